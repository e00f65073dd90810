r"""Score the experts of a mixture-of-experts model on a task: how often, and how strongly, its tokens go to each.

    python scripts/expert/get_expert_scores.py --eval_dataset=translation --base_model_path=M \
        --output_dir=results/expert_scores/translation --n_sample_tokens=131072 --world_size=4 --gpus_per_rank=2

Whole documents of the training data, in a seeded order, are packed until they have n_sample_tokens. Every pack goes
through the model alone (no gradient, no lm_head), while hooks count where the routers send its tokens. The result,
<output_dir>/summary.json, is the same for any world_size: a pack's numbers do not depend on other packs, the counts of
the ranks are integers and add exactly, and on the CPU each rank computes with one thread (the order in which threads
share out a sum changes its last bits, and with them a near tie between two experts). The counts of each pack lie beside
it, in packs.safetensors: compare_scores.py tells from them how certain a selection is.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.files import check_output
from deepseek.loading import empty_model, plan_devices
from esft import ExpertScores, RouterCapture, load_tokenizer, select_experts
from evaluation.expert_scoring import Counted, collect, run_rank, sample_packs
from evaluation.selection import PACKS_NAME
from scripts.expert.generate_expert_config import TOP_P
from training.data import Pack
from utils import command_parser, environment, positive, run_cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--eval_dataset", "--eval_datasets", required=True, metavar="NAME", help="data set of the task: a name in "
        "datasets/train, a path (.jsonl, .json, .parquet) or a hub id; as in the paper, experts are scored on training "
        "data")  # fmt: skip
    add("--base_model_path", "--model", required=True, metavar="MODEL", help="folder or hub id of the base model")
    add("--output_dir", required=True, metavar="DIR", help="folder that gets summary.json and packs.safetensors")
    add("--prob", action="store_true", help="score the mean router probability over all experts, too (default: token "
        "and gate scores only)")  # fmt: skip
    add("--world_size", type=positive, default=1, metavar="N", help="processes, each with a whole model; on the CPU "
        "each computes with one thread, so give as many as there are cores (default: 1)")  # fmt: skip
    add_shared_flags(parser)
    return parser.parse_args(argv)


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """What is sampled of a data set (see `sample_packs`), and where the model runs that reads it."""
    add = parser.add_argument
    add("--n_sample_tokens", type=positive, default=131072, metavar="N", help="tokens to sample, rounded up to whole "
        "documents; less where the data has less (default: 131072, the paper's)")  # fmt: skip
    add("--seq_length", type=positive, default=4096, metavar="N", help="longest pack, in tokens; at most the model's "
        "context (default: 4096, the paper's)")  # fmt: skip
    add("--overlong", choices=("error", "truncate"), default="error", help="a document longer than seq_length is an "
        "error, or keeps its head (default: error)")  # fmt: skip
    add("--template", choices=("chat", "released"), default="chat", help="how messages become tokens: the tokenizer's "
        "chat template, or the one of the released checkpoints (default: chat)")  # fmt: skip
    add("--skip_template_tokens", action="store_true", help="count only the tokens of the messages' contents; the "
        "template's are read by the model all the same (default: count all)")  # fmt: skip
    add("--gpus_per_rank", type=positive, default=1, metavar="N", help="GPUs over which each process spreads its model "
        "(default: 1)")  # fmt: skip
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights "
        "(default: auto, as stored)")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto, the GPUs "
        "if there are any)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the documents' order (default: 0)")


# ------------------------------------------------------------------------------------------------ what is counted


# ----------------------------------------------------------------------------------------------------- counting


def _spawned(rank: int, args: argparse.Namespace, devices: list, packs: list, masks: list, queue) -> None:
    if rank:
        from transformers.utils import logging

        logging.disable_progress_bar()
    try:
        for message in run_rank(rank, args, devices, packs, masks):
            queue.put(message)
    except (ValueError, OSError) as error:
        queue.put(str(error))


def run_ranks(
    args: argparse.Namespace, devices: list[list[str]], packs: list[Pack], masks: list[list[bool]]
) -> Iterator[Counted | None]:
    """`run_rank` of every rank, each in a process of its own. Raises what a rank raised, as one sentence."""
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    ranks = multiprocessing.spawn(
        _spawned, (args, devices, packs, masks, queue), nprocs=len(devices), join=False, daemon=True
    )
    try:
        done = False
        while not done or not queue.empty():
            done = done or ranks.join(timeout=0.1)
            while not queue.empty():
                if isinstance(message := queue.get(), str):
                    raise ValueError(message)
                yield message
    except ProcessRaisedException as error:
        reason = str(error).strip().split("\n")[-1]
        raise ChildProcessError(f"rank {error.error_index} failed ({reason})") from error
    except ProcessExitedException as error:
        cause = error.signal_name or f"exit code {error.exit_code}"
        raise ChildProcessError(
            f"rank {error.error_index} died ({cause}), perhaps of too little memory: lower --world_size"
        ) from error
    finally:
        for process in ranks.processes:
            process.terminate()


# ------------------------------------------------------------------------------------------------------- command


def table(scores: ExpertScores) -> str:
    """A line per layer: tokens, how many experts the paper's cuts take, and the highest token score."""
    functions = [name for name in ("token", "gate") if name in scores.by_function]
    cuts = {name: select_experts(scores, score_function=name, top_p=TOP_P[name]).experts for name in functions}
    heads = "".join(f"{f'{name} {TOP_P[name]:g}':>12}" for name in functions)
    lines = [
        f"{'':>15}  experts that the paper's cut takes",
        f"{'layer':>5}{'tokens':>10}{heads}   highest token score",
    ]
    for layer, score_E in scores["token"].items():
        best = max(score_E, key=lambda e: (score_E[e], -e))
        counts = "".join(f"{len(cuts[name][layer]):>12}" for name in functions)
        top = f"{score_E[best]:.1%} on expert {best} of {len(score_E)}"
        lines.append(f"{layer:>5}{scores.meta['tokens']:>10}{counts}   {top}")
    return "\n".join(lines)


def note_replaced(path: Path, meta: dict) -> None:
    """Say so where `path` holds scores that were computed with other settings than `meta`."""
    try:
        old = ExpertScores.load(path).meta
    except (ValueError, OSError):  # nothing there, or nothing that could be missed
        return
    if other := [key for key in meta if meta[key] != old.get(key)]:
        dataset, model = old.get("dataset", "an unknown data set"), old.get("model", "an unknown model")
        _note(f"{path}: this run replaces the scores of {dataset} on {model} (another {', '.join(other)})")


def main(argv: list[str] | None = None) -> ExpertScores:
    args = parse_args(argv)
    output_path = Path(args.output_dir) / "summary.json"
    check_output(output_path)
    devices = plan_devices(args.device, args.world_size, args.gpus_per_rank)
    model = empty_model(args.base_model_path)
    RouterCapture(model, args.prob)  # refuses what it cannot count on, before any weight is read
    tokenizer = load_tokenizer(args.base_model_path)
    seq_length = args.seq_length
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and context < seq_length:
        _note(f"seq_length {seq_length} is more than the model's context, packs have at most {context} tokens")
        seq_length = context
    settings = ("template", "skip_template_tokens", "n_sample_tokens", "overlong", "seed", "dtype")
    meta = {"model": args.base_model_path, "dataset": args.eval_dataset, "seq_length": seq_length}
    meta |= {name: getattr(args, name) for name in settings}
    note_replaced(output_path, meta)
    packs, masks = sample_packs(args, tokenizer, seq_length)
    if len(packs) < len(devices):
        _note(f"{len(packs)} packs cannot keep {len(devices)} processes busy: running {len(packs)}")
        devices = devices[: len(packs)]

    run = run_ranks(args, devices, packs, masks) if len(devices) > 1 else run_rank(0, args, devices, packs, masks)
    counted = collect(run, sum(map(len, packs)))
    documents, counts = sum(len(p.samples) for p in packs), counted.total()
    scores = ExpertScores.from_counts(counts, **meta, documents=documents, packs=len(packs), environment=environment())
    counted.save(output_path.with_name(PACKS_NAME))
    scores.save(output_path)
    print(table(scores))
    print(f"written to {output_path}")
    return scores


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
