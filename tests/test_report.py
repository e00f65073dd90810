"""scripts/report.py: its figures are those of the files, text stays text, nothing is fetched, and parts may miss."""

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
from scripts import report
from utils import run_cli

EVIL = "<script>alert(1)</script><img src=http://x.test/a onerror=alert(2)>\"'&\x1b[31m\ud800"
EXPERTS = {"1": [5, 2], "2": [7, 0, 3]}
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


def page(*folders, **options) -> Page:
    return Page(report.page(folders, **options))


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
    assert {k for k in before if before[k] != after.figures[k]} == {"full/step_seconds", "base/law/mean"}
    assert "table.json has 10.1234 for base on law" in after.text  # which was written before
    assert "table.json has" not in page(write_run(run.parent / "other")).text


def test_changes_questions_and_intervals_are_counted(run):
    for method, right in (("base", {0, 1, 2}), ("full", {2, 3, 4, 5, 6})):
        path = run / "completions" / f"{method}.general.jsonl"
        lines = [
            json.loads(line) | {"score": float(i in right)} for i, line in enumerate(path.read_text().splitlines())
        ]
        write(path, lines)
    path = run / "completions" / "esft-token.general.summary.json"
    write(path, json.loads(path.read_text()) | {"mean": 89.0, "ci95": [87.0, 91.0]})
    cells = [cell for cell in re.split(r"<[^>]+>", page(run).source) if cell]
    rows = {name: cells[cells.index(name) + 1 :][:4] for name in ("full, law", "full, general", "esft-token, general")}
    assert rows["full, general"] == ["\u221240.0", "forgotten", "4", "2"]
    assert rows["full, law"][:2] == ["+80.0", "gained"]
    assert rows["esft-token, general"][:2] == ["\u22121.6", "intervals overlap"]


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
        write(summary, {**told, "dataset": dataset, "primary": EVIL, "groups": {EVIL: {"n": 1, "mean": 5.0}}})
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
    assert report.esc("a\r\nb\tc\x00<&\"'") == "a\nb\tc\ufffd&lt;&amp;&quot;&#x27;"


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


def contrast(a: str, b: str) -> float:
    """Of two colours, by WCAG 2."""

    def light(colour: str) -> float:
        channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", report.THEMES)
def test_text_and_curves_stand_out(name):
    theme = report.THEMES[name]
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") < 4.5
    for ground in (theme["bg"], theme["card"]):
        for kind in ("ink", "soft", "accent", "good", "bad", "warn"):
            assert contrast(theme[kind], ground) >= 4.5, (kind, ground)
        for colour in (*theme["c"], theme["base"], theme["chosen"]):
            assert contrast(colour, ground) >= 3, colour
    steps = [contrast(shade, theme["card"]) for shade in theme["q"]]
    assert steps == sorted(steps), "a higher score stands out more"


@pytest.mark.parametrize(
    "gone, sentence",
    [
        ("expert_scores", "No scores are here, so the trained experts are listed only."),
        ("completions", "mine has no evaluation (completions/ holds no summary)."),
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
    config["training"] = train.DEFAULTS | {"save_strategy": "steps"} | config["training"]
    assert again == train.TrainConfig(**config)


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


# --------------------------------------------------------------------------------------------------------------------
# charts


def points(chart: str, kind: str = "curve") -> list[list[tuple[float, float]]]:
    found = re.findall(rf'<path class="{kind}"[^>]* d="M([^"]*)"', chart)
    return [[tuple(map(float, point.split())) for point in d.split("L")] for d in found]


@pytest.mark.parametrize("losses", [(2.0, 1.0, 0.5, 0.001), (2.0, 1.9, 1.8, 1.7), (0.5, 0.0, -0.25, -1.0)])
def test_a_curve_falls_where_the_loss_does(losses):
    curve = list(zip((1, 10, 20, 30), losses))
    chart = report.loss_chart("loss", {"a": curve, "b": [(1, losses[0])]}, {"a": 0, "b": 1}, True)
    (xy, _) = points(chart)
    assert [x for x, _ in xy] == sorted(x for x, _ in xy) and len(xy) == 4
    assert all(below > above for (_, above), (_, below) in pairwise(xy)), "y grows downwards"
    assert ("log scale" in chart) == (losses[-1] == 0.001)
    steps = [y / x for (x, y) in zip([a - b for a, b in pairwise(losses)], [b[1] - a[1] for a, b in pairwise(xy)])]
    assert (max(steps) - min(steps) < 1) == ("log scale" not in chart)  # pixels per nat are equal where it is linear


@pytest.mark.parametrize(
    "curve", [[(5, 1.0)], [(5, 0.0)], [(1, 2.0), (2, 2.0)], [(0, 0.0), (1, 1e-9)], [(1, 1.0), (2, 5.5)]]
)
@pytest.mark.parametrize("dots", [True, False])
def test_curves_that_have_no_range_are_drawn_too(curve, dots):
    chart = report.loss_chart("loss", {"a": curve}, {"a": 0}, dots)
    assert "nan" not in chart and "inf" not in chart and points(chart)[0]
    assert len(re.findall(r'class="tick">[\d.]', chart)) >= 2


def test_a_long_curve_is_thinned_and_ends_where_it_ends():
    curve = [(float(step), 1 + 1 / (step + 1)) for step in range(100_000)]
    chart = report.loss_chart("loss", {"a": curve}, {"a": 0}, False)
    thick, raw = points(chart)[0], points(chart, "curve raw")[0]
    assert len(thick) <= report.POINTS + 1 and len(raw) <= report.POINTS + 1 and len(chart) < 30_000
    assert thick[-1][0] == raw[-1][0] == pytest.approx(max(x for x, _ in raw))


@pytest.mark.parametrize(
    "low, high, log", [(0, 100, False), (0, 7, False), (-3, 0.2, False), (1e-4, 3, True), (0.2, 1.5, True)]
)
def test_ticks_are_few_round_and_inside(low, high, log):
    found = report.ticks(low, high, log)
    assert 2 <= len(found) <= 8 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert all(len(f"{tick:.6g}".strip("-0.").replace(".", "").strip("0")) <= 2 for tick in found)


def test_labels_are_moved_apart_in_their_order():
    places = [50.0, 52.0, 10.0, 51.0, 199.0]
    moved = report.spread(places, 14, 0, 200)
    order = sorted(range(5), key=places.__getitem__)
    assert all(moved[b] - moved[a] >= 14 for a, b in pairwise(order)) and max(moved) <= 200
    assert report.spread([10.0, 90.0], 14, 0, 100) == [10.0, 90.0]


def test_a_heat_map_has_every_expert_once_and_marks_the_trained():
    score_LE = {la: {e: (e + 1) / 36 for e in range(8)} for la in (1, 2, 5)}
    by_id = {la: list(range(8)) for la in score_LE}
    chart = report.heat_map("scores", score_LE, by_id, {1: {7, 0}, 5: {3}}, {1: 2, 2: 0, 5: 1}, "id")
    assert chart.count("M") - 1 == 3 * 8  # and one of the cut
    assert re.findall(r"<title>(layer \d, expert \d)", chart) == [
        "layer 1, expert 0",
        "layer 1, expert 7",
        "layer 5, expert 3",
    ]
    assert report.scale_end(score_LE) == 8 / 36 and report.scale_end({1: {e: float(e) for e in range(200)}}) == 197
    darkest = re.search(r'fill="var\(--q8\)" d="([^"]*)"', chart)[1]
    assert darkest.count("M") == 3 and 'fill="var(--q9)"' not in chart


def test_the_line_in_a_map_is_drawn_at_the_top_p_of_the_run(run):
    assert "running sum reaches 0.2<" in page(run).source
    table = json.loads((run / "table.json").read_text())
    write(run / "table.json", {**table, "arguments": {**table["arguments"], "top_p_token": 0.5}})
    assert "running sum reaches 0.5<" in page(run).source


def test_experts_of_another_model_are_refused(run):
    config = {"experts": {"1": [99]}, "shared_experts": False, "non_expert_modules": False}
    write(run / "checkpoints" / "esft-token" / "expert_cfg.json", config)
    with pytest.raises(ValueError, match="scores are of another model"):
        page(run)


# --------------------------------------------------------------------------------------------------------------------
# answers


def answers(*scores) -> list[dict]:
    return [{"example": {"prompt": str(i)}, "score": s} for i, s in enumerate(scores)]


def test_the_best_the_worst_and_some_random_questions_are_picked():
    by_label = {"base": answers(*[0.5] * 50), "a": answers(*(i / 50 for i in range(50)))}
    picked = report.pick(by_label, "base", 2, seed=0)
    assert [i for i, why in picked.items() if why == "most gained"] == [49, 48]
    assert [i for i, why in picked.items() if why == "least gained, or lost"] == [0, 1]
    drawn = [i for i, why in picked.items() if why == "drawn at random"]
    assert len(picked) == 6 and len(drawn) == 2
    assert report.pick(by_label, "base", 2, seed=0) == picked
    assert any(report.pick(by_label, "base", 2, seed=seed) != picked for seed in (1, 2, 3))
    assert set(report.pick({"a": answers(0.0, 1.0, None)}, "base", 5, 0)) == {0, 1, 2}


@pytest.mark.parametrize(
    "line, told",
    [
        ({"score": 1.0}, "correct"),
        ({"score": 0.0}, "incorrect"),
        ({"score": 0.934}, "scores 93 of 100"),
        ({"score": None}, "not scored"),
        ({"score": None, "error": "too long"}, "failed"),
        ({"score": 0.0, "truncated": True}, "incorrect, cut off"),
    ],
)
def test_the_verdict_on_an_answer(line, told):
    assert f">{told}<" in report.chip(line)


def test_answers_stand_side_by_side_and_long_ones_are_cut(run):
    found = page(run, count=1)
    (sample, *others) = re.findall(r"<article.*?</article>", found.source, re.DOTALL)
    assert len(others) == 5 and "law question 11" in sample and "gold 11" in sample
    for method, verdict in (("base", "incorrect"), ("esft-token", "scores 92 of 100"), ("full", "correct")):
        assert f"{method} says 11" in sample and f">{verdict}<" in sample
    assert page(run, count=1).source == found.source
    path = run / "completions" / "full.law.jsonl"
    path.write_text(path.read_text().replace("full says", "x" * 10_000))
    assert "characters more)" in page(run).text and "x" * (report.SHOWN + 1) not in page(run).text


def test_answers_to_other_questions_are_left_out(run):
    path = run / "completions" / "full.law.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    found = page(run)
    assert "full: left out, since they answer other questions." in found.text and "full says" in found.text
    law = found.source[found.source.index(">law</h3>", found.source.index('id="answers"')) :].split(">general</h3>")[0]
    assert "esft-token says" in law and "full says" not in law


# --------------------------------------------------------------------------------------------------------------------
# the command


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
