"""Summaries of answers: means with their intervals, what an adapter changed, and a table of both.

`results` are the lines of a completions file. Intervals are 95 % bootstrap intervals over samples, drawn again within
each skill. The interval of a difference draws the same samples from the base and the adapter. A skill with one sample
says nothing about its spread, so a mean with such a skill has no interval.
"""

from collections.abc import Callable, Iterator

import numpy as np

from evaluation.intervals import Strata, compare_pairs, interval


def summarize(results: list[dict], *, seed: int = 0) -> dict:
    """Return means in percent:

    {"n", "failed": lines with an error, "mean": of the scores, "ci95": [low, high] or None, "metrics": {name: mean},
     "missing": {name: lines without a value}, "groups": {skill: {"n", "mean"}}}

    Each skill counts the same. A line that failed, or a value that is missing, is left out. A mean of nothing is None.
    """
    scored = [result for result in results if "error" not in result]

    def by_skill(value: Callable[[dict], float | None]) -> dict[str, np.ndarray]:
        found: dict[str, list[float]] = {}
        for result in scored:
            if value(result) is not None:
                found.setdefault(result.get("skill", ""), []).append(value(result))
        return {skill: np.array(values) for skill, values in found.items()}

    def mean(groups: dict[str, np.ndarray]) -> float | None:
        return round(float(np.mean([values.mean() for values in groups.values()])), 4) if groups else None

    names = list(dict.fromkeys(name for result in scored for name in result["metrics"]))
    scores = by_skill(lambda result: None if result["score"] is None else 100 * result["score"])
    return {
        "n": len(results),
        "failed": len(results) - len(scored),
        "mean": mean(scores),
        "ci95": interval(Strata([[v] for v in scores.values()]).draws(seed)[0], (0, 100)) if scores else None,
        "metrics": {name: mean(by_skill(lambda result, name=name: result["metrics"].get(name))) for name in names},
        "missing": {name: sum(result["metrics"].get(name, 0) is None for result in scored) for name in names},
        "groups": {skill: {"n": len(v), "mean": mean({skill: v})} for skill, v in sorted(scores.items()) if skill},
    }


def compare(base: list[dict], adapted: list[dict], *, seed: int = 0) -> dict:
    """Return what an adapter changed, in percent, on the samples that both scored, as `compare_pairs` does.

    The two lists have one order. Each skill counts the same.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for one, other in zip(base, adapted, strict=True):
        if one["score"] is not None and other["score"] is not None:
            groups.setdefault(one.get("skill", ""), []).append((100 * one["score"], 100 * other["score"]))
    if not groups:
        return {"n": 0, "base": None, "adapter": None, "difference": None, "ci95": None, "certain": False}
    strata = Strata([list(zip(*pairs)) for pairs in groups.values()])
    return compare_pairs(strata, strata.means(), strata.draws(seed), 100)


# ------------------------------------------------------------------------------------------------ tables


def format_results(summaries: list[dict], bases: dict[str, dict] | None = None) -> str:
    """Return a line per data set or suite, in percent or in the unit that a remark names, and remarks below.

    A summary with "against_base" shows both means and their difference. Any other shows its mean, metrics and skills.
    `bases` has the summaries of the bases by data set, for the remarks on them.
    """
    pairs = [s for s in summaries if "against_base" in s]
    alone = [s for s in summaries if "against_base" not in s]
    tables = [*([_format_pairs(pairs, bases or {})] if pairs else []), *([_format_alone(alone)] if alone else [])]
    return "\n\n".join(tables)


def _format_pairs(summaries: list[dict], bases: dict[str, dict]) -> str:
    rows, below = [["dataset", "n", "metric", "base", "adapter", "difference", "95 % interval", ""]], []
    for s in summaries:
        c = s["against_base"]
        means = _number(c["base"]), _number(c["adapter"]), _number(c["difference"], "+.1f")
        bounds, mark = _bounds(c["ci95"], "+.1f"), "*" if c["certain"] else ""
        rows.append([s["dataset"], str(c["n"]), s["primary"], *means, bounds, mark])
        below += [f"  {s['dataset']} (base): {line}" for line in _remarks(bases.get(s["dataset"], {}))]
        below += [f"  {s['dataset']}: {line}" for line in _remarks(s)]
    if any(s["against_base"]["certain"] for s in summaries):
        below.append("* the interval (paired bootstrap over samples) excludes 0")
    return "\n".join([*_columns(rows), *below])


def _format_alone(summaries: list[dict]) -> str:
    rows, remarks = [["dataset", "n", "metric", "mean", "95 % interval", "seconds", "tokens/s"]], {}
    for s in summaries:
        speed = [f"{s['seconds']:.1f}", _number(s.get("tokens_per_second"))]
        rows.append([s["dataset"], str(s["n"]), s["primary"], _number(s["mean"]), _bounds(s["ci95"]), *speed])
        others = {name: mean for name, mean in s["metrics"].items() if name != s["primary"]}
        rows += [["", "", name, _number(mean), "", "", ""] for name, mean in others.items()]
        rows += [[f"  {name}", str(g["n"]), "", _number(g["mean"]), "", "", ""] for name, g in s["groups"].items()]
        remarks[len(rows)] = [f"  {line}" for line in _remarks(s)]
    lines = []
    for number, line in enumerate(_columns(rows), start=1):
        lines += [line, *remarks.get(number, [])]
    return "\n".join(lines)


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _bounds(bounds: list[float] | None, form: str = ".1f") -> str:
    return f"[{bounds[0]:{form}}, {bounds[1]:{form}}]" if bounds else "-"


def _columns(rows: list[list[str]]) -> Iterator[str]:
    """Yield the rows as aligned lines: the names (columns 0 and 2) on the left, the numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [f"{cell:{'<' if i in (0, 2) else '>'}{widths[i]}}" for i, cell in enumerate(row)]
        yield "  ".join(cells).rstrip()


def _remarks(s: dict) -> list[str]:
    """Return what a summary leaves out of its means, and why."""
    missing = s.get("missing", {}).items()
    lines = [f"{n} without {name}, left out" for name, n in missing if n and name != "judge"]  # its reasons follow
    if s.get("mean") is not None and s.get("ci95") is None:
        lines.append("no interval: that needs at least two samples of each skill or task")
    lines += [f"{n} not graded: {reason}" for reason, n in s.get("judge", {}).get("failed", {}).items()]
    if s.get("failed"):
        lines.append(f"{s['failed']} failed and left out, each with its error in the answers")
    if s.get("truncated"):
        lines.append(
            f"{s['truncated']} cut off at {s['arguments']['max_new_tokens']} tokens or at the end of the context"
        )
    if s.get("unit", "percent") != "percent":
        lines.append(f"in the unit of {s['primary']}, {'more' if s['higher_is_better'] else 'less'} is better")
    return lines
