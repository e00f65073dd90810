"""Whatever a program does, it is contained, fails alone, and leaves nothing behind; a right one passes."""

import json
import socket
import sys
import tempfile
import time
from importlib import util
from pathlib import Path

import pytest

from benchmarks import EVALUATORS, get_evaluator, load_rows
from evaluation import code_runner
from evaluation.code_runner import Limits, run
from evaluation.generation import Completion, score
from evaluation.results import summarize

LIMITS = Limits(wall=3, cpu=1, memory_mb=256)
SOURCE = Path(code_runner.__file__)

BAD = {
    "fails": "assert 1 + 1 == 3",
    "loops": "while True: pass",
    "loops, deaf to signals": "import signal\nfor s in (24, 15): signal.signal(s, lambda *_: 0)\nwhile True: pass",
    "leaves the process group and loops": "import os\nos.setsid()\nwhile True: pass",
    "forks": "import os\nwhile True: os.fork()",
    "starts processes": "import subprocess, sys\nwhile True: subprocess.Popen([sys.executable, '-c', 'while 1: pass'])",
    "calls a shell": "import os\nassert os.system('true') == 0",
    "allocates without end": "x = []\nwhile True: x.append(bytearray(10**7))",
    "allocates at once": "x = 'x' * 10**11",
    "writes without end": "f = open('x', 'wb')\nwhile True: f.write(b'x' * 10**6)",
    "writes files without end": "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'w').write('x' * 10**6)",
    "prints gigabytes": "while True: print('x' * 10**6)",
    "prints errors": "import sys\nwhile True: sys.stderr.write('x' * 10**6)",
    "opens a socket": "import socket\nsocket.socket()",
    "connects": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')",
    "lists home": "import os\nos.listdir({home!r})",
    "reads home": "open({secret!r}).read()",
    "reads home by a link": "import os\nos.symlink({secret!r}, 'x')\nopen('x').read()",
    "reads home by a raw descriptor": "import os\nos.open({secret!r}, os.O_RDONLY)",
    "reads home by ..": "import os\nopen('../' * 20 + {secret!r}).read()",
    "reads the environment of its parent": "import os\nopen(f'/proc/{{os.getppid()}}/environ').read()",
    "writes home": "open({home!r} + '/new', 'w')",
    "deletes": "import os\nos.remove({secret!r})",
    "deletes a tree": "import shutil\nshutil.rmtree({home!r}, ignore_errors=False)",
    "opens a folder of the library": "import os\nos.open(os.path.dirname(os.__file__), os.O_RDONLY)",
    "renames": "import os\nos.rename({secret!r}, 'x')",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)",
    "kills its parent by a descriptor": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
    "kills all": "import os\nos.killpg(0, 9)",
    "calls C": "import ctypes\nctypes.CDLL(None).system(b'true')",
    "leaves early": "import os\nos._exit(0)",
    "leaves early, politely": "import sys\nsys.exit(0)",
    "says it passed": """import os
for i in range(3, 40):
    try: os.write(i, b'{{"token": "", "passed": true, "reason": "", "fence": []}}\\n')
    except OSError: pass
os._exit(0)""",
    "floods the pipe": "import os\nfor i in range(3, 40):\n    try:\n        while 1: os.write(i, b'x' * 999)\n"
    "    except OSError: pass",
    "closes the pipe": "import os\nos.closerange(0, 99)",
    "crashes": "import sys\nsys.setrecursionlimit(10**8)\nf = lambda: f()\nf()",
    "has a strange error": "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
    "is no Python": "def f(:",
    "is nested": "(" * 100_000,
    "holds half a character": "x = '\ud800'",
    "holds a zero": "x = 1\0",
    "raises limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
}
GOOD = {
    "nothing": "",
    "libraries": "import bz2, collections, dataclasses, datetime, decimal, hashlib, itertools, json, lzma\n"
    "import math, random, re, statistics, typing\nassert hashlib.sha256(b'').hexdigest()[:4] == 'e3b0'",
    "dataclass": "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 3\nassert A().x == 3",
    "its own files": "import os, tempfile\nopen('a', 'w').write('b')\nassert open('a').read() == 'b'\n"
    "assert os.listdir() == ['a']\nassert os.path.expanduser('~') == os.getcwd() == tempfile.gettempdir()",
    "removes its own tree": "import os, shutil\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\nshutil.rmtree('a')\n"
    "assert os.listdir() == []",
    "main is not run": "if __name__ == '__main__':\n    raise SystemExit",
    "input is empty": "import sys\nassert sys.stdin.read() == ''",
}


@pytest.fixture
def secret(tmp_path, monkeypatch) -> Path:
    """A file in a home folder that is not to be touched; temporary folders are made beside it, and nowhere else."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    path = tmp_path / "home" / "secret"
    path.parent.mkdir()
    path.write_text("the secret")
    return path


def fill(program: str, secret: Path, port: int) -> str:
    return program.format(home=str(secret.parent), secret=str(secret), port=port) if "{" in program else program


def assert_contained(runner, program: str, secret: Path, limits: Limits) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        start = time.monotonic()
        outcome = runner([fill(program, secret, listener.getsockname()[1])], limits)
        assert not outcome.passed and outcome.reason and "\n" not in outcome.reason and len(outcome.reason) <= 300
        assert time.monotonic() - start < limits.wall + 6
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert secret.read_text() == "the secret" and len(list(secret.parent.iterdir())) == 1
    assert not list(Path(tempfile.gettempdir()).iterdir())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_program_is_contained(name, secret):
    assert_contained(run, BAD[name], secret, LIMITS)
    assert run(["x = 1"], LIMITS).passed


@pytest.mark.parametrize("name", GOOD)
def test_a_good_program_passes(name):
    outcome = run([GOOD[name]], LIMITS)
    assert outcome.passed and outcome.reason == "", outcome


def test_a_program_that_waits_is_ended_by_the_clock(secret):
    start = time.monotonic()
    outcome = run(["import time\ntime.sleep(60)"], LIMITS._replace(wall=1))
    assert outcome == (False, "not done after 1 s", []) and time.monotonic() - start < 5


# without what the machine's kernel gives, limits and the audit hook are left; those that use up their time are not
# tried again, and one is the kernel's alone
NOT_AGAIN = ("loops", "prints", "crashes", "kills its parent by a descriptor")


@pytest.mark.parametrize("name", [name for name in BAD if not any(word in name for word in NOT_AGAIN)])
def test_the_hook_alone_contains_it_too(name, secret, tmp_path):
    text = SOURCE.read_text(encoding="utf-8")
    assert text.count('sys.platform == "linux"') == 1
    (tmp_path / "bare.py").write_text(text.replace('sys.platform == "linux"', "False"), encoding="utf-8")
    spec = util.spec_from_file_location("bare", tmp_path / "bare.py")
    bare = util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    good = bare.run(["x = 1"], LIMITS)
    assert good.passed and good.fence == []
    assert_contained(bare.run, BAD[name], secret, LIMITS)


@pytest.mark.skipif(sys.platform != "linux", reason="what Linux adds")
def test_the_kernel_contains_what_gets_around_the_hook(secret, tmp_path):
    fence = run(["x = 1"], LIMITS).fence
    if set(fence) != {"namespaces", "landlock"}:
        pytest.skip(f"this machine has {fence} only")
    text = SOURCE.read_text(encoding="utf-8")
    assert text.count("            sys.addaudithook(") == 1
    (tmp_path / "unhooked.py").write_text(
        text.replace("            sys.addaudithook(", "            ("), encoding="utf-8"
    )
    spec = util.spec_from_file_location("unhooked", tmp_path / "unhooked.py")
    unhooked = util.module_from_spec(spec)
    spec.loader.exec_module(unhooked)
    assert unhooked.run(["import socket\nsocket.socket()"], LIMITS).passed  # so the hook is off
    for name in (
        "connects", "lists home", "reads home", "writes home", "deletes", "deletes a tree", "renames",
        "kills its parent by a descriptor", "reads the environment of its parent",
    ):  # fmt: skip
        assert_contained(unhooked.run, BAD[name], secret, LIMITS)
    for name in ("kills its parent", "kills all"):  # reaches nobody: we are here
        unhooked.run([BAD[name]], LIMITS)
    assert not unhooked.run(
        ["import os\nassert os.fork() == 0 or os.wait()\nos.execv('/bin/ls', ['ls'])"], LIMITS
    ).passed
    forks = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert_contained(unhooked.run, forks, secret, LIMITS._replace(wall=1))


def test_no_key_is_in_its_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert run(
        ["import os\nassert sorted(os.environ) == ['HOME', 'LANG', 'PATH', 'TMPDIR'], os.environ"], LIMITS
    ).passed


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
def test_a_solution_passes_in_the_forms_that_models_give(prediction, passes, monkeypatch):
    monkeypatch.setattr(code_runner.run, "__defaults__", (LIMITS,))
    assert EVALUATORS["code"].metrics(prediction, [""], ROW) == {"pass@1": 100.0 * passes}


def test_a_prompt_in_words_works_too():
    row = {**ROW, "prompt": "Write a function add(a, b) in Python."}
    assert EVALUATORS["code"].metrics("```python\ndef add(a, b):\n    return a + b\n```", [""], row)["pass@1"] == 100
    assert EVALUATORS["code"].metrics("    return a + b", [""], row)["pass@1"] == 0


def test_a_sample_that_is_contained_scores_0_and_the_rest_goes_on(monkeypatch):
    monkeypatch.setattr(code_runner.run, "__defaults__", (LIMITS,))
    row = {**ROW, "raw_answers": [""]}
    answers = [
        "    return a + b",
        "    import os; os.kill(os.getppid(), 9)",
        "    while True: pass",
        "    return a + b",
    ]
    results = [score(row, Completion(text, 1, False), EVALUATORS["code"]) for text in answers]
    assert [result["score"] for result in results] == [1, 0, 0, 1] and summarize(results)["mean"] == 50


def test_programs_are_run_only_when_allowed(tmp_path):
    path = tmp_path / "humaneval.jsonl"
    path.write_text(json.dumps(ROW))
    rows = load_rows(str(path))
    assert rows[0]["raw_answers"] == [ROW["canonical_solution"]]
    for name, asked in (("humaneval", None), ("mine", "code")):
        with pytest.raises(ValueError, match=r"--allow_code_execution") as error:
            get_evaluator(name, asked, rows)
        assert str(error.value).count(". ") == 0
        assert get_evaluator(name, asked, rows, True) is EVALUATORS["code"]
    with pytest.raises(ValueError, match="--allow_code_execution"):
        get_evaluator("mine", None, [{**rows[0], "evaluator": "code"}])
    with pytest.raises(ValueError, match='needs "test"'):
        get_evaluator("humaneval", None, [{"prompt": "q", "raw_answers": ["a"]}], True)
