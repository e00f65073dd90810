"""Odd inputs for every command: a folder of good inputs, ways to break one of them, and a process for each try.

world(folder)                      the good inputs: a model, data, scores, a run, a merge, keys in YAML
break_one(rng, folder, command)    break a copy of it -> (what was done, the words of the command)
outcome(command, argv, folder)     run the command there -> what is wrong with how it ended, or None
"""

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
from pathlib import Path

from safetensors import safe_open

from deepseek.files import write_json, write_jsonl
from tests.helpers import make_model
from utils import run_cli

TIMEOUT = int(os.environ.get("FZT", 120))  # seconds, for a command that takes less than two
MEMORY = 24 * 2**30  # bytes of address space: an absurd size must not take the machine down
KEYS = """seq_length: 48
max_steps: 2
batch_size: 2
learning_rate: 1e-3
validation_fraction: 0.2
save_steps: 1
save_opt_states: true
disable_tqdm: true
device: cpu
"""
BASE, DATA = "--base_model_path=model", "--train_dataset=data.jsonl"
CPU = "--device=cpu"
TRAIN = [BASE, DATA, "--expert_config=experts.json", "--train_config=keys.yaml"]
SAMPLE = [BASE, "--n_sample_tokens=64", "--seq_length=48", CPU]
ANSWER = ["--max_new_tokens=2", CPU]
COMMANDS = {  # name: (module, the words of a command that works in the world)
    "train": ("train", [*TRAIN, "--output_dir=out"]),
    "train_ep": ("train_ep", [*TRAIN, "--output_dir=out"]),
    "dpo": ("train", [BASE, "--train_dataset=pairs.jsonl", "--method=dpo", *TRAIN[2:], "--output_dir=out"]),
    "resume": ("train", [*TRAIN, "--output_dir=run", "max_steps=3"]),
    "eval": (
        "eval_multigpu",
        [BASE, "--adapter_dir=run", "--eval_dataset=eval.jsonl", "--output_path=o.jsonl", *ANSWER],
    ),
    "eval_run": ("eval_multigpu", ["--model=run", *ANSWER]),
    "score": ("scripts.expert.get_expert_scores", ["--eval_dataset=data.jsonl", "--output_dir=out", *SAMPLE]),
    "select": ("scripts.expert.generate_expert_config", [BASE, "--expert_scores_dir=scores", "--output_path=o.json"]),
    "stability": ("scripts.expert.compare_scores", ["--expert_scores_dir=scores", "--n_bootstrap=9"]),
    "overlap": (
        "scripts.expert.compare_scores",
        ["--expert_scores_dir", "scores", "experts.json", "--output_path=o.png"],
    ),
    "plot": (
        "scripts.expert.plot_expert_scores",
        ["--expert_scores_dir=scores", "--expert_config=experts.json", "--output_path=o.png"],
    ),
    "preview": (
        "scripts.expert.preview_config",
        [BASE, "--expert_scores_dir=scores", "--top_p", "0.2", "--seq_length=32", "--device=cpu"],
    ),
    "drift": (
        "scripts.expert.routing_drift",
        [*SAMPLE, "--adapter_dir=run", "--eval_dataset=data.jsonl", "--output_dir=out"],
    ),
    "info": ("scripts.adapter_info", ["run", "merged/replaced", BASE]),
    "estimate": (
        "scripts.estimate_memory",
        [BASE, "--expert_config=experts.json", "--seq_length=32", "--gpu_gb=80", CPU],
    ),
    "merge": ("scripts.merge_adapter", [BASE, "--adapter_dir", "run", "--output_dir=out"]),
    "unmerge": ("scripts.merge_adapter", ["--base_model_path=merged", "--unmerge", "--output_dir=out"]),
    "pipeline": (
        "scripts.pipeline",
        [BASE, DATA, "--eval_dataset=eval.jsonl", "--train_config=keys.yaml", "--output_dir=out", "learning_rate=1e-3"],
    ),
    "gguf": ("scripts.check_gguf", [BASE]),
    "push": ("scripts.push_adapter", ["--adapter_dir=run", "--repo_id=you/law", "--dry_run"]),
    "push_weights": (
        "scripts.push_weights",
        ["--url=http://127.0.0.1:9", BASE, "--adapter_dir", "run", "--output_dir=out", "--dry_run"],
    ),
    "report": ("scripts.report", ["run", "--output=o.html"]),
    "teacher": (
        "scripts.teacher_logits",
        ["--model=model", "--dataset=data.jsonl", "--output_dir=out", "--top_k=4", CPU],
    ),
    "show_data": ("scripts.show_data", ["data.jsonl", BASE, "--seq_length=48"]),
}
WRITTEN = (
    "run.json",
    "expert_cfg.json",
    "summary.json",
    "manifest.json",
    "trainer_state.json",
    "merged_from.json",
    "o.json",
)
LONG = ("max_steps", "steps", "epochs", "num_train_epochs", "n_bootstrap", "n_samples", "ddp_timeout")  # huge is legal
ODD = [
    *(None, True, False, 0, -1, 1, 7, 0.5, -0.5, 1e308, 1e-320, math.nan, math.inf, -math.inf),
    *(2**31, 2**63, 10**23, -(10**23), "", " ", "x", "0", "-1", "1e400", "nan", "null", ",", "../x", "/dev/null"),
    *("\0", "\ud800", "é ", "a" * 9999, "<eos>", [], {}, [[]], [None], [{}], {"": 0}, {"a": {"b": [1]}}, [1, "x"]),
]
PATHS = ["nowhere", "", ",", ".", "/", "/dev/null", "/dev/zero", "a\nb", "pipe.jsonl", "loop", "link", "folder.json"]
TEXTS = ["", " ", "{", "[]", "null", "3", '"x"', "[" * 99_999, '{"a":' * 99_999, "9" * 9999, "\0" * 64, "a: " * 2000]
TEXTS += ["{a: " * 2000, "a: 1\na: 2\n", "a: &a [*a]\n", "- a\n", "!!python/object:os.x {}", '{"a": 1, "a": 2}', "NaN"]
BYTES = [b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"\x80" * 99, b"PK\x03\x04", bytes(range(256)), b"\xff" * 8 + b"{}"]
TEMPLATES = ["{{ 1 / 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages[9].content }}", "{% if %}"]
TEMPLATES += ["{{ raise_exception('no') }}", "{{ range(9**9) }}", "{{ 'a' * -1 }}", "", "{{ messages }}", "{{ x.y.z }}"]
TEMPLATES += ["{{ 9 ** 9999 }}", "{{ '' | int(base='x') }}", "{{ messages[0].content.index('~') }}", "{{ " + "(" * 999]


# --------------------------------------------------------------------------------------------------------------------
# good inputs


def world(folder: Path, tokenizer) -> Path:
    """Write good inputs for every command to a folder, with the commands themselves."""
    make_model().save_pretrained(folder / "model", max_shard_size="150KB")
    tokenizer.save_pretrained(folder / "model")
    turns = [[("user", f"is it {i}?"), ("assistant", "yes " * (1 + i % 3))] for i in range(6)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in pair]} for pair in turns]
    write_jsonl(folder / "data.jsonl", rows)
    write_jsonl(folder / "pairs.jsonl", [{"prompt": text, "chosen": "yes", "rejected": "no"} for (_, text), _ in turns])
    write_jsonl(folder / "eval.jsonl", [{"prompt": f"is it {i}?", "answers": ["yes"]} for i in range(2)])
    write_json(folder / "experts.json", {"experts": {"1": [3, 5], "2": [0]}})
    (folder / "keys.yaml").write_text(KEYS)
    run = [*TRAIN, "--output_dir=run"]
    score = [*COMMANDS["score"][1][2:], "--eval_dataset=data.jsonl", "--output_dir=scores"]
    merge = [BASE, "--adapter_dir", "run", "--output_dir=merged"]
    for name, argv in (("train", run), ("score", score), ("merge", merge), ("eval_run", COMMANDS["eval_run"][1])):
        code, told = call(name, argv, folder)
        assert code == 0, told
    return folder


# --------------------------------------------------------------------------------------------------------------------
# odd inputs


def copy_world(good: Path, folder: Path) -> None:
    """Copy the good inputs. A run knows its base and its data by their paths."""
    shutil.copytree(good, folder)
    path = folder / "run" / "run.json"
    path.write_text(path.read_text().replace(str(good), str(folder)))


def break_one(rng: random.Random, folder: Path, name: str) -> tuple[str, list[str]]:
    """Break one of the inputs in `folder`, or one word of the command. Return what was done, and the words."""
    argv = list(COMMANDS[name][1])
    named = [folder / (word.partition("=")[2] if word.startswith("--") else word) for word in argv]
    files = sorted({file for path in named if path != folder for file in _files(path)})
    kind = rng.choice(["file", "file", "file", "path", "word", "word"])
    if kind == "word" or not files:
        return _break_words(rng, folder, name, argv)
    if kind == "path":
        path = rng.choice(
            [
                *files,
                *(path for path in named if path != folder and (path.exists() or path.suffix or path.name == "out")),
            ]
        )
        return f"{_replace_path(rng, path)} at {path.relative_to(folder)}", argv
    file = rng.choice(files)
    return f"{_break_file(rng, file)} in {file.relative_to(folder)}", argv


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path] if path.is_file() else []


def _replace_path(rng: random.Random, path: Path) -> str:
    """Put something else in the place of a file, a folder, or an output."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    kinds = {
        "nothing": lambda: None,
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a link to nothing": lambda: path.symlink_to("nothing"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link to its folder": lambda: path.symlink_to("."),
        "an empty file": path.touch,
        "a device": lambda: path.symlink_to("/dev/zero"),
    }
    kind = rng.choice(sorted(kinds))
    kinds[kind]()
    return kind


def _break_words(rng: random.Random, folder: Path, name: str, argv: list[str]) -> tuple[str, list[str]]:
    """Change a value of the command, or add a flag of its help."""
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "loop").symlink_to("loop")
    (folder / "link").symlink_to("nothing")
    (folder / "folder.json").mkdir()
    values = [*map(str, ODD), *PATHS, "9" * 9999, "{a: " * 999, "[" * 9999]
    value = rng.choice([text for text in values if "\0" not in text and text.isprintable()])
    at, flags = rng.randrange(len(argv)), known_flags(COMMANDS[name][0])
    what = rng.choice(["value", "flag", "flag", "drop", "twice", "unknown"])
    if what == "drop":
        return f"without {argv.pop(at)}", argv
    if what == "twice":
        return f"{argv[at]} twice", [*argv, argv[at]]
    if what == "unknown":
        return "an unknown flag", [*argv, f"--{value}", f"{value}={value}"]
    flag = rng.choice(flags)
    if what == "value" and argv[at].startswith("--"):
        flag = argv[at].partition("=")[0]
        del argv[at]
    if flag.lstrip("-") in LONG and len(value) > 4:
        value = "-1"
    return f"{flag}={value:.40}", [*argv, f"{flag}={value}"]


_flags: dict[str, list[str]] = {}


def known_flags(module: str) -> list[str]:
    """Return the flags that a command's help names."""
    if module not in _flags:
        text = Path(importlib.import_module(module).__file__).read_text()
        if module.startswith("train"):
            from training.config import ALIASES, RunConfig, TrainingArguments

            names = {*RunConfig.__dataclass_fields__, *TrainingArguments.__dataclass_fields__, *ALIASES} - {"training"}
        elif module == "eval_multigpu":
            from evaluation.config import EvalConfig

            names = set(EvalConfig.__dataclass_fields__)
        else:
            names = set(re.findall(r'add(?:_argument)?\(\s*"--(\w+)"', text)) | {"seed"}
        _flags[module] = [f"--{name}" for name in sorted(names)]
    return _flags[module]


def _break_file(rng: random.Random, path: Path) -> str:
    """Change the content of a file: as what it is, or as bytes."""
    raw = path.read_bytes()
    if path.suffix == ".jinja" and rng.random() < 0.8:
        text = rng.choice(TEMPLATES)
        path.write_text(text)
        return f"the template {text[:30]!r}"
    ways = {"text": lambda: rng.choice(TEXTS).encode(), "bytes": lambda: rng.choice(BYTES)}
    ways |= {"cut": lambda: raw[: rng.randrange(len(raw) + 1)], "flipped": lambda: _flipped(rng, raw)}
    structured = {".json": _odd_json, ".jsonl": _odd_jsonl, ".yaml": _odd_yaml, ".safetensors": _odd_tensors}
    if path.suffix in structured and rng.random() < 0.7:
        what, content = structured[path.suffix](rng, raw)
    else:
        what = rng.choice(sorted(ways))
        content = ways[what]()
    path.write_bytes(content)
    return what


def _flipped(rng: random.Random, raw: bytes) -> bytes:
    content = bytearray(raw or b"x")
    for _ in range(rng.choice([1, 1, 20])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def _encoded(value: object) -> bytes:
    return json.dumps(value).encode()


def _odd_value(rng: random.Random, value: object) -> tuple[str, object]:
    """Return a JSON value in which one part is another."""
    place, parts = "", value
    while isinstance(parts, (dict, list)) and parts and rng.random() < 0.8:
        key = rng.choice(sorted(parts)) if isinstance(parts, dict) else rng.randrange(len(parts))
        above, place, parts = parts, f"{place}.{key}", parts[key]
    odd = rng.choice(ODD)
    if not place:
        return f"{odd!r:.30}", odd
    if rng.random() < 0.2:
        del above[key]
        return f"no {place}", value
    above[key] = odd
    return f"{place}={odd!r:.30}", value


def _odd_json(rng: random.Random, raw: bytes) -> tuple[str, bytes]:
    what, value = _odd_value(rng, json.loads(raw))
    return what, _encoded(value)


def _odd_jsonl(rng: random.Random, raw: bytes) -> tuple[str, bytes]:
    lines = raw.splitlines()
    at = rng.randrange(len(lines))
    if rng.random() < 0.3:
        lines[at] = rng.choice([*(text.encode() for text in TEXTS), *BYTES])
        return f"line {at + 1}: {lines[at][:20]!r}", b"\n".join(lines)
    what, lines[at] = _odd_json(rng, lines[at])
    return f"line {at + 1}: {what}", b"\n".join(lines)


def _odd_yaml(rng: random.Random, raw: bytes) -> tuple[str, bytes]:
    flag = rng.choice(known_flags("train")).lstrip("-")
    values = [*map(str, ODD), ".nan", ".inf", "[1, [2]]", "{a: b}", "2026-01-01", "&a [1]", "*b", "!!set {a}", "|\n x"]
    value = rng.choice([text for text in values if text.isprintable() or "\n" in text])
    if flag in LONG and len(value) > 4:
        value = "-1"
    return f"{flag}: {value:.30}", raw + f"{flag}: {value}\n".encode(errors="surrogatepass")


def _odd_tensors(rng: random.Random, raw: bytes) -> tuple[str, bytes]:
    """Change a tensor's entry in the header, the size of the header, or some numbers."""
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    way = rng.choice(["header", "header", "nan", "huge", "name"])
    if way == "nan":
        at = rng.randrange(max(len(data) // 4, 1)) * 4
        return "NaN", raw[: 8 + size] + data[:at] + b"\x00\x00\xc0\x7f" + data[at + 4 :]
    if way == "huge":
        return "a header of a huge size", rng.choice([2**31, 2**63, 2**64 - 1, 0]).to_bytes(8, "little") + raw[8:]
    if way == "name":
        names = sorted(key for key in header if key != "__metadata__")
        header[rng.choice(["x", names[-1]])] = header.pop(names[0])
        what = f"another name for {names[0]}"
    else:
        what, header = _odd_value(rng, header)
    text = _encoded(header)
    return what, len(text).to_bytes(8, "little") + text + data


# --------------------------------------------------------------------------------------------------------------------
# the commands


def outcome(name: str, argv: list[str], folder: Path) -> str | None:
    """Run a command in `folder`. Return what is wrong with its end, or None."""
    before = _listing(folder)
    code, told = call(name, argv, folder)
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    if code is None:
        return "it hangs"
    if code not in (0, 2):
        return f"exit code {code}: {told[-2500:]}"
    if "Traceback" in told:
        return f"a traceback: {told[-2500:]}"
    if len(errors) == 1 and not re.search(r"cannot |:\d+: |--help| has an effect only", errors[0]):
        return f"the sentence does not say what cannot be done: {errors[0]}"
    if len(errors) != (code == 2) or (errors and len(errors[0]) < 25):
        return f"exit code {code} with {len(errors)} sentences: {told[-1500:]}"
    after = _listing(folder)
    if code == 2 and "cannot take step" not in errors[0] and (changed := _changed(before, after)):
        return f"it was refused, and {changed} changed: {errors[0]}"
    return _half_written(folder, after.keys() - before.keys())


def _listing(folder: Path) -> dict[str, tuple]:
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path.relative_to(folder))] = None if path.is_dir() else (status.st_size, status.st_mtime_ns)
    return found


def _changed(before: dict, after: dict) -> list[str]:
    same = ("run/held_out.jsonl",)  # made of the run, whole, and the same at every try
    return sorted(key for key in before | after if before.get(key, ...) != after.get(key, ...) and key not in same)


def _half_written(folder: Path, names: set[str]) -> str | None:
    for name in sorted(names):
        path = folder / name
        if path.name.startswith("."):
            return f"{name} is left"
        if not path.is_file():
            continue
        if path.name in WRITTEN:
            json.loads(path.read_text())
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
    return None


def call(name: str, argv: list[str], folder: Path) -> tuple[int | None, str]:
    """Return (exit code, what was printed) of a command in a process of its own. The code of one that hangs is None."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fuzz_inputs", *(module for module, _ in COMMANDS.values())])
    log = folder.with_name(f"{folder.name}.log")
    process = context.Process(target=_command, args=(COMMANDS[name][0], argv, str(folder), str(log)))
    process.start()
    process.join(TIMEOUT)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code, log.read_text(errors="replace")


def _command(module: str, argv: list[str], folder: str, log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, errors="replace") for number in (1, 2))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.argv = [module, *argv]
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(folder).parent / "cache"
    command = importlib.import_module(module)
    for stage in ("training.first_selection", "scripts.stages"):  # other commands, which are tried themselves
        importlib.import_module(stage).run_command = _not_run
    run_cli(lambda: command.main(argv))
    with contextlib.suppress(OSError):
        sys.stdout.flush()


def _not_run(words, **_):
    raise ChildProcessError(f"cannot run {words[0]}: cannot take step 0 of a command that is tried itself")
