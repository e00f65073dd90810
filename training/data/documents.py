"""The parts of a rendered conversation: settings, pieces of text, documents, and the skeleton of a template."""

import argparse
import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

from torch.utils._pytree import tree_leaves

from deepseek.files import parse_json

IGNORE = -100  # the label that cross entropy skips
NO_END = "an end of answers, which the template does not write (append_end=true adds one)"
THINK = "<think>"
REACH = 48  # characters before a cut that are encoded again to see whether the cut changes them


@dataclass(frozen=True)
class Encoded:
    """One document. `labels` are as many as `input_ids`: the token's own id (not shifted), or -100 for no loss."""

    input_ids: list[int]
    labels: list[int]
    left_out: tuple[str, ...] = ()  # what the template does not show, such as "reasoning_content"

    def __len__(self) -> int:
        return len(self.input_ids)


class Documents(Sequence):
    """Documents in a memory-mapped table. Of each, arrays hold the tokens, the tokens with a label, and the row."""

    def __init__(self, table):
        self.table = table.with_format("numpy")
        self.lengths, self.label_counts, self.rows = (
            table.data.column(key).to_numpy() for key in ("length", "learned", "row")
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:
        found = self.table[int(index)]
        return Encoded(found["input_ids"].tolist(), found["labels"].tolist())


def _flag(default: object, about: str, **options) -> object:
    """Return a field of TemplateSettings that is also a flag of commands."""
    return field(default=default, metadata={"default": default, "help": about, **options})


@dataclass(frozen=True)
class TemplateSettings:
    """How messages become tokens.

    template="released" is that of the published checkpoints: BOS, system text, blank line, "User: q", blank line,
    "Assistant:", then " a" and EOS.
    """

    template: str = _flag("chat", "how messages become tokens: the tokenizer's chat template, or the one of the "
        "released checkpoints (default: chat)", choices=("chat", "released"))  # fmt: skip
    template_kwargs: dict = field(default_factory=dict, metadata={"default": "{}", "metavar": "JSON",
        "help": 'variables of the chat template, such as {"enable_thinking": false}'})  # fmt: skip
    loss_on: str = _flag("all", "which answers of a conversation carry loss; each: every one in a document of its own "
        "(default: all)", choices=("all", "last", "each"))  # fmt: skip
    special_text: str = _flag("error", "what to do where a message spells a special token (default: error)",
        choices=("error", "plain", "token"))  # fmt: skip
    append_end: bool = _flag(False, "end answers with the tokenizer's end token where the chat template writes no end",
        action="store_true")  # fmt: skip

    def __post_init__(self):
        if not isinstance(self.template_kwargs, dict):
            raise ValueError(f"cannot use template_kwargs={self.template_kwargs!r}: it must be a JSON object")
        given = {"template_kwargs": self.template_kwargs, "append_end": self.append_end}
        given |= {"loss_on": self.loss_on} if self.loss_on == "each" else {}
        for key, value in given.items() if self.template == "released" else ():
            if value:
                raise ValueError(f"cannot use {key}={value} with template=released: it has no effect. Leave it out.")


def template_settings(values: object) -> TemplateSettings:
    """Return the settings among the fields of a config, or the flags of a command."""
    found = {f.name: getattr(values, f.name) for f in fields(TemplateSettings)}
    kwargs = found["template_kwargs"] or {}
    if isinstance(kwargs, str):
        kwargs = parse_json(kwargs, "template_kwargs", 1)
    return TemplateSettings(**found | {"template_kwargs": kwargs})


def add_template_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of TemplateSettings."""
    for setting in fields(TemplateSettings):
        parser.add_argument(f"--{setting.name}", **setting.metadata)


@dataclass(frozen=True)
class Piece:
    """Text of a document. `loss`: it is an answer, with what ends it. `plain`: it spells no special token."""

    text: str
    loss: bool = False
    plain: bool = False


@dataclass(frozen=True)
class Document:
    """The text of one document. `whole`: its pieces are encoded together, if tokens allow it."""

    pieces: list[Piece]
    whole: bool = True
    left_out: tuple[str, ...] = ()

    @functools.cached_property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def cuts(self) -> list[int]:
        """Return where in `text` a piece ends and another begins."""
        return list(itertools.accumulate(len(piece.text) for piece in self.pieces))[:-1]

    def endings(self) -> list[str]:
        """Return the last characters before each cut."""
        return [self.text[max(cut - REACH, 0) : cut] for cut in self.cuts()]


@dataclass(frozen=True)
class Skeleton:
    """What a template writes around the contents of messages with given roles.

    between: the text before each content, and after the last one.
    answers: (message, start, end) of each answer; start counts from the start of its content, end from the end of it.
    """

    between: list[str]
    answers: list[tuple[int, int, int]]

    def contents(self, text: str, messages: list[dict]) -> list[tuple[int, int]] | None:
        """Return (start, end) of each content in `text`, or None if the template did more than put contents in."""
        at, found = len(self.between[0]), []
        for message, after in zip(messages, self.between[1:]):
            content = message["content"]
            if not text.startswith(content + after, at):
                content = content.strip()
            if not text.startswith(content + after, at):
                return None
            found.append((at, at + len(content)))
            at += len(content) + len(after)
        whole = at == len(text) and text.startswith(self.between[0]) and len(self.between) == len(messages) + 1
        return found if whole else None


def content_marks(messages: list[dict]) -> list[str]:
    """Return a text for each message that no template changes, to find out where contents lie."""
    return [f"7340{number}0437" for number in range(len(messages))]


def texts_of(messages: list[dict]) -> Iterator[str]:
    """Yield all texts in messages: contents, reasoning, tool calls, tools."""
    for message in messages:
        yield message["content"]
        for key in sorted(message.keys() - {"role", "content", "mask"}):
            yield from (leaf for leaf in tree_leaves(message[key]) if isinstance(leaf, str))


@contextlib.contextmanager
def numbered(where: list[str] | None, number: int) -> Iterator[None]:
    """Name a conversation in its errors, if there are names."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where[number]}: {error}" if where else str(error)) from error


def lacking(token: str, number: int, vocab_size: int) -> str:
    """Return the error about a token that a model lacks."""
    return (
        f"cannot encode the text: token {token!r} has id {number}, and the model knows {vocab_size} tokens. The "
        "tokenizer is not the model's, or one of its files (such as tokenizer_config.json) is missing. Fetch it again."
    )
