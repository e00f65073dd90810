"""Sample a task's documents, pack them, and count where the model's routers send their tokens, pack by pack.

    packs = sample_packs(SampleSettings("law"), tokenizer)
    counts = count_packs(packs, "results/models/tiny", devices=[["cpu"]])      # -> evaluation/selection.py

The counts are the same for any number of processes. A pack goes through the model alone, so its numbers do not depend
on the others. Most are integers, which add exactly. The others are added in the order of the packs.
"""

import contextlib
import functools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor, nn
from tqdm import tqdm

from deepseek.loading import keeps_documents_apart
from deepseek.routing import RouterCapture, RouterCounts
from esft import add_adapter
from evaluation.selection import PackCounts
from evaluation.workers import TIMEOUT, load_on, run_ranks
from training.data import (
    IGNORE,
    Encoded,
    Pack,
    Skeleton,
    Template,
    TemplateSettings,
    collate,
    content_marks,
    has_label,
    pack,
    pack_of,
    read_chosen,
    sample_rows,
    split_samples,
    stream_rows,
)
from utils import note


@dataclass(frozen=True)
class SampleSettings:
    """Which documents of a data set are sampled, and how they become packs.

    With `n_train_samples` and `validation_fraction`, only the samples that a run with these keys trains on.
    """

    dataset: str
    n_sample_tokens: int = 131072
    seq_length: int = 4096
    overlong: str = "error"
    streaming: bool = False
    n_train_samples: int | None = None
    validation_fraction: float = 0.0
    template: TemplateSettings = field(default_factory=TemplateSettings)
    skip_template_tokens: bool = False
    seed: int = 0


@dataclass(frozen=True)
class MaskedPack:
    """A pack, and which of its tokens count."""

    pack: Pack
    mask: list[bool]

    def __len__(self) -> int:
        return len(self.pack)

    def documents(self) -> list["MaskedPack"]:
        """Return each document as a pack of its own, for a model that does not keep documents apart."""
        documents = self.pack.documents()
        ends = accumulate(map(len, documents))
        return [MaskedPack(document, self.mask[end - len(document) : end]) for document, end in zip(documents, ends)]


def sample_packs(
    settings: SampleSettings, tokenizer, vocab_size: int | None = None, samples: list[dict] | None = None
) -> list[MaskedPack]:
    """Pack whole documents in a seeded order until they have `n_sample_tokens`, or all documents if they have fewer.

    vocab_size: tokens that the model knows; any other is refused.
    samples: conversations in place of the training data of `settings.dataset`.
    """
    template, tokens = Template(tokenizer, settings.template, vocab_size), 0
    documents: list[Encoded] = []
    numbers: list[int] = []  # of the rows, from 1
    masks: list[list[bool]] = []
    for number, where, row in _rows_in_order(settings, samples):
        messages = read_chosen(row, where)
        found = template.encode([messages], [where])[0]
        documents += found
        numbers += [number] * len(found)
        every = [[True] * len(document) for document in found]
        masks += content_masks(messages, found, template) if settings.skip_template_tokens else every
        tokens += sum(min(len(document), settings.seq_length) for document in found)
        if tokens >= settings.n_sample_tokens:
            break
    sizes = [min(len(document), settings.seq_length) for document in documents]
    members_P = pack(
        list(map(len, documents)),
        lambda i: has_label(documents[i], sizes[i]),
        numbers,
        settings.seq_length,
        settings.overlong,
        settings.seed,
    )
    packs = [
        MaskedPack(
            pack_of(documents, members, sizes, numbers),
            [keep for i in members for keep in masks[i][: sizes[i]]],
        )
        for members in members_P
    ]
    if not packs:
        raise ValueError(f"cannot pack {settings.dataset!r}: no answer begins within seq_length {settings.seq_length}")
    if tokens < settings.n_sample_tokens:
        note(f"{settings.dataset} has {tokens} tokens, fewer than the {settings.n_sample_tokens} to sample: all count")
    return packs


def _rows_in_order(settings: SampleSettings, samples: list[dict] | None) -> Iterator[tuple[int, str, dict]]:
    """Yield (number in the data set, where, row) in the order of the seed."""
    if settings.streaming and not settings.n_train_samples:
        for number, (where, row) in enumerate(stream_rows(settings.dataset, seed=settings.seed), 1):
            yield number, where, row
        return
    if samples is None:
        rows, numbers = sample_rows(settings.dataset, settings.n_train_samples, settings.seed, settings.streaming)
    else:
        rows, numbers = [(f"sample {i}", sample) for i, sample in enumerate(samples, 1)], range(1, len(samples) + 1)
    order, _ = split_samples(list(range(len(rows))), settings.validation_fraction, settings.seed)
    random.Random(settings.seed).shuffle(order)
    for i in order:
        yield int(numbers[i]), *rows[i]


def content_masks(messages: list[dict], documents: list[Encoded], template: Template) -> list[list[bool]]:
    """Return, for each document of a conversation, which of its tokens hold text of its messages' contents.

    The template's own text is what remains between marks, if the conversation is encoded with a mark for each content.
    """
    marks = content_marks(messages)
    marked = template.encode([[{**m, "content": mark} for m, mark in zip(messages, marks)]])[0]
    masks = []
    for document, with_marks in zip(documents, marked):
        between = re.split("|".join(marks), _text_and_spans(with_marks, template.tokenizer)[0])
        text, spans = _text_and_spans(document, template.tokenizer)
        contents = Skeleton(between, []).contents(text, messages[: len(between) - 1])
        if contents is None:
            raise ValueError(
                f"cannot find the template's tokens in the sample that begins {messages[0]['content'][:40]!r}, whose "
                "text the template changes. Leave out --skip_template_tokens"
            )
        masks.append([any(start < b and end > a for a, b in contents) for start, end in spans])
    return masks


def _text_and_spans(document: Encoded, tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of the tokens and each token's [start, end) in it. Parts of one character share its place."""
    stream, text, spans = DecodeStream(skip_special_tokens=False), "", []
    for token in document.input_ids:
        chunk = stream.step(tokenizer.backend_tokenizer, token) or ""
        spans.append((len(text), len(text) + max(len(chunk), 1)))
        text += chunk
    return text, spans


def count_packs(
    packs: list[MaskedPack],
    base_model_path: str,
    *,
    devices: list[list[str]],
    dtype: str = "auto",
    extra: Sequence[str] = (),
    timeout: float = TIMEOUT,
    adapter: str | None = None,
) -> PackCounts:
    """Count the routing of every pack under a progress bar, with a process and a model for each entry of `devices`.

    extra: of "prob", "reap" and "gradient", what is measured beside the routing.
    timeout: one of several processes that counts no pack for so many seconds ends all.
    adapter: its folder, to count in the base with it.
    """
    work = functools.partial(count_share, base_model_path, dtype, extra, adapter)
    bar, counts_P = None, {}
    ranks = run_ranks(work, list(enumerate(packs)), devices, timeout, lambda item: f"pack {item[0] + 1}")
    with contextlib.closing(ranks) as messages:
        for message in messages:
            bar = bar or tqdm(total=sum(map(len, packs)), unit="tok", unit_scale=True, desc="scoring")
            if message is not None:
                number, counts = message
                counts_P[number] = counts
                bar.update(len(packs[number]))
    bar.close()
    return PackCounts.of([counts_P[number] for number in range(len(packs))])


def count_share(
    base_model_path: str,
    dtype: str,
    extra: Sequence[str],
    adapter: str | None,
    share: list[tuple[int, MaskedPack]],
    devices: list[str],
) -> Iterator[tuple[int, RouterCounts] | None]:
    """Yield None when the model is loaded, then (number, counts) of each pack of one process."""
    model, _ = load_on(devices, base_model_path, dtype)
    model = add_adapter(model, adapter) if adapter else model
    yield None
    numbers, packs = zip(*share)
    yield from zip(numbers, count_routing(model, packs, extra))


def count_routing(model: nn.Module, packs: list[MaskedPack], extra: Sequence[str] = ()) -> Iterator[RouterCounts]:
    """Yield the counts of each pack. Each goes alone through the decoder, and with "gradient" back again."""
    apart = keeps_documents_apart(model)
    for masked in packs:
        with RouterCapture(model, **dict.fromkeys(extra, True)) as capture:
            for part in [masked] if apart else masked.documents():
                capture.token_mask = torch.tensor([part.mask])
                if "gradient" in extra:
                    document_losses(model, part.pack).sum().backward()
                else:
                    forward_pack(model, part.pack)
        yield capture.counts()


@torch.no_grad()
def forward_pack(model: nn.Module, one: Pack) -> None:
    """Run one pack through the decoder, without lm_head."""
    inputs, _ = _inputs(model, one)
    model.base_model(**inputs, use_cache=False)


def document_losses(model: nn.Module, one: Pack) -> Tensor:
    """Return the mean cross entropy of each of the G documents of a pack, over its label tokens, as (G,) in fp32.

    So the gradient of a document does not depend on the others, and a long answer does not count for more.
    """
    inputs, labels_T = _inputs(model, one)
    document_T = (inputs["position_ids"][0] == 0).cumsum(0) - 1
    columns = (labels_T[1:] != IGNORE).nonzero().squeeze(-1)
    logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits[0].float()
    losses = nn.functional.cross_entropy(logits, labels_T[1:][columns].to(logits.device), reduction="none")
    document = document_T[columns].to(logits.device)
    count_G = document.bincount(minlength=len(one.samples)).clamp(min=1)
    return losses.new_zeros(len(count_G)).index_add(0, document, losses) / count_G


def _inputs(model: nn.Module, one: Pack) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs of a pack (1, T), and its labels (T,), where its model is."""
    batch, device = collate([one], pad_token_id=0), model.get_input_embeddings().weight.device  # nothing is padded
    batch = {key: tensor.to(device) for key, tensor in batch.items()}
    labels_T = batch.pop("labels")[0]
    return batch, labels_T
