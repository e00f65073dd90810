r"""Score the experts of a mixture-of-experts model on a task: how often, and how strongly, its tokens go to each.

    python scripts/expert/get_expert_scores.py --eval_dataset=translation --base_model_path=M \
        --output_dir=results/expert_scores/translation --n_sample_tokens=131072 --world_size=4 --gpus_per_rank=2

Whole documents of the training data, in a seeded order, are packed until they have n_sample_tokens. Each pack goes
through the model alone, without gradient or lm_head, while hooks count where the routers send its tokens. The scores
are in <output_dir>/summary.json. The counts of each pack are beside them in packs.safetensors, from which
compare_scores.py tells how certain a selection is. The result is the same for any world_size.

--scores asks for more than where the tokens go:

    prob        mean router probability
    gradient    squared gradients of an expert's weights, summed over documents. Needs a backward, and keeps no gradient
    reap        mean of gate weight x norm of an expert's output

docs/selection.md has their formulas and costs.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.files import check_output, suggest
from deepseek.loading import empty_model
from esft import (
    SCORE_FUNCTIONS,
    TOP_P,
    ExpertScores,
    RouterCapture,
    base_note,
    check_adapter,
    load_tokenizer,
    select_experts,
)
from evaluation.expert_scoring import SampleSettings, count_packs, sample_packs
from evaluation.selection import PACKS_NAME
from evaluation.workers import TIMEOUT, plan_devices
from training.data import TemplateSettings, add_template_flags, template_settings
from utils import (
    AUTO_DTYPE,
    command_parser,
    counted,
    environment,
    locked,
    markdown_table,
    note,
    positive,
    run_cli,
    seed_number,
    split_names,
)

EXTRA = [name for name in SCORE_FUNCTIONS if name not in ("token", "gate")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--eval_dataset", "--eval_datasets", required=True, metavar="NAME", help="training data of the task, as in the "
        "paper: a name in datasets/train, a path (.jsonl, .json, .parquet) or a hub id")  # fmt: skip
    add("--base_model_path", "--model", required=True, metavar="MODEL", help="folder or hub id of the base model")
    add("--adapter_dir", metavar="DIR", help="score the base with this adapter in it, such as one of trained routers")
    add("--output_dir", required=True, metavar="DIR", help="folder for summary.json and packs.safetensors")
    add("--scores", default="", metavar="NAME[,NAME]", help=f"scores beside token and gate: {', '.join(EXTRA)}")
    add("--prob", action="store_true", help="the same as --scores=prob")
    add("--world_size", type=positive, default=1, metavar="N", help="processes, each with a whole model; on the CPU "
        "each computes with one thread, so give as many as there are cores (default: 1)")  # fmt: skip
    add("--timeout", type=positive, default=TIMEOUT, metavar="SECONDS", help="after which one of several processes "
        "that does not answer ends all (default: %(default)s)")  # fmt: skip
    add_shared_flags(parser)
    args = parser.parse_args(argv)
    args.scores = sorted({*split_names(args.scores), *["prob"] * args.prob} - {"token", "gate"})
    return args


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `sample_settings`, and those of where the model runs."""
    add = parser.add_argument
    add("--n_sample_tokens", type=positive, default=131072, metavar="N", help="tokens to sample, rounded up to whole "
        "documents, or all if there are fewer (default: 131072, the paper's)")  # fmt: skip
    add("--seq_length", type=positive, default=4096, metavar="N", help="longest pack, in tokens (default: 4096)")
    add("--overlong", choices=("error", "truncate"), default="error", help="of a document longer than seq_length: stop "
        "with an error, or keep only the first seq_length tokens (default: error)")  # fmt: skip
    add("--n_train_samples", type=positive, metavar="N", help="take only the samples that train.py takes with it")
    add("--validation_fraction", type=float, default=0.0, metavar="X", help="leave out the samples that train.py holds "
        "out with it (default: 0)")  # fmt: skip
    add("--streaming", action="store_true", help="read no more of the data set than the sample needs, for sets larger "
        "than the disk")  # fmt: skip
    add_template_flags(parser)
    add("--skip_template_tokens", action="store_true", help="count only the tokens of the messages' contents")
    add("--gpus_per_rank", type=positive, default=1, metavar="N", help="GPUs that share a model (default: 1)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights "
        f"(default: auto, {AUTO_DTYPE})")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, the GPUs if there are any")
    add("--seed", type=seed_number, default=0, metavar="N", help="seed of the documents' order (default: 0)")


def sample_settings(args: argparse.Namespace) -> SampleSettings:
    """Return what the flags sample."""
    names = ("n_sample_tokens", "seq_length", "overlong", "streaming", "skip_template_tokens", "seed")
    names += ("n_train_samples", "validation_fraction")
    values = {name: getattr(args, name) for name in names}
    return SampleSettings(args.eval_dataset, template=template_settings(args), **values)


def format_scores(scores: ExpertScores) -> str:
    """Return a line per layer: tokens, how many experts the paper's cuts take, and the highest token score."""
    functions = [name for name in ("token", "gate") if name in scores.by_function]
    cuts = {name: select_experts(scores, score_function=name, top_p=TOP_P[name]).experts for name in functions}
    rows = []
    for layer, score_E in scores["token"].items():
        best = max(score_E, key=lambda e: (score_E[e], -e))
        counts = [len(cuts[name][layer]) for name in functions]
        rows.append([layer, scores.meta["tokens"], *counts, f"{score_E[best]:.1%} on expert {best} of {len(score_E)}"])
    heads = [f"experts by {name} {TOP_P[name]:g}" for name in functions]
    return markdown_table(["layer", "tokens", *heads, "highest token score"], rows)


def note_replaced(path: Path, meta: dict, extra: list[str]) -> None:
    """Say so if `path` holds scores that were computed with other settings than `meta`, or others than `extra`."""
    try:
        scores = ExpertScores.load(path)
    except (ValueError, OSError):  # there are none, or they cannot be read
        return
    old = scores.meta
    if lost := [name for name in EXTRA if name in scores.by_function and name not in extra]:
        note(f"{path}: this run removes the scores {', '.join(lost)}, as --scores does not name them")
    if other := [key for key in meta if meta[key] != old.get(key)]:
        dataset, model = old.get("dataset", "an unknown data set"), old.get("model", "an unknown model")
        note(f"{path}: this run replaces the scores of {dataset} on {model} (another {', '.join(other)})")


def main(argv: list[str] | None = None) -> ExpertScores:
    args = parse_args(argv)
    for name in ("summary.json", PACKS_NAME):
        check_output(Path(args.output_dir) / name)
    with locked(args.output_dir):
        return write_scores(args)


def write_scores(args: argparse.Namespace) -> ExpertScores:
    """Score the experts, write and print the scores, and return them."""
    output_path = Path(args.output_dir) / "summary.json"
    for name in args.scores:
        if name not in EXTRA:
            raise ValueError(f"cannot score {name!r}{suggest(name, EXTRA)}. Give --scores of {', '.join(EXTRA)}.")
    devices = plan_devices(args.device, args.world_size, args.gpus_per_rank)
    model = empty_model(args.base_model_path)
    RouterCapture(model, "prob" in args.scores)  # raises for a model that it cannot count, before any weight is read
    if args.adapter_dir:
        check_adapter(empty_model(args.base_model_path), args.adapter_dir)
    settings = sample_settings(args)
    meta = {"model": args.base_model_path, "dataset": args.eval_dataset, "seq_length": settings.seq_length}
    for name in ("template", "skip_template_tokens", "n_sample_tokens", "overlong", "seed", "dtype"):
        meta[name] = getattr(args, name)
    for name in ("streaming", "n_train_samples", "validation_fraction"):
        meta |= {name: value} if (value := getattr(settings, name)) else {}
    meta |= {"adapter": args.adapter_dir} if args.adapter_dir else {}
    usual = asdict(TemplateSettings())
    meta |= {name: value for name, value in asdict(settings.template).items() if value != usual[name]}
    note_replaced(output_path, meta, args.scores)
    packs = sample_packs(settings, load_tokenizer(args.base_model_path), model.config.get_text_config().vocab_size)
    if len(packs) < len(devices):
        note(f"the sample has {counted(len(packs), 'pack')}, so {len(packs)} of the {len(devices)} processes are used")
        devices = devices[: len(packs)]

    options = {"dtype": args.dtype, "extra": args.scores, "timeout": args.timeout, "adapter": args.adapter_dir}
    counts = count_packs(packs, args.base_model_path, devices=devices, **options)
    meta |= {"documents": sum(len(p.pack.samples) for p in packs), "packs": len(packs), "environment": environment()}
    meta["base"] = base_note(model)
    scores = ExpertScores.from_counts(counts.total(), **meta)
    counts.save(output_path.with_name(PACKS_NAME))
    scores.save(output_path)
    print(format_scores(scores))
    print(f"written to {output_path}")
    return scores


if __name__ == "__main__":
    run_cli(main)
