"""Figures in one style: heat maps of expert scores, curves of losses, means with their intervals."""

import html
import io
import itertools
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from deepseek.files import atomic_path, check_output, import_extra
from esft import ExpertConfig, ExpertScores, select_experts

UNITS = {  # of 100 times a score
    **{"token": "share of routed slots (%)", "gate": "gate weight per token (%)", "prob": "router probability (%)"},
    **{"gradient": "share of the squared gradients (%)", "reap": "gate weight x output norm (x 100)"},
}
MARK, CUT = "#e8000b", "#0f9d58"  # red and green, against every blue
COLORS = ("#2f7fd6", "#cf6a00", "#12908a", "#b04fc9", "#d9534f", "#6b8f16", "#7b6be0", "#c2447f")  # on any page
BASE = "#7d8794"  # the base model is gray
MAX_POINTS = 600  # of a curve


def new_figure(width: float, height: float, ncols: int = 2, nrows: int = 1, **options):
    """Return a figure and its axes, side by side; sizes are in inches. Raise ValueError if matplotlib is missing."""
    figure = import_extra("matplotlib.figure", "plot").Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.subplots(nrows, ncols, **options)


def check_picture(path: str | Path) -> None:
    """Raise ValueError if no picture can be written to `path`, or matplotlib is missing. Call this before the work."""
    check_output(path)
    figure, _ = new_figure(1, 1)
    known = figure.canvas.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise ValueError(
            f"cannot write {path}: no such kind of picture. Give a name that ends in .{', .'.join(known)}."
        )


def save_figure(figure, path: str | Path) -> None:
    """Write a picture, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def figure_to_svg(figure, label: str) -> str:
    """Return a figure as an <svg> element of an HTML page. What is black takes the color of the page's text."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name may have dollar signs
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # missing here, but the reader's browser draws the text
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg[svg.index("<svg") :]).replace("#000000", "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def colors_of(labels: Iterable[str]) -> dict[str, str]:
    """Return a color for each label, in their order."""
    return dict(zip(labels, itertools.cycle(COLORS)))


def draw_experts(
    scores: ExpertScores, config: ExpertConfig | None, score_function: str, top_p: float | None, title: str
):
    """Return a figure of two heat maps, layers x experts: by id, and by score with the cut at `top_p`, unless None.

    The experts of `config` are outlined. Raise ValueError where they have no scores, or where matplotlib is missing.
    """
    score_LE = scores[score_function]
    chosen = config.experts if config else {}
    for layer, ids in chosen.items():
        if missing := set(ids) - score_LE.get(layer, {}).keys():
            raise ValueError(
                f"cannot mark expert {min(missing)} of layer {layer}: it has no score. Give scores of the same model."
            )
    layers, E = sorted(score_LE), max(map(len, score_LE.values()))
    height = min(0.5, max(0.2, 5.2 / len(layers)))  # of a layer, inches
    width = min(7.0, max(3.6, 0.16 * E))  # of a map, inches
    figure, (left, right) = new_figure(2 * width + 1.4, height * len(layers) + 1.6, sharey=True)
    from matplotlib.patches import Rectangle  # not before new_figure, which says what to install

    by_id = {layer: sorted(score_LE[layer]) for layer in layers}
    by_score = {layer: sorted(by_id[layer], key=lambda e: -score_LE[layer][e]) for layer in layers}
    heat_map(left, score_LE, by_id, chosen)
    image = heat_map(right, score_LE, by_score, chosen)
    step = max(1, round(0.22 / height))
    left.set_yticks(range(0, len(layers), step), layers[::step])
    left.set(title="by expert id", xlabel="expert id", ylabel="decoder layer")
    right.set(title="by score in each layer", xlabel="rank in its layer, 0 = highest score")
    figure.colorbar(image, ax=[left, right], label=UNITS[score_function], pad=0.01, fraction=0.025)
    legend = {}
    if config:
        taken, of = sum(map(len, chosen.values())), sum(map(len, score_LE.values()))
        marked = Rectangle((0, 0), 1, 1, facecolor="none", edgecolor=MARK, linewidth=1.3)
        legend[f"selected: {taken} of {of} experts ({taken / of:.1%})"] = marked
    if top_p is not None:
        cut = select_experts(scores, score_function=score_function, top_p=top_p).experts
        ends, edges = [len(cut[layer]) - 0.5 for layer in layers], np.arange(len(layers) + 1) - 0.5
        stairs = right.stairs(ends, edges, orientation="horizontal", baseline=None, color=CUT, lw=1.8)
        legend[f"running sum of scores reaches {top_p:g}"] = stairs
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def cut_of(scores: ExpertScores, config: ExpertConfig | None, score_function: str, top_p: float) -> float | None:
    """Return `top_p` if it selects the experts of `config`, or if there is none. Another rule has no such cut."""
    if config is None:
        return top_p
    cut = select_experts(scores, score_function=score_function, top_p=top_p)
    chosen, up_to = ({layer: {*ids} for layer, ids in one.experts.items()} for one in (config, cut))
    return top_p if chosen == up_to else None


def heat_map(axes, score_LE: dict[int, dict[int, float]], column_LE: dict[int, list[int]], chosen: dict):
    """Draw layers x experts, each layer in the order of `column_LE`, and outline the chosen. Return the image."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    layers, E = sorted(score_LE), max(map(len, score_LE.values()))
    percent_LE = np.full((len(layers), E), np.nan)
    outlines = []
    for row, layer in enumerate(layers):
        for column, e in enumerate(column_LE[layer]):
            percent_LE[row, column] = 100 * score_LE[layer][e]
            if e in chosen.get(layer, ()):
                outlines.append(Rectangle((column - 0.5, row - 0.5), 1, 1))
    top = np.nanquantile(percent_LE, 0.99)  # with the highest as its end, one outlier would make a large map pale
    image = axes.imshow(percent_LE, cmap="Blues", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    thickness = 1.3 if E <= 96 else 0.5  # cells of many experts are small
    axes.add_collection(PatchCollection(outlines, facecolor="none", edgecolor=MARK, linewidth=thickness))
    axes.set_xticks(range(0, E, max(1, E // 8)))
    return image


def draw_matrix(axes, names: list[str], numbers: list[list[float]], texts: list[list[str]], title: str, **colors):
    """Draw a square of numbers up to 1, with a text in each cell. Return the image."""
    image = axes.imshow(numbers, vmax=1, **colors)
    for row, column in itertools.product(range(len(names)), repeat=2):
        color = "white" if abs(numbers[row][column]) > 0.6 else "black"
        axes.text(column, row, texts[row][column], ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(title)
    return image


def plot_losses(axes, curves: dict[str, list[tuple[float, float]]], title: str, colors: dict[str, str]) -> None:
    """Draw (step, loss) points as curves. A curve of many points is thin, with its running mean over it."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    curves = {label: points for label, points in curves.items() if points}
    for label, points in curves.items():
        step_N, loss_N = np.array(points).T
        span, thin = max(1, len(points) // 40), math.ceil(len(points) / MAX_POINTS)
        if span > 1:
            axes.plot(step_N[::thin], loss_N[::thin], color=colors[label], linewidth=0.8, alpha=0.35)
            sums = np.cumsum(np.concatenate([np.zeros(span), loss_N]))
            loss_N = (sums[span:] - sums[:-span]) / np.minimum(np.arange(len(points)) + 1, span)
        line = {"color": colors[label], "label": label, "marker": "o" if len(points) <= 40 else None, "markersize": 4}
        axes.plot(step_N[::thin], loss_N[::thin], **line)
    losses = [loss for points in curves.values() for _, loss in points]
    if losses and min(losses) > 0 and max(losses) > 5 * min(losses):
        axes.set_yscale("log")
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if steps := [step for points in curves.values() for step, _ in points]:
        pad = 0.5 if max(steps) - min(steps) < 40 else 0  # there is no step 0
        axes.set_xlim(min(steps) - pad, max(steps) + pad)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per label token)", title=title)
    axes.grid(alpha=0.25)
    if losses:
        axes.legend(frameon=False)


def plot_means(axes, rows: list[tuple[str, float, list[float] | None]], colors: dict[str, str]) -> None:
    """Draw the mean of each (label, mean, interval), with its 95 % interval if it has one."""
    for y, (label, mean, interval) in enumerate(rows):
        axes.plot(interval or [mean, mean], [y, y], "-|", color=colors[label], linewidth=2, markersize=10)
        axes.plot(mean, y, "o", color=colors[label])
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first at the top
    axes.grid(axis="x", alpha=0.25)
