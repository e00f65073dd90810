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
import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream
from torch import multiprocessing, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import Encoded, Pack, collate, encode, load_samples, pack
from deepseek.loading import empty_model, keeps_documents_apart, plan_devices
from deepseek.routing import RouterCounts
from esft import ExpertScores, RouterCapture, load_base_model, load_tokenizer, select_experts
from insight import PACKS_NAME, PackCounts
from scripts.expert.generate_expert_config import TOP_P
from utils import Parser, check_output, environment, positive, run_cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
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


def add_shared_flags(parser: Parser) -> None:
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


def sample_packs(
    args: argparse.Namespace, tokenizer, seq_length: int, samples: list[dict] | None = None
) -> tuple[list[Pack], list[list[bool]]]:
    """Packs of whole documents with at least n_sample_tokens tokens (all documents, if they have fewer), and for each
    pack which of its tokens to count. `samples` are those of the training data, by default."""
    samples = load_samples(args.eval_dataset) if samples is None else samples
    order = list(range(len(samples)))
    random.Random(args.seed).shuffle(order)
    encoded: list[Encoded] = []
    masks: list[list[bool]] = []
    tokens = 0
    for i in order:
        if tokens >= args.n_sample_tokens:
            break
        messages = samples[i]["messages"]
        document = encode(messages, tokenizer, args.template)
        if len(document) > seq_length and args.overlong == "error":
            raise ValueError(
                f"data set {args.eval_dataset!r}: sample {i + 1} has {len(document)} tokens, more than seq_length "
                f"{seq_length}: give --overlong truncate or a larger --seq_length"
            )
        encoded.append(document)
        skip = args.skip_template_tokens
        masks.append(content_mask(messages, document, tokenizer, args.template) if skip else [True] * len(document))
        tokens += min(len(document), seq_length)
    packs = pack(encoded, seq_length, args.overlong, args.seed)
    if not packs:
        raise ValueError(f"no answer begins within seq_length {seq_length}: give a larger --seq_length")
    if tokens < args.n_sample_tokens:
        _note(f"{args.eval_dataset} has {tokens} tokens, fewer than n_sample_tokens {args.n_sample_tokens}: all count")
    return packs, [[keep for i in p.samples for keep in masks[i][:seq_length]] for p in packs]


def content_mask(messages: list[dict], document: Encoded, tokenizer, template: str) -> list[bool]:
    """Which tokens of an encoded conversation hold text of its messages' contents, and not of the template.

    The template's own text is found by encoding the conversation with marks for contents.
    """
    marks = [f"7340{number}0437" for number in range(len(messages))]
    marked = encode([{**m, "content": mark} for m, mark in zip(messages, marks)], tokenizer, template)
    between = re.split("|".join(marks), _text_and_spans(marked, tokenizer)[0])
    text, spans = _text_and_spans(document, tokenizer)
    at, inside = len(between[0]), []
    for message, after in zip(messages, between[1:]):
        content = message["content"]
        if not text.startswith(content + after, at):
            content = content.strip()
        inside.append((at, at + len(content)))
        at += len(content) + len(after)
        if not text.startswith(content + after, inside[-1][0]):
            at = -1
    if at != len(text) or len(between) != len(messages) + 1 or not text.startswith(between[0]):
        raise ValueError(
            f"the template does not show the sample that begins {messages[0]['content'][:40]!r} as it is, so its "
            "template tokens cannot be told: leave out --skip_template_tokens"
        )
    return [any(start < b and end > a for a, b in inside) for start, end in spans]


def _text_and_spans(document: Encoded, tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The text of the tokens, and [start, end) of each in it; parts of one character share its place."""
    stream, text, spans = DecodeStream(skip_special_tokens=False), "", []
    for token in document.input_ids:
        chunk = stream.step(tokenizer.backend_tokenizer, token) or ""
        spans.append((len(text), len(text) + max(len(chunk), 1)))
        text += chunk
    return text, spans


# ----------------------------------------------------------------------------------------------------- counting


@dataclass
class Counted:
    """What was counted in a pack, or in a document of one: the pack's number, tokens that the model read, counts."""

    pack: int
    length: int
    counts: RouterCounts


@torch.no_grad()
def count_routing(
    model: nn.Module, packs: list[Pack], masks: list[list[bool]], numbers: list[int], prob: bool = False
) -> Iterator[Counted | None]:
    """Forward each pack alone. Yields None, then what was counted in each pack when it is done."""
    decoder = model.base_model  # without lm_head
    device = model.get_input_embeddings().weight.device
    yield None
    for one, mask, number in zip(packs, masks, numbers):
        batch = collate([one], pad_token_id=0)  # nothing is padded
        with RouterCapture(decoder, prob) as capture:
            capture.token_mask = torch.tensor([mask])
            decoder(
                input_ids=batch["input_ids"].to(device),
                position_ids=batch["position_ids"].to(device),
                use_cache=False,
            )
        yield Counted(number, len(one), capture.counts())


def run_rank(
    rank: int, args: argparse.Namespace, devices: list[list[str]], packs: list[Pack], masks: list[list[bool]]
) -> Iterator[Counted | None]:
    """Load the model and yield from `count_routing` of the packs rank::world_size."""
    threads = torch.get_num_threads()
    if devices[rank] == ["cpu"]:
        torch.set_num_threads(1)
    try:
        device = devices[rank] if len(devices[rank]) > 1 else devices[rank][0]
        model, _ = load_base_model(args.base_model_path, dtype=args.dtype, device=device)
        numbers = list(range(len(packs)))[rank :: len(devices)]
        packs, masks = packs[rank :: len(devices)], masks[rank :: len(devices)]
        if not keeps_documents_apart(model):
            packs, masks, numbers = one_by_one(packs, masks, numbers)
        yield from count_routing(model, packs, masks, numbers, args.prob)
    finally:
        torch.set_num_threads(threads)


def one_by_one(packs: list[Pack], masks: list[list[bool]], numbers: list[int]) -> tuple[list, list, list]:
    """(documents as packs of their own, their masks, the numbers of the packs they are of)."""
    documents, kept, of = [], [], []
    for one, mask, number in zip(packs, masks, numbers):
        ends = list(accumulate(map(len, one.documents())))
        documents += one.documents()
        kept += [mask[end - len(document) : end] for document, end in zip(one.documents(), ends)]
        of += [number] * len(ends)
    return documents, kept, of


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


def collect(messages: Iterable[Counted | None], total: int) -> PackCounts:
    """The counts of each pack, under a progress bar over `total` tokens that starts when a model is loaded."""
    bar, counts_P = None, {}
    for message in messages:
        bar = bar or tqdm(total=total, unit="tok", unit_scale=True, desc="scoring")
        if message is not None:
            before = counts_P.get(message.pack)
            counts_P[message.pack] = before + message.counts if before else message.counts
            bar.update(message.length)
    bar.close()
    return PackCounts.of([counts_P[number] for number in sorted(counts_P)])


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
