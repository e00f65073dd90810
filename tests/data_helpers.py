"""Samples of a data set, and the tokens of a conversation, in one call."""

from pathlib import Path

from training.data import Encoded, Template, TemplateSettings, open_rows, read_messages


def encode(messages: list[dict], tokenizer, template: str = "chat") -> Encoded:
    """Return the document of a conversation."""
    return Template(tokenizer, TemplateSettings(template=template)).encode([messages])[0][0]


def encode_prompt(prompt: str, tokenizer, template: str = "chat") -> list[int]:
    """Return the tokens before the answer to a user's plain text."""
    return Template(tokenizer, TemplateSettings(template=template)).encode_prompt(prompt)


def load_samples(dataset: str | Path) -> list[dict]:
    """Return the samples of a data set in memory: {"messages": [...]}."""
    return [{"messages": read_messages(row, where)} for where, row in open_rows(dataset)]
