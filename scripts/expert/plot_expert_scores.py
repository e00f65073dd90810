r"""Draw the expert scores of a task as a heat map over layers and experts, and mark the experts that a config selects.

    python scripts/expert/plot_expert_scores.py --expert_scores_dir=results/expert_scores/translation \
        --expert_config=results/expert_configs/translation.json --output_path=translation.png

Left: experts by id. Right: each layer's experts by score, best first, with the cut where their running sum reaches
--top_p. By default that is the paper's, and a config that another rule selected has no cut. The more the color gathers
at the left edge of the right panel, the more specialized the experts.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from esft import ExpertConfig, ExpertScores
from evaluation.figures import check_picture, cut_of, draw_experts, save_figure
from scripts.expert.generate_expert_config import add_score_flags, default_top_p
from utils import command_parser, run_cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--expert_scores_dir", required=True, metavar="DIR", help="folder of scores, or a summary or flat JSON file")
    add("--expert_config", metavar="FILE", help="expert config, or adapter, whose experts are marked (default: none)")
    add("--output_path", metavar="FILE", help="the picture (default: <score_function>_scores.png beside the scores)")
    add_score_flags(parser)
    add("--title", metavar="TEXT", help="of the picture (default: the data set of the scores)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    source = Path(args.expert_scores_dir)
    folder = source if source.is_dir() else source.parent
    output_path = Path(args.output_path or folder / f"{args.score_function}_scores.png")
    check_picture(output_path)
    scores = ExpertScores.load(args.expert_scores_dir)
    config = ExpertConfig.load(args.expert_config) if args.expert_config else None
    title = args.title or f"Expert scores ({args.score_function}) on {Path(scores.meta.get('dataset') or folder).stem}"
    top_p = args.top_p or cut_of(scores, config, args.score_function, default_top_p(args))
    save_figure(draw_experts(scores, config, args.score_function, top_p, title), output_path)
    print(f"written to {output_path}")
    return output_path


if __name__ == "__main__":
    run_cli(main)
