"""One page to look at: what was trained, losses, expert maps, scores, answers side by side, and how to do it again.

    python scripts/report.py results/runs/law
    python scripts/report.py results/runs/law results/runs/summary results/checkpoints/mine --output=report.html

RUN is a folder of scripts/pipeline.py, or one that train.py wrote; several come into the same charts and tables. The
page is one HTML file that asks the network for nothing (its Content-Security-Policy forbids it) and runs no script;
charts are SVG, light and dark go by the reader's settings. What a folder lacks is left out, with a sentence.

Every figure is that of a file: `<data value="96.4286">96.4</data>` carries it unrounded. Answers of a model are
untrusted: all text is escaped, and control characters show as a replacement character.

    folders -> read_run -> Run (plain data) -> a section each -> page
"""

import argparse
import html
import json
import math
import random
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from esft import CONFIG_NAME, ExpertConfig, ExpertScores, select_experts
from scripts.expert.generate_expert_config import TOP_P
from scripts.pipeline import TRAINING
from utils import Parser, check_output, positive, read_jsonl, run_cli, suggest_path, write_text

SHOWN = 3000  # characters of a prompt or an answer
POINTS = 600  # of a curve
MANY = 96  # experts of a layer: more, and a map takes the whole width
THEMES = {  # the light page and the dark one: c<n> are the curves' colours, q<n> the heat map's from low to high
    "light": {
        "bg": "#f6f7fa", "card": "#ffffff", "ink": "#1a1f29", "soft": "#556070", "line": "#d9dee7", "accent": "#0b57b4",
        "good": "#0a6b3d", "bad": "#b3261e", "warn": "#805000", "base": "#69727f", "chosen": "#d4380d",
        "c": ["#0b62c4", "#b45309", "#0f766e", "#a21caf", "#b91c1c", "#4d7c0f", "#5b4bd6", "#9d174d"],
        "q": ["#f0f4fa", "#dbe7f6", "#bcd5ef", "#95bde5", "#6ba2d8", "#4585c8", "#2868b2", "#154c91", "#0a3166"],
    },
    "dark": {
        "bg": "#11141a", "card": "#1a1f28", "ink": "#e7eaf0", "soft": "#a7b0bf", "line": "#343c4a", "accent": "#86b8ff",
        "good": "#67d49a", "bad": "#ff9b92", "warn": "#f1bd63", "base": "#9aa4b5", "chosen": "#ff9d5c",
        "c": ["#6cb0ff", "#f5b14c", "#4fd1c0", "#e58cf2", "#ff8a80", "#a5d65b", "#a99bff", "#ff8fbd"],
        "q": ["#202733", "#1f3552", "#1f4470", "#245891", "#2d6eb1", "#4287cb", "#66a3de", "#95c2ee", "#d0e6fb"],
    },
}  # fmt: skip
CSS = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main,footer{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:0 0 .6rem}
h3{font-size:1.05rem;margin:1.3rem 0 .5rem;overflow-wrap:anywhere}
h4{margin:.7rem 0 .4rem;font-size:1rem}
h4 .soft{font-weight:400}
p{margin:.4rem 0 .8rem;max-width:78ch;overflow-wrap:anywhere}
a{color:var(--accent)}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:.8rem 0 1.2rem}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px;margin:0 0 18px;min-width:0}
.soft,figcaption,footer{color:var(--soft);font-size:.9rem}
.cards,.pair{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr))}
.pair{grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));align-items:start}
.answers{display:grid;gap:6px 16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,210px),1fr))}
.cards>*,.pair>*,.answers>*{min-width:0}
.card{border:1px solid var(--line);border-left:5px solid var(--line);border-radius:8px;padding:12px 14px}
.card h3{margin:0 0 .3rem}
.card dl{margin:0;display:grid;grid-template-columns:auto 1fr;gap:2px 12px;font-size:.93rem}
.card dt{color:var(--soft)}
.card dd{margin:0;text-align:right;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;max-width:100%;margin:.4rem 0}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;min-width:min(100%,420px)}
th,td{padding:5px 14px 5px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th:not(.w){white-space:nowrap}
th:first-child{position:sticky;left:0;background:var(--card);min-width:7rem;max-width:45vw;
overflow-wrap:anywhere}
td.n,th.n{text-align:right;white-space:nowrap}
th[scope=row]{font-weight:600}
td.w{overflow-wrap:anywhere;min-width:8.5rem;max-width:22rem}
td.w:nth-child(2):last-child{max-width:52rem}
figure{margin:.5rem 0;min-width:0}
svg.chart{display:block;width:100%;height:auto;overflow:visible}
svg text{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round;
fill:var(--ink);font-size:12.5px;font-family:inherit}
svg .tick{fill:var(--soft);font-size:11.5px}
svg .grid{stroke:var(--line);stroke-width:1}
svg .curve{fill:none;stroke-width:2;stroke-linejoin:round}
svg .raw{stroke-width:1;opacity:.3}
svg .ref{stroke:var(--base);stroke-dasharray:3 3}
svg .chosen{fill:none;stroke:var(--chosen);stroke-width:1.2}
svg .cut{fill:none;stroke:var(--ink);stroke-width:1.6}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;padding:0;margin:.2rem 0;font-size:.9rem}
.legend svg{width:26px;height:10px;margin-right:6px;vertical-align:middle}
.up{color:var(--good)}.down{color:var(--bad)}
.chip{display:inline-block;border:1px solid currentColor;border-radius:99px;padding:0 9px;font-size:.8rem;
font-weight:600;white-space:nowrap}
.right{color:var(--good)}.wrong{color:var(--bad)}.partly{color:var(--warn)}
.sample{border-top:1px solid var(--line);padding:2px 0 10px}
.text{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--bg);border-radius:6px;padding:8px 10px;
margin:4px 0 8px;max-height:17rem;overflow:auto;font:.88rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.label{display:block;font-size:.85rem;font-weight:600;overflow-wrap:anywhere}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--accent)}
pre.text{margin:4px 0;white-space:pre;max-height:none}
a:focus-visible,summary:focus-visible,.scroll:focus-visible,.text:focus-visible{
outline:2px solid var(--accent);outline-offset:2px}
@media(max-width:560px){header,main,footer{padding-left:10px;padding-right:10px}section{padding:14px 12px}
h1{font-size:1.5rem}
table{font-size:.85rem}th,td{padding-right:10px}}
@media(min-width:561px){th:first-child{min-width:11.5rem}}
@media print{body{background:#fff}section{break-inside:avoid-page}.text{max-height:none}nav{display:none}}
"""

# --------------------------------------------------------------------------------------------------------------------
# reading


@dataclass
class Trained:
    """One folder of train.py. `results` is empty where the run was not finished."""

    label: str
    method: str
    folder: Path
    config: dict
    results: dict
    environment: dict
    data: str  # SHA-256 of the training data, or its name
    history: list[dict]
    experts: ExpertConfig | None
    scores: ExpertScores | None
    function: str
    top_p: float


@dataclass
class Run:
    """One RUN of the command line: summaries and answers by data set, then by label, the base's first."""

    name: str
    folder: Path
    trained: list[Trained] = field(default_factory=list)
    summaries: dict[str, dict[str, dict]] = field(default_factory=dict)
    answers: dict[str, dict[str, list[dict]]] = field(default_factory=dict)
    stages: list[list[str]] = field(default_factory=list)
    arguments: dict = field(default_factory=dict)
    base: str = "base"
    notes: list[str] = field(default_factory=list)


def read_json(path: Path) -> dict:
    """The JSON object in a file; ValueError, with the file's name, where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); make it again, or move it away") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object; make it again, or move it away")
    return value


def read_run(folder: Path, name: str, alone: bool) -> Run:
    """Read a folder of the pipeline or of train.py; labels are the methods where it is `alone`, else name/method.

    Raises:
        ValueError, FileNotFoundError: no such folder, no run in it, or a file that is not what its name says.
    """
    if not folder.is_dir():
        where = suggest_path(folder)
        raise FileNotFoundError(f"{folder}: no such folder{where}; give a run of pipeline.py or train.py")
    if (folder / "run.json").is_file():
        return Run(name, folder, [read_trained(folder, name, name, None)])
    try:
        return read_pipeline(folder, name, "" if alone else f"{name}/")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: table.json or stages.json is not what pipeline.py writes ({error!r})") from error


def read_pipeline(folder: Path, name: str, prefix: str) -> Run:
    """Read a folder of the pipeline; a label is `prefix` and the method."""
    checkpoints = [path.parent.name for path in folder.glob("checkpoints/*/run.json")]
    summaries = {path: read_summary(path) for path in sorted(folder.glob("completions/*.summary.json"))}
    if not checkpoints and not summaries:
        raise ValueError(
            f"{folder} is no run: no run.json is in it or in checkpoints/<method>/, nor a summary in completions/; "
            "give a folder of scripts/pipeline.py or train.py"
        )
    table = read_json(folder / "table.json") if (folder / "table.json").is_file() else {}
    stages = read_json(folder / "stages.json") if (folder / "stages.json").is_file() else {}
    run = Run(name, folder, base=f"{prefix}base", arguments=dict(table.get("arguments", {})))
    run.stages = [list(command) for command in stages.values()]
    asked = str(run.arguments.get("methods", "")).replace(" ", "").split(",")
    rank = {method: number for number, method in enumerate(dict.fromkeys(["base", *asked, *TRAINING]))}
    at = folder / "expert_scores"
    scores = ExpertScores.load(at) if (at / "summary.json").is_file() else None
    for method in sorted(checkpoints, key=lambda method: (rank.get(method, 99), method)):
        trained = read_trained(folder / "checkpoints" / method, prefix + method, method, scores)
        trained.top_p = run.arguments.get(f"top_p_{trained.function}") or trained.top_p
        run.trained.append(trained)

    def order(item: tuple[Path, dict]) -> tuple:
        path, summary = item
        names = [Path(d).stem for d in str((summary.get("arguments") or {}).get("eval_dataset", "")).split(",")]
        method, dataset = path.name.split(".")[0], summary["dataset"]
        return names.index(dataset) if dataset in names else 99, dataset, rank.get(method, 99), method

    in_table = {row["method"]: row["scores"] for row in table.get("rows", [])}
    for path, summary in sorted(summaries.items(), key=order):
        method, dataset = path.name.split(".")[0], summary["dataset"]
        run.summaries.setdefault(dataset, {})[prefix + method] = summary
        told = in_table.get(method, {}).get(dataset, summary)["mean"]
        if told != summary["mean"]:
            run.notes.append(f"table.json has {told} for {method} on {dataset}: another evaluation than the one shown.")
        lines = path.with_name(path.name.replace(".summary.json", ".jsonl"))
        if lines.is_file():
            run.answers.setdefault(dataset, {})[prefix + method] = read_answers(lines)
    return run


def read_summary(path: Path) -> dict:
    """A summary of eval_multigpu.py, checked as far as it is shown."""
    summary, number = read_json(path), (int, float)
    ci95 = summary.get("ci95", ())
    if not (
        isinstance(summary.get("dataset"), str)
        and isinstance(summary.get("n"), int)
        and isinstance(summary.get("mean", ""), (*number, type(None)))
        and (ci95 is None or (len(ci95) == 2 and all(isinstance(bound, number) for bound in ci95)))
    ):
        raise ValueError(f"{path}: not a summary of eval_multigpu.py; make it again, or move it away")
    return {"primary": "score", "groups": {}, **summary}


def read_answers(path: Path) -> list[dict]:
    """The lines of eval_multigpu.py, checked as far as they are shown."""
    lines = read_jsonl(path)
    for number, line in enumerate(lines, 1):
        example, score = line.get("example"), line.get("score")
        if not (isinstance(example, dict) and "prompt" in example and isinstance(score, int | float | None)):
            raise ValueError(f"{path}: line {number} is not one of eval_multigpu.py; make it again, or move it away")
    return lines


def read_trained(folder: Path, label: str, method: str, scores: ExpertScores | None) -> Trained:
    """Read a folder of train.py. Where training was not finished, the losses are those of its last checkpoint."""
    note = read_json(folder / "run.json")
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda p: (len(p.parent.name), p.parent.name))
    states += [path for path in [folder / "trainer_state.json"] if path.is_file()]
    function = TRAINING[method][0] or "token" if method in TRAINING else "token"
    try:
        config = note["config"]
        results = dict(note.get("results") or {})
        if not all(isinstance(value, int | float | None) for value in results.values()):
            raise TypeError("a result that is no number")
        config["method"], config["training"].get("seed")
        source = config.get("expert_scores_dir")
        if scores is None and source and Path(source).exists():
            scores = ExpertScores.load(source)
        return Trained(
            label,
            config["method"],
            folder,
            config,
            results,
            dict(note.get("environment") or {}),
            (note.get("inputs") or {}).get("train_dataset") or config["train_dataset"],
            [dict(entry) for entry in read_json(states[-1])["log_history"]] if states else [],
            ExpertConfig.load(folder) if (folder / CONFIG_NAME).is_file() else None,
            scores,
            function,
            TOP_P[function],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: its run.json or trainer_state.json is not train.py's ({error!r})") from error


# --------------------------------------------------------------------------------------------------------------------
# HTML


def esc(text: object) -> str:
    """Text for HTML, in elements and attributes: escaped; what no file or page can show becomes U+FFFD."""
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(text).replace("\r\n", "\n"))
    return html.escape(text)


def num(key: str, value: float | None, text: str | Callable[[float], str]) -> str:
    """A figure: `value` unrounded beside what is read; `key` says which it is. A dash for None."""
    if value is None:
        return "-"
    shown = text if isinstance(text, str) else text(value)
    return f'<data value="{value!r}" data-key="{esc(key)}">{esc(shown)}</data>'


def mib(size: float) -> str:
    """Bytes as MiB, from 10 GiB on as GiB."""
    if size >= 10 * 2**30:
        return f"{size / 2**30:,.2f} GiB"
    return f"{size / 2**20:,.0f} MiB" if size >= 100 * 2**20 else f"{size / 2**20:,.2f} MiB"


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\u2212")


def change(value: float) -> str:
    """A change of a score in points, coloured by its sign."""
    kind = "up" if value > 0.05 else "down" if value < -0.05 else "soft"
    return f'<span class="{kind}">{signed(value)}</span>'


def table(caption: str, head: Iterable[str], rows: Iterable[Iterable[str]], numbers: bool = True) -> str:
    """A table that scrolls by itself; cells are HTML, the first of a row is its heading, `caption` is plain text."""
    kind = ' class="n"' if numbers else ' class="w"'
    first, *others = head
    heads = f'<th scope="col">{first}</th>' + "".join(f'<th scope="col"{kind}>{cell}</th>' for cell in others)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td{kind}>{cell}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></figure>"
    )


def details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


# --------------------------------------------------------------------------------------------------------------------
# SVG


def svg(width: float, height: float, label: str, body: str, least: int = 0) -> str:
    """A chart as wide as its place; where that is below `least` pixels it scrolls."""
    chart = (
        f'<svg class="chart" role="img" aria-label="{esc(label)}" viewBox="0 0 {width:g} {height:g}"'
        f"{f' style=min-width:{least}px' if least else ''}>{body}</svg>"
    )
    return f'<div class="scroll" tabindex="0" role="region" aria-label="chart">{chart}</div>' if least else chart


def words(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{esc(text)}</text>'


def colour(number: int) -> str:
    """Of the n-th run; -1 is the base."""
    return "var(--base)" if number < 0 else f"var(--c{number % 8})"


def dashes(number: int) -> str:
    """After eight runs the colours come again, dashed."""
    return "" if number < 8 else f' stroke-dasharray="{4 + number // 8 * 2} 3"'


def legend(labels: dict[str, int]) -> str:
    """A list of (label -> number of its colour)."""
    line = '<svg viewBox="0 0 26 10" aria-hidden="true"><path d="M0 5h26" stroke="{}" stroke-width="3"{}/></svg>'
    items = (f"<li>{line.format(colour(n), dashes(n))}{esc(label)}</li>" for label, n in labels.items())
    return f'<ul class="legend">{"".join(items)}</ul>'


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers within [low, high]; on a log scale powers of 10, and 2 and 5 times them where that is few."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
            if len(found) >= 4:
                break
        return found
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(step * f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 6)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def spread(places: list[float], gap: float, top: float, bottom: float) -> list[float]:
    """Places moved apart to be `gap` from each other, in their order, within [top, bottom] where they fit."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved, least = list(places), top
    for i in order:
        moved[i] = least = max(moved[i], least)
        least += gap
    most = bottom
    for i in reversed(order):
        moved[i] = most = min(moved[i], most)
        most -= gap
    return moved


def loss_chart(title: str, curves: dict[str, list[tuple[float, float]]], colours: dict[str, int], dots: bool) -> str:
    """Curves of (step, loss), on a log scale where the losses span a factor of 5; `dots` mark and name each point, else
    the curve is drawn thin and its running mean thick."""
    values = [y for points in curves.values() for _, y in points]
    low, high = min(values), max(values)
    log = low > 0 and high / low > 5
    if not log:
        low, high = min(low, 0.0), high or 1.0
    elif len(ticks(low, high, True)) < 2:  # at least two numbers on the axis
        low, high = low / 2, high * 2
    direct = len(curves) <= 6 and max(map(len, curves)) <= 12
    right = 12 + 7 * max(map(len, curves)) if direct else 12
    width, height, left, top, bottom = 440, 280, 50, 12, 40
    last = max(x for points in curves.values() for x, _ in points)
    first = min(0, *(x for points in curves.values() for x, _ in points))

    def at_x(x: float) -> float:
        return left + (width - left - right) * (x - first) / ((last - first) or 1)

    def at_y(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / ((high - low) or 1)
        return height - bottom - (height - top - bottom) * share

    body = []
    for y in ticks(low, high, log):
        body += [f'<path class="grid" d="M{left} {at_y(y):.1f}H{width - right}"/>']
        body += [words(left - 6, at_y(y) + 4, f"{y:g}", "end", "tick")]
    body += [words(at_x(x), height - bottom + 18, f"{x:,g}", "middle", "tick") for x in ticks(first, last or 1, False)]
    body += [words((left + width - right) / 2, height - 4, "optimizer step", "middle", "tick")]
    ends = []
    for label, points in curves.items():
        line, thick = colour(colours[label]) + '"' + dashes(colours[label]), points
        if not dots:
            span = max(1, len(points) // 40)
            thick = [
                (points[i][0], sum(y for _, y in points[max(0, i - span + 1) : i + 1]) / min(i + 1, span))
                for i in range(len(points))
            ]
            if span > 1:
                body += [f'<path class="curve raw" stroke="{line} d="{path(points, at_x, at_y)}"/>']
        body += [f'<path class="curve" stroke="{line} d="{path(thick, at_x, at_y)}"><title>{esc(label)}</title></path>']
        for x, y in points if dots or len(points) == 1 else ():
            body += [
                f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.5" fill="{colour(colours[label])}"><title>'
                f"{esc(label)}, step {x:g}: {y:.4g}</title></circle>"
            ]
        ends.append((label, at_x(thick[-1][0]), at_y(thick[-1][1])))
    if direct:
        for (label, x, _), y in zip(ends, spread([y for *_, y in ends], 14, top, height - bottom)):
            body += [words(x + 7, y + 4, label)]
    told = "; ".join(
        f"{label}: {points[0][1]:.3g} at first, {points[-1][1]:.3g} at last" for label, points in curves.items()
    )
    chart = svg(width, height, f"{title} by optimizer step. {told}.", "".join(body))
    return figure(chart, f"{esc(title)}{', log scale' if log else ''}")


def path(points: list[tuple[float, float]], at_x: Callable, at_y: Callable) -> str:
    """Of at most POINTS points, taken evenly; the last one always."""
    step = math.ceil(len(points) / POINTS)
    kept = points[::step] + ([points[-1]] if (len(points) - 1) % step else [])
    return "M" + "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in kept)


def whiskers(title: str, rows: list[tuple[str, int, dict]], base: float | None) -> str:
    """A row per (label, colour, summary): its mean as a dot, its 95 % interval as a line; `base` is a dashed line."""
    rows = [row for row in rows if row[2]["mean"] is not None]
    bounds = [v for *_, s in rows for v in (s["mean"], *(s["ci95"] or ()))]
    low, high = min(0, *bounds), max(100, *bounds)
    width, left, right, step = 440, 14, 14, 42
    height = step * len(rows) + 34

    def at(value: float) -> float:
        return left + (width - left - right) * (value - low) / (high - low)

    body = []
    for x in ticks(low, high, False):
        body += [
            f'<path class="grid" d="M{at(x):.1f} 4V{height - 26}"/>',
            words(at(x), height - 10, f"{x:g}", "middle", "tick"),
        ]
    if base is not None:  # beside the dots only: it would cross the words out
        marks = "".join(f"M{at(base):.1f} {number * step + 23}v18" for number in range(len(rows)))
        body += [f'<path class="ref" d="{marks}"><title>base: {base:.1f}</title></path>']
    for number, (label, n, summary) in enumerate(rows):
        y, mean, fill = number * step + 32, summary["mean"], colour(n)
        value = f"{mean:.1f}" + (" [{:.1f}, {:.1f}]".format(*summary["ci95"]) if summary["ci95"] else "")
        short = label if len(label) < 34 else f"…{label[-32:]}"
        body += [words(left, y - 12, short), words(width - right, y - 12, value, "end")]
        if summary["ci95"]:
            a, b = (at(v) for v in summary["ci95"])
            line = f"M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 5}v10M{b:.1f} {y - 5}v10"
            body += [f'<path d="{line}" fill="none" stroke="{fill}" stroke-width="2"/>']
        body += [
            f'<circle cx="{at(mean):.1f}" cy="{y}" r="5" fill="{fill}"><title>{esc(label)}: {value}</title></circle>'
        ]
    told = "; ".join(f"{label} {summary['mean']:.1f}" for label, _, summary in rows)
    return svg(width, height, f"{title}: {told}.", "".join(body))


def scale_end(score_LE: dict) -> float:
    """Of a map's colours: the score that one expert in a hundred exceeds, so that a few do not make the others pale."""
    scores = sorted((score for row in score_LE.values() for score in row.values()), reverse=True)
    return scores[len(scores) // 100] or scores[0]


def heat_map(title: str, score_LE: dict, column_LE: dict, chosen: dict, cut: dict | None, axis: str) -> str:
    """Layers x experts in the order of `column_LE`, nine shades from 0 to `scale_end`; `chosen` are outlined, `cut`
    experts of each layer lie left of a line. Of very many experts it is made for the whole width of the page."""
    layers, E = sorted(score_LE), max(map(len, score_LE.values()))
    top, wide = scale_end(score_LE), E > MANY
    w, h = max(4.0, min(16.0, (1000 if wide else 370) / E)), max(9.0, min(18.0, 300 / len(layers)))
    left, head = 46, 4
    cells: list[list[str]] = [[] for _ in range(9)]
    marks, edge = [], ""
    for row, layer in enumerate(layers):
        y = head + row * h
        for column, e in enumerate(column_LE[layer]):
            x, score = left + column * w, score_LE[layer][e]
            cells[min(8, int(9 * score / top))].append(f"M{x:g} {y:g}h{w:g}v{h:g}h-{w:g}z")
            if e in chosen.get(layer, ()):
                told = f"layer {layer}, expert {e}: {score:.2%}"
                place = f'x="{x + 0.7:g}" y="{y + 0.7:g}" width="{w - 1.4:g}" height="{h - 1.4:g}"'
                marks.append(f'<rect class="chosen" pointer-events="all" {place}><title>{told}</title></rect>')
        if cut:
            edge += f"{'L' if edge else 'M'}{left + cut[layer] * w:g} {y:g}v{h:g}"
    body = [f'<path fill="var(--q{level})" d="{"".join(found)}"/>' for level, found in enumerate(cells) if found]
    body += marks + ([f'<path class="cut" d="{edge}"/>'] if cut else [])
    bottom = head + len(layers) * h
    every = 1 if h >= 12 else 2
    body += [
        words(left - 6, head + (row + 0.5) * h + 4, str(layer), "end", "tick")
        for row, layer in enumerate(layers)
        if row % every == 0
    ]
    body += [words(left + (e + 0.5) * w, bottom + 15, str(e), "middle", "tick") for e in range(0, E, max(1, E // 8))]
    body += [words(left + E * w / 2, bottom + 31, axis, "middle", "tick")]
    middle = head + len(layers) * h / 2
    body += [f'<g transform="rotate(-90 10 {middle:g})">{words(10, middle + 4, "layer", "middle", "tick")}</g>']
    return svg(left + E * w + 4, bottom + 36, title, "".join(body), least=900 if wide else 0)


# --------------------------------------------------------------------------------------------------------------------
# sections: each returns HTML


def per_layer(trained: Trained) -> str:
    """`5 to 7 of 64`: how many experts of a layer are trained, of how many where the scores tell."""
    if trained.experts is None:
        return "all" if trained.method == "full" else "-"
    counts = [len(ids) for ids in trained.experts.experts.values()]
    if not counts:
        return "none"
    low, high = min(counts), max(counts)
    of = {len(row) for row in trained.scores[trained.function].values()} if has_scores(trained) else set()
    of = f" of {of.pop()}" if len(of) == 1 else ""
    return (f"{low}" if low == high else f"{low} to {high}") + of


def has_scores(trained: Trained) -> bool:
    return trained.scores is not None and trained.function in trained.scores.by_function


def overview(runs: list[Run], colours: dict[str, int]) -> str:
    """A card per trained model: scores before and after, share, speed, memory."""
    cards = []
    for run in runs:
        for trained in run.trained:
            facts = []
            for dataset, by_label in run.summaries.items():
                before, after = (by_label.get(label, {}).get("mean") for label in (run.base, trained.label))
                if after is not None:
                    change_ = f" ({change(after - before)})" if before is not None else ""
                    arrow = f"{before:.1f} → " if before is not None else ""
                    facts.append((esc(dataset), f"{arrow}{after:.1f}{change_}"))
            results = trained.results
            if not results:
                facts.append(("state", "not finished"))
            if results.get("trained_parameters") and results.get("parameters"):
                facts.append(("trained", f"{results['trained_parameters'] / results['parameters']:.1%}"))
            for name, key in (("saved", "saved_bytes"), ("peak memory", "peak_memory_bytes")):
                if results.get(key) is not None:
                    facts.append((name, mib(results[key])))
            rows = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in facts)
            style = f"border-left-color:{colour(colours[trained.label])}"
            cards.append(f'<div class="card" style="{style}"><h3>{esc(trained.label)}</h3><dl>{rows}</dl></div>')
    several = any(run.summaries for run in runs)
    note = (
        "<p class='soft'>Scores are in percent, before training → after, with the change in points.</p>"
        if several
        else ""
    )
    return f'<div class="cards">{"".join(cards)}</div>{note}' if cards else "<p>Nothing was trained here.</p>"


def what_was_trained(runs: list[Run]) -> str:
    """Properties as rows, trained models as columns."""
    trained = [t for run in runs for t in run.trained]
    if not trained:
        return "<p>No folder of train.py is here, so only the evaluations follow.</p>"

    def result(key: str, text: Callable[[float], str]) -> Callable[[Trained], str]:
        return lambda t: num(f"{t.label}/{key}", t.results.get(key), text)

    def total(t: Trained) -> str:
        took = next((e["train_runtime"] for e in reversed(t.history) if "train_runtime" in e), None)
        return num(f"{t.label}/train_runtime", took, lambda s: f"{s:,.0f} s" if s < 600 else f"{s / 60:,.1f} min")

    def share(t: Trained) -> str:
        part, whole = t.results.get("trained_parameters"), t.results.get("parameters")
        return num(f"{t.label}/share", part / whole, f"{part / whole:.2%}") if part and whole else "-"

    def chosen(t: Trained) -> str:
        return str(sum(map(len, t.experts.experts.values()))) if t.experts else "-"

    def also(t: Trained) -> str:
        flags = (
            {"shared experts": t.experts.shared_experts, "other modules": t.experts.non_expert_modules}
            if t.experts
            else {}
        )
        return ", ".join(name for name, on in flags.items() if on) or "-"

    def proof(t: Trained) -> str:
        if t.method == "full":
            return "-"
        return "proven by hash" if t.results.get("frozen_verified") else "not asked for"

    rows: dict[str, Callable[[Trained], str]] = {
        "method": lambda t: esc(t.method),
        "base model": lambda t: esc(t.config.get("base_model_path")),
        "training data": lambda t: esc(t.config.get("train_dataset")),
        "experts per layer": per_layer,
        "experts in all": chosen,
        "trained beside them": also,
        "parameters": result("parameters", lambda n: f"{n:,}"),
        "trained parameters": result("trained_parameters", lambda n: f"{n:,}"),
        "share": share,
        "learning rate": lambda t: num(
            f"{t.label}/learning_rate", t.config["training"].get("learning_rate"), "{:g}".format
        ),
        "tokens per pack": lambda t: esc(t.config.get("seq_length")),
        "steps": result("steps", lambda n: f"{n:,}"),
        "best step": result("best_step", lambda n: f"{n:,}"),
        "training loss, mean": result("train_loss", "{:.4g}".format),
        "validation loss": result("eval_loss", "{:.4g}".format),
        "time of a step": result("step_seconds", "{:.3g} s".format),
        "time in all": total,
        "peak memory, measured": result("peak_memory_bytes", mib),
        "peak memory, estimated": result("estimated_peak_bytes", mib),
        "gradients": result("gradient_bytes", mib),
        "optimizer states": result("optimizer_bytes", mib),
        "saved": result("saved_bytes", mib),
        "processes": result("world_size", "{:d}".format),
        "ep_size": result("ep_size", "{:d}".format),
        "frozen kept its bits": proof,
    }
    heads = ["", *(esc(t.label) for t in trained)]
    shown = ((name, [cell(t) for t in trained]) for name, cell in rows.items())
    main_table = table(
        "one column per run", heads, [[name, *cells] for name, cells in shown if {*cells} != {"-"}], False
    )
    notes = [f"{esc(t.label)} was not finished: it has no results yet." for t in trained if not t.results]
    if any(str(t.environment.get("device", "")).startswith("cpu") for t in trained):
        notes.append(
            "On the CPU the measured memory is that of the whole process, Python and libraries included; an estimate "
            "is of the model, gradients, states and activations alone."
        )
    keys = dict.fromkeys(key for t in trained for key in t.environment)
    versions = [[esc(key), *(esc(t.environment.get(key) or "-") for t in trained)] for key in keys]
    settings = dict.fromkeys(key for t in trained for key in {**t.config, **t.config["training"]} if key != "training")
    values = [
        [esc(key), *(esc({**t.config, **t.config["training"]}.get(key, "-")) for t in trained)] for key in settings
    ]
    return (
        main_table
        + "".join(f"<p class='soft'>{note}</p>" for note in notes)
        + details("Versions, git, device", table("what the runs depend on", heads, versions, False))
        + details("All settings", table("the resolved configuration", heads, values, False))
    )


def losses(runs: list[Run], colours: dict[str, int]) -> str:
    """A pair of charts, training and validation, for each training set."""
    trained = [t for run in runs for t in run.trained]
    parts = []
    for data in dict.fromkeys(t.data for t in trained):
        group = [t for t in trained if t.data == data]
        charts, rows = [], []
        for key, title in (("loss", "training loss"), ("eval_loss", "validation loss")):
            curves = {}
            for t in group:
                points = {e["step"]: e[key] for e in t.history if isinstance(e.get(key), int | float) and "step" in e}
                points = {step: y for step, y in points.items() if math.isfinite(y)}
                if points:
                    curves[t.label] = sorted(points.items())
            if curves:
                charts.append(loss_chart(f"{title} (nats per label token)", curves, colours, key == "eval_loss"))
            else:
                charts.append(f"<p>No {title} was logged.</p>")
            if key == "eval_loss":
                steps = sorted({step for points in curves.values() for step, _ in points})
                found = {label: dict(points) for label, points in curves.items()}
                rows = [
                    [f"{step:g}", *(num(f"{t}/eval_loss@{step}", found[t].get(step), "{:.4g}".format) for t in found)]
                    for step in steps[:: math.ceil(len(steps) / 60) or 1]
                ]
                heads = ["step", *map(esc, found)]
        name = esc(group[0].config.get("train_dataset"))
        parts.append(f"<h3>on {name}</h3>{legend({t.label: colours[t.label] for t in group})}")
        parts.append(f'<div class="pair">{"".join(charts)}</div>')
        parts.append(
            details("Validation losses as a table", table("validation loss by step", heads, rows)) if rows else ""
        )
    if not parts:
        return "<p>No training was found.</p>"
    note = "Of training, single steps are thin and a running mean is thick. Point at a dot to read it."
    return f'<p class="soft">{note}</p>{"".join(parts)}'


def expert_maps(runs: list[Run]) -> str:
    """Two heat maps, by id and by score, for each run that trains experts."""
    parts = []
    for t in (t for run in runs for t in run.trained):
        if t.experts is None:
            continue
        parts.append(f"<h3>{esc(t.label)}</h3>")
        listed = [[str(la), ", ".join(map(str, ids))] for la, ids in t.experts.experts.items()]
        if not has_scores(t):
            parts.append("<p>No scores are here, so the trained experts are listed only.</p>")
            parts.append(table("experts trained in each layer", ["layer", "experts"], listed, False))
            continue
        score_LE, chosen = t.scores[t.function], {la: set(ids) for la, ids in t.experts.experts.items()}
        if any(la not in score_LE or ids - score_LE[la].keys() for la, ids in chosen.items()):
            raise ValueError(f"{t.folder}: it trains experts that have no scores: the scores are of another model")
        by_id = {la: sorted(row) for la, row in score_LE.items()}
        by_score = {la: sorted(row, key=lambda e, row=row: -row[e]) for la, row in score_LE.items()}
        cut = {
            la: len(ids)
            for la, ids in select_experts(t.scores, score_function=t.function, top_p=t.top_p).experts.items()
        }
        taken, of = sum(map(len, chosen.values())), sum(map(len, score_LE.values()))
        top, highest = scale_end(score_LE), max(max(row.values()) for row in score_LE.values())
        shown = f"0 to {top:.2%}" + (f" (highest {highest:.2%})" if highest > top else "")
        place = "" if max(map(len, score_LE.values())) > MANY else ' class="pair"'
        about = f"{t.function} scores, {len(score_LE)} layers, {taken:,} of {of:,} experts selected"
        left = heat_map(f"{about}; by id", score_LE, by_id, chosen, None, "expert id")
        right = heat_map(f"{about}; by score", score_LE, by_score, chosen, cut, "rank in its layer, 0 = highest score")
        swatch = '<svg viewBox="0 0 90 10" style="width:90px" aria-hidden="true">{}</svg>'
        shades = "".join(f'<rect x="{10 * q}" width="10" height="10" fill="var(--q{q})"/>' for q in range(9))
        mark = (
            '<svg viewBox="0 0 26 10" aria-hidden="true"><rect class="chosen" x="8" y="1" width="10" height="8"/></svg>'
        )
        line = '<svg viewBox="0 0 26 10" aria-hidden="true"><path class="cut" d="M13 0v10"/></svg>'
        source = esc(t.scores.meta.get("dataset") or "the task")
        tokens = f" of {t.scores.meta['tokens']:,} tokens" if isinstance(t.scores.meta.get("tokens"), int) else ""
        parts.append(
            f'<ul class="legend"><li>{swatch.format(shades)}{shown}, {t.function} score on {source}{tokens}</li>'
            f"<li>{mark}trained: {taken:,} of {of:,} experts ({taken / of:.1%})</li>"
            f"<li>{line}where the running sum reaches {t.top_p:g}</li></ul>"
            f"<div{place}>{figure(left, 'by expert id')}{figure(right, 'by score in each layer')}</div>"
        )
        rows = []
        for la, row in score_LE.items():
            best = sorted(chosen.get(la, ()), key=lambda e, row=row: -row[e])
            total = sum(row[e] for e in best)
            ids = ", ".join(f"{e} ({num(f'{t.label}/score/{la}/{e}', row[e], '{:.2%}'.format)})" for e in best)
            rows.append([str(la), f"{len(best)} with {total:.2%}: {ids}" if best else "-"])
        heads = ["layer", "how many, the sum of their scores, and which, best first"]
        parts.append(details("Trained experts as a table", table("experts trained in each layer", heads, rows, False)))
    return "".join(parts) or "<p>No run here selects experts.</p>"


def scores(runs: list[Run], colours: dict[str, int]) -> str:
    """A plot for each data set, the table of means and intervals, and what was gained and forgotten."""
    datasets = list(dict.fromkeys(d for run in runs for d in run.summaries))
    notes = [f"{esc(run.name)} has no evaluation (completions/ holds no summary)." for run in runs if not run.summaries]
    notes += [esc(note) for run in runs for note in run.notes]
    parts = [f"<p>{note}</p>" for note in notes]
    if not datasets:
        return "".join(parts)
    plots = []
    for dataset in datasets:
        rows = [
            (label, colours.get(label, -1), s) for run in runs for label, s in run.summaries.get(dataset, {}).items()
        ]
        bases = {run.summaries.get(dataset, {}).get(run.base, {}).get("mean") for run in runs}
        metric = ", ".join(sorted({str(s["primary"]) for *_, s in rows}))
        if any(s["mean"] is not None for *_, s in rows):
            base = bases.pop() if len(bases) == 1 else None
            dashed = "" if base is None else "; dashed: the base"
            plot = whiskers(f"{dataset}, {metric}", rows, base)
            plots.append(figure(plot, f"{esc(dataset)}: {esc(metric)} in percent{dashed}"))
    parts.append(f'<div class="pair">{"".join(plots)}</div>')

    labels = list(dict.fromkeys(label for run in runs for by in run.summaries.values() for label in by))
    of = {(d, label): s for run in runs for d, by in run.summaries.items() for label, s in by.items()}

    def cell(label: str, dataset: str) -> str:
        s = of.get((dataset, label))
        if s is None or s["mean"] is None:
            return "-"
        key = f"{label}/{dataset}"
        low_high = (num(f"{key}/{side}", v, "{:.1f}".format) for side, v in zip(("low", "high"), s["ci95"] or ()))
        interval = f" [{', '.join(low_high)}]" if s["ci95"] else ""
        failed = f"; {s['failed']} failed" if s.get("failed") else ""
        size = f' <span class="soft">n={num(f"{key}/n", s["n"], "{:d}".format)}{failed}</span>'
        return num(f"{key}/mean", s["mean"], "{:.1f}".format) + interval + size

    rows = [[esc(label), *(cell(label, d) for d in datasets)] for label in labels]
    caption = "means in percent, 95 % intervals over the questions, number of questions"
    parts.append(table(caption, ["", *map(esc, datasets)], rows))
    parts.append(gained_and_forgotten(runs, datasets))
    return "".join(parts)


def is_right(line: dict) -> bool:
    return line.get("score") is not None and line["score"] > 1 - 1e-9


def gained_and_forgotten(runs: list[Run], datasets: list[str]) -> str:
    """Changes against the base of the same run: means, questions, skills."""
    rows, parts = [], []
    for run in runs:
        for dataset in datasets:
            by_label = run.summaries.get(dataset, {})
            base = by_label.get(run.base)
            if not base or base["mean"] is None:
                continue
            for label, s in by_label.items():
                if label == run.base or s["mean"] is None:
                    continue
                apart = (
                    base["ci95"] and s["ci95"] and (s["ci95"][0] > base["ci95"][1] or s["ci95"][1] < base["ci95"][0])
                )
                verdict = "intervals overlap"
                if apart:
                    verdict = "gained" if s["mean"] > base["mean"] else "forgotten"
                was, now = (run.answers.get(dataset, {}).get(name, []) for name in (run.base, label))
                pairs = list(zip(was, now)) if same_questions(was, now) else []
                won, lost = (sum(is_right(b) > is_right(a) for a, b in p) for p in (pairs, [(b, a) for a, b in pairs]))
                rows.append([f"{esc(label)}, {esc(dataset)}", change(s["mean"] - base["mean"]), verdict])
                rows[-1] += [str(won), str(lost)] if pairs else ["-", "-"]
            skills = sorted({skill for s in by_label.values() for skill in s.get("groups") or {}})
            if skills:
                before = base.get("groups") or {}

                def after(
                    label: str, skill: str, before: dict = before, by_label: dict = by_label, run: Run = run
                ) -> str:
                    mean = (by_label[label].get("groups") or {}).get(skill, {}).get("mean")
                    old = before.get(skill, {}).get("mean")
                    if mean is None:
                        return "-"
                    return f"{mean:.0f}" + (f" ({change(mean - old)})" if label != run.base and old is not None else "")

                lines = [[esc(skill), *(after(label, skill) for label in by_label)] for skill in skills]
                parts.append(
                    details(
                        f"{esc(dataset)} by skill" + (f", {esc(run.name)}" if len(runs) > 1 else ""),
                        table("means in percent, change against the base", ["skill", *map(esc, by_label)], lines),
                    )
                )
    if not rows:
        return "<p>No base was evaluated beside a trained model, so there is no change to show.</p>"
    heads = ["", "change", "verdict", "newly right", "no longer right"]
    note = (
        "Gained or forgotten where the two 95 % intervals do not touch. Right is an answer with the full score; the "
        "last columns count questions that the base and the trained model answer differently."
    )
    parts.insert(0, table("against the base", heads, rows))
    return f'<h3>Gained and forgotten</h3><p class="soft">{note}</p>{"".join(parts)}'


def same_questions(a: list[dict], b: list[dict]) -> bool:
    """Whether two files answer the same questions in the same order."""
    return bool(a) and [x["example"]["prompt"] for x in a] == [x["example"]["prompt"] for x in b]


def pick(answers: dict[str, list[dict]], base: str, count: int, seed: int) -> dict[int, str]:
    """{index of a question: why it is shown}: the `count` with the highest and with the lowest mean gain over the base
    (mean score, where there is no base), and as many drawn with `seed`. None is shown twice."""

    def score(line: dict) -> float:
        return line.get("score") or 0.0

    trained = [lines for label, lines in answers.items() if label != base] or list(answers.values())
    before = answers.get(base) if len(answers) > 1 else None
    size = len(trained[0])
    gain = [
        (sum(score(lines[i]) for lines in trained) / len(trained) - (score(before[i]) if before else 0))
        for i in range(size)
    ]
    order = sorted(range(size), key=lambda i: (-gain[i], i))
    best, worst = ("most gained", "least gained, or lost") if before else ("best", "worst")
    found = dict.fromkeys(order[:count], best)
    found |= {i: worst for i in reversed(order[-count:]) if i not in found}
    rest = [i for i in range(size) if i not in found]
    return found | dict.fromkeys(sorted(random.Random(seed).sample(rest, min(count, len(rest)))), "drawn at random")


def text_block(label: str, text: object, chip: str = "") -> str:
    shown = "(no answer)" if text is None else str(text).strip() or "(empty)"
    more = len(shown) - SHOWN
    shown = esc(shown[:SHOWN]) + (f"\n… ({more:,} characters more)" if more > 0 else "")
    return (
        f'<div><span class="label">{label} {chip}</span><div class="text" dir="auto" tabindex="0">{shown}</div></div>'
    )


def chip(line: dict) -> str:
    """The verdict on an answer."""
    score = line.get("score")
    if "error" in line:
        kind, told = "wrong", "failed"
    elif score is None:
        kind, told = "partly", "not scored"
    elif is_right(line):
        kind, told = "right", "correct"
    elif score <= 0:
        kind, told = "wrong", "incorrect"
    else:
        kind, told = "partly", f"scores {100 * score:.0f} of 100"
    cut = ", cut off" if line.get("truncated") else ""
    return f'<span class="chip {kind}">{told}{cut}</span>'


def samples(runs: list[Run], count: int, seed: int) -> str:
    """For each data set some questions, with every model's answer beside the gold one."""
    parts = []
    for run in runs:
        for dataset, answers in run.answers.items():
            first = next(iter(answers.values()))
            left_out = [label for label, lines in answers.items() if not same_questions(first, lines)]
            answers = {label: lines for label, lines in answers.items() if label not in left_out}
            where = f"{esc(run.name)}, {esc(dataset)}" if len(runs) > 1 else esc(dataset)
            parts.append(f"<h3>{where}</h3>")
            if left_out:
                parts.append(f"<p>{esc(', '.join(left_out))}: left out, since they answer other questions.</p>")
            for i, why in pick(answers, run.base, count, seed).items() if answers else ():
                example = next(iter(answers.values()))[i]["example"]
                gold = " / ".join(map(str, example.get("raw_answers") or [])) or "(none)"
                blocks = [
                    text_block(
                        esc(label),
                        lines[i].get("error") if "error" in lines[i] else lines[i]["example"].get("raw_prediction"),
                        chip(lines[i]),
                    )
                    for label, lines in answers.items()
                ]
                skill = next(iter(answers.values()))[i].get("skill")
                named = f", {esc(skill)}" if skill else ""
                parts.append(
                    f'<article class="sample"><h4>Question {i + 1}{named} <span class="soft">{why}</span></h4>'
                    f'<div class="pair">'
                    f"{text_block('prompt', example['prompt'])}{text_block('gold answer', gold)}</div>"
                    f'<div class="answers">{"".join(blocks)}</div></article>'
                )
    if not parts:
        return "<p>No answers are here (completions/*.jsonl).</p>"
    note = (
        f"By their mean change against the base, the {count} best and worst of each data set, and {count} drawn with "
        f"seed {seed}. White space around an answer is not shown."
    )
    return f'<p class="soft">{note}</p>{"".join(parts)}'


def train_command(t: Trained) -> list[str]:
    """The command that gives the resolved config of a run: paths as flags, every other key as key=value."""
    flags = ("base_model_path", "train_dataset", "expert_config", "output_dir")
    keys = {
        k: v for k, v in {**t.config, **t.config["training"]}.items() if k not in (*flags, "training") and v is not None
    }
    world = t.results.get("world_size") or 1
    script = "train_ep.py" if world > 1 and t.method in ("esft", "random") else "train.py"
    start = ["torchrun", f"--nproc-per-node={world}", script] if world > 1 else ["python", script]
    given = [f"--{key}={t.config[key]}" for key in flags if t.config.get(key)]
    return [*start, *given, *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in keys.items())]


def shell(command: list[str]) -> str:
    """A command to be pasted, in lines of some 96 characters."""
    lines = [""]
    for word in map(shlex.quote, command):
        if lines[-1] and len(lines[-1]) + len(word) > 96:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def commands(runs: list[Run]) -> str:
    parts = []
    for run in runs:
        found: list[list[str]] = []
        if run.arguments:
            flags = {k: v for k, v in run.arguments.items() if v is not None and v is not False and k != "overrides"}
            words_ = [f"--{k}" if v is True else f"--{k}={v}" for k, v in flags.items()]
            found.append(["python", "scripts/pipeline.py", *words_, *run.arguments.get("overrides", [])])
        stages = [["python", *command] for command in run.stages] or [train_command(t) for t in run.trained]
        gits = dict.fromkeys(str(t.environment["git"]) for t in run.trained if t.environment.get("git"))
        parts.append(f"<h3>{esc(run.name)}</h3>" if len(runs) > 1 else "")
        if gits:
            parts.append(
                f"<p>At git {', '.join(f'<code>{esc(git)}</code>' for git in gits)}; from the repository's root:</p>"
            )

        def block(lines: list[list[str]]) -> str:
            return "".join(f'<pre class="text" tabindex="0">{esc(shell(line))}</pre>' for line in lines)

        if not found and not stages:
            parts.append("<p>No command was recorded (stages.json, table.json).</p>")
        elif found:
            parts.append(block(found) + (details(f"Its {len(stages)} stages", block(stages)) if stages else ""))
        else:
            parts.append(block(stages))
    return "".join(parts)


# --------------------------------------------------------------------------------------------------------------------
# the page


def theme(name: str) -> str:
    """CSS variables of a theme."""
    flat = {k: v for k, v in THEMES[name].items() if isinstance(v, str)}
    flat |= {f"{k}{n}": v for k in ("c", "q") for n, v in enumerate(THEMES[name][k])}
    return "".join(f"--{key}:{value};" for key, value in flat.items())


def page(folders: list[str | Path], count: int = 2, seed: int = 0) -> str:
    """The HTML of a report on `folders`, with `count` questions of each kind; drawn with `seed`.

    Raises:
        ValueError, FileNotFoundError: a folder that is no run, given twice, or with files that are damaged.
    """
    paths = [Path(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a folder is given twice; give each once")
    if len(set(names)) < len(names):
        names = list(map(str, paths))
    runs = [read_run(path, name, len(paths) == 1) for path, name in zip(paths, names)]
    colours = {t.label: number for number, t in enumerate(t for run in runs for t in run.trained)}
    others = (label for run in runs for by in run.summaries.values() for label in by if label != run.base)
    for label in others:  # evaluated, but its training is not here
        colours.setdefault(label, len(colours))
    sections = {
        "At a glance": overview(runs, colours),
        "What was trained": what_was_trained(runs),
        "Scores": scores(runs, colours),
        "Losses": losses(runs, colours),
        "Experts": expert_maps(runs),
        "Answers": samples(runs, count, seed),
        "Do it again": commands(runs),
    }
    ids = {title: title.lower().replace(" ", "-") for title in sections}
    dates = sorted(str(t.environment["date"]) for run in runs for t in run.trained if t.environment.get("date"))
    told = " and ".join(dict.fromkeys(str(t.config.get("base_model_path")) for run in runs for t in run.trained))
    subtitle = " · ".join(filter(None, [told, ", ".join(dict.fromkeys(date[:10] for date in dates))]))
    title = f"Report: {', '.join(names)}"
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    body = "".join(
        f'<section id="{ids[name]}" aria-labelledby="h-{ids[name]}">'
        f'<h2 id="h-{ids[name]}">{name}</h2>{content}</section>'
        for name, content in sections.items()
    )
    links = "".join(f'<a href="#{ids[name]}">{name}</a>' for name in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{esc(title)}</title><style>:root{{color-scheme:light dark;{theme('light')}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{theme('dark')}}}}}{CSS}</style></head>"
        f'<body><header><h1>{esc(title)}</h1><p class="soft">{esc(subtitle)}</p>'
        f'<nav aria-label="sections">{links}</nav></header><main>{body}</main>'
        "<footer><p>Written by scripts/report.py from the files of the runs.</p></footer></body></html>\n"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders of scripts/pipeline.py or train.py")
    add("--output", metavar="FILE.html", help="the page (default: report.html in the first RUN)")
    add("--n_samples", type=positive, default=2, metavar="N", help="questions shown of each kind (best, worst, random) "
        "and data set (default: 2)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the random questions (default: 0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    output = Path(args.output or Path(args.runs[0]) / "report.html")
    text = page(args.runs, args.n_samples, args.seed)
    check_output(output)
    write_text(output, text)
    print(f"written to {output} ({len(text.encode()) / 1024:,.0f} KiB)")
    return output


if __name__ == "__main__":
    run_cli(main)
