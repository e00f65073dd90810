"""The guides are true: what they name exists, their line numbers point at definitions, their examples run.

python tests/test_docs.py       # write the line numbers anew, after code has moved
"""

import ast
import importlib.util
import json
import math
import re
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = re.compile(r"`([\w/]+\.py):(\d+) \(([\w.]+)\)`")  # `esft.py:12 (to_esft)`
QUOTE = re.compile(r"^ *```python ([\w/]+\.py)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)  # lines of that file
EXAMPLES = ROOT / "docs" / "examples"
TINY = str(ROOT / "results" / "models" / "tiny")
LAW = str(ROOT / "datasets" / "train" / "law.jsonl")


def definitions(source: str) -> dict[str, int]:
    """The line of every function and class in Python source, by name; a method is Class.method."""
    found: dict[str, int] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found.setdefault(f"{prefix}{child.name}", child.lineno)
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(source), "")
    return found


def references(page: Path) -> list[tuple[str, int, str]]:
    return [(path, int(line), name) for path, line, name in REFERENCE.findall(page.read_text(encoding="utf-8"))]


def line_of(path: str, name: str) -> int | None:
    file = ROOT / path
    return definitions(file.read_text(encoding="utf-8")).get(name) if file.is_file() else None


def rewrite_line_numbers() -> None:
    """Put the present line into every reference. A name that is gone keeps its number, and the test fails."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fresh = REFERENCE.sub(lambda m: f"`{m[1]}:{line_of(m[1], m[3]) or m[2]} ({m[3]})`", text)
        if fresh != text:
            page.write_text(fresh, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: line numbers written")


def test_every_promise_has_a_test_that_is_there():
    page = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    rows = [row for row in page.splitlines() if row.startswith("| ") and not row.endswith("| test |")]
    assert len(rows) > 40
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row.rpartition(" | ")[2])
        assert named, row
        assert not [f"{path}::{name}" for path, name in named if line_of(f"tests/{path}", name) is None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_reference_points_at_the_definition(page):
    wrong = [f"{path}:{line} ({name})" for path, line, name in references(page) if line_of(path, name) != line]
    assert not wrong, f"{page.name}: {wrong}; run `python tests/test_docs.py`"


def is_quoted_from(quote: str, source: str) -> bool:
    """Whether the lines of `quote` stand in `source` one after the other, at any indentation."""
    wanted, lines = textwrap.dedent(quote).strip().splitlines(), source.splitlines()
    windows = (lines[start : start + len(wanted)] for start in range(len(lines)))
    return any(textwrap.dedent("\n".join(window)).splitlines() == wanted for window in windows)


def test_the_four_guides_show_code():
    for name in ("architecture", "peft-methods", "memory-optimization", "training-pipeline"):
        page = ROOT / "docs" / f"{name}.md"
        assert len(references(page)) >= 3 and QUOTE.search(page.read_text(encoding="utf-8")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_quote_is_what_the_file_says(page):
    for path, quote in QUOTE.findall(page.read_text(encoding="utf-8")):
        assert is_quoted_from(quote, (ROOT / path).read_text(encoding="utf-8")), f"{page.name} quotes {path}:\n{quote}"


def test_a_wrong_quote_is_noticed():
    source = "def f():\n    a = 1\n    b = 2\n"
    assert is_quoted_from("a = 1\nb = 2\n", source) and not is_quoted_from("a = 1\nb = 3\n", source)


def test_definitions_know_methods_and_lines():
    source = "x = 1\n\n@cache\ndef f(): ...\n\nclass A:\n    def g(self): ...\n"
    assert definitions(source) == {"f": 4, "A": 6, "A.g": 7}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout")
    yours = {"utils.py", "train.py"}
    for name in set(re.findall(r"`([\w./-]+\.(?:py|sh|slurm|yaml|md))(?::\d+[^`]*)?`", text)) - yours:
        assert any(path == name or path.endswith(f"/{name}") for path in tracked), f"{page.name} names {name}"


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_use_the_library_only():
    ours = {path.stem for path in ROOT.glob("*.py")} | {"deepseek", "training", "evaluation", "scripts", "tests"}
    for path in EXAMPLES.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert "esft" in imported and not imported & (ours - {"esft"}), path.name


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("law")
    load_example("score_and_select").main(TINY, LAW, str(folder), num_samples=16)
    return str(folder / "experts.json")


def test_score_and_select_writes_scores_and_experts(experts):
    scores = json.loads((Path(experts).parent / "summary.json").read_text())
    config = json.loads(Path(experts).read_text())
    for layer, ids in config["experts"].items():
        row = scores["token_scores"][layer]
        assert sum(row[str(expert)] for expert in ids) >= 0.2 > sum(row[str(expert)] for expert in ids[:-1])


@pytest.mark.parametrize("name", ["train_with_a_plain_loop", "train_with_trainer"])
def test_training_examples_learn_and_save_the_selected_experts(name, experts, tmp_path):
    losses = load_example(name).main(TINY, LAW, experts, str(tmp_path), num_steps=20)
    assert losses[-1] < losses[0]
    config = json.loads(Path(experts).read_text())
    saved = json.loads((tmp_path / "expert_cfg.json").read_text())
    assert saved["experts"] == config["experts"]
    assert len(load_file(tmp_path / "adapter.safetensors")) == 3 * sum(map(len, config["experts"].values()))


def test_sft_with_trl_goes_on_where_it_was_broken_off(experts, tmp_path):
    pytest.importorskip("trl")
    sft = load_example("sft_with_trl").main
    whole = sft(TINY, LAW, experts, str(tmp_path / "whole"), num_steps=20)
    sft(TINY, LAW, experts, str(tmp_path / "out"), num_steps=10)  # with another schedule: the data go on
    resumed = sft(TINY, LAW, experts, str(tmp_path / "out"), num_steps=20)
    assert len(resumed) == len(whole) == 2 and whole[1] < whole[0] and resumed[1] < resumed[0]
    again = sft(TINY, LAW, experts, str(tmp_path / "out"), num_steps=20)
    assert again == resumed  # nothing is left to do
    assert len(load_file(tmp_path / "out" / "adapter.safetensors")) > 0


def test_dpo_with_trl_begins_at_the_base_and_learns_the_preference(experts, tmp_path):
    pytest.importorskip("trl")
    losses = load_example("dpo_with_trl").main(TINY, LAW, experts, str(tmp_path), num_steps=6)
    assert losses[0] == pytest.approx(math.log(2), abs=5e-3) and losses[-1] < 0.9 * losses[0]
    adapter = load_file(tmp_path / "adapter.safetensors")
    assert len(adapter) == 3 * sum(map(len, json.loads(Path(experts).read_text())["experts"].values()))


def test_merge_and_save_gives_a_plain_model_with_the_adapter_s_weights(experts, tmp_path):
    load_example("train_with_a_plain_loop").main(TINY, LAW, experts, str(tmp_path / "adapter"), num_steps=2)
    load_example("merge_and_save").main(TINY, str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32").state_dict()
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32").state_dict()
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, merged[name])}
    assert changed and all(".experts." in name for name in changed)


if __name__ == "__main__":
    rewrite_line_numbers()
