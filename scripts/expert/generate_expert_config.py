r"""Select the experts to train from the scores of a task, layer by layer, and write them as an expert config.

    python scripts/expert/generate_expert_config.py --eval_dataset=translation --score_function=token --top_p=0.2 \
        --expert_scores_dir=results/expert_scores/translation --output_path=results/expert_configs/translation.json

The scores are those of get_expert_scores.py, or the published ones: a summary.json, raw routing logs (with or without
rank_* folders), or a flat JSON. Strategies:

    cumulative  (the paper) best first until the running sum reaches --top_p
    fraction    the best --fraction of the layer's experts, rounded up
    topk        the best --top_k
    random      the control: as many as cumulative takes in the layer, drawn with --seed

With --base_model_path the config is checked against the model's architecture; no weights are read.
"""

import argparse
import json
import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.experts import find_experts
from deepseek.loading import empty_model
from esft import (
    SCORE_FUNCTIONS,
    STRATEGIES,
    ExpertConfig,
    ExpertScores,
    adapter_views,
    select_experts,
)
from utils import Parser, run_cli, write_text

TOP_P = {"token": 0.2, "gate": 0.1, "prob": 0.2}  # the paper's; prob sums to 1 as token does
FLAGS = {"top_p": ("cumulative", "random"), "fraction": ("fraction",), "top_k": ("topk",), "seed": ("random",)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--expert_scores_dir", required=True, metavar="DIR", help="folder of scores, or a summary or flat JSON file")
    add("--output_path", required=True, metavar="FILE", help="where the expert config (.json) goes")
    add("--eval_dataset", metavar="NAME", help="a label for the table; a note tells if the scores are of another "
        "(default: none)")  # fmt: skip
    add("--score_function", choices=SCORE_FUNCTIONS, default="token", help="share of the routed slots, gate weight per "
        "token, or router probability over all experts (default: token)")  # fmt: skip
    add("--strategy", choices=STRATEGIES, default="cumulative", help="see above (default: cumulative)")
    add("--top_p", type=float, metavar="P", help="cumulative and random: the sum of scores to reach in each layer, "
        "above 0 and up to 1 (default: 0.2, for gate 0.1)")  # fmt: skip
    add("--fraction", type=float, metavar="F", help="fraction: share of each layer's experts, above 0 and up to 1 "
        "(no default)")  # fmt: skip
    add("--top_k", type=int, metavar="N", help="topk: experts per layer (no default)")
    add("--seed", type=int, metavar="N", help="random: seed of the draw (default: 0)")
    add("--train_shared_experts", action="store_true", help="train the shared experts, too (default: frozen)")
    add("--train_non_expert_modules", action="store_true", help="train all that is no expert, too: attention, norms, "
        "embeddings, head, dense layers, routers (default: frozen)")  # fmt: skip
    add("--base_model_path", "--model", metavar="MODEL", help="folder or hub id of the base model to check the config "
        "against and to count parameters (default: no check)")  # fmt: skip
    return parser.parse_args(argv)


def select(scores: ExpertScores, args: argparse.Namespace) -> ExpertConfig:
    """The config that the flags ask for. Raises ValueError where a flag is missing, out of range or without effect."""
    options = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    for name in options:
        if args.strategy not in FLAGS[name]:
            raise ValueError(
                f"--{name} has no effect with --strategy {args.strategy}: leave it out or give --strategy "
                f"{FLAGS[name][0]}"
            )
    for name, strategy in (("fraction", "fraction"), ("top_k", "topk")):
        if args.strategy == strategy and name not in options:
            raise ValueError(f"--strategy {strategy} needs --{name}")
    if args.strategy in FLAGS["top_p"]:
        options.setdefault("top_p", TOP_P[args.score_function])
    chosen = select_experts(scores, score_function=args.score_function, strategy=args.strategy, **options)
    return ExpertConfig(chosen.experts, args.train_shared_experts, args.train_non_expert_modules)


def notes(scores: ExpertScores, config: ExpertConfig, args: argparse.Namespace) -> list[str]:
    """What the user should know of the selection and might not expect."""
    found = []
    dataset = scores.meta.get("dataset")
    if args.eval_dataset and dataset and Path(dataset).stem != Path(args.eval_dataset).stem:
        found.append(f"these scores were computed on {dataset!r}, not on {args.eval_dataset!r}")
    if args.strategy in FLAGS["top_p"]:
        top_p = args.top_p or TOP_P[args.score_function]
        sums = {layer: sum(score_E.values()) for layer, score_E in scores[args.score_function].items()}
        low = [layer for layer in sums if sums[layer] < top_p and len(config.experts[layer]) > 1]
        if low:
            found.append(
                f"in {len(low)} of {len(sums)} layers all experts together score less than top_p {top_p:g} (layer "
                f"{low[0]}: {sums[low[0]]:.4f}), so all of them were taken"
            )
    return found


def table(scores: ExpertScores, config: ExpertConfig, args: argparse.Namespace) -> str:
    """A line per layer (experts taken, the sum of their scores, their ids), and the total."""
    score_LE = scores[args.score_function]
    title = f"{args.score_function} score, {args.strategy}" + (f", {args.eval_dataset}" if args.eval_dataset else "")
    order = "as drawn" if args.strategy == "random" else "best first"
    lines = [
        title,
        f"{'layer':>5}{'experts':>9}{'of':>5}{'score':>9}  ids, {order}",
    ]
    for layer, ids in config.experts.items():
        total = sum(score_LE[layer][e] for e in ids)
        shown = " ".join(map(str, ids[:16])) + (f" ... ({len(ids) - 16} more)" if len(ids) > 16 else "")
        lines.append(f"{layer:>5}{len(ids):>9}{len(score_LE[layer]):>5}{total:>9.4f}  {shown}")
    taken, of = sum(map(len, config.experts.values())), sum(map(len, score_LE.values()))
    lines.append(f"{taken} of {of} routed experts ({taken / of:.1%}) in {len(score_LE)} layers")
    extra = ["shared experts"] * config.shared_experts + ["all that is no expert"] * config.non_expert_modules
    return "\n".join([*lines, *(f"and {name}" for name in extra)])


def main(argv: list[str] | None = None) -> ExpertConfig:
    args = parse_args(argv)
    scores = ExpertScores.load(args.expert_scores_dir)
    config = select(scores, args)
    trained = ""
    if args.base_model_path:
        model = empty_model(args.base_model_path)
        config.check(model)
        _check_scores(scores, model, args)
        trained = sum(view.numel() for view in adapter_views(model, config).values())
        total = sum(param.numel() for param in model.parameters())
        trained = f"\n{trained:,} of {total:,} parameters ({trained / total:.1%})"
    write_text(args.output_path, json.dumps(config.to_dict()) + "\n")
    print(table(scores, config, args) + trained)
    for note in notes(scores, config, args):
        print(f"note: {note}", file=sys.stderr)
    print(f"written to {args.output_path}")
    return config


def _check_scores(scores: ExpertScores, model: nn.Module, args: argparse.Namespace) -> None:
    layers, score_LE = find_experts(model), scores[args.score_function]
    missing = sorted(layers.keys() - score_LE.keys())
    if missing:
        raise ValueError(
            f"{args.expert_scores_dir}: no scores of layer {missing[0]} ({len(missing)} of the model's {len(layers)} "
            "MoE layers): they are incomplete, or of another model"
        )
    for layer, score_E in score_LE.items():
        expected = layers[layer][1].num_experts
        if len(score_E) != expected:
            raise ValueError(
                f"{args.expert_scores_dir}: layer {layer} has scores of {len(score_E)} experts, the model has "
                f"{expected}: they are of another model"
            )


if __name__ == "__main__":
    run_cli(main)
