r"""Draw the expert scores of a task as a heat map over layers and experts, and mark the experts that a config selects.

    python scripts/expert/plot_expert_scores.py --expert_scores_dir=results/expert_scores/translation \
        --expert_config=results/expert_configs/translation.json --output_path=translation.png

Left: experts by id. Right: each layer's experts by score, best first, with the cut where their running sum reaches
--top_p. The more the colour gathers at the left edge of the right panel, the more specialised the experts.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from esft import SCORE_FUNCTIONS, ExpertConfig, ExpertScores, select_experts
from evaluation.figures import new_figure, save_figure
from scripts.expert.generate_expert_config import top_p_of
from utils import command_parser, run_cli

UNITS = {
    "token": "share of routed slots (%)",
    "gate": "gate weight per token (%)",
    "prob": "router probability (%)",
}
MARK = "#e8000b"  # red, against every blue


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--expert_scores_dir", required=True, metavar="DIR", help="folder of scores, or a summary or flat JSON file")
    add("--expert_config", metavar="FILE", help="expert config, or adapter folder, whose experts are marked (default: "
        "none)")  # fmt: skip
    add("--output_path", metavar="FILE", help="the picture (.png; default: <score_function>_scores.png beside the "
        "scores)")  # fmt: skip
    add("--score_function", choices=SCORE_FUNCTIONS, default="token", help="which score is drawn (default: token)")
    add("--top_p", type=float, metavar="P", help="where the right panel's cut lies, above 0 and up to 1 (default: the "
        "paper's, 0.2, for gate 0.1)")  # fmt: skip
    add("--title", metavar="TEXT", help="of the picture (default: the data set of the scores, where they name it)")
    return parser.parse_args(argv)


def draw(scores: ExpertScores, config: ExpertConfig | None, score_function: str, top_p: float, title: str):
    """-> the matplotlib figure. Raises ValueError where matplotlib is missing or the config is of another model."""
    score_LE = scores[score_function]
    layers = sorted(score_LE)
    cut = select_experts(scores, score_function=score_function, top_p=top_p).experts
    by_id = {layer: sorted(score_LE[layer]) for layer in layers}
    by_score = {layer: sorted(by_id[layer], key=lambda e: -score_LE[layer][e]) for layer in layers}
    chosen = {layer: set(config.experts.get(layer, ())) for layer in layers} if config else {}
    for layer in chosen:
        if chosen[layer] - score_LE[layer].keys():
            raise ValueError(f"the expert config names experts of layer {layer} that have no scores: other model")
    if config and config.experts.keys() - score_LE.keys():
        raise ValueError("the expert config names layers that have no scores: they are of another model")

    L, E = len(layers), max(map(len, score_LE.values()))
    width = min(7.0, max(3.6, 0.16 * E))  # of a panel, inches
    cell = min(0.5, max(0.2, 5.2 / L))  # height of a layer, inches
    figure, (left, right) = new_figure(2 * width + 1.4, cell * L + 1.6, sharey=True)
    from matplotlib.collections import PatchCollection  # not before new_figure, which tells what to install
    from matplotlib.patches import Rectangle

    top = 100 * max(max(score_E.values()) for score_E in score_LE.values())
    for axes, column_LE in ((left, by_id), (right, by_score)):
        percent = [[100 * score_LE[layer][e] for e in column_LE[layer]] for layer in layers]
        percent = [row + [float("nan")] * (E - len(row)) for row in percent]
        image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        outlines = [
            Rectangle((column_LE[layer].index(e) - 0.5, row - 0.5), 1, 1)
            for row, layer in enumerate(layers)
            for e in chosen.get(layer, ())
        ]
        axes.add_collection(PatchCollection(outlines, facecolor="none", edgecolor=MARK, linewidth=1.3))
        axes.set_xticks(range(0, E, max(1, E // 8)))
    step = max(1, round(0.22 / cell))
    left.set_yticks(range(0, L, step), layers[::step])
    left.set(title="by expert id", xlabel="expert id", ylabel="decoder layer")
    right.set(title="by score in each layer", xlabel="rank in its layer, 0 = highest score")
    edges = [row - 0.5 for row in range(L + 1)]
    stairs = right.stairs(
        [len(cut[layer]) - 0.5 for layer in layers],
        edges,
        orientation="horizontal",
        baseline=None,
        color="black",
        lw=1.8,
    )
    figure.colorbar(image, ax=[left, right], label=UNITS[score_function], pad=0.01, fraction=0.025)
    legend = {f"running sum of scores reaches {top_p:g}": stairs}
    if config:
        taken, of = sum(map(len, chosen.values())), sum(map(len, score_LE.values()))
        marked = Rectangle((0, 0), 1, 1, facecolor="none", edgecolor=MARK, linewidth=1.3)
        legend = {f"selected: {taken} of {of} experts ({taken / of:.1%})": marked, **legend}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    scores = ExpertScores.load(args.expert_scores_dir)
    config = ExpertConfig.load(args.expert_config) if args.expert_config else None
    source = Path(args.expert_scores_dir)
    folder = source if source.is_dir() else source.parent
    output_path = Path(args.output_path or folder / f"{args.score_function}_scores.png")
    if output_path.suffix != ".png":
        raise ValueError(f"--output_path {output_path} must end in .png")
    title = args.title or f"Expert scores ({args.score_function}) on {Path(scores.meta.get('dataset') or folder).stem}"
    save_figure(draw(scores, config, args.score_function, top_p_of(args), title), output_path)
    print(f"written to {output_path}")
    return output_path


if __name__ == "__main__":
    run_cli(main)
