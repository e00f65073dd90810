"""The data of a run: files -> messages -> tokens and labels -> packs -> tensors.

A pack holds whole samples end to end, each with positions from 0. A label `.` is -100, which carries no loss:

    input_ids      BOS  q  q  a  a EOS | BOS  q  a EOS | pad pad
    labels           .  .  .  a  a EOS |   .  .  a EOS |   .   .
    position_ids     0  1  2  3  4   5 |   0  1  2   3 |   0   1

transformers builds a mask from `position_ids` if it gets no attention mask and no KV cache (`use_cache=False`). The
mask keeps the documents apart, and a packed sample has the same logits as alone. A few model families build no such
mask. `deepseek.loading.keeps_documents_apart` finds them, and each of their samples becomes a pack of its own. The
first label of each document is -100, so no document learns to predict the start of the next one.

Labels work with any chat template. The conversation is rendered up to an answer, with the template's prompt for the
assistant, and then again with the answer. The text that the second has more is the answer.
"""

import bisect
import itertools
import random
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import torch

from deepseek.files import read_json_rows, suggest, suggest_path
from utils import ROOT

if TYPE_CHECKING:
    from training.config import RunConfig

IGNORE = -100  # the label that cross entropy skips
ROLES = ("system", "user", "assistant")
SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
SHAPES = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
SUFFIXES = (".jsonl", ".json", ".parquet")

# -------------------------------------------------------------------------------------------- data sets -> messages


def resolve_dataset(name: str | Path, split: str = "train") -> Path | str:
    """Return the path of a data set, or its hub id. Raise ValueError if it is neither a file nor like a hub id.

    `name` is the name of a file in datasets/<split> without .jsonl, a path (.jsonl, .json, .parquet) or a hub id.
    `split` is "train" or "eval".
    """
    text, path, folder = str(name), Path(name), ROOT / "datasets" / split
    known = {file.stem: file for file in sorted(folder.glob("*.jsonl"))}
    if text in known:
        return known[text]
    if path.suffix in SUFFIXES and path.is_file():
        return path
    if path.suffix not in SUFFIXES and not path.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", text):
        return text
    raise ValueError(
        f"cannot find data set {text!r}{suggest(text, known) or suggest_path(path)}. Give one of those in "
        f"datasets/{split} ({', '.join(known) or 'none there'}), a file ({', '.join(SUFFIXES)}), or a hub id."
    )


def read_rows(dataset: str | Path, split: str = "train") -> Iterator[tuple[str, dict]]:
    """Yield (where, row) for each row of a data set. `where` is "file:line" or "source: row n", counted from 1.

    `dataset` is what `resolve_dataset` takes. split="eval" reads the split "test" of a hub id.
    """
    source = resolve_dataset(dataset, split)
    if isinstance(source, Path) and source.suffix != ".parquet":
        yield from read_json_rows(source)
        return
    import datasets  # slow, and few runs need it

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what its error says, too
    try:
        if isinstance(source, Path):
            table = datasets.load_dataset("parquet", data_files=str(source), split="train")
        else:
            table = datasets.load_dataset(source, split="test" if split == "eval" else "train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"cannot read data set {str(source)!r}: {error}") from error
    yield from ((f"{source}: row {number}", row) for number, row in enumerate(table, 1))


def load_samples(dataset: str | Path, split: str = "train") -> list[dict]:
    """Return the samples of a data set: {"messages": [{"role", "content", "mask"?}, ...]}. "mask": 1 means no loss.

    A row has one of the four shapes below. A ValueError names the file and line of a row that lacks keys or an answer,
    or has an unknown role.

        {"messages": [{"role", "content", "mask"?}, ...]}
        {"conversations": [{"from": human | gpt | system, "value"}, ...], "system"?}      ShareGPT
        {"prompt", "completion", "system"?}
        {"instruction", "input"?, "output", "system"?}                                    Alpaca
    """
    samples = [{"messages": _messages(row, where)} for where, row in read_rows(dataset, split)]
    if not samples:
        raise ValueError(f"cannot read data set {str(dataset)!r}: it has no rows")
    return samples


def split_samples(samples: list, fraction: float, seed: int) -> tuple[list, list]:
    """Return (training, validation) samples in their order. A random `fraction` of them is for validation.

    With a fraction above 0 this is at least one sample, but never the last one: a single sample is for training.
    """
    count = min(max(round(fraction * len(samples)), 1), len(samples) - 1) if fraction > 0 and samples else 0
    chosen = set(random.Random(seed).sample(range(len(samples)), count))
    return [s for i, s in enumerate(samples) if i not in chosen], [s for i, s in enumerate(samples) if i in chosen]


def _messages(row: dict, where: str) -> list[dict]:
    """Return the messages of a row of any shape, after checking them."""
    row = {key: value for key, value in row.items() if value is not None}  # a table has None for a missing key
    shape = next((keys for keys in SHAPES if row.keys() >= set(keys)), None)
    if shape is None:
        hint = next(filter(None, (suggest(key, itertools.chain(*SHAPES)) for key in row)), "")
        wanted = " or ".join("+".join(keys) for keys in SHAPES)
        raise ValueError(f"{where}: a row needs the keys {wanted}, this one has {', '.join(row) or 'none'}{hint}")
    turns = row[shape[0]]
    if len(shape) == 2:
        question = f"{turns}\n\n{row['input']}" if shape[0] == "instruction" and row.get("input") else turns
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row[shape[1]]}]
    if not (isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)):
        raise ValueError(f"{where}: {shape[0]!r} must be a list of objects")
    if shape[0] == "conversations":
        turns = [{"role": t.get("from"), "content": t.get("value"), "mask": t.get("mask")} for t in turns]
    if shape[0] != "messages" and row.get("system"):
        turns = [{"role": "system", "content": row["system"]}, *turns]
    turns = [{**turn, "role": SPEAKERS.get(str(turn.get("role")), turn.get("role"))} for turn in turns]
    if complaint := next(_complaints(turns), None):
        raise ValueError(f"{where}: {complaint}")
    return [{key: turn[key] for key in ("role", "content", "mask") if turn.get(key) or key != "mask"} for turn in turns]


def _complaints(turns: list[dict]) -> Iterator[str]:
    """Yield what is wrong with the messages of a row, for an error."""
    for number, turn in enumerate(turns, 1):
        role, content, mask, at = turn["role"], turn.get("content"), turn.get("mask"), f"message {number}"
        if role not in ROLES:
            names = (*ROLES, *SPEAKERS)
            yield f"{at}: unknown role {role!r}{suggest(role, names)}. Known are {', '.join(names)}."
        if not isinstance(content, str):
            yield f"{at}: the content of {role} must be text, not {type(content).__name__}"
        if mask not in (None, 0, 1):
            yield f'{at}: "mask" must be 0 or 1, not {mask!r}'
        if role == "assistant" and not content.strip():
            yield f"{at}: the assistant turn is empty. Fill it or drop the row."
        if role == "assistant" and number == 1 and not mask:
            yield f'{at}: an assistant turn comes first and answers nothing. Drop it or give it "mask": 1.'
    if not any(turn["role"] == "assistant" and not turn.get("mask") for turn in turns):
        yield "no assistant turn carries loss. Add one or drop the row."


# ------------------------------------------------------------------------------------ messages -> tokens and labels


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample. A label is the token's own id (labels are not shifted), or -100 for no loss."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


def encode(messages: list[dict], tokenizer, template: str = "chat") -> Encoded:
    """Return the tokens of a conversation. Only the assistant's turns (content and end-of-turn token) have labels.

    A message with "mask": 1 has no labels. `template` is "chat" or "released". "chat" is the tokenizer's own template.
    "released" is that of the published checkpoints: BOS, system text, blank line, "User: q", blank line, "Assistant:",
    then " a" and EOS.

    Raises:
        ValueError: the answers cannot be found exactly in the rendered text.
    """
    pieces = (_released_pieces if template == "released" else _chat_pieces)(messages, tokenizer)
    labels = [token if loss else IGNORE for ids, loss in pieces for token in ids]
    return Encoded([token for ids, _ in pieces for token in ids], labels)


def encode_prompt(prompt: str, tokenizer, template: str = "chat") -> list[int]:
    """Return the tokens that come before the answer to `prompt`, a user's plain text. They are those of `encode`.

    A prompt of the published evaluation files is rendered already ("User: ... Assistant:") and gets BOS only.
    """
    if prompt.startswith("User: ") and prompt.endswith("Assistant:"):
        return _bos(tokenizer) + _ids(prompt, tokenizer)
    if template == "released":
        return _bos(tokenizer) + _ids(f"User: {prompt}\n\nAssistant:", tokenizer)
    return _ids(_render([{"role": "user", "content": prompt}], tokenizer, answer_next=True), tokenizer)


def _released_pieces(messages: list[dict], tokenizer) -> list[tuple[list[int], bool]]:
    """Return (tokens, carries loss) for the text before each answer and for each answer, each encoded alone."""
    pieces, text = [(_bos(tokenizer), False)], ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            answer = [*_ids(f" {content}", tokenizer), tokenizer.eos_token_id]
            pieces += [(_ids(text + "Assistant:", tokenizer), False), (answer, not message.get("mask"))]
            text = ""
        else:
            text += f"User: {content}\n\n" if role == "user" else f"{content}\n\n"
    return [*pieces, (_ids(text, tokenizer), False)]


def _chat_pieces(messages: list[dict], tokenizer) -> list[tuple[list[int], bool]]:
    """Return (tokens, carries loss) for each part of the conversation. Each answer with loss is a part.

    The text must begin with the text of every shorter conversation. If a token would span two parts, as when an answer
    begins with a line break, the parts are encoded alone, as at generation.
    """
    text, cuts = _render(messages, tokenizer), [0]
    special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("mask"):
            continue
        before = _render(messages[:i], tokenizer, answer_next=True)
        after = _render(messages[: i + 1], tokenizer)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"cannot use the chat template: it changes the text around message {i + 1} of {_name(messages)}. Set "
                'template=released, or give all answers but the last "mask": 1.'
            )
        turn = after.rstrip()  # nothing after the end-of-turn token is ever generated
        cuts += [len(before), len(turn) if special and turn.endswith(special) else len(after)]
    cuts.append(len(text))

    whole = _ids(text, tokenizer)
    heads = [*(_ids(text[:cut], tokenizer) for cut in cuts[:-1]), whole]
    if all(whole[: len(head)] == head for head in heads):
        parts = [whole[len(a) : len(b)] for a, b in itertools.pairwise(heads)]
    else:
        parts = [_ids(text[a:b], tokenizer) for a, b in itertools.pairwise(cuts)]
        if tokenizer.decode([token for part in parts for token in part]) != tokenizer.decode(whole):
            raise ValueError(
                f"cannot use the chat template: a token of {_name(messages)} spans the start or end of an answer. Set "
                "template=released."
            )
    return [(part, number % 2 == 1) for number, part in enumerate(parts)]


def _render(messages: list[dict], tokenizer, answer_next: bool = False) -> str:
    if not tokenizer.chat_template:
        raise ValueError("cannot use the chat template: the tokenizer has none. Set template=released.")
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    try:
        return tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=answer_next)
    except jinja2.TemplateError as error:
        raise ValueError(f"cannot use the chat template: it refuses {_name(messages)} ({error})") from error


def _ids(text: str, tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _bos(tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _name(messages: list[dict]) -> str:
    return f"the sample that begins {messages[0]['content'][:40]!r}"


# ------------------------------------------------------------------------------------- samples -> packs -> tensors


@dataclass(frozen=True, slots=True)
class Pack:
    """Whole samples end to end. The first three lists have one length. `samples` are the numbers of the samples."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)

    def documents(self) -> list["Pack"]:
        """Return each sample as a pack of its own."""
        starts = [i for i, position in enumerate(self.position_ids) if position == 0]
        return [
            Pack(self.input_ids[a:b], self.labels[a:b], self.position_ids[a:b], [sample])
            for sample, a, b in zip(self.samples, starts, [*starts[1:], len(self)])
        ]


def pack(
    encoded: list[Encoded], seq_length: int, overlong: str = "error", seed: int = 0, numbers: list[int] | None = None
) -> list[Pack]:
    """Pack whole samples into packs of at most `seq_length` tokens: longest first, best fit, then shuffled by `seed`.

    A longer sample is an error. With overlong="truncate" its end is cut off. It is dropped if no label is left, and a
    warning counts such samples. `numbers` name the samples in the packs and in the error (default: their indices).
    """
    numbers = range(len(encoded)) if numbers is None else numbers
    too_long = [i for i, sample in enumerate(encoded) if len(sample) > seq_length]
    if too_long and overlong == "error":
        first, longest = too_long[0], max(map(len, encoded))
        raise ValueError(
            f"sample {numbers[first]} has {len(encoded[first])} tokens, more than seq_length={seq_length} "
            f"({len(too_long)} such samples). Set seq_length={longest} or overlong=truncate."
        )
    dropped = {i for i in too_long if all(label == IGNORE for label in encoded[i].labels[1:seq_length])}
    if too_long:
        warnings.warn(
            f"{len(too_long)} of {len(encoded)} samples are longer than seq_length={seq_length}: "
            f"{len(too_long) - len(dropped)} truncated, {len(dropped)} dropped as they have no label left",
            stacklevel=2,
        )

    rng = random.Random(seed)
    order = [i for i in range(len(encoded)) if i not in dropped]
    rng.shuffle(order)
    order.sort(key=lambda i: -len(encoded[i]))  # samples of one length stay shuffled
    packs: list[Pack] = []
    open_packs: dict[int, list[Pack]] = {}  # by their room: the tokens that still fit in
    rooms: list[int] = []  # the keys of open_packs, ascending
    for i in order:
        size = min(len(encoded[i]), seq_length)
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            packs.append(target := Pack())
        else:
            target = open_packs[rooms[at]].pop()
            if not open_packs[rooms[at]]:
                del open_packs[rooms.pop(at)]
        target.input_ids.extend(encoded[i].input_ids[:size])
        target.labels.extend([IGNORE, *encoded[i].labels[1:size]])
        target.position_ids.extend(range(size))
        target.samples.append(numbers[i])
        if room := seq_length - len(target):
            if room not in open_packs:
                bisect.insort(rooms, room)
            open_packs.setdefault(room, []).append(target)
    rng.shuffle(packs)
    return packs


def collate(packs: list[Pack], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return input_ids, labels and position_ids, int64 (B, T), where T is the length of the longest pack.

    Padding is a document of its own. There is no attention_mask, because transformers builds its own mask without one.
    """
    length = max(map(len, packs))
    gaps = [(p, length - len(p)) for p in packs]
    return {
        "input_ids": torch.tensor([p.input_ids + [pad_token_id] * gap for p, gap in gaps]),
        "labels": torch.tensor([p.labels + [IGNORE] * gap for p, gap in gaps]),
        "position_ids": torch.tensor([p.position_ids + list(range(gap)) for p, gap in gaps]),
    }


def split_dataset(dataset: str | Path, n_samples: int | None, fraction: float, seed: int) -> tuple[list, list]:
    """Return the training and the validation samples of a data set, each with its row number, from 1."""
    rows = list(enumerate(load_samples(dataset), 1))
    if n_samples is not None:
        rows = random.Random(seed).sample(rows, min(n_samples, len(rows)))
    return split_samples(rows, fraction, seed)


def load_data(tokenizer, config: "RunConfig") -> tuple[list[Pack], list[Pack]]:
    """Return the (training packs, validation packs) of a run. Their `samples` are rows of its data set, from 1."""
    both = []
    for part in split_dataset(config.train_dataset, config.n_train_samples, config.validation_fraction, config.seed):
        encoded = [encode(sample["messages"], tokenizer, config.template) for _, sample in part]
        numbers = [number for number, _ in part]
        both.append(pack(encoded, config.seq_length, config.overlong, config.seed, numbers))
    if not both[0]:
        raise ValueError(f"cannot train on {config.train_dataset}: truncation leaves no sample. Raise seq_length.")
    return both[0], both[1]
