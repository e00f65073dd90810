r"""Select the experts to train from the scores of a task, and write them as an expert config.

    python scripts/expert/generate_expert_config.py --eval_dataset=translation --score_function=token --top_p=0.2 \
        --expert_scores_dir=results/expert_scores/translation --output_path=results/expert_configs/translation.json

The scores are those of get_expert_scores.py or the published ones: a summary.json, raw routing logs (with or without
rank_* folders), or a flat JSON (in a folder: expert_scores.json). Strategies:

    cumulative  (the paper) in each layer the best, until their running sum reaches --top_p
    global      the best of all layers together, as many as cumulative takes
    layers      as many as cumulative takes, all in the --upper_layers uppermost layers: fast, as nothing below them is
                differentiated
    fraction    the best --fraction of each layer's experts, rounded up
    topk        the best --top_k of each layer
    random      a control: as many as cumulative takes in the layer, drawn with --seed. Does it matter which experts?
    uniform     a control: the best, as many in all as cumulative takes, but the same number in every layer (the rest
                goes to the layers in which cumulative takes most). Does it matter how many a layer has?

A rule with --top_p takes --budget in its place: the share of all routed experts, and so of their parameters. Any score
goes with any rule. --contrast_scores_dir names scores on general data. The experts are then those that matter more to
the task than to general data, by the difference or the ratio of the two scores (--contrast).

Scores of several tasks, --eval_dataset=a,b --expert_scores_dir=A,B, give the union of their selections, ordered by an
expert's best rank in one of them. A tie goes to the lower id. The controls are then those of the union, and "meta" in
the config says what it is made of. With --output_dir each task gets a config of its own, <output_dir>/<task>.json, and
its scores are looked for in <expert_scores_dir>/<task>.

With --base_model_path the config is checked against the model: its layers, its experts, and whether the scores are of
its weights. The config notes the base of its scores, and training says so if it gets another one.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.experts import moe_layers
from deepseek.files import check_output, write_text
from deepseek.fingerprint import difference
from deepseek.loading import empty_model
from deepseek.selection import CONTRASTS, OPTIONS, TAKES, check_rule, spread
from esft import (
    SCORE_FUNCTIONS,
    TOP_P,
    WITHOUT_SUM,
    ExpertConfig,
    ExpertScores,
    adapter_views,
    base_note,
    select_experts,
)
from evaluation.selection import union_of
from utils import command_parser, markdown_table, note, run_cli, seed_number, split_names


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--expert_scores_dir", required=True, metavar="DIR[,DIR]", help="folder of scores, or a summary or flat JSON "
        "file; several give the union of their selections")  # fmt: skip
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--output_path", metavar="FILE", help="the expert config to write (.json)")
    output.add_argument("--output_dir", metavar="DIR", help="folder for an expert config of each --eval_dataset")
    add(
        "--eval_dataset",
        "--eval_datasets",
        metavar="NAME[,NAME]",
        help="name of the task of each scores dir, for the table",
    )
    add("--strategy", metavar="NAME", default="cumulative", help=f"of {', '.join(TAKES)} (default: cumulative)")
    add_score_flags(parser)
    add("--budget", type=float, metavar="SHARE", help="share of all routed experts to select, in place of --top_p")
    add("--upper_layers", type=int, metavar="N", help="layers: select in so many uppermost layers (default: half)")
    add("--contrast_scores_dir", metavar="DIR", help="scores on general data, to compare the task's with")
    add("--contrast", choices=CONTRASTS, help="task - general, or task / (general + its mean) (default: difference)")
    add("--fraction", type=float, metavar="F", help="fraction: share of each layer's experts, above 0 and up to 1")
    add("--top_k", type=int, metavar="N", help="topk: experts per layer")
    add("--seed", type=seed_number, metavar="N", help="random: seed of the draw (default: 0)")
    add("--train_shared_experts", action="store_true", help="also train the shared experts (default: frozen)")
    add("--train_non_expert_modules", action="store_true", help="also train everything but experts: attention, norms, "
        "embeddings, head, dense layers, routers (default: frozen)")  # fmt: skip
    add("--base_model_path", "--model", metavar="MODEL", help="base model, to check the config and count parameters")
    return parser.parse_args(argv)


def add_score_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which score selects experts, and up to what sum."""
    parser.add_argument("--score_function", choices=SCORE_FUNCTIONS, default="token", help="share of the routed slots, "
        "gate weight per token, router probability over all experts, squared gradients, or gate weight x norm of the "
        "output (default: token)")  # fmt: skip
    parser.add_argument("--top_p", type=float, metavar="P", help="select experts per layer until their scores sum to "
        "this (default: 0.2, or 0.1 with --score_function=gate)")  # fmt: skip


def split_list(text: str) -> list[str]:
    """Return the parts between commas, or the text itself if that is a path."""
    parts = [text] if Path(text).exists() else split_names(text)
    if not parts:
        raise ValueError(f"cannot read {text!r}: it names nothing. Give a name or a path, or several with commas.")
    return parts


def load_scores(folders: list[str], model: nn.Module | None = None) -> list[ExpertScores]:
    """Return the scores of each task. All must have the layers, experts and weights of `model`, or of the first one."""

    def sizes(scores: ExpertScores) -> dict[int, int]:
        return {layer: len(score_E) for layer, score_E in next(iter(scores.by_function.values())).items()}

    every = [ExpertScores.load(folder) for folder in folders]
    expected = {i: layer.num_experts for i, layer in moe_layers(model).items()} if model else sizes(every[0])
    for folder, scores in zip(folders, every):
        if sizes(scores) != expected:
            other = "the base model" if model else folders[0]
            raise ValueError(f"cannot use {folder}: it has scores of other layers or experts than {other} has")
    bases = ([base_note(model)] if model else []) + [scores.meta.get("base", {}) for scores in every]
    for folder, base in zip(folders, bases[-len(folders) :]):
        if how := difference(bases[0], base):
            raise ValueError(f"cannot use {folder}: its scores are of another base model: {how}. Compute them again.")
    return every


def default_top_p(args: argparse.Namespace) -> float:
    """Return --top_p, or the paper's."""
    return TOP_P[args.score_function] if args.top_p is None else args.top_p


def strategy_options(args: argparse.Namespace) -> dict:
    """Return the options of the strategy. By default, top_p is the paper's."""
    given = {name: getattr(args, name) for name in (*OPTIONS, "seed") if getattr(args, name) is not None}
    check_rule(args.strategy, **given)
    usual = {"top_p": default_top_p(args)} if "top_p" in TAKES[args.strategy] and "budget" not in given else {}
    return usual | given


def select(every: list[ExpertScores], general: ExpertScores | None, args: argparse.Namespace) -> ExpertConfig:
    """Return the config that the flags ask for. The controls are those of the union of the tasks."""
    options, strategy = strategy_options(args), args.strategy
    score = {"score_function": args.score_function, "general": general, "contrast": args.contrast or CONTRASTS[0]}

    def union(**rule: object) -> dict[int, tuple[int, ...]]:
        each = [select_experts(scores, **score, **rule) for scores in every]
        return (each[0] if len(each) == 1 else union_of(each)).experts

    if strategy not in ("random", "uniform") or len(every) == 1:
        experts = union(strategy=strategy, **options)
    else:
        draw = random.Random(options.pop("seed", 0)).sample
        experts, ranked_L = union(**options), union(strategy="fraction", fraction=1)
        if strategy == "random":
            experts = {layer: tuple(draw(sorted(ranked_L[layer]), len(ids))) for layer, ids in experts.items()}
        else:
            counts_L = spread({layer: len(ids) for layer, ids in experts.items()}, ranked_L)
            experts = {layer: ranked_L[layer][:count] for layer, count in counts_L.items()}
    return ExpertConfig(experts, args.train_shared_experts, args.train_non_expert_modules)


def print_notes(every: list[ExpertScores], config: ExpertConfig, names: list[str], args: argparse.Namespace) -> None:
    """Say what the user might not expect of the selection."""
    for name, scores in zip(names if args.eval_dataset else [], every):
        dataset = scores.meta.get("dataset")
        if dataset and Path(dataset).stem != Path(name).stem:
            note(f"these scores were computed on {dataset!r}, not on {name!r}")
    top_p = default_top_p(args)
    whole = args.budget is None and not args.contrast_scores_dir and args.score_function not in WITHOUT_SUM
    for scores in every if whole and args.strategy in ("cumulative", "random") else ():
        sums = {layer: sum(score_E.values()) for layer, score_E in scores[args.score_function].items()}
        if low := [layer for layer in sums if sums[layer] < top_p and len(config.experts[layer]) > 1]:
            why = f"their scores sum to less than top_p {top_p:g} (layer {low[0]}: {sums[low[0]]:.4f})"
            note(f"all experts were taken in {len(low)} of {len(sums)} layers, because {why}")


def format_selection(every: list[ExpertScores], config: ExpertConfig, args: argparse.Namespace) -> str:
    """Return a line per layer (experts, the sum of their scores in each task, their ids), and the total."""
    every_LE, rows = [scores[args.score_function] for scores in every], []
    for layer, ids in config.experts.items():  # a layer that gives none has no line
        totals = [f"{sum(score_LE[layer][e] for e in ids):.4f}" for score_LE in every_LE]
        shown = " ".join(map(str, ids[:16])) + (f" ... ({len(ids) - 16} more)" if len(ids) > 16 else "")
        rows.append([layer, len(ids), len(every_LE[0][layer]), *totals, shown])
    order = "as drawn" if args.strategy == "random" else "best first"
    heads = [f"score on {name}" for name in task_names(args.eval_dataset, every)] if len(every) > 1 else ["score"]
    table = markdown_table(["layer", "experts", "of", *heads, f"ids, {order}"], rows)
    taken, of = sum(map(len, config.experts.values())), sum(map(len, every_LE[0].values()))
    also = "\nand shared experts" * config.shared_experts + "\nand all other modules" * config.non_expert_modules
    against = args.contrast_scores_dir and f"{args.contrast or CONTRASTS[0]} with {args.contrast_scores_dir}"
    what = ", ".join(filter(None, [f"{args.score_function} score", against, args.strategy, args.eval_dataset]))
    total = f"{taken} of {of} routed experts ({taken / of:.1%}) in {len(every_LE[0])} layers"
    return f"{what}\n\n{table}\n\n{total}{also}"


def split_tasks(args: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the arguments of each config that is asked for. With --output_dir there is one for each data set."""
    if not args.output_dir:
        return [args]
    names = [Path(name).stem for name in split_list(args.eval_dataset)] if args.eval_dataset else []
    if not names or len(set(names)) < len(names):
        raise ValueError(f"cannot name the configs in {args.output_dir}. Give --eval_dataset with distinct names.")
    folder, tasks = Path(args.expert_scores_dir), []
    for name in names:
        scores = folder if len(names) == 1 and not (folder / name).exists() else folder / name
        own = {"eval_dataset": name, "expert_scores_dir": str(scores), "output_path": f"{args.output_dir}/{name}.json"}
        tasks.append(argparse.Namespace(**{**vars(args), **own}))
    return tasks


def task_names(eval_dataset: str | None, every: list[ExpertScores]) -> list[str]:
    """Return the name of each task. Several data sets that were scored together are one task."""
    known = [scores.meta.get("dataset") for scores in every]
    return known if eval_dataset is None or [eval_dataset] == known else split_list(eval_dataset)


def write_config(every: list[ExpertScores], config: ExpertConfig, args: argparse.Namespace, model: nn.Module | None):
    """Write a config and print what it selects."""
    names = task_names(args.eval_dataset, every)
    share = ""
    if model:
        trained = sum(view.numel() for view in adapter_views(model, config).values())
        total = sum(param.numel() for param in model.parameters())
        share = f"\n{trained:,} of {total:,} parameters ({trained / total:.1%})"
    written = config.to_dict()
    if base := every[0].meta.get("base"):  # of released scores it is not known
        written["base"] = base
    if len(every) > 1:  # one task's config keeps the released form
        paths = split_list(args.expert_scores_dir)
        tasks = [{"dataset": name, "expert_scores": path} for name, path in zip(names, paths)]
        how = {"score_function": args.score_function, "strategy": args.strategy, **strategy_options(args)}
        if args.contrast_scores_dir:
            how |= {"contrast_scores_dir": args.contrast_scores_dir, "contrast": args.contrast or CONTRASTS[0]}
        written["meta"] = {"union_of": tasks, **how}
    write_text(args.output_path, json.dumps(written) + "\n")
    print(format_selection(every, config, args) + share)
    print_notes(every, config, names, args)
    print(f"written to {args.output_path}")


def main(argv: list[str] | None = None) -> list[ExpertConfig]:
    args = parse_args(argv)
    model = empty_model(args.base_model_path) if args.base_model_path else None
    if args.contrast and not args.contrast_scores_dir:
        raise ValueError("cannot use --contrast: it has an effect only with --contrast_scores_dir. Give that, too.")
    chosen = []
    for task in split_tasks(args):
        folders, contrast = split_list(task.expert_scores_dir), filter(None, [args.contrast_scores_dir])
        *every, general = [*load_scores([*folders, *contrast], model), *([] if args.contrast_scores_dir else [None])]
        if (found := len(task_names(task.eval_dataset, every))) != len(folders):
            raise ValueError(
                f"cannot name the tasks: --eval_dataset has {found}, --expert_scores_dir {len(folders)}. Give as many."
            )
        check_output(task.output_path)
        chosen.append((every, select(every, general, task), task))
    for every, config, task in chosen:  # none is written unless all are right
        write_config(every, config, task, model)
    return [config for _, config, _ in chosen]


if __name__ == "__main__":
    run_cli(main)
