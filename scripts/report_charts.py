"""What the page of scripts/report.py is made of, as strings: escaped text, figures, tables (HTML) and charts (SVG).

A chart is 440 units wide (a map of very many experts more), and CSS stretches it to its place. Colours are CSS
variables, so that it turns dark with the page: `--c0` to `--c7` are the curves', `--q0` to `--q8` the heat map's from
low to high, `--base` is the base model's.
"""

import html
import math
import re
from collections.abc import Callable, Iterable
from itertools import accumulate

POINTS = 600  # of a curve
MANY = 96  # experts of a layer: more, and a map takes the whole width
Point = tuple[float, float]

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


def change(value: float, better: int = 1) -> str:
    """A change of a score in points, coloured by its sign; `better` is -1 where less is better."""
    kind = "up" if better * value > 0.05 else "down" if better * value < -0.05 else "soft"
    shown = f"{value:+.1f}".replace("-", "\u2212")
    return f'<span class="{kind}">{shown}</span>'


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


def legend(labels: dict[str, int]) -> str:
    """A list of (label -> number of its colour)."""
    line = '<svg viewBox="0 0 26 10" aria-hidden="true"><path d="M0 5h26" stroke="{}" stroke-width="3"{}/></svg>'
    items = (f"<li>{line.format(colour(n), dashes(n))}{esc(label)}</li>" for label, n in labels.items())
    return f'<ul class="legend">{"".join(items)}</ul>'


# --------------------------------------------------------------------------------------------------------------------
# parts of a chart


def svg(width: float, height: float, label: str, body: Iterable[str], least: int = 0) -> str:
    """A chart as wide as its place; where that is below `least` pixels it scrolls."""
    chart = (
        f'<svg class="chart" role="img" aria-label="{esc(label)}" viewBox="0 0 {width:g} {height:g}"'
        f"{f' style=min-width:{least}px' if least else ''}>{''.join(body)}</svg>"
    )
    return f'<div class="scroll" tabindex="0" role="region" aria-label="chart">{chart}</div>' if least else chart


def words(x: float, y: float, text: object, anchor: str = "start", kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{esc(text)}</text>'


def tick(x: float, y: float, text: object, anchor: str = "middle") -> str:
    return words(x, y, text, anchor, "tick")


def dot(x: float, y: float, radius: float, fill: str, title: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}"><title>{esc(title)}</title></circle>'


def colour(number: int) -> str:
    """Of the n-th model; -1 is the base."""
    return "var(--base)" if number < 0 else f"var(--c{number % 8})"


def dashes(number: int) -> str:
    """After eight models the colours come again, dashed."""
    return "" if number < 8 else f' stroke-dasharray="{4 + number // 8 * 2} 3"'


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers within [low, high]; on a log scale powers of 10, and where they are few some times them."""
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
    moved, least, most = list(places), top, bottom
    for i in order:
        moved[i] = max(moved[i], least)
        least = moved[i] + gap
    for i in reversed(order):
        moved[i] = min(moved[i], most)
        most = moved[i] - gap
    return moved


def running_mean(points: list[Point], span: int) -> list[Point]:
    """At each point the mean of the last `span` values, of fewer at the start."""
    sums = [0.0, *accumulate(y for _, y in points)]
    return [(x, (sums[i] - sums[max(0, i - span)]) / min(i, span)) for i, (x, _) in enumerate(points, 1)]


def path(points: list[Point], at_x: Callable, at_y: Callable) -> str:
    """Of at most POINTS points, taken evenly; the last one always."""
    step = math.ceil(len(points) / POINTS)
    kept = points[::step] + ([points[-1]] if (len(points) - 1) % step else [])
    return "M" + "L".join(f"{at_x(x):.1f} {at_y(y):.1f}" for x, y in kept)


# --------------------------------------------------------------------------------------------------------------------
# charts


def loss_chart(title: str, curves: dict[str, list[Point]], colours: dict[str, int], dots: bool) -> str:
    """Curves of (step, loss), on a log scale where the losses span a factor of 5; `dots` mark and name each point, else
    the curve is drawn thin and its running mean thick."""
    xs, ys = zip(*(point for points in curves.values() for point in points))
    first, last, low, high = min(0, *xs), max(xs), min(ys), max(ys)
    log = low > 0 and high / low > 5
    if not log:
        low, high = min(low, 0.0), high or 1.0
    elif len(ticks(low, high, True)) < 2:  # at least two numbers on the axis
        low, high = low / 2, high * 2
    named = len(curves) <= 6 and max(map(len, curves)) <= 12  # at their ends, beside the legend
    width, height, left, top, bottom = 440, 280, 50, 12, 40
    right = 12 + 7.5 * max(map(len, curves)) if named else 12

    def at_x(x: float) -> float:
        return left + (width - left - right) * (x - first) / ((last - first) or 1)

    def at_y(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / ((high - low) or 1)
        return height - bottom - (height - top - bottom) * share

    body = []
    for y in ticks(low, high, log):
        body.append(f'<path class="grid" d="M{left} {at_y(y):.1f}H{width - right:g}"/>')
        body.append(tick(left - 6, at_y(y) + 4, f"{y:g}", "end"))
    body += [tick(at_x(x), height - bottom + 18, f"{x:,g}") for x in ticks(first, last or 1, False)]
    body.append(tick((left + width - right) / 2, height - 4, "optimizer step"))
    ends = {}
    for label, points in curves.items():
        n, curve = colours[label], points
        stroke = f'stroke="{colour(n)}"{dashes(n)}'
        span = max(1, len(points) // 40)
        if not dots and span > 1:
            body.append(f'<path class="curve raw" {stroke} d="{path(points, at_x, at_y)}"/>')
            curve = running_mean(points, span)
        body.append(f'<path class="curve" {stroke} d="{path(curve, at_x, at_y)}"><title>{esc(label)}</title></path>')
        if dots or len(points) == 1:
            body += [dot(at_x(x), at_y(y), 3.5, colour(n), f"{label}, step {x:g}: {y:.4g}") for x, y in points]
        ends[label] = at_y(curve[-1][1])
    if named:
        places = spread(list(ends.values()), 15, top, height - bottom)
        body += [words(at_x(curves[label][-1][0]) + 7, y + 4, label) for label, y in zip(ends, places)]
    told = "; ".join(
        f"{label}: {points[0][1]:.3g} at first, {points[-1][1]:.3g} at last" for label, points in curves.items()
    )
    chart = svg(width, height, f"{title} by optimizer step. {told}.", body)
    return figure(chart, f"{esc(title)}{', log scale' if log else ''}")


def whiskers(title: str, rows: list[tuple[str, int, dict]], base: float | None) -> str:
    """A row per (label, colour, summary): its mean as a dot, its 95 % interval (if it has one) as a line; `base` is a
    dashed line."""
    bounds = [value for *_, s in rows for value in (s["mean"], *(s["ci95"] or ()))]
    low, high = min(0, *bounds), max(100, *bounds)
    width, left, right, step = 440, 14, 14, 42
    height = step * len(rows) + 34

    def at(value: float) -> float:
        return left + (width - left - right) * (value - low) / (high - low)

    body = []
    for x in ticks(low, high, False):
        body.append(f'<path class="grid" d="M{at(x):.1f} 4V{height - 26}"/>')
        body.append(tick(at(x), height - 10, f"{x:g}"))
    if base is not None:  # beside the dots only: it would cross the words out
        marks = "".join(f"M{at(base):.1f} {number * step + 23}v18" for number in range(len(rows)))
        body.append(f'<path class="ref" d="{marks}"><title>base: {base:.1f}</title></path>')
    for number, (label, n, s) in enumerate(rows):
        y = number * step + 32
        value = f"{s['mean']:.1f}"
        if s["ci95"]:
            value += " [{:.1f}, {:.1f}]".format(*s["ci95"])
            a, b = map(at, s["ci95"])
            line = f"M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 5}v10M{b:.1f} {y - 5}v10"
            body.append(f'<path d="{line}" fill="none" stroke="{colour(n)}" stroke-width="2"/>')
        short = label if len(label) < 34 else f"…{label[-32:]}"
        body.append(words(left, y - 12, short) + words(width - right, y - 12, value, "end"))
        body.append(dot(at(s["mean"]), y, 5, colour(n), f"{label}: {value}"))
    told = "; ".join(f"{label} {s['mean']:.1f}" for label, _, s in rows)
    return svg(width, height, f"{title}: {told}.", body)


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
    bottom, middle, every = head + len(layers) * h, head + len(layers) * h / 2, 1 if h >= 12 else 2
    body += [
        tick(left - 6, head + (row + 0.5) * h + 4, layer, "end") for row, layer in enumerate(layers) if row % every == 0
    ]
    body += [tick(left + (e + 0.5) * w, bottom + 15, e) for e in range(0, E, max(1, E // 8))]
    body.append(tick(left + E * w / 2, bottom + 31, axis))
    body.append(f'<g transform="rotate(-90 10 {middle:g})">{tick(10, middle + 4, "layer")}</g>')
    return svg(left + E * w + 4, bottom + 36, title, body, least=900 if wide else 0)
