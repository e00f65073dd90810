"""Figures in one style, saved whole."""

from pathlib import Path

from deepseek.files import atomic_path


def new_figure(width: float, height: float, **options):
    """(figure, two axes side by side); sizes in inches. Raises ValueError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("pictures need matplotlib: python -m pip install -c constraints.txt matplotlib") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, 2, **options)


def save_figure(figure, path: str | Path) -> None:
    """Write a picture, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
