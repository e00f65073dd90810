"""What answers come to: means with their intervals, what an adapter changed, and the table of it.

    summarize(results) -> summary;  compare(base_results, results) -> summary["against_base"];  table(summaries) -> text

Results are the lines that benchmarks.evaluate returns. Intervals are 95 % percentile bootstrap intervals over samples;
those of a difference draw base and adapter in pairs, the same samples of both. Draws within a skill of n samples are
spread by sqrt(n / (n - 1)), since they scatter about the skill's mean by so much too little; one sample says nothing of
its spread, so that a mean with such a skill has no interval.
"""

from collections.abc import Callable, Iterator

import numpy as np

from evaluation.intervals import _bootstrap, is_certain


def summarize(results: list[dict], *, resamples: int = 2000, seed: int = 0) -> dict:
    """Means in percent over the lines that `evaluate` returns.

    {"n", "failed": count of lines with an error, "mean", "ci95": [low, high], "metrics": {name: mean},
     "missing": {name: count of None}, "groups": {skill: {"n", "mean"}}}

    `mean` is that of the scores. Where rows carry a "skill", means are macro averages, each skill counting the same.
    What failed or could not be computed is left out; with nothing left a mean is None. "ci95" is None where a skill has
    a single score.
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

    names = list(dict.fromkeys(name for result in scored for name in result["metrics"]))  # rows may differ in theirs
    scores = by_skill(lambda result: None if result["score"] is None else 100 * result["score"])
    return {
        "n": len(results),
        "failed": len(results) - len(scored),
        "mean": mean(scores),
        "ci95": _bootstrap(list(scores.values()), resamples, seed, (0, 100)) if scores else None,
        "metrics": {name: mean(by_skill(lambda result, name=name: result["metrics"].get(name))) for name in names},
        "missing": {name: sum(result["metrics"].get(name, 0) is None for result in scored) for name in names},
        "groups": {skill: {"n": len(v), "mean": mean({skill: v})} for skill, v in sorted(scores.items()) if skill},
    }


def compare(base: list[dict], adapted: list[dict], *, resamples: int = 2000, seed: int = 0) -> dict:
    """What an adapter changed, in percent, over the samples that have a score from both (lists in one order).

    {"n", "base", "adapter", "difference": means, "ci95": paired bootstrap interval of the difference, "certain": does
    it exclude 0, where at least LEAST_PAIRS pairs differ}. Samples are drawn as pairs, within their skill where rows
    carry one; skills count the same.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for one, other in zip(base, adapted, strict=True):
        if one["score"] is not None and other["score"] is not None:
            groups.setdefault(one.get("skill", ""), []).append((100 * one["score"], 100 * other["score"]))
    if not groups:
        return {"n": 0, "base": None, "adapter": None, "difference": None, "ci95": None, "certain": False}
    pairs = [np.array(values) for values in groups.values()]
    means = np.mean([values.mean(axis=0) for values in pairs], axis=0)
    changes = [values[:, 1] - values[:, 0] for values in pairs]
    interval = _bootstrap(changes, resamples, seed, (-100, 100))
    return {
        "n": sum(len(values) for values in pairs),
        **{
            name: round(float(v), 4)
            for name, v in zip(("base", "adapter", "difference"), (*means, means[1] - means[0]))
        },
        "ci95": interval,
        "certain": is_certain(interval, sum(np.count_nonzero(values) for values in changes)),
    }


# ------------------------------------------------------------------------------------------------ tables


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _interval(bounds: list[float] | None, form: str = ".1f") -> str:
    return f"[{_number(bounds[0], form)}, {_number(bounds[1], form)}]" if bounds else "-"


def _columns(rows: list[list[str]], left: tuple[int, ...]) -> Iterator[str]:
    """The rows as lines whose columns are wide enough for each; those in `left` start, the others end together."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(row)]
        yield "  ".join(cells).rstrip()


def table(summaries: list[dict], bases: dict[str, dict] | None = None) -> str:
    """A line per data set or suite, in percent (or in the unit of a suite's metric, which is said).

    Where an adapter was compared with its base: both means, and the difference with its interval, marked where that
    excludes 0. Else the mean with its interval, the other metrics and the skills. Below: what was left out, and why;
    `bases` are the summaries of the bases, by data set.
    """
    pairs = [s for s in summaries if "against_base" in s]
    alone = [s for s in summaries if "against_base" not in s]
    return "\n\n".join([*([_paired(pairs, bases or {})] if pairs else []), *([_single(alone)] if alone else [])])


def _paired(summaries: list[dict], bases: dict[str, dict]) -> str:
    rows = [["dataset", "n", "metric", "base", "adapter", "difference", "95 % interval", ""]]
    below = []
    for s in summaries:
        c = s["against_base"]
        means = _number(c["base"]), _number(c["adapter"]), _number(c["difference"], "+.1f")
        mark = "*" if c["certain"] else ""
        rows.append([s["dataset"], str(c["n"]), s["primary"], *means, _interval(c["ci95"], "+.1f"), mark])
        below += [f"  {s['dataset']} (base): {line}" for line in _remarks(bases.get(s["dataset"], {}))]
        below += [f"  {s['dataset']}: {line}" for line in _remarks(s)]
    if any(s["against_base"]["certain"] for s in summaries):
        below.append("* the interval (paired bootstrap over samples) excludes 0")
    return "\n".join([*_columns(rows, (0, 2)), *below])


def _single(summaries: list[dict]) -> str:
    rows, remarks = [["dataset", "n", "metric", "mean", "95 % interval", "seconds", "tokens/s"]], {}
    for s in summaries:
        speed = [f"{s['seconds']:.1f}", _number(s.get("tokens_per_second"))]
        rows.append([s["dataset"], str(s["n"]), s["primary"], _number(s["mean"]), _interval(s["ci95"]), *speed])
        rows += [
            ["", "", name, _number(mean), "", "", ""] for name, mean in s["metrics"].items() if name != s["primary"]
        ]
        rows += [[f"  {name}", str(g["n"]), "", _number(g["mean"]), "", "", ""] for name, g in s["groups"].items()]
        remarks[len(rows)] = [f"  {line}" for line in _remarks(s)]
    lines = []
    for number, line in enumerate(_columns(rows, (0, 2)), start=1):
        lines += [line, *remarks.get(number, [])]
    return "\n".join(lines)


def _remarks(s: dict) -> list[str]:
    """What a summary left out of its means, and why."""
    lines = [
        f"{count} without {name}, left out"
        for name, count in s.get("missing", {}).items()
        if count and name != "judge"  # whose reasons follow
    ]
    if s.get("mean") is not None and s.get("ci95") is None:
        lines.append("no interval: a skill or task has a single sample")
    lines += [f"{n} not graded: {reason}" for reason, n in s.get("judge", {}).get("failed", {}).items()]
    if s.get("failed"):
        lines.append(f"{s['failed']} failed and left out, each with its error in the answers")
    if s.get("truncated"):
        lines.append(f"{s['truncated']} cut off at {s['arguments']['max_new_tokens']} tokens")
    if s.get("unit", "percent") != "percent":
        lines.append(f"in the unit of {s['primary']}, {'more' if s['higher_is_better'] else 'less'} is better")
    return lines
