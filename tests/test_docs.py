"""The guides are true: what they name exists, their line numbers point at definitions.

python tests/test_docs.py       # write the line numbers anew, after code has moved
"""

import ast
import re
import subprocess
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = re.compile(r"`([\w/]+\.py):(\d+) \(([\w.]+)\)`")  # `esft.py:12 (to_esft)`
QUOTE = re.compile(r"^ *```python ([\w/]+\.py)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)  # lines of that file


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


@pytest.mark.parametrize("name, title, least", [("promises", "", 40), ("library", "## What was tried", 12)])
def test_every_promise_has_a_test_that_is_there(name, title, least):
    section = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").partition(title or "#")[2]
    page = section.partition("\n## ")[0] if title else section
    rows = [row for row in page.splitlines() if row.startswith("| ") and not row.endswith("| test |")]
    assert len(rows) > least
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


def test_a_star_import_gives_the_functions_of_the_guide_and_nothing_of_torch():
    scope: dict = {}
    exec("from esft import *", scope)
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8").partition("\n## Programs")[0]
    listed = set(re.findall(r"^\| `(\w+)\(", page, re.MULTILINE))
    assert len(listed) > 8 and listed <= scope.keys() and "torch" not in scope and "nn" not in scope


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


if __name__ == "__main__":
    rewrite_line_numbers()
