r"""Select the experts to train from the scores of a task, layer by layer, and write them as an expert config.

    python scripts/expert/generate_expert_config.py --eval_dataset=translation --score_function=token --top_p=0.2 \
        --expert_scores_dir=results/expert_scores/translation --output_path=results/expert_configs/translation.json

The scores are those of get_expert_scores.py, or the published ones: a summary.json, raw routing logs (with or without
rank_* folders), or a flat JSON. Strategies:

    cumulative  (the paper) best first until the running sum reaches --top_p
    fraction    the best --fraction of the layer's experts, rounded up
    topk        the best --top_k
    random      a control: as many as cumulative takes in the layer, drawn with --seed. Does it matter which experts?
    uniform     a control: the best, as many in all as cumulative takes, but the same number in every layer (what is
                left over goes to the layers in which cumulative takes most). Does it matter how many a layer has?

Scores of several tasks, --eval_dataset=a,b --expert_scores_dir=A,B, give the union of their selections, ordered by an
expert's best rank in one of them (a tie goes to the lower id); the controls are then those of the union. Of what it was
made is noted under "meta".

With --base_model_path the config is checked against the model's architecture; no weights are read.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.experts import moe_layers
from deepseek.files import write_text
from deepseek.loading import empty_model
from esft import (
    SCORE_FUNCTIONS,
    STRATEGIES,
    TOP_P,
    ExpertConfig,
    ExpertScores,
    adapter_views,
    select_experts,
)
from evaluation.selection import even_counts, ranked_experts, union_of
from utils import command_parser, run_cli

CUMULATIVE = ("cumulative", "random", "uniform")  # the controls take as many
FLAGS = {"top_p": CUMULATIVE, "fraction": ("fraction",), "top_k": ("topk",), "seed": ("random",)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--expert_scores_dir", required=True, metavar="DIR[,DIR]", help="folder of scores, or a summary or flat JSON "
        "file; several for the union of their selections")  # fmt: skip
    add("--output_path", required=True, metavar="FILE", help="where the expert config (.json) goes")
    add("--eval_dataset", metavar="NAME[,NAME]", help="a label for the table, of each scores dir; a note tells if "
        "the scores are of another (default: none)")  # fmt: skip
    add("--score_function", choices=SCORE_FUNCTIONS, default="token", help="share of the routed slots, gate weight per "
        "token, or router probability over all experts (default: token)")  # fmt: skip
    add("--strategy", choices=(*STRATEGIES, "uniform"), default="cumulative", help="see above (default: cumulative)")
    add("--top_p", type=float, metavar="P", help="cumulative and its controls: the sum of scores to reach in each "
        "layer, above 0 and up to 1 (default: 0.2, for gate 0.1)")  # fmt: skip
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


def load_scores(args: argparse.Namespace) -> list[ExpertScores]:
    """The scores of each task. Raises ValueError where they are of different models, or the names do not match."""
    folders = split_list(args.expert_scores_dir)
    names = (args.eval_dataset or "").split(",")
    if args.eval_dataset and len(names) != len(folders):
        raise ValueError(
            f"--eval_dataset names {len(names)} tasks and --expert_scores_dir {len(folders)}: give one name per folder"
        )
    if len(set(folders)) < len(folders):
        raise ValueError(f"--expert_scores_dir {args.expert_scores_dir}: one folder is given twice")
    found = [ExpertScores.load(folder) for folder in folders]
    shapes = [{layer: len(score_E) for layer, score_E in scores[args.score_function].items()} for scores in found]
    for folder, shape in zip(folders, shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"{folder} has {sum(shape.values())} experts in {len(shape)} layers, {folders[0]} has "
                f"{sum(shapes[0].values())} in {len(shapes[0])}: they are of different models"
            )
    return found


def split_list(text: str) -> list[str]:
    """Paths with commas between them, or the path of something that is there, commas included."""
    return [text] if Path(text).exists() else [part for part in text.split(",") if part]


def top_p_of(args: argparse.Namespace) -> float:
    """--top_p, or the paper's."""
    return TOP_P[args.score_function] if args.top_p is None else args.top_p


def options_of(args: argparse.Namespace) -> dict:
    """What was given of the strategies' flags, and the paper's top_p where the strategy takes one."""
    options = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    return {"top_p": top_p_of(args), **options} if args.strategy in CUMULATIVE else options


def select(every: list[ExpertScores], args: argparse.Namespace) -> ExpertConfig:
    """The config that the flags ask for. Raises ValueError where a flag is missing, out of range or without effect."""
    options = options_of(args)
    for name in options:
        if args.strategy not in FLAGS[name]:
            raise ValueError(
                f"--{name} has no effect with --strategy {args.strategy}: leave it out or give --strategy "
                f"{FLAGS[name][0]}"
            )
    for name, strategy in (("fraction", "fraction"), ("top_k", "topk")):
        if args.strategy == strategy and name not in options:
            raise ValueError(f"--strategy {strategy} needs --{name}")
    seed = options.pop("seed", 0)
    strategy = "cumulative" if args.strategy in CUMULATIVE else args.strategy
    each = [
        select_experts(scores, score_function=args.score_function, strategy=strategy, **options) for scores in every
    ]
    chosen = each[0] if len(each) == 1 else union_of(each)
    ranked = [ExpertConfig(ranked_experts(scores, args.score_function)) for scores in every]
    ranked_L = union_of(ranked).experts
    if args.strategy == "random":
        generator = random.Random(seed)
        drawn = {layer: generator.sample(sorted(ranked_L[layer]), len(ids)) for layer, ids in chosen.experts.items()}
        chosen = ExpertConfig({layer: tuple(ids) for layer, ids in drawn.items()})
    if args.strategy == "uniform":
        counts = even_counts(chosen, {layer: len(ids) for layer, ids in ranked_L.items()})
        chosen = ExpertConfig({layer: ranked_L[layer][:count] for layer, count in counts.items()})
    return ExpertConfig(chosen.experts, args.train_shared_experts, args.train_non_expert_modules)


def meta(every: list[ExpertScores], args: argparse.Namespace) -> dict:
    """Of what a union was made; nothing of a single task's config, which keeps the released form."""
    if len(every) == 1:
        return {}
    names = args.eval_dataset.split(",") if args.eval_dataset else [scores.meta.get("dataset") for scores in every]
    tasks = [{"dataset": name, "expert_scores": path} for name, path in zip(names, split_list(args.expert_scores_dir))]
    how = {"score_function": args.score_function, "strategy": args.strategy, **options_of(args)}
    return {"meta": {"union_of": tasks, **how}}


def notes(every: list[ExpertScores], config: ExpertConfig, args: argparse.Namespace) -> list[str]:
    """What the user should know of the selection and might not expect."""
    found = []
    names = args.eval_dataset.split(",") if args.eval_dataset else []
    for name, scores in zip(names, every):
        dataset = scores.meta.get("dataset")
        if dataset and Path(dataset).stem != Path(name).stem:
            found.append(f"these scores were computed on {dataset!r}, not on {name!r}")
    if args.strategy in CUMULATIVE:
        top_p = top_p_of(args)
        for scores in every:
            sums = {layer: sum(score_E.values()) for layer, score_E in scores[args.score_function].items()}
            low = [layer for layer in sums if sums[layer] < top_p and len(config.experts[layer]) > 1]
            if low:
                found.append(
                    f"in {len(low)} of {len(sums)} layers all experts together score less than top_p {top_p:g} (layer "
                    f"{low[0]}: {sums[low[0]]:.4f}), so all of them were taken"
                )
    return found


def table(every: list[ExpertScores], config: ExpertConfig, args: argparse.Namespace) -> str:
    """A line per layer (experts taken, the sum of their scores in each task, their ids), and the total."""
    title = f"{args.score_function} score, {args.strategy}" + (f", {args.eval_dataset}" if args.eval_dataset else "")
    order = "as drawn" if args.strategy == "random" else "best first"
    every_LE = [scores[args.score_function] for scores in every]
    lines = [
        title,
        f"{'layer':>5}{'experts':>9}{'of':>5}{'score':>9}{' ' * 9 * (len(every) - 1)}  ids, {order}",
    ]
    for layer, ids in config.experts.items():
        totals = "".join(f"{sum(score_LE[layer][e] for e in ids):>9.4f}" for score_LE in every_LE)
        shown = " ".join(map(str, ids[:16])) + (f" ... ({len(ids) - 16} more)" if len(ids) > 16 else "")
        lines.append(f"{layer:>5}{len(ids):>9}{len(every_LE[0][layer]):>5}{totals}  {shown}")
    taken, of = sum(map(len, config.experts.values())), sum(map(len, every_LE[0].values()))
    lines.append(f"{taken} of {of} routed experts ({taken / of:.1%}) in {len(every_LE[0])} layers")
    extra = ["shared experts"] * config.shared_experts + ["all that is no expert"] * config.non_expert_modules
    return "\n".join([*lines, *(f"and {name}" for name in extra)])


def main(argv: list[str] | None = None) -> ExpertConfig:
    args = parse_args(argv)
    every = load_scores(args)
    config = select(every, args)
    share = ""
    if args.base_model_path:
        model = empty_model(args.base_model_path)
        config.check(model)
        for path, scores in zip(split_list(args.expert_scores_dir), every):
            check_scores(scores, model, path, args.score_function)
        trained = sum(view.numel() for view in adapter_views(model, config).values())
        total = sum(param.numel() for param in model.parameters())
        share = f"\n{trained:,} of {total:,} parameters ({trained / total:.1%})"
    write_text(args.output_path, json.dumps({**config.to_dict(), **meta(every, args)}) + "\n")
    print(table(every, config, args) + share)
    for note in notes(every, config, args):
        print(f"note: {note}", file=sys.stderr)
    print(f"written to {args.output_path}")
    return config


def check_scores(scores: ExpertScores, model: nn.Module, path: str, score_function: str) -> None:
    """Raise ValueError where the scores at `path` are not of all MoE layers and experts of `model`."""
    layers, score_LE = moe_layers(model), scores[score_function]
    missing = sorted(layers.keys() - score_LE.keys())
    if missing:
        raise ValueError(
            f"{path}: no scores of layer {missing[0]} ({len(missing)} of the model's {len(layers)} MoE layers): they "
            "are incomplete, or of another model"
        )
    for layer, score_E in score_LE.items():
        if layer not in layers:
            have = f"{min(layers)} to {max(layers)}"
            raise ValueError(
                f"{path}: scores of layer {layer}, the model's MoE layers are {have}: they are of another model"
            )
        expected = layers[layer].num_experts
        if len(score_E) != expected:
            raise ValueError(
                f"{path}: layer {layer} has scores of {len(score_E)} experts, the model has {expected}: they are of "
                "another model"
            )


if __name__ == "__main__":
    run_cli(main)
