"""What the runs of paper.py come to: intervals over seeds, the paper's claims with what came out, pictures.

The rows are those of a part's table, {"name", "tasks": {task: [per seed]}, "average": [per seed], "general":
[per seed], "share": [per run]}, in percent; a base, which has no seed, has one value.

A claim is a difference between two rows, seed by seed, with its 95 % t interval over seeds. It holds where the interval
lies on the paper's side of 0, does not where it lies on the other, and else so many seeds do not decide.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from utils import atomic_path, note, write_json, write_text

T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # quantiles for n - 1 = 1, 2, ...
TASKS, GENERAL = "average", "general"


def half_width(values: list[float]) -> float:
    """Of the 95 % t interval of the mean; 0 for one value, which has none."""
    if len(values) < 2:
        return 0.0
    return T95[min(len(values), len(T95)) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: list[float], form: str = ".1f") -> str:
    """Mean and 95 % t interval; of one value the value alone."""
    mean, half = statistics.fmean(values), half_width(values)
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]" if len(values) > 1 else f"{mean:{form}}"


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def smallest_good_rate(rows: list[dict], name: str) -> str:
    """Of a method's rates: the smallest whose validation perplexity is within 5 % of its lowest."""
    own = [row for row in rows if row["name"] == name]
    limit = min(row["validation_loss"] for row in own) + math.log(1.05)
    return min((row["learning_rate"] for row in own if row["validation_loss"] <= limit), key=float)


# ---- claims ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """`one` minus `other` of a part's rows; the paper says that it is above 0 (sign 1), below (-1), or little (0)."""

    part: str
    text: str
    one: str
    other: str
    key: str
    paper: str
    sign: int


CLAIMS = (
    Claim("a", "ESFT-Token is as good as full fine-tuning on the tasks", "esft-token", "full", TASKS, "-1.6", 0),
    Claim("a", "ESFT-Gate is as good as full fine-tuning on the tasks", "esft-gate", "full", TASKS, "-0.8", 0),
    Claim("a", "ESFT-Token is better than LoRA on the tasks", "esft-token", "lora", TASKS, "+4.5", 1),
    Claim("a", "ESFT-Gate is better than LoRA on the tasks", "esft-gate", "lora", TASKS, "+5.3", 1),
    Claim("a", "ESFT-Token keeps more general skills than full fine-tuning", "esft-token", "full", GENERAL, "+2.7", 1),
    Claim("a", "ESFT-Gate keeps more general skills than full fine-tuning", "esft-gate", "full", GENERAL, "+1.8", 1),
    Claim("a", "ESFT-Token keeps more general skills than LoRA", "esft-token", "lora", GENERAL, "+2.4", 1),
    Claim("a", "ESFT-Gate keeps more general skills than LoRA", "esft-gate", "lora", GENERAL, "+1.5", 1),
    Claim("a", "chosen by token score, experts learn more than as many random ones", "esft-token",
          "random, as many as token", TASKS, "+2.8", 1),
    Claim("a", "chosen by gate score, experts learn more than as many random ones", "esft-gate",
          "random, as many as gate", TASKS, "+4.4", 1),
    Claim("b", "shared experts as well add little on the tasks", "experts, shared", "experts", TASKS, "+0.4", 0),
    Claim("b", "shared experts as well cost general skills", "experts, shared", "experts", GENERAL, "-0.8", -1),
    Claim("b", "shared experts alone learn less", "shared", "experts", TASKS, "-2.0", -1),
    Claim("b", "shared experts and all else, but no others, learn no more", "shared, all else", "experts", TASKS,
          "-0.4", 0),
    Claim("b", "and cost general skills", "shared, all else", "experts", GENERAL, "-1.5", -1),
    Claim("b", "training all of it learns more", "experts, shared, all else", "experts", TASKS, "+1.4", 1),
    Claim("b", "and costs general skills", "experts, shared, all else", "experts", GENERAL, "-1.2", -1),
)  # fmt: skip


def differences(rows: list[dict], claim: Claim) -> list[float]:
    """Per seed, in percentage points."""
    by_name = {row["name"]: row for row in rows}
    return [a - b for a, b in zip(by_name[claim.one][claim.key], by_name[claim.other][claim.key], strict=True)]


def verdict(values: list[float], sign: int) -> str:
    """A `sign` of 0 claims that there is no difference, which no interval can prove."""
    if len(values) < 2:
        return "one seed"
    mean, half = statistics.fmean(values), half_width(values)
    certain = (mean - half > 0) - (mean + half < 0)
    if sign == 0:
        return "no: certainly more" if certain > 0 else "no: certainly less" if certain < 0 else "not refuted"
    return "yes" if certain == sign else "no" if certain == -sign else "not decided"


def claims_table(parts: dict[str, list[dict]]) -> tuple[str, list[dict]]:
    """(table, rows) of the claims that the parts at hand, {letter: rows}, can tell of."""
    rows = []
    for claim in CLAIMS:
        if claim.part in parts:
            values = differences(parts[claim.part], claim)
            rows.append({**vars(claim), "differences": values, "holds": verdict(values, claim.sign)})
    where = {TASKS: "tasks", GENERAL: "general"}
    lines = [
        [f"({r['part']}) {r['text']}", where[r["key"]], r["paper"], interval(r["differences"], "+.1f"), r["holds"]]
        for r in rows
    ]
    return markdown(["claim", "difference on", "paper", "here", "holds here?"], lines), rows


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw(path: str | Path, size: tuple[float, float], draw_on: Callable) -> None:
    """Save what `draw_on(figure)` draws as a picture (.png)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw_on(figure)
    with atomic_path(path) as beside:
        FigureCanvasAgg(figure).print_png(beside)


def gains_and_losses(rows: list[dict], title: str) -> Callable:
    """Of methods: learned on the tasks (up) against kept of the general skills (right), with intervals over seeds."""

    def draw_on(figure) -> None:
        axes = figure.subplots()
        for number, row in enumerate(rows):
            x, y = row[GENERAL], row[TASKS]
            axes.errorbar(
                statistics.fmean(x), statistics.fmean(y), xerr=half_width(x), yerr=half_width(y),
                fmt="osD^vPX*"[number % 8], color=f"C{number}", capsize=3, label=row["name"],
            )  # fmt: skip
        axes.set(xlabel="general skills (%)", ylabel="mean of the tasks (%)", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)

    return draw_on


def frontier(rows: list[dict], title: str) -> Callable:
    """Of methods at several learning rates: what is learned (up) against what is kept (right)."""

    def draw_on(figure) -> None:
        axes = figure.subplots()
        for number, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
            points = [(row[GENERAL][0], row[TASKS][0], row["learning_rate"]) for row in rows if row["name"] == name]
            axes.plot(*list(zip(*points))[:2], "osD^v"[number % 5] + "-", color=f"C{number}", label=name)
            for x, y, rate in points:
                axes.annotate(rate, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=6, color=f"C{number}")
        axes.set(xlabel="general skills (%)", ylabel="task (%)", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)

    return draw_on


def curves(series: dict[str, list[tuple[float, dict]]], title: str, xlabel: str) -> Callable:
    """Tasks and general skills over what is varied, {label: [(x, row)]}."""

    def draw_on(figure) -> None:
        panels = figure.subplots(1, 2)
        for axes, key, ylabel in zip(panels, (TASKS, GENERAL), ("mean of the tasks (%)", "general skills (%)")):
            for label, points in series.items():
                x = [x for x, _ in points]
                values = [row[key] for _, row in points]
                axes.errorbar(
                    x, list(map(statistics.fmean, values)), yerr=list(map(half_width, values)), fmt="o-", capsize=3,
                    label=label,
                )  # fmt: skip
            axes.set(xlabel=xlabel, ylabel=ylabel)
            axes.grid(alpha=0.3)
        panels[0].legend(fontsize=8)
        figure.suptitle(title)

    return draw_on


def overlap(rows: list[dict], title: str) -> Callable:
    names = [row["name"] for row in rows]

    def draw_on(figure) -> None:
        axes = figure.subplots()
        axes.imshow([[row[name] for name in names] for row in rows], cmap="Blues", vmin=0, vmax=1)
        for i, row in enumerate(rows):
            for j, name in enumerate(names):
                axes.text(j, i, f"{row[name]:.2f}", ha="center", va="center", color="k" if row[name] < 0.6 else "w")
        axes.set_xticks(range(len(names)), names, rotation=30)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title)

    return draw_on


def pictures(stem: str, parts: dict[str, list[dict]]) -> None:
    """STEM_a.png, ..., of the parts that are better looked at."""
    if "r" in parts:
        draw(f"{stem}_r.png", (6.4, 4.8), frontier(parts["r"], "Law and general skills at each learning rate"))
    titles = {"a": "What methods learn, and what they keep", "b": "What is trained, on two tasks"}
    for part, title in titles.items():
        if part in parts:
            draw(f"{stem}_{part}.png", (6.4, 4.8), gains_and_losses(parts[part], title))
    if "c" in parts:
        swept = {row["name"]: row for row in parts["c"] if row["name"].startswith("top_p ")}
        points = [(float(name.split()[1]), row) for name, row in swept.items()]
        draw(f"{stem}_c.png", (9, 3.6), curves({"esft-token": points}, "How many experts are trained", "top_p"))
    if "d" in parts:
        methods = dict.fromkeys(row["name"].split(": ")[1] for row in parts["d"])
        varied = {
            method: [(int(row["name"].split()[0]), row) for row in parts["d"] if row["name"].endswith(f": {method}")]
            for method in methods
        }
        draw(f"{stem}_d.png", (9, 3.6), curves(varied, "Experts of a layer, of equal size together", "experts"))
    if "f" in parts:
        draw(f"{stem}_f.png", (5, 4.2), overlap(parts["f"], "Experts that tasks share (Jaccard index)"))


def conclude(stem: str) -> str:
    """Write STEM_claims.md, STEM_claims.json and the pictures, of all parts whose STEM_<part>.json is there; return
    the table of the claims."""
    found = {part: Path(f"{stem}_{part}.json") for part in "rabcdef"}
    parts = {
        part: json.loads(path.read_text(encoding="utf-8"))["rows"] for part, path in found.items() if path.is_file()
    }
    text, rows = claims_table(parts)
    write_text(
        f"{stem}_claims.md",
        f"# The paper's claims, and what came out here\n\n{text}\n\nDifferences in percentage points, seed by seed, of "
        "the rows of the parts' tables; brackets: 95 % t interval over seeds. A difference of 0 cannot be proved, only "
        "refuted.\n",
    )
    write_json(f"{stem}_claims.json", rows)
    if find_spec("matplotlib"):
        pictures(stem, parts)
    else:
        note("no pictures without matplotlib: python -m pip install -c constraints.txt matplotlib")
    return text
