"""The results of paper.py: intervals over seeds, the paper's claims beside the results here, and pictures.

The rows of a part's table are {"name", "tasks": {task: [per seed]}, "average": [per seed], "general": [per seed],
"share": [per run]}, in percent. A base has no seed and one value.

A claim is a difference between two rows, seed by seed, with its 95 % t interval over seeds. It holds if the interval
lies on the paper's side of 0, and does not hold if it lies on the other side. Otherwise the seeds do not decide it.
"""

import itertools
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from deepseek.files import read_json, write_json, write_text
from evaluation.figures import draw_matrix, new_figure, save_figure
from utils import markdown_table

T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # quantiles for n - 1 = 1, 2, ...
TASKS, GENERAL = "average", "general"


def half_width(values: list[float]) -> float:
    """Return half the width of the 95 % t interval of the mean; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return T95[min(len(values), len(T95)) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: list[float], form: str = ".1f") -> str:
    """Return the mean and its 95 % t interval as text, or a single value alone."""
    mean, half = statistics.fmean(values), half_width(values)
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]" if len(values) > 1 else f"{mean:{form}}"


def largest_rate(rows: list[dict], name: str, kept: float) -> str | None:
    """Return a method's largest rate that, like all smaller ones, keeps at least `kept` % of the general skills."""
    own = sorted((row for row in rows if row["name"] == name), key=lambda row: float(row["learning_rate"]))
    keeping = itertools.takewhile(lambda row: row[GENERAL][0] >= kept, own)
    return max((row["learning_rate"] for row in keeping), key=float, default=None)


# ---- claims ---------------------------------------------------------------------------------------------------------

PAPER_TASKS = {  # table 1: intent, summary, law, translation
    "full": (78.8, 69.4, 47.0, 38.4),
    "lora": (67.8, 64.7, 39.7, 23.1),
    "esft-token": (75.6, 65.4, 45.7, 36.2),
    "esft-gate": (78.6, 65.8, 49.1, 35.2),
}
PAPER_GENERAL = {"full": 58.8, "lora": 59.1, "esft-token": 61.5, "esft-gate": 60.6}
MORE, LESS, AS_GOOD, LITTLE = "more", "less", "as good", "little"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper about the row `one` minus the row `other` of a part.

    `kind` says that the difference is above 0 (MORE), below 0 (LESS), not below 0 (AS_GOOD) or near 0 (LITTLE).
    `paper` is the paper's own difference in points, or None where it shows a picture without a number.
    """

    part: str
    text: str
    one: str
    other: str
    key: str
    kind: str
    paper: float | None = None


def of_table_1(text: str, one: str, other: str, key: str, kind: str) -> Claim:
    """Return a claim about two methods, with the paper's difference over the four tasks that are here too."""
    tasks = statistics.fmean(PAPER_TASKS[one]) - statistics.fmean(PAPER_TASKS[other])
    general = PAPER_GENERAL[one] - PAPER_GENERAL[other]
    return Claim("a", text, one, other, key, kind, tasks if key == TASKS else general)


CLAIMS = (
    of_table_1("ESFT-Token is as good as full fine-tuning", "esft-token", "full", TASKS, AS_GOOD),
    of_table_1("ESFT-Gate is as good as full fine-tuning", "esft-gate", "full", TASKS, AS_GOOD),
    of_table_1("ESFT-Token learns more than LoRA", "esft-token", "lora", TASKS, MORE),
    of_table_1("ESFT-Gate learns more than LoRA", "esft-gate", "lora", TASKS, MORE),
    of_table_1("ESFT-Token keeps more than full fine-tuning", "esft-token", "full", GENERAL, MORE),
    of_table_1("ESFT-Gate keeps more than full fine-tuning", "esft-gate", "full", GENERAL, MORE),
    of_table_1("ESFT-Token keeps more than LoRA", "esft-token", "lora", GENERAL, MORE),
    of_table_1("ESFT-Gate keeps more than LoRA", "esft-gate", "lora", GENERAL, MORE),
    Claim("a", "experts by token score learn more than as many random ones", "esft-token",
          "random, as many as token", TASKS, MORE, 2.8),
    Claim("a", "experts by gate score learn more than as many random ones", "esft-gate",
          "random, as many as gate", TASKS, MORE, 4.4),
    Claim("b", "shared experts as well add little", "experts, shared", "experts", TASKS, LITTLE, 0.4),
    Claim("b", "and cost general skills", "experts, shared", "experts", GENERAL, LESS, -0.8),
    Claim("b", "shared experts alone learn less", "shared", "experts", TASKS, LESS, -2.0),
    Claim("b", "shared experts and all but experts learn less", "shared, all else", "experts", TASKS, LESS, -0.4),
    Claim("b", "and cost general skills", "shared, all else", "experts", GENERAL, LESS, -1.5),
    Claim("b", "experts, shared experts and all else learn more", "experts, shared, all else", "experts", TASKS,
          MORE, 1.4),
    Claim("b", "and cost general skills", "experts, shared, all else", "experts", GENERAL, LESS, -1.2),
    Claim("d", "with finer experts ESFT-Token learns more (64, not 32)", "64 experts: esft-token",
          "32 experts: esft-token", TASKS, MORE),
    Claim("d", "with finer experts ESFT-Token learns more (64, not 16)", "64 experts: esft-token",
          "16 experts: esft-token", TASKS, MORE),
)  # fmt: skip
NOTE = """Differences in percentage points, seed by seed, of the rows of the parts' tables; brackets: 95 % t interval
over seeds. The paper's are of DeepSeek-V2-Lite: in (a) over the same four tasks (random experts: over all of its
eight), in (b) over all eight; "more" is what it draws without a number. "As good" and "little" cannot be proved by an
interval, only refuted. Learning rates are those of equal forgetting on law (part r); what trains more than experts in
(b) has full fine-tuning's. Each base of (d) is pretrained once, so that its interval knows nothing of other bases; a
token meets experts of one width with 64 and 32 of them (6 of 48, 3 of 96; shared 96), and a third more with 16 (2 of
192; shared 192), since it cannot meet one and a half."""


def differences(rows: list[dict], claim: Claim) -> list[float]:
    """Return the differences per seed, in percentage points."""
    by_name = {row["name"]: row for row in rows}
    return [a - b for a, b in zip(by_name[claim.one][claim.key], by_name[claim.other][claim.key], strict=True)]


def verdict(values: list[float], kind: str) -> str:
    """Return whether a claim of this kind holds, given its differences by seed."""
    if len(values) < 2:
        return "one seed"
    mean, half = statistics.fmean(values), half_width(values)
    sign = (mean - half > 0) - (mean + half < 0)
    if kind in (MORE, LESS):
        wanted = 1 if kind == MORE else -1
        return {wanted: "yes", -wanted: "no", 0: "not decided"}[sign]
    if sign == 0:
        return "not refuted"
    return "yes, better" if kind == AS_GOOD and sign > 0 else f"no, {'more' if sign > 0 else 'less'}"


def claims_table(parts: dict[str, list[dict]]) -> tuple[str, list[dict]]:
    """Return the table and the rows of the claims about `parts`, {letter: rows}."""
    rows, lines = [], []
    for claim in CLAIMS:
        if claim.part in parts:
            values = differences(parts[claim.part], claim)
            holds = verdict(values, claim.kind)
            rows.append({**vars(claim), "here": values, "holds": holds})
            where = {TASKS: "tasks", GENERAL: "general"}[claim.key]
            paper = claim.kind if claim.paper is None else f"{claim.paper:+.1f}"
            lines.append([f"({claim.part}) {claim.text}", where, paper, interval(values, "+.1f"), holds])
    return markdown_table(["claim", "difference on", "paper", "here", "holds here?"], lines), rows


def read_parts(stem: str) -> dict[str, dict]:
    """Return the content of every STEM_<part>.json, by part."""
    paths = {part: Path(f"{stem}_{part}.json") for part in "rabcdef"}
    return {part: read_json(path) for part, path in paths.items() if path.is_file()}


def write_claims(stem: str) -> str:
    """Write STEM_claims.md and STEM_claims.json from every STEM_<part>.json; return the claims' table."""
    found = read_parts(stem)
    text, rows = claims_table({part: told["rows"] for part, told in found.items()})
    sources = "\n".join(f"- ({part}) {told['made_by']}" for part, told in found.items() if part in "abd")
    write_text(f"{stem}_claims.md", f"# The paper's claims, and what came out here\n\n{text}\n\n{NOTE}\n\n{sources}\n")
    write_json(f"{stem}_claims.json", rows)
    return text


# ---- pictures -------------------------------------------------------------------------------------------------------


def gains_and_losses(rows: list[dict], title: str, ylabel: str = "mean of the tasks (%)"):
    """Draw methods: score on the tasks (up) against general skills (right), with intervals over seeds.

    Several rows of a name, one per learning rate, make a line.
    """
    figure, axes = new_figure(6.4, 4.8, ncols=1)
    for number, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        own = [row for row in rows if row["name"] == name]
        x, y = ([statistics.fmean(row[key]) for row in own] for key in (GENERAL, TASKS))
        xerr, yerr = ([half_width(row[key]) for row in own] for key in (GENERAL, TASKS))
        look = {"fmt": "osD^vPX*"[number % 8] + "-", "color": f"C{number}", "capsize": 3, "label": name}
        axes.errorbar(x, y, xerr=xerr, yerr=yerr, **look)
        for row, *point in zip(own, x, y):
            rate = row.get("learning_rate", "")
            axes.annotate(rate, point, textcoords="offset points", xytext=(4, 4), fontsize=6, color=f"C{number}")
    axes.set(xlabel="general skills (%)", ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def curves(rows: list[dict], pattern: str, title: str, xlabel: str):
    """Draw tasks and general skills over what is varied. `pattern` finds it, and the curve's label, in a row's name."""
    series: dict[str, list[tuple[float, dict]]] = {}
    for row in rows:
        if match := re.fullmatch(pattern, row["name"]):
            series.setdefault(match["label"] or "esft-token", []).append((float(match["x"]), row))
    figure, panels = new_figure(9, 3.6)
    for axes, key, ylabel in zip(panels, (TASKS, GENERAL), ("mean of the tasks (%)", "general skills (%)")):
        for label, points in series.items():
            x, own = zip(*points)
            means = [statistics.fmean(row[key]) for row in own]
            axes.errorbar(x, means, yerr=[half_width(row[key]) for row in own], fmt="o-", capsize=3, label=label)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(title)
    return figure


def shared_by_pairs(rows: list[dict], title: str):
    """Draw how many experts each pair of tasks shares."""
    names = [row["name"] for row in rows]
    numbers = [[row[name] for name in names] for row in rows]
    figure, axes = new_figure(5, 4.2, ncols=1)
    draw_matrix(axes, names, numbers, [[f"{x:.2f}" for x in row] for row in numbers], title, cmap="Blues", vmin=0)
    return figure


PICTURES = {
    "r": (gains_and_losses, "Law and general skills at each learning rate", "task (%)"),
    "a": (gains_and_losses, "What methods learn, and what they keep"),
    "b": (gains_and_losses, "What is trained"),
    "c": (curves, r"top_p (?P<x>.*)(?P<label>)", "How many experts are trained", "top_p"),
    "d": (curves, r"(?P<x>\d+) experts: (?P<label>.*)", "Experts of a layer, of equal size together", "experts"),
    "f": (shared_by_pairs, "Experts that tasks share (Jaccard index)"),
}


def save_pictures(stem: str) -> None:
    """Save STEM_a.png, ..., of every STEM_<part>.json. Raise ValueError where matplotlib is missing."""
    for part, told in read_parts(stem).items():
        if part in PICTURES:
            draw, *words = PICTURES[part]
            save_figure(draw(told["rows"], *words), f"{stem}_{part}.png")
