"""A program that a model wrote is held to each limit, fails alone, and leaves nothing behind. A right one passes."""

import json
import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks import EVALUATORS, CodeEvaluator, get_evaluator, load_rows
from evaluation.code_runner import Limits, isolated, run
from evaluation.generation import Completion, score
from evaluation.results import summarize

LIMITS = Limits(wall=300, cpu=1, memory_mb=256)  # only what waits meets the clock
ENDED = "ended before its last line, or was ended by a limit"

BAD = {
    "fails": ("assert 1 + 1 == 3", "AssertionError"),
    "uses too much CPU time": ("while True: pass", ENDED),
    "allocates without end": ("x = []\nwhile True: x.append(bytearray(10**7))", "MemoryError"),
    "allocates at once": ("x = 'x' * 10**11", "MemoryError"),
    "writes without end": ("f = open('x', 'wb')\nwhile True: f.write(b'x' * 10**6)", "OSError: [Errno 27]"),
    "prints without end": ("while True: print('x' * 10**6)", ENDED),
    "leaves early": ("import os\nos._exit(0)", ENDED),
    "leaves early, politely": ("import sys\nsys.exit(0)", "SystemExit: 0"),
    "claims success": (
        "import os\nfor i in range(3, 40):\n    try: os.write(i, b'x')\n    except OSError: pass",
        ENDED,
    ),
    "crashes": ("import sys\nsys.setrecursionlimit(10**8)\nf = lambda: f()\nf()", ENDED),
    "has a strange error": ("class E(Exception):\n    def __str__(self): raise SystemExit\nraise E", "E:"),
    "is not Python": ("def f(:", "SyntaxError"),
    "is nested": ("(" * 100_000, "SyntaxError"),
    "holds half a character": ("x = '\ud800'", "UnicodeEncodeError"),
    "holds a zero": ("x = 1\0", "SyntaxError"),
}
GOOD = {
    "nothing": "",
    "libraries": "import bz2, collections, dataclasses, datetime, decimal, hashlib, itertools, json, lzma\n"
    "import math, random, re, statistics, typing\nassert hashlib.sha256(b'').hexdigest()[:4] == 'e3b0'",
    "dataclass": "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 3\nassert A().x == 3",
    "its own files": "import os, tempfile\nopen('a', 'w').write('b')\nassert open('a').read() == 'b'\n"
    "assert os.listdir() == ['a']\nassert os.path.expanduser('~') == os.getcwd() == tempfile.gettempdir()",
    "main is not run": "if __name__ == '__main__':\n    raise SystemExit",
    "input is empty": "import sys\nassert sys.stdin.read() == ''",
    "no key": "import os\nassert sorted(os.environ) == ['HOME', 'LANG', 'PATH', 'TMPDIR'], os.environ",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The place of temporary folders, which must be empty at the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    yield tmp_path
    assert not list(tmp_path.glob("code.*"))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_program_fails_at_its_limit(name):
    program, reason = BAD[name]
    why = run([program], LIMITS)
    said = "MemoryError" if name == "is nested" and "MemoryError" in why else reason
    assert why.startswith(said) and len(why) <= 300


@pytest.mark.parametrize("name", GOOD)
def test_a_good_program_passes(name):
    assert run([GOOD[name]], LIMITS) == ""


def test_the_first_program_that_is_valid_is_run():
    assert run(["def f(:", "x = 1", "raise ValueError"], LIMITS) == ""
    assert run(["raise ValueError('no  good')", "x = 1"], LIMITS) == "ValueError: no good"


def test_a_program_that_waits_is_ended_by_the_clock():
    assert run(["import time\ntime.sleep(10**6)"], LIMITS._replace(wall=1)) == "not done after 1 s"


@pytest.mark.skipif(os.geteuid() == 0, reason="the number of processes of root is not limited")
def test_a_program_starts_no_process():
    assert run(["import os\nos.fork()"], LIMITS).startswith("BlockingIOError")


@pytest.mark.skipif(not isolated(), reason="this machine does not allow unshare")
def test_a_program_has_no_network():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {listener.getsockname()[1]}))"
        assert run([connect], LIMITS).startswith("OSError")


@pytest.mark.skipif(not isolated(), reason="this machine does not allow unshare")
def test_what_a_program_started_ends_with_it(tmp_path):
    log = tmp_path / "log"
    program = (
        f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True: open({str(log)!r}, 'a').write('x')\n"
    )
    program += f"while not os.path.exists({str(log)!r}): time.sleep(0.01)"
    limits = LIMITS._replace(cpu=60, file_mb=100)
    if not run([program], limits):  # else the machine allows no fork
        size = log.stat().st_size
        time.sleep(0.5)
        assert log.stat().st_size == size


def test_no_limit_gets_in_the_way_of_another_program():
    assert [run([program], LIMITS) for program in ("while True: pass", "x = 1")] == [ENDED, ""]
    assert run(["x = 1"]) == ""


# ------------------------------------------------------------------------------------------------ the evaluator

ROW = {
    "prompt": 'import math\n\ndef add(a, b):\n    """The sum of a and b."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
    "canonical_solution": "    return a + b\n",
}


@pytest.mark.parametrize(
    ("prediction", "passes"),
    [
        ("    return a + b", True),
        ("return a + b", True),  # an indent lost between prompt and answer
        ("    c = a + b\n    return c\n\n\ndef other():\n    return (", True),  # cut where the next begins
        ("c = a + b\nreturn c", True),
        ("def add(a, b):\n    return int(math.fsum([a, b]))", True),  # with the prompt's import
        ("Sure:\n```python\ndef add(x, y):\n    return x + y\n```\nIt adds.", True),
        ("```py\nimport os\n```\nand\n```\ndef helper(x): return x\ndef add(x, y):\n    return helper(x) + y\n", True),
        ("    return a - b", False),
        ("", False),
        ("I do not know.", False),
        ("    return (", False),
        ("```python\n", False),
        ("    exit()", False),
        ("    return a + b\n\nimport os; os._exit(0)", False),
        ("    while True: pass", False),
        ("\ud800", False),
    ],
)
def test_a_solution_passes_in_the_forms_that_models_give(prediction, passes):
    assert CodeEvaluator(LIMITS).metrics(prediction, [""], ROW) == {"pass@1": 100.0 * passes}


def test_a_prompt_in_words_works_too():
    row, evaluator = {**ROW, "prompt": "Write a function add(a, b) in Python."}, CodeEvaluator(LIMITS)
    assert evaluator.metrics("```python\ndef add(a, b):\n    return a + b\n```", [""], row)["pass@1"] == 100
    assert evaluator.metrics("    return a + b", [""], row)["pass@1"] == 0


def test_a_sample_that_is_ended_scores_0_and_the_rest_goes_on():
    row = {**ROW, "raw_answers": [""]}
    answers = ["    return a + b", "    import os; os._exit(0)", "    while True: pass", "    return a + b"]
    results = [score(row, Completion(text, 1, False), CodeEvaluator(LIMITS)) for text in answers]
    assert [result["score"] for result in results] == [1, 0, 0, 1] and summarize(results)["mean"] == 50


def test_programs_are_run_only_when_allowed(tmp_path):
    path = tmp_path / "humaneval.jsonl"
    path.write_text(json.dumps(ROW))
    rows = load_rows(str(path))
    assert rows[0]["raw_answers"] == [ROW["canonical_solution"]]
    for name, asked in (("humaneval", None), ("mine", "code")):
        with pytest.raises(ValueError, match=r"--allow_code_execution"):
            get_evaluator(name, asked, rows)
        assert get_evaluator(name, asked, rows, True) is EVALUATORS["code"]
    with pytest.raises(ValueError, match="--allow_code_execution"):
        get_evaluator("mine", None, [{**rows[0], "evaluator": "code"}])
    with pytest.raises(ValueError, match='lacks "test"'):
        get_evaluator("humaneval", None, [{"prompt": "q", "raw_answers": ["a"]}], True)
