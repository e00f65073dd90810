"""Figures: curves have the points that were given, and stand out on a light page and on a dark one."""

import pytest

from evaluation import figures

pytest.importorskip("matplotlib")


def drawn(curve: list[tuple[int, float]]) -> list:
    _, axes = figures.new_figure(4, 3, ncols=1)
    figures.plot_losses(axes, {"a": curve}, "loss", {"a": "red"})
    return axes.get_lines()


def test_a_curve_has_its_points_and_a_long_one_its_running_mean():
    (line,) = drawn([(1, 2.0), (5, 1.0), (9, 0.5)])
    assert line.get_xydata().tolist() == [[1, 2], [5, 1], [9, 0.5]]
    raw, mean = drawn([(step, float(step % 2)) for step in range(100_000)])
    assert len(raw.get_xdata()) <= figures.MAX_POINTS and mean.get_ydata()[1:] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("steps", [[12], [1, 2, 3], [6, 12], range(1, 13), range(100, 2000, 100), [1, 1001]])
def test_axes_show_the_steps_that_there_are_and_the_losses_closely(steps):
    _, axes = figures.new_figure(4, 3, ncols=1)
    figures.plot_losses(axes, {"a": [(step, 7.2 + 0.01 * (step % 3)) for step in steps]}, "loss", {"a": "red"})
    (low, high), ticks = axes.get_xlim(), axes.get_xticks()
    assert min(steps) - 0.5 <= low <= min(steps) and max(steps) <= high <= max(steps) + 0.5
    assert all(float(tick).is_integer() for tick in ticks if low <= tick <= high)
    assert axes.get_ylim()[0] > 6


def test_a_curve_without_points_is_left_out():
    assert not drawn([])


def test_a_name_is_not_read_as_mathematics_and_stays_text():
    figure, axes = figures.new_figure(4, 3, ncols=1)
    axes.set_title("$x_{ & <b>")
    svg = figures.figure_to_svg(figure, 'a "<label>"')
    assert "$x_{ &amp; &lt;b&gt;" in svg and svg.startswith('<svg role="img" aria-label="a &quot;&lt;label&gt;&quot;"')
    assert "currentColor" in svg and "#000000" not in svg


def contrast(a: str, b: str) -> float:
    """The contrast of two colors, by WCAG 2."""

    def light(color: str) -> float:
        channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("card", ["#ffffff", "#1a1f28"])
def test_curves_stand_out_on_a_light_page_and_on_a_dark_one(card):
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") < 4.5
    assert all(contrast(color, card) >= 3 for color in (*figures.COLORS, figures.BASE))
