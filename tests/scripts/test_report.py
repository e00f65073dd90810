"""scripts/report.py: text stays text, nothing is fetched, parts may miss, and a page shows several runs."""

import html
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import train
from scripts import report, report_charts, report_evaluation
from training.config import DEFAULTS
from utils import run_cli

EVIL = "<script>alert(1)</script><img src=http://x.test/a onerror=alert(2)>\"'&\x1b[31m\ud800"
TRAINING = {"learning_rate": 0.0025, "max_steps": 6, "seed": 0, "eval_strategy": "steps", "eval_steps": 3}
CONFIG = {
    "base_model_path": "results/models/tiny",
    "train_dataset": "law",
    "output_dir": "somewhere/with a space",
    "expert_config": "law.json",
    "seq_length": 256,
    "frozen_dtype": None,
    "validation_fraction": 0.05,
    "global_batch_size": 4,
    "save_opt_states": True,
}


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "mine")


class Page(HTMLParser):
    """Tags with their attributes, figures {key: (value, text)}, text; AssertionError where elements do not nest."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, text: str):
        super().__init__()
        self.source, self.tags, self.figures, self.open, self.key, self.words = text, [], {}, [], None, []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "data":
            self.key = attrs["data-key"]
            assert self.key not in self.figures, f"{self.key} is on the page twice"
            self.figures[self.key] = (float(attrs["value"]), "")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.key = None if tag == "data" else self.key

    def handle_data(self, data):
        self.words.append(data)
        if self.key:
            self.figures[self.key] = (self.figures[self.key][0], data)

    def of(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def poison(run: Path) -> None:
    """EVIL wherever a file of the run may hold text."""
    for path in sorted(run.glob("completions/*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            text = EVIL.replace("\ud800", "")  # no line may have that
            line["example"] = {"prompt": text, "raw_prediction": text, "raw_answers": [text]}
            line["skill"] = text
        lines[0] |= {"error": text, "score": None}
        write(path, lines)
        summary = path.with_suffix(".summary.json")
        told = json.loads(summary.read_text())
        dataset = f"{told['dataset']}{EVIL}"
        write(
            summary,
            {**told, "dataset": dataset, "primary": EVIL, "failed": EVIL, "groups": {EVIL: {"n": 1, "mean": 5}}},
        )
    for path in run.glob("checkpoints/*/run.json"):
        note = json.loads(path.read_text())
        note["config"] |= {"base_model_path": EVIL, "train_dataset": EVIL, EVIL: EVIL}
        note["environment"] = dict.fromkeys(("date", "git", "device", EVIL), EVIL)
        write(path, note)
    scores = json.loads((run / "expert_scores" / "summary.json").read_text())
    write(run / "expert_scores" / "summary.json", {**scores, "meta": {"dataset": EVIL}})
    write(run / "stages.json", {EVIL: [EVIL]})
    write(run / "table.json", {"rows": [], "arguments": {EVIL: EVIL, "overrides": [EVIL]}})


def test_text_stays_text(run):
    clean = {tag for tag, _ in page(run).tags}
    poison(run)
    evil = page(run)
    assert "<script>alert(1)</script>" in evil.text and "<script" not in evil.source
    assert {tag for tag, _ in evil.tags} <= clean and not {"script", "img", "iframe", "link"} & clean
    assert not [key for _, attrs in evil.tags for key in attrs if key.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", evil.source)
    evil.source.encode("utf-8")
    assert report_charts.esc("a\r\nb\tc\x00<&\"'") == "a\nb\tc\ufffd&lt;&amp;&quot;&#x27;"


def test_the_page_asks_the_network_for_nothing(run):
    found = page(run)
    (policy,) = [a["content"] for a in found.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and "script-src" not in rules
    assert all(
        attrs[key].startswith("#") for _, attrs in found.tags for key in ("href", "src", "action") if key in attrs
    )
    assert not re.search(r"url\(|@import|https?:|//[a-z]", found.source)
    assert "prefers-color-scheme:dark" in found.source and any(a.get("name") == "viewport" for a in found.of("meta"))


def test_it_can_be_read_without_eyes(run):
    found = page(run)
    assert found.of("html") == [{"lang": "en"}] and len(found.of("h1")) == len(found.of("main")) == 1
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(set(ids)) == len(ids) and {a["href"][1:] for a in found.of("a")} <= set(ids)
    charts = [attrs for attrs in found.of("svg") if attrs.get("class") == "chart"]
    assert len(charts) == 6 and all(a["role"] == "img" and len(a["aria-label"]) > 30 for a in charts)
    assert all("aria-hidden" in a for a in found.of("svg") if a not in charts)
    assert len(found.of("th")) == len([a for a in found.of("th") if a.get("scope") in ("row", "col")]) > 40
    scrolls = [a for a in found.of("div") if a.get("class") == "scroll"]
    assert len(scrolls) >= len(found.of("table")) > 6 and all(a["tabindex"] == "0" and a["aria-label"] for a in scrolls)


@pytest.mark.parametrize(
    "gone, sentence",
    [
        ("expert_scores", "No scores are here, so the trained experts are listed only."),
        ("completions", "mine has no evaluation: eval_multigpu.py --adapter_dir="),
        ("checkpoints", "No folder of train.py is here, so only the evaluations follow."),
        ("checkpoints/full/trainer_state.json", None),
        ("checkpoints/esft-token/expert_cfg.json", "No run here selects experts."),
        ("completions/base.law.summary.json", None),
        ("table.json", None),
        ("stages.json", None),
    ],
)
def test_what_is_missing_is_left_out(gone, sentence, run):
    whole = page(run)
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = page(run)
    assert sentence is None or (sentence in found.text and sentence not in whole.text)
    assert found.figures.items() <= whole.figures.items()


def test_no_base_no_answers_no_commands(run):
    for path in [
        *run.glob("completions/base.*"),
        *run.glob("completions/*.jsonl"),
        run / "table.json",
        run / "stages.json",
    ]:
        path.unlink(missing_ok=True)
    shutil.rmtree(run / "checkpoints")
    text = page(run).text
    assert "No base was evaluated beside a trained model" in text and "No answers are here" in text
    assert "No command was recorded" in text and "No training was found" in text


def test_a_run_that_was_broken_off_has_losses_of_its_last_checkpoint(run):
    folder = run / "checkpoints" / "full"
    write_trained(folder, "full", 7, finished=False)
    (folder / "trainer_state.json").unlink()
    for step, loss in ((20, 0.25), (100, 0.75)):  # not in the order of their names
        write(
            folder / f"checkpoint-{step}" / "trainer_state.json", {"log_history": [{"step": step, "eval_loss": loss}]}
        )
    found = page(run)
    assert "full was not finished: it has no results yet." in found.text and "not finished" in found.text
    assert found.figures["full/eval_loss@100"][0] == 0.75 and "full/eval_loss@20" not in found.figures
    assert "full/steps" not in found.figures


def test_a_folder_of_train_py_alone(run):
    found = page(run / "checkpoints" / "esft-token")
    assert found.figures["esft-token/steps"][0] == 6 and "listed only" in found.text
    (command,) = [m for m in re.findall(r"<pre[^>]*>(.*?)</pre>", found.source, re.DOTALL)]
    words = shlex.split(html.unescape(command).replace("\\\n", " "))
    assert words[:2] == ["python", "train.py"]
    pairs = (word.removeprefix("--").partition("=") for word in words[2:])
    again = train.read_config(None, {key: yaml.safe_load(value) for key, _, value in pairs})
    config = json.loads((run / "checkpoints" / "esft-token" / "run.json").read_text())["config"]
    config["training"] = DEFAULTS | {"save_strategy": "steps"} | config["training"]
    assert again == train.RunConfig(**config)


def test_commands_can_be_pasted(run):
    blocks = re.findall(r"<pre[^>]*>(.*?)</pre>", page(run).source, re.DOTALL)
    first, stage = (shlex.split(html.unescape(block).replace("\\\n", " ")) for block in blocks)
    assert stage == ["python", "train.py", "--output_dir=a b", "method=esft"]
    assert first[:3] == ["python", "scripts/pipeline.py", "--base_model_path=results/models/tiny"]
    assert first[-2:] == ["--no_merge", "a=b c"]


def test_several_runs_share_charts_and_keep_their_names(run, tmp_path):
    other = write_run(tmp_path / "yours")
    write_trained(tmp_path / "alone", "lora", 1000)
    found = page(run, other, tmp_path / "alone")
    labels = {"mine/esft-token", "mine/full", "yours/esft-token", "yours/full", "alone"}
    assert {key.rpartition("/steps")[0] for key in found.figures if key.endswith("/steps")} == labels
    (chart,) = [a["aria-label"] for a in found.of("svg") if a.get("aria-label", "").startswith("validation loss")]
    assert all(f"{label}: 0.5 at first, 0.125 at last" in chart for label in labels)
    assert "alone has no evaluation" in found.text and "mine has no evaluation" not in found.text
    (law,) = [a["aria-label"] for a in found.of("svg") if a.get("aria-label", "").startswith("law")]
    assert "mine/base 10.1" in law and "yours/full 90.1" in law
    note = json.loads((other / "checkpoints" / "full" / "run.json").read_text())
    write(other / "checkpoints" / "full" / "run.json", note | {"inputs": {"train_dataset": "another hash"}})
    charts = [
        a["aria-label"] for a in page(run, other).of("svg") if a.get("aria-label", "").startswith("validation loss")
    ]
    assert len(charts) == 2, "losses on different data are not compared"


def test_experts_of_another_model_are_refused(run):
    config = {"experts": {"1": [99]}, "shared_experts": False, "non_expert_modules": False}
    write(run / "checkpoints" / "esft-token" / "expert_cfg.json", config)
    with pytest.raises(ValueError, match="scores are of another model"):
        page(run)


def test_answers_stand_side_by_side_and_long_ones_are_cut(run):
    found = page(run, count=1)
    (sample, *others) = re.findall(r"<article.*?</article>", found.source, re.DOTALL)
    assert len(others) == 5 and "law question 11" in sample and "gold 11" in sample
    for method, verdict in (("base", "incorrect"), ("esft-token", "scores 92 of 100"), ("full", "correct")):
        assert f"{method} says 11" in sample and f">{verdict}<" in sample
    assert page(run, count=1).source == found.source
    path = run / "completions" / "full.law.jsonl"
    path.write_text(path.read_text().replace("full says", "x" * 10_000))
    assert "characters more)" in page(run).text and "x" * (report_evaluation.SHOWN + 1) not in page(run).text


def test_answers_to_other_questions_are_left_out(run):
    path = run / "completions" / "full.law.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    found = page(run)
    assert "full: left out, since they answer other questions." in found.text and "full says" in found.text
    law = found.source[found.source.index(">law</h3>", found.source.index('id="answers"')) :].split(">general</h3>")[0]
    assert "esft-token says" in law and "full says" not in law


def test_the_command_writes_one_small_file(run, tmp_path, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    report.main([str(run), f"--output={tmp_path / 'deep' / 'page.html'}"])
    assert "written to" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]
    assert (tmp_path / "deep" / "page.html").read_text(encoding="utf-8") == report.page([run])
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert report.main([str(run)]) == run / "report.html"


def test_a_page_on_a_big_model_stays_small(run):
    by_layer = {str(la): {str(e): (1 + e % 2 * 2) / 512 for e in range(256)} for la in range(61)}
    write(run / "expert_scores" / "summary.json", {"token_scores": by_layer, "meta": {}})
    size = len(report.page([run]).encode())
    assert 200_000 < size < 1_000_000


@pytest.mark.parametrize(
    "break_it, sentence",
    [
        (lambda run: shutil.rmtree(run), "no such folder"),
        (lambda run: [shutil.rmtree(run / name) for name in ("checkpoints", "completions")], "is no run"),
        (lambda run: (run / "checkpoints" / "full" / "run.json").write_text('{"config": '), "not valid JSON"),
        (lambda run: (run / "checkpoints" / "full" / "run.json").write_text("[]"), "expected a JSON object"),
        (lambda run: (run / "checkpoints" / "full" / "run.json").write_text("{}"), "is not train.py's"),
        (lambda run: (run / "checkpoints" / "full" / "trainer_state.json").write_text("{}"), "is not train.py's"),
        (lambda run: (run / "completions" / "base.law.summary.json").write_text("{}"), "not a summary"),
        (lambda run: (run / "completions" / "base.law.jsonl").write_text('{"a": 1}\n'), "base.law.jsonl: line 1"),
        (lambda run: (run / "table.json").write_text('{"rows": [1]}'), "not what pipeline.py writes"),
        (lambda run: (run / "stages.json").write_text('{"out": 1}'), "not what pipeline.py writes"),
        (lambda run: (run / "completions" / "base.law.jsonl").write_text('{"a"\n'), "base.law.jsonl:1"),
        (lambda run: (run / "expert_scores" / "summary.json").write_text("{}"), "no scores in it"),
    ],
)
def test_what_is_no_run_is_one_sentence(break_it, sentence, run, tmp_path, capsys):
    break_it(run)
    output = tmp_path / "page.html"
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: report.main([str(run), f"--output={output}"]))
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1 and sentence in told
    assert "mine" in told and not output.exists()


def test_a_folder_twice_is_refused(run):
    with pytest.raises(ValueError, match="given twice"):
        page(run, run / ".." / "mine")


def test_a_folder_of_train_py_has_the_evaluations_that_are_of_it(run, tmp_path, monkeypatch):
    """Those that eval_multigpu.py wrote where no path was given."""
    monkeypatch.chdir(tmp_path)
    mine, other = tmp_path / "mine" / "full", tmp_path / "other" / "full"
    for folder in (mine, other):
        shutil.copytree(run / "checkpoints" / "full", folder)
    assert "eval_multigpu.py --adapter_dir=" in page(mine).source
    for dataset, of in (("law", mine), ("general", other)):
        for method, between in (("full", ""), ("base", ".base")):
            for end in ("jsonl", "summary.json"):
                path = tmp_path / "results" / "completions" / f"full.{dataset}{between}.{end}"
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(run / "completions" / f"{method}.{dataset}.{end}", path)
            told = json.loads(path.read_text())
            path.write_text(json.dumps({**told, "arguments": {"base_model_path": "b", "adapter_dir": str(of)}}))
    found = page(mine)
    assert found.figures["full/law/mean"][0] == pytest.approx(90.1234)
    assert not any("general" in key for key in found.figures)
    assert "against the base" in found.source


EXPERTS = {"1": [5, 2], "2": [7, 0, 3]}


def score(layer: int, expert: int) -> float:
    return round((1 + (5 * expert + layer) % 8) / 36, 4)


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in value) if path.suffix == ".jsonl" else json.dumps(value)
    )


def write_trained(folder: Path, method: str, size: int, finished: bool = True, steps: int = 6) -> None:
    config = {**CONFIG, "method": method, "training": TRAINING}
    results = {
        "parameters": 5828288,
        "trained_parameters": size,
        "gradient_bytes": 4 * size,
        "optimizer_bytes": 8 * size,
        "steps": steps,
        "best_step": 3,
        "train_loss": 0.21828169645534625 + size,
        "eval_loss": 0.04721920029455874,
        "step_seconds": 0.1939645759994164,
        "world_size": 1,
        "ep_size": 1,
        "peak_memory_bytes": 609505280 + size,
        "estimated_peak_bytes": 78905024,
        "saved_bytes": 4 * size,
        "frozen_verified": False,
    }
    environment = {"date": "2026-11-21T05:00:00+00:00", "git": "f76b19c", "torch": "2.13.0", "device": "cpu (2 cores)"}
    write(folder / "run.json", {"config": config, "environment": environment, "results": results if finished else None})
    history = [{"step": s, "loss": 3.0 * 0.5**s + 1e-4} for s in range(1, steps + 1)]
    history += [{"step": 3, "eval_loss": 0.5}, {"step": 6, "eval_loss": 0.125}, {"step": 6, "eval_loss": 0.125}]
    write(folder / "trainer_state.json", {"log_history": [*history, {"step": 6, "train_runtime": 75.5}]})
    if method == "esft":
        write(folder / "expert_cfg.json", {"experts": EXPERTS, "shared_experts": False, "non_expert_modules": False})


def write_run(folder: Path) -> Path:
    """A run as the pipeline leaves it: base, esft-token and full on law and general."""
    rows = []
    write_trained(folder / "checkpoints" / "esft-token", "esft", 442368)
    write_trained(folder / "checkpoints" / "full", "full", 5828288)
    for number, method in enumerate(("base", "esft-token", "full")):
        row = {"method": method, "scores": {}}
        for dataset, mean in (("law", 10.1234 + 40 * number), ("general", 90.5678 - 20 * number)):
            told = {"mean": mean, "ci95": [mean - 1.5, mean + 1.5], "n": 12, "primary": "rouge_l"}
            groups = (
                {"copying": {"n": 6, "mean": mean}, "facts": {"n": 6, "mean": mean}} if dataset == "general" else {}
            )
            summary = {"dataset": dataset, **told, "failed": 0, "groups": groups}
            write(folder / "completions" / f"{method}.{dataset}.summary.json", {**summary, "arguments": {
                "eval_dataset": "law,general"}})  # fmt: skip
            lines = [
                {
                    "example": {"prompt": f"{dataset} question {i}", "raw_prediction": f"{method} says {i}",
                                "raw_answers": [f"gold {i}"]},
                    "score": min(1.0, number * i / 12),
                    "truncated": False,
                }
                for i in range(12)
            ]  # fmt: skip
            write(folder / "completions" / f"{method}.{dataset}.jsonl", lines)
            row["scores"][dataset] = told
        rows.append(row)
    by_layer = {str(la): {str(e): score(la, e) for e in range(8)} for la in (1, 2)}
    write(
        folder / "expert_scores" / "summary.json", {"token_scores": by_layer, "meta": {"dataset": "law", "tokens": 99}}
    )
    arguments = {
        "base_model_path": "results/models/tiny",
        "methods": "esft-token,full",
        "no_merge": True,
        "overrides": ["a=b c"],
    }
    write(folder / "table.json", {"rows": rows, "arguments": arguments})
    write(folder / "stages.json", {"out": ["train.py", "--output_dir=a b", "method=esft"]})
    return folder


def page(*folders, **options) -> Page:
    return Page(report.page(folders, **options))
