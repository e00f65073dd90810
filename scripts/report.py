"""One page on what was trained: experts, losses, scores, answers side by side, and the commands to do it again.

    python scripts/report.py results/runs/law
    python scripts/report.py results/runs/law results/runs/summary results/checkpoints/mine --output=report.html

RUN is a folder of scripts/pipeline.py, or of train.py. Several runs share the charts and tables. The page is one HTML
file that needs no network and runs no script. It is light or dark as the reader's browser is. All text is escaped.
"""

import argparse
import random
import re
import shlex
import sys
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.files import check_output, write_text
from evaluation.figures import BASE, colors_of, cut_of, draw_experts, figure_to_svg, new_figure, plot_losses, plot_means
from evaluation.run_folder import Evaluation, Run, Trained, read_run, same_questions
from utils import command_parser, locked, positive, run_cli, seed_number

FOLDER = Path(__file__).parent
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def experts_per_layer(model: Trained) -> str:
    """Return how many experts of a layer are trained, as in "5 to 7 of 64"."""
    if model.experts is None:
        return "all" if model.settings["method"] == "full" else "-"
    counts = sorted(len(ids) for ids in model.experts.experts.values()) or [0]
    of = f" of {len(next(iter(model.scores[model.function].values())))}" if model.scores else ""
    return f"{counts[0]}{of}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}{of}"


def expert_map(model: Trained) -> str:
    """Return the heat map of a model's experts, with the cut at `top_p` unless another rule selected them."""
    title = f"{model.function} scores on {model.scores.meta.get('dataset') or 'the task'}"
    top_p = cut_of(model.scores, model.experts, model.function, model.top_p)
    figure = draw_experts(model.scores, model.experts, model.function, top_p, title)
    return figure_to_svg(figure, f"Experts that {model.label} trains: {title}")


def loss_chart(key: str, title: str, models: list[Trained], colors: dict[str, str]) -> str:
    """Return a chart of "loss" or "eval_loss" by optimizer step."""
    curves = {model.label: curve for model in models if (curve := model.curve(key))}
    figure, axes = new_figure(5.6, 3.6, ncols=1)
    plot_losses(axes, curves, title, colors)
    ends = [f"{label}: {curve[0][1]:.3g} at first, {curve[-1][1]:.3g} at last" for label, curve in curves.items()]
    return figure_to_svg(figure, f"{title} by optimizer step. {'; '.join(ends)}")


def score_chart(dataset: str, runs: list[Run], colors: dict[str, str]) -> str:
    """Return a chart of the means of all models on one data set, with their intervals."""
    summaries = {label: e.summary for run in runs for label, e in run.evaluations.get(dataset, {}).items()}
    rows = [(label, s["mean"], s["ci95"]) for label, s in summaries.items() if s["mean"] is not None]
    units = sorted({f"{s['primary']} ({unit(s)})" for s in summaries.values()})
    figure, axes = new_figure(5.6, 1.1 + 0.4 * len(rows), ncols=1)
    plot_means(axes, rows, colors | {run.base: BASE for run in runs})
    axes.set(title=dataset, xlabel=", ".join(units), xlim=(0, 100) if "(percent)" in units[0] else None)
    return figure_to_svg(figure, f"{dataset}: " + "; ".join(f"{label} {mean:.1f}" for label, mean, _ in rows))


def unit(summary: dict) -> str:
    """Return what a mean is in, and which way is better if it is not in percent."""
    if summary.get("unit", "percent") == "percent":
        return "percent"
    return f"its own unit, {'more' if summary['higher_is_better'] else 'less'} is better"


def turned(run: Run, dataset: str, label: str) -> tuple[int, int] | None:
    """Count the questions that are newly right, and no longer right. None if the base answered other questions."""
    base, now = run.evaluations[dataset].get(run.base), run.evaluations[dataset][label]
    if base is None or not same_questions(base.answers, now.answers):
        return None
    pairs = [(a["score"], b["score"]) for a, b in zip(base.answers, now.answers)]
    right = [(a > 0.999, b > 0.999) for a, b in pairs if a is not None and b is not None]
    return right.count((False, True)), right.count((True, False))


def pick(by_label: dict[str, Evaluation], base: str, count: int, seed: int) -> dict[int, str]:
    """Return {index of a question: why it is shown}: most and least gained over the base, and some at random."""
    trained = [e.answers for label, e in by_label.items() if label != base] or [by_label[base].answers]
    before = by_label[base].answers if base in by_label and len(by_label) > 1 else None

    def gain(i: int) -> float:
        mean = sum(lines[i]["score"] or 0 for lines in trained) / len(trained)
        return mean - (before[i]["score"] or 0 if before else 0)

    order = sorted(range(len(trained[0])), key=gain, reverse=True)
    best, worst = ("most gained", "least gained, or lost") if before else ("best", "worst")
    found = dict.fromkeys(order[:count], best)
    found |= {i: worst for i in order[: -count - 1 : -1] if i not in found}
    rest = sorted(set(order) - set(found))
    return found | dict.fromkeys(random.Random(seed).sample(rest, min(count, len(rest))), "drawn at random")


def page(folders: list[str | Path], count: int = 2, seed: int = 0) -> str:
    """Return the HTML of a report, with `count` questions of each kind.

    Raises:
        ValueError, FileNotFoundError: a folder that is not a run, or has a damaged file.
    """
    paths = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    names = [path.resolve().name for path in paths]
    names = names if len(set(names)) == len(names) else list(map(str, paths))
    runs = [read_run(path, name, f"{name}/" if len(paths) > 1 else "") for path, name in zip(paths, names)]
    models = [model for run in runs for model in run.trained]
    datasets = list(dict.fromkeys(dataset for run in runs for dataset in run.evaluations))
    evaluated = [label for run in runs for by_label in run.evaluations.values() for label in by_label]
    colors = colors_of(dict.fromkeys([*(model.label for model in models), *evaluated]))
    functions = (experts_per_layer, expert_map, loss_chart, score_chart, turned, pick, same_questions)
    jinja = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=FileSystemLoader(FOLDER))
    jinja.globals |= {function.__name__: function for function in functions}
    jinja.filters["command"] = shlex.join
    template = jinja.get_template("report.html.j2")
    given = {"runs": runs, "models": models, "names": names, "datasets": datasets, "colors": colors}
    return UNPRINTABLE.sub("\ufffd", template.render(**given, count=count, seed=seed))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    count_help = "questions of each kind (most and least gained, random) and data set (default: 2)"
    add("runs", nargs="+", metavar="RUN", help="folders of scripts/pipeline.py or train.py")
    add("--output", metavar="FILE.html", help="the page (default: report.html in the first RUN)")
    add("--n_samples", type=positive, default=2, metavar="N", help=count_help)
    add("--seed", type=seed_number, default=0, metavar="N", help="of the random questions (default: 0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    output = Path(args.output or Path(args.runs[0]) / "report.html")
    check_output(output)
    with locked(output):
        text = page(args.runs, args.n_samples, args.seed)
        write_text(output, text)
    print(f"written to {output} ({len(text.encode()) / 1024:,.0f} KiB)")
    return output


if __name__ == "__main__":
    run_cli(main)
