"""scripts/report.py: every figure on the page is that of a file, in cards, tables and charts, and rounded rightly."""

import json
import re
import statistics
from itertools import pairwise

import pytest

from scripts import report_training
from tests.scripts.test_report import EXPERTS, page, score, write, write_run, write_trained


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "mine")


def row_of(text: str, heading: str) -> list[str]:
    """What is read in the cells of the first table row with that heading."""
    row = re.search(rf'<th scope="row">{re.escape(heading)}</th>(.*?)</tr>', text)[1]
    return [re.sub("<[^>]+>", "", cell) for cell in re.findall("<td.*?</td>", row)]


def test_the_figures_are_those_of_the_files(run):
    figures = page(run).figures
    for method in ("esft-token", "full"):
        results = json.loads((run / "checkpoints" / method / "run.json").read_text())["results"]
        told = {key: figures[f"{method}/{key}"][0] for key in results if key not in ("frozen_verified",)}
        assert told == {key: value for key, value in results.items() if key in told}
        assert figures[f"{method}/share"][0] == results["trained_parameters"] / results["parameters"]
        assert figures[f"{method}/eval_loss@6"][0] == 0.125 and figures[f"{method}/train_runtime"][0] == 75.5
    for row in json.loads((run / "table.json").read_text())["rows"]:
        for dataset, s in row["scores"].items():
            key = f"{row['method']}/{dataset}"
            assert [figures[f"{key}/{what}"][0] for what in ("mean", "low", "high", "n")] == [s["mean"], *s["ci95"], 12]
            assert figures[f"{key}/mean"][1] == f"{s['mean']:.1f}"
    for layer, ids in EXPERTS.items():
        for e in ids:
            assert figures[f"esft-token/score/{layer}/{e}"][0] == score(int(layer), e)
    assert figures["esft-token/trained_parameters"][1] == "442,368" and figures["esft-token/share"][1] == "7.59%"
    assert (
        figures["esft-token/peak_memory_bytes"][1] == "582 MiB"
        and figures["full/estimated_peak_bytes"][1] == "75.25 MiB"
    )


def test_another_figure_in_a_file_is_another_on_the_page(run):
    before = page(run).figures
    path = run / "checkpoints" / "full" / "run.json"
    path.write_text(path.read_text().replace("0.1939645759994164", "0.5"))
    path = run / "completions" / "base.law.summary.json"
    path.write_text(path.read_text().replace("10.1234", "11.5"))
    after = page(run)
    assert {k for k in before if before[k] != after.figures[k]} == {
        "full/step_seconds",
        "base/law/mean",
        "card/esft-token/law/before",
        "card/full/law/before",
    }
    assert "table.json has 10.1234 for base on law" in after.text  # which was written before
    assert "table.json has" not in page(write_run(run.parent / "other")).text


def rounds(value: float, text: str) -> bool:
    """Whether `text`, a number with its unit, is `value` to the last digit shown."""
    number, decimals, exponent, unit = re.fullmatch(
        r"(-?[\d,]+(?:\.(\d+))?)(?:e([-+]\d+))?(?: ?(%|MiB|GiB|s|min))?", text
    ).groups()
    one = {None: 1, "s": 1, "%": 0.01, "MiB": 2**20, "GiB": 2**30, "min": 60}[unit] * 10 ** int(exponent or 0)
    return abs(float(number.replace(",", "")) * one - value) <= 0.5001 * one * 10 ** -len(decimals or "")


def test_what_is_read_is_the_figure_rounded(run):
    assert rounds(0.0759, "7.59%") and rounds(609505280, "581 MiB") and rounds(75.5, "76 s") and rounds(1e-5, "1e-05")
    assert not rounds(0.0759, "7.58%") and not rounds(609505280, "580 MiB") and not rounds(3.1, "31")
    note = run / "checkpoints" / "full" / "run.json"
    told = json.loads(note.read_text())
    told["results"] |= {"peak_memory_bytes": 17 * 2**30 + 12345678, "parameters": 15_706_484_224}
    told["config"]["training"] = {**told["config"]["training"], "learning_rate": 1e-5}
    write(note, told)
    history = note.with_name("trainer_state.json")
    history.write_text(history.read_text().replace("75.5", "4000.0"))
    figures = page(run).figures
    assert figures["full/train_runtime"] == (4000, "66.7 min")
    assert len(figures) > 80
    assert not {key: figure for key, figure in figures.items() if not rounds(*figure)}


def test_a_card_has_the_figures_of_the_tables(run):
    found = page(run)
    for method in ("esft-token", "full"):
        for dataset in ("law", "general"):
            for when, who in (("before", "base"), ("after", method)):
                assert found.figures[f"card/{method}/{dataset}/{when}"] == found.figures[f"{who}/{dataset}/mean"]
        assert found.figures[f"card/{method}/share"][0] == found.figures[f"{method}/share"][0]
        for key in ("saved_bytes", "peak_memory_bytes"):
            assert found.figures[f"card/{method}/{key}"] == found.figures[f"{method}/{key}"]
    card = re.search(r'<div class="card".*?<h3>full</h3>(.*?)</div>', found.source)[1]
    facts = [re.sub("<[^>]+>", "", fact) for fact in re.findall("<dd>(.*?)</dd>", card)]
    assert facts[:3] == ["10.1 → 90.1 (+80.0)", "90.6 → 50.6 (\u221240.0)", "100.0%"]


def test_dots_and_intervals_stand_at_their_scores(run):
    chart = re.search(r'<svg class="chart"[^>]*aria-label="law, .*?</svg>', page(run).source)[0]
    axis = {float(text): float(x) for x, text in re.findall(r'<text x="([\d.]+)"[^>]*class="tick">(\d+)<', chart)}
    at = [axis[0] + (axis[100] - axis[0]) * mean / 100 for mean in (10.1234, 50.1234, 90.1234)]
    assert sorted(axis) == [0, 20, 40, 60, 80, 100] and axis[100] > axis[0]
    assert [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', chart)] == pytest.approx(at, abs=0.06)
    wide = 1.5 * (axis[100] - axis[0]) / 100
    intervals = [(float(a), float(b)) for a, b in re.findall(r'd="M([\d.]+) \d+H([\d.]+)M', chart)]
    assert intervals == [pytest.approx((x - wide, x + wide), abs=0.06) for x in at]
    assert re.findall(r'"end">([^<]*)<', chart) == ["10.1 [8.6, 11.6]", "50.1 [48.6, 51.6]", "90.1 [88.6, 91.6]"]


def test_changes_are_of_pairs_and_questions_are_counted(run):
    right = {"base": range(12), "full": (2, 12, 13, 14), "esft-token": range(1, 13)}
    for method, indices in right.items():
        path = run / "completions" / f"{method}.general.jsonl"
        (line, *_) = map(json.loads, path.read_text().splitlines())
        example = line["example"]
        write(path, [
            line | {"score": float(i in indices), "skill": "", "example": example | {"prompt": f"question {i}"}}
            for i in range(40)
        ])  # fmt: skip
    cells = [cell for cell in re.split(r"<[^>]+>", page(run).source) if cell.strip("[], ")]
    rows = {name: cells[cells.index(name) + 1 :][:6] for name in ("full, general", "esft-token, general")}
    change, low, high, *rest = (cell.replace("\u2212", "-") for cell in rows["full, general"])
    assert change == "-20.0" and rest == ["forgotten", "3", "11"]  # of the answers' pairs
    spread = 1.96 * 100 * statistics.pstdev([*[-1] * 11, *[1] * 3, *[0] * 26]) / 40**0.5
    assert (float(low), float(high)) == pytest.approx((-20 - spread, -20 + spread), abs=2.6)
    low, high = (float(cell.replace("\u2212", "-")) for cell in rows["esft-token, general"][1:3])
    assert low < 0 < high and rows["esft-token, general"][3:] == ["uncertain", "1", "1"]


def test_without_the_same_questions_there_is_no_verdict(run):
    (run / "completions" / "full.law.jsonl").unlink()
    cells = [cell for cell in re.split(r"<[^>]+>", page(run).source) if cell]
    assert cells[cells.index("full, law") + 1 :][:5] == ["+80.0", "-", "-", "-", "-"]


def test_the_change_is_the_one_that_the_evaluation_printed(run):
    suite = {"primary": "perplexity", "unit": "as in lm-eval", "higher_is_better": False}
    changed = {"n": 12, "base": 10.1, "adapter": 50.1, "difference": 39.5, "ci95": [30.5, 45.5], "certain": True}
    for method, more in {"base": {}, "esft-token": {"against_base": changed}, "full": {}}.items():
        path = run / "completions" / f"{method}.law.summary.json"
        write(path, json.loads(path.read_text()) | suite | more)
    text = page(run).source
    assert row_of(text, "esft-token, law")[:3] == ["+39.5", "[+30.5, +45.5]", "forgotten"]
    assert row_of(text, "full, law")[:3] == ["+80.0", "-", "-"]  # its tasks' weights are the suite's own
    assert row_of(text, "full, general")[2] != "-"
    assert '<span class="down">+39.5</span>' in text and "law (in its own unit, less is better)" in text
    assert "law: perplexity in its own unit" in text


def test_without_an_interval_the_mean_stands_alone(run):
    path = run / "completions" / "full.law.summary.json"
    write(path, json.loads(path.read_text()) | {"ci95": None})
    text = page(run).source
    assert row_of(text, "full")[0] == "90.1 n=12"
    chart = re.search(r'<svg class="chart"[^>]*aria-label="law, .*?</svg>', text)[0]
    assert chart.count("<circle") == 3 and len(re.findall(r'd="M[\d.]+ \d+H', chart)) == 2


def test_a_question_that_failed_is_not_counted_as_no_longer_right(run):
    for method in ("base", "full"):
        path = run / "completions" / f"{method}.law.jsonl"
        rows = [json.loads(line) | {"score": 1.0} for line in path.read_text().splitlines()]
        if method == "full":
            rows[3] |= {"score": None, "error": "too long"}
            rows[4] |= {"score": 0.0}
        write(path, rows)
    assert row_of(page(run).source, "full, law")[3:] == ["0", "1"]


def test_skills_are_compared_with_the_base(run):
    path = run / "completions" / "full.general.summary.json"
    write(
        path,
        json.loads(path.read_text()) | {"groups": {"copying": {"n": 6, "mean": 31.25}, "new": {"n": 6, "mean": 7}}},
    )
    text = page(run).source
    assert row_of(text, "copying") == ["91", "71 (\u221220.0)", "31 (\u221259.3)"]
    assert row_of(text, "facts") == ["91", "71 (\u221220.0)", "-"] and row_of(text, "new") == ["-", "-", "7"]


def test_the_line_in_a_map_is_drawn_at_the_top_p_of_the_run(run):
    assert "running sum reaches 0.2<" in page(run).source
    table = json.loads((run / "table.json").read_text())
    write(run / "table.json", {**table, "arguments": {**table["arguments"], "top_p_token": 0.5}})
    assert "running sum reaches 0.5<" in page(run).source


def test_equal_scores_stand_in_the_order_of_their_ids(run):
    path = run / "expert_scores" / "summary.json"
    write(path, {"token_scores": {la: {str(e): 0.125 for e in range(8)} for la in ("1", "2")}})
    assert "3 with 37.50%: 0 (12.50%), 3 (12.50%), 7 (12.50%)" in row_of(page(run).source, "2")


def test_a_long_table_of_losses_has_the_last_step(run):
    for count in (60, 61, 125, 1000):
        curve = [(float(step), 1 / step) for step in range(1, count + 1)]
        steps = [int(step) for step in re.findall(r'scope="row">(\d+)<', report_training.loss_table({"a": curve}))]
        assert steps[-1] == count and 30 <= len(steps) <= 60 and len({b - a for a, b in pairwise(steps)}) == 1


def test_the_last_of_two_losses_of_a_step_counts(run):
    write_trained(run / "checkpoints" / "full", "full", 7)
    path = run / "checkpoints" / "full" / "trainer_state.json"
    history = [{"step": 3, "eval_loss": 0.5}, {"step": 3, "eval_loss": 0.25}, {"step": 4, "eval_loss": float("nan")}]
    write(path, {"log_history": history})
    figures = page(run).figures
    assert figures["full/eval_loss@3"] == (0.25, "0.25") and "full/eval_loss@4" not in figures
