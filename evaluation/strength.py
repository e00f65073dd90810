"""How strong should a change be? Evaluate it at several strengths, and choose one that forgets little.

    <folder>/0/law.jsonl, 0.5/law.jsonl, 0.7/law.jsonl, ..., curve.json, curve.png

A strength of 0 is the base, with which all others are compared. Each strength is an evaluation of its own, with a
process and a model of its own. The first data set is the task and the last one the general skills.
"""

import os
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

from deepseek.files import read_jsonl, write_json
from evaluation.config import EvalConfig
from evaluation.figures import BASE, COLORS, new_figure, save_figure
from evaluation.results import compare
from utils import PYTHON, ROOT, environment, flag_words, markdown_table, note

CurvePoint = dict  # "strength", and by data set "mean" and "difference" to the base with its "ci95"


def evaluate_strengths(config: EvalConfig, run: Callable[..., list[dict]], folder: Path) -> list[dict]:
    """Evaluate each strength by `run`, print the curve, write it to `folder`, and return all summaries.

    What an earlier curve in this folder has asked already is taken as it is.
    """
    every, points = [], []
    for strength in sorted({0.0, *config.strengths}):
        note(f"strength {strength:g}" if strength else "the base")
        part = replace(
            config,
            adapter_dir=config.adapter_dir if strength else None,
            strength=f"{strength:g}" if strength else "1",
            output_path=None,
            output_dir=str(folder / f"{strength:g}"),
            base_answers=None if strength else config.base_answers,
            **dict.fromkeys(("with_base", "choose_strength"), False),
        )
        every.append(run(part, (folder / f"{strength:g}",)))
        points.append(point_of(strength, every[-1], every[0], folder))
    names = list(points[0]["mean"])
    print(f"\n{format_curve(points)}")
    chosen = None
    if config.choose_strength:
        chosen = choose(points, names[0], names[-1], config.max_loss)
        print(f"\n{recommend(chosen, config, names)}")
    facts = {"chosen": chosen, "arguments": asdict(config), "environment": environment()}
    write_json(folder / "curve.json", {"points": points, **facts})
    if find_spec("matplotlib"):
        save_figure(draw_curve(points, chosen), folder / "curve.png")
    print(f"\nthe curve is in {folder}")
    return [summary for summaries in every for summary in summaries]


def point_of(strength: float, summaries: list[dict], base: list[dict], folder: Path) -> CurvePoint:
    """Return the means of a strength, and how they differ from the base's, with an interval but for suites.

    Raises:
        ValueError: no question of a data set has a score from both.
    """
    point: CurvePoint = {"strength": strength, "mean": {}, "difference": {}, "ci95": {}}
    for summary, of_base in zip(summaries, base, strict=True):
        name = summary["dataset"]
        change = {"difference": None, "ci95": None}
        if "unit" not in summary:
            answers = (read_jsonl(folder / s / f"{name}.jsonl") for s in ("0", f"{strength:g}"))
            change = compare(*answers, seed=summary["arguments"]["seed"])
        elif None not in (summary["mean"], of_base["mean"]):  # a suite weighs its tasks by itself
            change["difference"] = summary["mean"] - of_base["mean"]
        if change["difference"] is None:
            cause = f"no question has a score from both. See why in its answers in {folder}"
            raise ValueError(f"cannot compare strength {strength:g} with the base on {name}: {cause}.")
        point["mean"][name] = summary["mean"]
        point["difference"][name], point["ci95"][name] = change["difference"], change["ci95"]
    return point


def choose(points: list[CurvePoint], task: str, general: str, max_loss: float) -> float | None:
    """Return the strength with the largest gain on `task` that loses at most `max_loss` points of `general`.

    Of equal gains the smallest strength is taken. None: each strength loses more, or gains nothing.
    """
    fits = [p for p in points if p["difference"][general] >= -max_loss and p["difference"][task] > 0]
    best = max(fits, key=lambda p: (p["difference"][task], -p["strength"]), default=None)
    return best and best["strength"]


def recommend(strength: float | None, config: EvalConfig, names: list[str]) -> str:
    """Return what was chosen, and the command that merges it."""
    limit = f"loses at most {config.max_loss:g} points of {names[-1]}"
    if strength is None:
        return f"no strength gains on {names[0]} and {limit}: raise --max_loss, or keep the base"
    adapter = config.adapter_dir.rstrip("/")
    paths = {"base_model_path": config.base_model_path, "adapter_dir": adapter}
    flags = flag_words(**paths, strength=f"{strength:g}", output_dir=f"{adapter}_at_{strength:g}")
    command = shlex.join([PYTHON, os.path.relpath(ROOT / "scripts" / "merge_adapter.py"), *flags])
    return f"strength {strength:g}: the most on {names[0]} that {limit}\nnext: {command}"


def format_curve(points: list[CurvePoint]) -> str:
    """Return a line per strength: the mean of each data set, and its difference to the base with 95 % interval."""
    names, rows = list(points[0]["mean"]), []
    for point in points:
        cells = []
        for name in names:
            change, bounds = point["difference"][name], point["ci95"][name]
            interval = f" [{bounds[0]:+.1f}, {bounds[1]:+.1f}]" if bounds else ""
            shown = f"{point['mean'][name]:.1f}"
            cells += [f"{shown} ({change:+.1f}{interval})" if point["strength"] else shown]
        rows.append([f"{point['strength']:g}" if point["strength"] else "0 (base)", *cells])
    return markdown_table(["strength", *names], rows)


def draw_curve(points: list[CurvePoint], chosen: float | None):
    """Return a figure: the means by strength and, of two data sets or more, the first against the last."""
    names, strengths = list(points[0]["mean"]), [point["strength"] for point in points]
    figure, (left, right) = new_figure(9, 3.8)
    for name, color in zip(names, COLORS):
        left.plot(strengths, [point["mean"][name] for point in points], "o-", color=color, label=name)
    if chosen is not None:
        left.axvline(chosen, color=BASE, linestyle=":", label=f"chosen: {chosen:g}")
    left.set(xlabel="strength (0: the base, 1: as trained)", ylabel="mean score (%)", title="by strength")
    left.legend(frameon=False)
    task, general = ([point["mean"][name] for point in points] for name in (names[0], names[-1]))
    right.plot(general, task, "o-", color=COLORS[0])
    for x, y, strength in zip(general, task, strengths):
        right.annotate(f"{strength:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    right.set(xlabel=f"{names[-1]} (%)", ylabel=f"{names[0]} (%)", title="learned against kept")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    return figure
