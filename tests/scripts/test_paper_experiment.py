"""The paper in miniature: intervals, verdicts, pictures, and equal tables however often the runner was broken off."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek.files import read_jsonl, write_json
from scripts.experiments import paper, paper_results, paper_runs
from scripts.experiments.paper_results import Claim, half_width, interval, verdict
from tests.experiment_helpers import Commands, number
from tests.helpers import ROOT
from utils import locked, run_cli


def test_an_interval_is_student_s():
    values = [1.0, 2.0, 4.0]  # standard error 0.8819, quantile 4.3027
    assert half_width(values) == pytest.approx(3.794, abs=2e-3)
    assert interval(values) == "2.3 [-1.5, 6.1]" and interval([2.0]) == "2.0"
    assert half_width([3.0, 3.0]) == 0 and half_width(values * 4) < half_width(values) / 3


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        ([4.0, 5.0, 6.0], "more", "yes"),
        ([4.0, 5.0, 6.0], "less", "no"),
        ([-1.0, 5.0, 6.0], "more", "not decided"),
        ([-4.0, -5.0, -6.0], "less", "yes"),
        ([-4.0, -5.0, -6.0], "as good", "no, less"),
        ([4.0, 5.0, 6.0], "as good", "yes, better"),
        ([4.0, 5.0, 6.0], "little", "no, more"),
        ([-1.0, 0.0, 2.0], "little", "not refuted"),
        ([9.0], "more", "one seed"),
    ],
)
def test_a_claim_holds_where_the_interval_says_so(values, kind, said):
    assert verdict(values, kind) == said


def test_a_difference_is_of_the_same_seeds():
    rows = [{"name": "one", "average": [50.0, 61.0, 70.0]}, {"name": "other", "average": [40.0, 50.0, 60.0]}]
    found = paper_results.differences(rows, Claim("a", "", "one", "other", "average", "more"))
    assert found == [10, 11, 10] and verdict(found, "more") == "yes"  # far more certain than the rows' own intervals


def test_the_claims_are_of_rows_that_the_parts_have_and_hold_in_the_paper():
    names = {"a": paper.METHODS, "b": paper.VARIANTS, "d": paper.grains(str)}
    for claim in paper_results.CLAIMS:
        assert {claim.one, claim.other} <= names[claim.part].keys()
        if claim.paper is None:
            assert claim.kind == "more"
        else:
            assert {"more": claim.paper > 0, "less": claim.paper < 0}.get(claim.kind, abs(claim.paper) < 3)
    by_text = {claim.text: claim.paper for claim in paper_results.CLAIMS}
    assert by_text["ESFT-Token is as good as full fine-tuning"] == pytest.approx(55.725 - 58.4)
    assert by_text["ESFT-Gate learns more than LoRA"] == pytest.approx(57.175 - 48.825)
    assert by_text["ESFT-Gate keeps more than LoRA"] == pytest.approx(1.5)


def fake(words: list[str]) -> None:
    """Write what train.py, eval_multigpu.py and get_expert_scores.py would, decided by what they are asked."""
    flags = dict(word.removeprefix("--").split("=", 1) for word in words[1:])

    def of(*keys: str) -> float:
        return number(*(flags[key] for key in keys if key in flags))

    if words[0] == "train.py":
        assert not Path(flags["output_dir"]).exists()
        chosen = Path(flags["expert_config"]).read_text() if "expert_config" in flags else ""
        value = of("train_dataset", "method", "seed", "learning_rate") + len(chosen) % 7 / 7
        sizes = {"step_seconds": value, "peak_memory_bytes": 2**28, "saved_bytes": 2**20}
        done = {"trained_parameters": 1 + len(chosen), "parameters": 10_000, "eval_loss": value / 9, **sizes}
        write_json(Path(flags["output_dir"]) / "run.json", {"results": done})
    elif words[0] == "eval_multigpu.py":
        model = Path(flags.get("adapter_dir", flags["base_model_path"])) / "run.json"
        learned = json.loads(model.read_text())["results"]["step_seconds"] if model.is_file() else 0.0
        for name in flags["eval_dataset"].split(","):
            mean = 30 * learned + of("eval_dataset")
            write_json(Path(flags["output_path"]).with_suffix(f".{name}.summary.json"), {"mean": mean})
    elif words[0] == "scripts/miniature/build_tiny_model.py":
        write_json(Path(flags["output_dir"]) / "config.json", {})
        (Path(flags["output_dir"]) / "model.safetensors").write_text(flags["experts"])
    else:
        assert words[0] == "scripts/expert/get_expert_scores.py"
        first = {str(e): 0.5 - 0.1 * e + 0.01 * of("eval_dataset", "n_sample_tokens") for e in range(4)}
        scores = {"1": {e: score / sum(first.values()) for e, score in first.items()}}
        write_json(Path(flags["output_dir"]) / "summary.json", {"token_scores": scores, "gate_scores": scores})


@pytest.fixture
def commands(monkeypatch) -> Commands:
    return Commands(paper_runs.Lab, fake, monkeypatch)


@pytest.mark.slow
def test_a_runner_that_was_broken_off_ends_with_the_same_tables_and_repeats_nothing(tmp_path, commands):
    flags = ["--parts=r,a,b,c,d,e,f", "--seeds", "0", "1", "2"]
    whole = paper.main([*flags, f"--work_dir={tmp_path}/whole", f"--output={tmp_path}/one/paper", "--jobs=1"])
    asked = [" ".join(words).replace(str(tmp_path / "whole"), "") for words in commands]
    trained = commands.trained()
    timed = 5 * 6  # rounds x methods
    tried = 4 * (len(paper.TRIED) - 1)
    assert len(trained) == 4 * 3 * 6 + 2 * 3 * (4 + 7 + 2 * 2) + timed + tried  # d's third base is a's
    assert {Path(words[1]).name for words in trained} == {"tiny", "tiny16-5500000", "tiny32-5500000"}

    def start() -> dict:
        (tmp_path / "broken" / "results" / ".tiny-law-full-xyz").mkdir(parents=True, exist_ok=True)  # of a SIGKILL
        return paper.main([*flags, f"--work_dir={tmp_path}/broken", f"--output={tmp_path}/two/paper", "--jobs=1"])

    again, tries = commands.until_done(start, 25)
    assert tries > 5 and again == whole
    for name in (*(f"paper_{part}.md" for part in "rabcdef"), "paper_claims.md", "paper_claims.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    assert len(asked) <= len(commands) <= len(asked) + tries  # a training whose evaluation was broken off comes again
    assert not list((tmp_path / "broken" / "results").glob(".*"))


def test_a_result_of_other_data_or_settings_is_made_again(tmp_path, commands, monkeypatch):
    flags = ["--parts=b", "--seeds", "3", "5", f"--work_dir={tmp_path}", "--ablation_tasks", "law"]

    def trained() -> int:
        commands.clear()
        paper.main(flags)
        return len(commands.trained())

    assert trained() == 2 * 5 and trained() == 0
    kept = sorted((tmp_path / "results").glob("*-shared-*.json"))
    for path, text in zip(kept, ("[]", "{", '{"scores": 1}'), strict=False):
        path.write_text(text)
    assert len(kept) >= 3 and trained() == 3
    with monkeypatch.context() as patch:
        patch.setitem(paper_runs.RATES, "esft", "9e-3")
        assert trained() == 2 * 3
    with monkeypatch.context() as patch:
        settings = {"max_steps": 1, "learning_rate": 1e-3}
        patch.setattr(paper_runs.yaml, "safe_load", lambda text: dict(settings))
        assert trained() == 2 * 5
        settings["learning_rate"] = 2e-3  # which no run takes from there
        assert trained() == 0
    assert trained() == 2 * 5
    with monkeypatch.context() as patch:
        patch.setattr(paper_runs, "digest", lambda path: "other" if path.name == "law.jsonl" else "same")
        assert trained() == 2 * 5
        assert [words[0] for words in commands].count("scripts/expert/get_expert_scores.py") == 1  # and experts anew
    with locked(tmp_path), pytest.raises(ValueError, match="another run is at work there"):
        paper.main(flags)


def test_what_is_written_says_where_it_comes_from_and_shows_the_rows(tmp_path, commands):
    stem = tmp_path / "tables" / "paper"
    tables = paper.main(["--parts=r,a,f", f"--work_dir={tmp_path}/work", f"--output={stem}", "--steps=7"])
    text = Path(f"{stem}_a.md").read_text()
    assert tables["a"] in text and "--parts=a`" in text and "seeds 0 1 2, 7 steps" in text
    rows = {row["name"]: row for row in json.loads(Path(f"{stem}_a.json").read_text())["rows"]}
    assert str(tmp_path) not in Path(f"{stem}_a.json").read_text()  # no path of the machine
    token = rows["esft-token"]
    assert token["average"] == [
        statistics.fmean(token["tasks"][task][seed] for task in paper_runs.TASKS) for seed in range(3)
    ]
    assert f"| esft-token | {interval(token['tasks']['intent'])} | " in tables["a"]
    claims = json.loads(Path(f"{stem}_claims.json").read_text())
    assert {claim["part"] for claim in claims} == {"a"} and "- (a) `python" in Path(f"{stem}_claims.md").read_text()
    assert claims[0]["here"] == [a - b for a, b in zip(token["average"], rows["full"]["average"])]
    for part in "raf":
        assert Path(f"{stem}_{part}.png").read_bytes().startswith(b"\x89PNG")
    assert not Path(f"{stem}_b.png").exists()


def test_the_rate_taken_is_the_largest_that_keeps_enough(tmp_path, commands, capsys):
    kept = {"8e-3": 90.0, "5e-4": 90.0, "1e-3": 88.0, "2e-3": 86.0, "4e-3": 80.0}
    rows = [{"name": "full", "learning_rate": rate, "general": [value]} for rate, value in kept.items()]
    rows.append({"name": "lora", "learning_rate": "1e-2", "general": [99.0]})
    assert paper_results.largest_rate(rows, "full", 86.0) == "2e-3"  # and not what luck keeps at a larger one
    assert paper_results.largest_rate(rows, "full", 86.1) == "1e-3"
    assert paper_results.largest_rate(rows, "full", 95.0) is None
    text = paper.main(["--parts=r", f"--work_dir={tmp_path}"])["r"]
    for name, rate in {"full": "5e-4", "lora": "1e-3", "esft-token": "2e-3", "esft-gate": "4e-3"}.items():
        assert f"| {name} | **{rate}** |" in text
    assert text.count("**") == 8
    asked = {flag for words in commands for flag in words if flag.startswith("learning_rate=")}
    assert asked == {f"learning_rate={rate}" for rate in paper.TRIED}
    said = capsys.readouterr().err
    assert "part r says" in said and "and the other parts take" in said  # the figures are made up


def test_equal_runs_of_two_parts_are_one(tmp_path):
    parts = (paper.METHODS, paper.VARIANTS, paper.AMOUNTS)
    chosen = [run for rows in parts for run in paper.runs_of(rows, ["law"], [0]).values()]
    assert len({run.name for run in chosen}) == len(set(chosen)) == 7 + 4 + 7


def test_general_skills_are_scored_on_whole_samples(tmp_path):
    lab = paper_runs.Lab(paper.parse_args([f"--work_dir={tmp_path}"]))
    first = read_jsonl(lab.samples("general"))[0]["messages"]
    assert [turn["role"] for turn in first] == ["user", "assistant"] and all(turn["content"] for turn in first)
    assert lab.samples("law") == "law"


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--parts=a,g", "cannot run part 'g'. Give some of r, a, b, c, d, e, f"),
        ("--ablation_tasks=lwa", "invalid choice: 'lwa'"),
        ("--steps=0", "not a whole number above 0"),
        ("--output=README.md/x", "cannot write"),
        ("--work_dir=README.md", "cannot write README.md: it is a file"),
    ],
)
def test_wrong_flags_are_one_sentence(flag, sentence, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: paper.main(flag.split()))
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_runner_ends_with_the_same_tables(tmp_path):
    """Real trainings of two steps, and SIGKILL while they run."""

    def start(folder: str) -> subprocess.Popen:
        flags = ["--parts=b", "--seeds", "0", "1", "--steps=2", "--ablation_tasks", "law"]
        flags += [f"--work_dir={tmp_path / folder}", f"--output={tmp_path / folder / 'tables'}"]
        return subprocess.Popen(
            [sys.executable, "scripts/experiments/paper.py", *flags], cwd=ROOT, start_new_session=True
        )

    whole = start("whole")
    broken = start("broken")
    results = tmp_path / "broken" / "results"
    while not results.is_dir() or len(list(results.iterdir())) < 3:
        assert broken.poll() is None
        time.sleep(0.2)
    os.killpg(broken.pid, signal.SIGKILL)
    broken.wait()
    assert len(list(results.iterdir())) < 10
    assert start("broken").wait() == 0 == whole.wait()
    tables = [(tmp_path / folder / "tables_b.md").read_text() for folder in ("whole", "broken")]
    assert tables[0] == tables[1]
