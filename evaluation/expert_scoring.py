"""Pack a task's data and count where its tokens are routed, pack by pack."""

import argparse
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from tokenizers.decoders import DecodeStream
from torch import nn
from tqdm import tqdm

from deepseek.loading import keeps_documents_apart, load_base_model
from deepseek.routing import RouterCapture, RouterCounts
from evaluation.selection import PackCounts
from training.data import Encoded, Pack, collate, encode, load_samples, pack
from utils import note


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
        note(f"{args.eval_dataset} has {tokens} tokens, fewer than n_sample_tokens {args.n_sample_tokens}: all count")
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
