"""The report: a page holds what the files of the runs hold, escapes all text, and needs no network."""

import html
import json
import math
import re
import shlex
import shutil
import statistics
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from deepseek.files import write_json, write_jsonl
from esft import ExpertConfig, ExpertScores, select_experts
from evaluation.run_folder import read_run
from scripts import report
from tests.helpers import make_model, noisy_adapter
from utils import run_cli

pytest.importorskip("matplotlib")

EVIL = "<script>alert(1)</script><img src=http://x.test/a onerror=alert(2)>\"'& $x_{$ {{ 7 * 7 }}\x1b[31m"
EXPERTS = {"1": [5, 2], "2": [7, 0, 3]}
CONFIG = {
    "base_model_path": "results/models/tiny",
    "train_dataset": "law",
    "output_dir": "a folder/with spaces",
    "expert_config": "law.json",
    "seq_length": 256,
    "frozen_dtype": None,
    "save_opt_states": True,
    "training": {"learning_rate": 0.0025, "max_steps": 6},
}


def write_training(folder: Path, method: str, size: int, finished: bool = True) -> None:
    """Write a folder of train.py."""
    results = {"parameters": 5828288, "trained_parameters": size, "steps": 6, "eval_loss": 0.125, "step_seconds": 0.25}
    results |= {"world_size": 1, "peak_memory_bytes": 609505280, "saved_bytes": 4 * size}
    note = {"config": {**CONFIG, "method": method}, **({"results": results} if finished else {})}
    environment = {"date": "2026-11-21T05:00:00+00:00", "git": "f76b19c", "device": "cpu (2 cores)"}
    write_json(folder / "run.json", {**note, "environment": environment})
    history = [{"step": step, "loss": 3.0 * 0.5**step} for step in range(1, 7)]
    history += [{"step": 3, "eval_loss": 0.5}, {"step": 6, "eval_loss": 0.25}, {"step": 6, "eval_loss": 0.125}]
    write_json(folder / "trainer_state.json", {"log_history": history})
    if method == "esft":
        write_json(
            folder / "expert_cfg.json", {"experts": EXPERTS, "shared_experts": True, "non_expert_modules": False}
        )


def write_run(folder: Path) -> Path:
    """Write a folder of the pipeline: base, esft-token and full on law and general."""
    write_training(folder / "checkpoints" / "esft-token", "esft", 442368)
    write_training(folder / "checkpoints" / "full", "full", 5828288)
    rows = []
    for number, method in enumerate(("base", "esft-token", "full")):
        scores = {}
        for dataset, mean in (("law", 10.25 + 40 * number), ("general", 90.5 - 20 * number)):
            scores[dataset] = {"mean": mean, "ci95": [mean - 1.5, mean + 1.5], "n": 12, "primary": "rouge_l"}
            groups = {"copying": {"n": 6, "mean": mean}} if dataset == "general" else {}
            summary = {"dataset": dataset, **scores[dataset], "failed": 0, "groups": groups}
            at = folder / "completions" / f"{method}.{dataset}.jsonl"
            write_json(at.with_suffix(".summary.json"), {**summary, "arguments": {"eval_dataset": "law,general"}})
            texts = [(f"{dataset} question {i}", f"{method} says {i}", f"gold {i}") for i in range(12)]
            write_jsonl(at, (
                {"example": {"prompt": prompt, "raw_prediction": said, "raw_answers": [gold]}, "score": number * i / 22}
                for i, (prompt, said, gold) in enumerate(texts)
            ))  # fmt: skip
        rows.append({"method": method, "scores": scores})
    by_layer = {layer: {str(e): (1 + (5 * e + int(layer)) % 8) / 36 for e in range(8)} for layer in ("1", "2")}
    write_json(folder / "expert_scores" / "summary.json", {"token_scores": by_layer, "meta": {"dataset": "law"}})
    arguments = {"base_model_path": "results/models/tiny", "methods": "esft-token,full", "no_merge": True}
    write_json(folder / "table.json", {"rows": rows, "arguments": {**arguments, "overrides": ["a=b c"]}})
    write_json(folder / "stages.json", {"out": ["train.py", "--output_dir=a b", "method=esft"]})
    return folder


def change_json(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "mine")


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text. Elements must nest."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.tags, self.open, self.words = source, [], [], []
        self.feed(source)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def of(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]

    def charts(self, start: str) -> list[str]:
        return [a["aria-label"] for a in self.of("svg") if a["aria-label"].startswith(start)]

    def rows(self, heading: str) -> list[list[str]]:
        """The cells of each table row with that heading."""
        found = re.findall(rf'<th scope="row">{re.escape(heading)}</th>(.*?)</tr>', self.source, re.DOTALL)
        return [[" ".join(re.sub("<[^>]+>", "", c).split()) for c in re.findall("<td.*?</td>", r)] for r in found]


def page(*folders, **options) -> Page:
    return Page(report.page(folders, **options))


# --------------------------------------------------------------------------------------------------------------------
# the page


def test_text_stays_text(run):
    clean = {tag for tag, _ in page(run).tags}
    for path in run.glob("completions/*.jsonl"):
        example = {"prompt": EVIL, "raw_prediction": EVIL, "raw_answers": [EVIL]}
        write_jsonl(path, [{"example": example, "skill": EVIL, "score": None, "error": EVIL}] * 12)
        groups = {EVIL: {"n": 1, "mean": 5}}
        change_json(path.with_suffix(".summary.json"), dataset=f"law{EVIL}", primary=EVIL, failed=EVIL, groups=groups)
    for path in run.glob("checkpoints/*/run.json"):
        config = {**CONFIG, "method": "esft", "base_model_path": EVIL, "train_dataset": EVIL, EVIL: EVIL}
        change_json(path, config=config, environment=dict.fromkeys(("date", "git", EVIL), EVIL))
    change_json(run / "expert_scores" / "summary.json", meta={"dataset": EVIL})
    write_json(run / "stages.json", {EVIL: [EVIL]})
    write_json(run / "table.json", {"rows": [], "arguments": {EVIL: EVIL, "overrides": [EVIL]}})
    evil = page(run)
    assert "<script>alert(1)</script>" in evil.text and "$x_{$ {{ 7 * 7 }}" in evil.text
    assert {tag for tag, _ in evil.tags} <= clean and not {"script", "img", "iframe", "link"} & clean
    assert not [key for _, attrs in evil.tags for key in attrs if key.startswith("on")]
    assert "\x1b" not in evil.source and "\ufffd[31m" in evil.source


def test_the_page_needs_no_network(run):
    found = page(run)
    (policy,) = [a["content"] for a in found.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:" and "script-src" not in rules
    links = [attrs[key] for _, attrs in found.tags for key in ("href", "xlink:href", "src", "action") if key in attrs]
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.search(r"url\((?!#)|@import", found.source)
    assert "prefers-color-scheme: dark" in found.source and any(a.get("name") == "viewport" for a in found.of("meta"))


def test_a_page_can_be_read_without_eyes(run):
    found = page(run)
    assert found.of("html") == [{"lang": "en"}] and len(found.of("h1")) == len(found.of("main")) == 1
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    ids = [attrs["id"] for tag, attrs in found.tags if tag == "section"]
    assert len(set(ids)) == 6 and [a["href"] for a in found.of("a")] == [f"#{id}" for id in ids]
    assert len(found.of("svg")) == 5 and all(a["role"] == "img" and len(a["aria-label"]) > 30 for a in found.of("svg"))


def test_the_numbers_are_those_of_the_files(run):
    found = page(run)
    esft, full = found.rows("esft-token"), found.rows("full")
    assert esft[0][:2] == ["50.2 +25.0", "70.5 +25.0"] and esft[0][2:4] == ["7.6%", "2 to 3 of 8"]
    assert esft[0][4:] == ["6", "0.0025", "0.1250", "0.25 s", "581.3 MiB", "1.7 MiB"]
    assert full[0][2:4] == ["100.0%", "all"]
    assert esft[1] == ["3: 0.5000, 6: 0.1250"], "the last validation loss of a step counts"
    assert esft[2][:3] == ["50.2", "[48.8, 51.8]", "12"] and found.rows("base")[0][:3] == ["10.2", "[8.8, 11.8]", "12"]
    assert found.rows("copying") == [["90", "70 -20.0", "50 -40.0"]]
    assert "esft-token: 2 to 3 of 8 experts per layer, the shared experts" in found.text
    assert found.rows("2") == [["7, 0, 3"]]
    assert found.charts("law: ") == ["law: base 10.2; esft-token 50.2; full 90.2"]
    (losses,) = found.charts("validation loss")
    assert "esft-token: 0.5 at first, 0.125 at last" in losses
    assert "table.json says" not in found.text
    change_json(run / "completions" / "full.law.summary.json", mean=11.5)
    assert "table.json says 90.25 for full on law" in page(run).text


def test_changes_are_of_pairs_and_questions_are_counted(run):
    right = {"base": range(12), "full": (2, 12, 13, 14), "esft-token": range(1, 13)}
    for method, indices in right.items():
        example = {"raw_prediction": "x", "raw_answers": ["x"]}
        write_jsonl(run / "completions" / f"{method}.general.jsonl", (
            {"example": {"prompt": str(i), **example}, "score": float(i in indices)} for i in range(40)
        ))  # fmt: skip
    found = page(run)
    difference, interval, verdict, newly, no_longer = found.rows("full")[3][3:]
    assert (difference, verdict, newly, no_longer) == ("-20.0", "forgotten", "3", "11")
    spread = 1.96 * 100 * statistics.pstdev([*[-1] * 11, *[1] * 3, *[0] * 26]) / 40**0.5
    assert [float(x) for x in re.findall(r"[-+.\d]+", interval)] == pytest.approx([-20 - spread, -20 + spread], abs=2.6)
    assert found.rows("esft-token")[3][5:] == ["uncertain", "1", "1"]


def test_the_evaluation_s_own_comparison_is_shown(run):
    changed = {"difference": 39.5, "ci95": [30.5, 45.5], "certain": True}
    suite = {"primary": "perplexity", "unit": "as in lm-eval", "higher_is_better": False}
    for method, more in {"base": {}, "esft-token": {"against_base": changed}, "full": {}}.items():
        change_json(run / "completions" / f"{method}.law.summary.json", **suite, **more)
    found = page(run)
    assert found.rows("esft-token")[2][3:6] == ["+39.5", "[+30.5, +45.5]", "forgotten"]
    assert '<span class="down">+39.5</span>' in found.source
    assert found.rows("full")[2][3:6] == ["+80.0", "-", "-"], "the tasks of a suite have weights of their own"
    assert "perplexity (its own unit, less is better)" in found.text


def test_answers_stand_side_by_side_and_long_ones_are_cut(run):
    found = page(run, count=1)
    first, *others = re.findall(r"<article.*?</article>", found.source, re.DOTALL)
    assert len(others) == 5 and "law question 11" in first and "gold 11" in first
    for method, said in (("base", "incorrect"), ("esft-token", "scores 50 of 100"), ("full", "correct")):
        assert f"{method} says 11" in first and f">{said}<" in first
    assert page(run, count=1).source == found.source
    path = run / "completions" / "full.law.jsonl"
    path.write_text(path.read_text().replace("full says", "x" * 10_000))
    assert "(the rest is cut)" in page(run).text and "x" * 3001 not in page(run).source
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert "full is left out: it answers other questions." in page(run).text


def test_the_best_the_worst_and_some_random_questions_are_picked(run):
    (law, _) = read_run(run).evaluations.values()
    picked = report.pick(law, "base", 2, seed=0)
    assert list(picked.values()) == ["most gained"] * 2 + ["least gained, or lost"] * 2 + ["drawn at random"] * 2
    assert list(picked)[:4] == [11, 10, 0, 1]
    assert report.pick(law, "base", 2, seed=0) == picked
    assert any(report.pick(law, "base", 2, seed=seed) != picked for seed in (1, 2, 3))
    assert len(report.pick({"full": law["full"]}, "base", 9, seed=0)) == 12


def test_commands_can_be_pasted(run):
    blocks = re.findall(r'<div class="text command">(.*?)</div>', page(run).source, re.DOTALL)
    first, stage = (shlex.split(html.unescape(block)) for block in blocks)
    assert stage == ["python", "train.py", "--output_dir=a b", "method=esft"]
    assert first[:3] == ["python", "scripts/pipeline.py", "--base_model_path=results/models/tiny"]
    assert first[-2:] == ["--no_merge", "a=b c"]
    (block,) = re.findall(
        r'<div class="text command">(.*?)</div>', page(run / "checkpoints" / "full").source, re.DOTALL
    )
    words = shlex.split(html.unescape(block))
    assert words[:2] == ["python", "train.py"] and f"--output_dir={run / 'checkpoints' / 'full'}" in words
    assert {"method=full", "save_opt_states=true", "learning_rate=0.0025"} <= set(words)
    assert not any("frozen_dtype" in word for word in words)


# --------------------------------------------------------------------------------------------------------------------
# what a folder may lack, and several folders


@pytest.mark.parametrize(
    "gone, sentence",
    [
        ("expert_scores", "No scores are here, so the experts are only listed."),
        ("completions", "mine has no evaluation. This makes one: eval_multigpu.py --adapter_dir="),
        ("checkpoints", "No folder of train.py is here, so only the evaluations follow."),
        ("checkpoints/esft-token/expert_cfg.json", "No run here selects experts."),
        ("table.json", None),
        ("stages.json", None),
        ("completions/base.law.summary.json", None),
    ],
)
def test_what_is_missing_is_left_out(gone, sentence, run):
    whole = page(run).text
    shutil.rmtree(run / gone) if (run / gone).is_dir() else (run / gone).unlink()
    assert sentence is None or (sentence in page(run).text and sentence not in whole)


def test_an_unfinished_run_has_the_losses_of_its_last_checkpoint(run):
    folder = run / "checkpoints" / "full"
    write_training(folder, "full", 7, finished=False)
    (folder / "trainer_state.json").unlink()
    for step, loss in ((20, 0.25), (100, 0.75)):  # not in the order of their names
        log = [{"step": step, "eval_loss": loss}, {"step": step + 1, "loss": float("nan")}]
        write_json(folder / f"checkpoint-{step}" / "trainer_state.json", {"log_history": log})
    shutil.copytree(folder / "checkpoint-20", folder / "checkpoint-best")  # a copy of the user's
    rows = page(run).rows("full")
    assert rows[0][-1] == "not finished" and rows[1] == ["100: 0.7500"]


def test_lora_on_selected_experts_shows_which_and_lora_on_all_layers_shows_none(run):
    folder = run / "checkpoints" / "lora-selected"
    write_training(folder, "lora", 7)
    assert page(run).rows("lora-selected")[0][3] == "-"
    experts = ExpertConfig({int(layer): tuple(ids) for layer, ids in EXPERTS.items()})
    noisy_adapter(make_model(), experts, folder, lora_rank=2)
    assert page(run).rows("lora-selected")[0][3] == "2 to 3 of 8"
    assert len(page(run).charts("Experts that lora-selected trains")) == 1


def test_a_folder_of_train_py_may_hold_the_scores_it_made(run):
    folder = run / "checkpoints" / "esft-token"
    assert not page(folder).charts("Experts")
    shutil.copytree(run / "expert_scores", folder / "expert_scores")
    assert len(page(folder).charts("Experts")) == 1


def test_a_map_shows_the_cut_where_that_selected_the_experts(run):
    config, cut = run / "checkpoints" / "esft-token" / "expert_cfg.json", "running sum of scores reaches"
    assert page(run).charts("Experts") and cut not in page(run).text  # no sum of scores gives these
    scores = ExpertScores.load(run / "expert_scores")
    write_json(config, select_experts(scores, top_p=0.2).to_dict())
    assert f"{cut} 0.2" in page(run).text
    write_json(config, select_experts(scores, strategy="topk", top_k=4).to_dict())
    assert cut not in page(run).text
    write_json(config, select_experts(scores, top_p=0.5).to_dict())
    given = ["--top_p=0.5", "--output_path=expert_configs/esft-token.json"]
    write_json(run / "stages.json", {"config": ["scripts/expert/generate_expert_config.py", *given]})
    assert f"{cut} 0.5" in page(run).text


def test_several_runs_share_charts_and_keep_their_names(run, tmp_path):
    other = write_run(tmp_path / "yours")
    write_training(tmp_path / "alone", "lora", 1000)
    found = page(run, other, tmp_path / "alone")
    (losses,) = found.charts("validation loss")
    labels = ("mine/esft-token", "mine/full", "yours/esft-token", "yours/full", "alone")
    assert all(f"{label}: 0.5 at first" in losses and found.rows(label) for label in labels)
    assert "alone has no evaluation" in found.text and "mine has no evaluation" not in found.text
    assert "mine/base 10.2" in found.charts("law")[0] and "yours/full 90.2" in found.charts("law")[0]
    change_json(other / "checkpoints" / "full" / "run.json", inputs={"train_dataset": "another hash"})
    assert len(page(run, other).charts("validation loss")) == 2, "losses on different data are not compared"


def test_a_folder_of_train_py_has_the_evaluations_of_it(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine, other = tmp_path / "mine" / "full", tmp_path / "other" / "full"
    for folder in (mine, other):
        shutil.copytree(run / "checkpoints" / "full", folder)
    for dataset, of in (("law", mine), ("general", other)):
        for method, between in (("full", ""), ("base", ".base")):
            path = tmp_path / "results" / "completions" / f"full.{dataset}{between}.summary.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(run / "completions" / f"{method}.{dataset}.summary.json", path)
            change_json(path, arguments={"base_model_path": "b", "adapter_dir": str(of)})
    found = page(mine)
    assert found.rows("full")[0][0] == "90.2 +80.0" and "general" not in found.text

    for between in ("", ".base"):  # evaluations in the folder itself
        path = other / "completions" / f"general{between}.summary.json"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "results" / "completions" / f"full.general{between}.summary.json", path)
    shutil.rmtree(tmp_path / "results")
    moved = other.rename(tmp_path / "moved")
    assert read_run(moved).evaluations.keys() == {"general"} and not read_run(mine).evaluations
    assert list(read_run(moved).evaluations["general"]) == ["base", "moved"]


# --------------------------------------------------------------------------------------------------------------------
# the command


def test_the_command_writes_one_file(run, tmp_path, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    report.main([str(run), f"--output={tmp_path / 'deep' / 'page.html'}"])
    assert "written to" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]
    assert (tmp_path / "deep" / "page.html").read_text(encoding="utf-8") == report.page([run])
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert report.main([str(run)]) == run / "report.html"


def change_state(run, **values):
    change_json(run / "checkpoints" / "full" / "trainer_state.json", **values)


@pytest.mark.parametrize(
    "break_it, sentence",
    [
        (lambda run: run.rename(run.with_name("mine2")), "did you mean"),
        (
            lambda run: [shutil.rmtree(run / name) for name in ("checkpoints", "completions")],
            "Give the folder of a run",
        ),
        (lambda run: (run / "checkpoints" / "full" / "run.json").write_text('{"config": '), "not valid JSON"),
        (lambda run: (run / "checkpoints" / "full" / "run.json").write_text("{}"), "another program wrote it"),
        (lambda run: (run / "completions" / "base.law.summary.json").write_text("[]"), "an object is expected"),
        (lambda run: (run / "completions" / "base.law.jsonl").write_text('{"a"\n'), "base.law.jsonl:1"),
        (lambda run: (run / "completions" / "base.law.jsonl").write_text("{}\n"), "base.law.jsonl: it does not hold"),
        (lambda run: change_state(run, log_history=3), "trainer_state.json: it does not hold"),
        (lambda run: change_state(run, log_history=[{"loss": 1}]), "trainer_state.json: it does not hold"),
        (lambda run: change_state(run, log_history=[{"step": math.inf, "loss": 1}]), "trainer_state.json: it does not"),
        (lambda run: (run / "table.json").write_text("[" * 200_000), "table.json: not valid JSON"),
        (lambda run: (run / "expert_scores" / "summary.json").write_text("{}"), "no layer has scores"),
        (lambda run: change_json(run / "checkpoints/esft-token/expert_cfg.json", experts={"1": [99]}), "expert 99"),
    ],
)
def test_what_is_no_run_is_one_sentence(break_it, sentence, run, tmp_path, capsys):
    break_it(run)
    output = tmp_path / "page.html"
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: report.main([str(run), f"--output={output}"]))
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1 and sentence in told
    assert not output.exists()


def test_a_folder_given_twice_is_shown_once(run):
    assert page(run / ".." / "mine", run).source == page(run).source


def test_a_run_that_changed_its_experts_says_when_and_its_command_begins_with_the_same(tmp_path):
    write_training(tmp_path, "esft", 442368)
    note = json.loads((tmp_path / "run.json").read_text())
    note["config"] |= {"expand_experts": {"start": 0.1, "to": 0.3, "by": 0.1, "when": 40}, "score_function": "gate"}
    changes = [{"step": 40, "layer": 2, "added": [4, 9], "removed": []}]
    note["results"]["expert_changes"] = [*changes, {"step": 80, "layer": 1, "added": [1], "removed": [5]}]
    write_json(tmp_path / "run.json", note)
    text = " ".join(html.unescape(re.sub("<[^>]+>", "", report.page([tmp_path]))).split())
    assert "after step 40 in layer 2 +4 +9; after step 80 in layer 1 +1 -5." in text
    (model,) = read_run(tmp_path, "run", "").trained
    assert "--expert_config=law.json" in model.command and "score_function=gate" in model.command
    assert 'expand_experts={"to": 0.3, "by": 0.1, "when": 40}' in model.command
