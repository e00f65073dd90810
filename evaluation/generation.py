"""Batched greedy answers of a model, and their scores.

A row of an eval file goes through `evaluate` and comes out as a line of a completions file:

    {"prompt", "raw_answers", ...}  ->  {"example", "score": 0..1 or None, "metrics": {name: 0..100 or None}, ...}

Prompts are sorted by length and cut into batches. The batch of a prompt can change the last bits of its logits, and so
the answer. `make_batches` is therefore called before batches are shared out: a prompt has the same neighbors and the
same padding for any number of processes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from transformers import GenerationConfig

from training.data import Template
from utils import sentence


class Evaluator(Protocol):
    """Score one answer against the gold answers of its row: percent by metric, or None where it cannot be computed.

    `primary` names the metric that becomes the row's score.
    """

    primary: str

    def metrics(self, prediction: str, answers: list[str], row: dict) -> dict[str, float | None]: ...


class Completion(NamedTuple):
    """What was generated, how many tokens (the end token included), and whether max_new_tokens cut it off.

    `answer` is the text without the reasoning before it; None stands for all of the text.
    """

    text: str
    tokens: int
    truncated: bool
    answer: str | None = None


def question(row: dict) -> str | tuple[str, str]:
    """Return what `Template.encode_prompt` takes of a row."""
    return (row["system"], row["prompt"]) if row.get("system") else row["prompt"]


def make_batches(prompts: list[str | tuple[str, str]], template: Template, batch_size: int) -> list[list[int]]:
    """Cut the indices of the prompts into batches, longest first: what does not fit in memory fails at once.

    Raises ValueError where every prompt holds a token that the model does not know.
    """
    encoded = [template.encode_prompt(prompt) for prompt in prompts]
    template.check_ids(min(encoded, key=lambda ids: max(ids, default=0), default=[]))  # those of one prompt: later
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def final_answer(ids: list[int], text: str, template: Template) -> str | None:
    """Return what a model answers after its reasoning: behind </think>, or in gpt-oss's channel "final".

    None if there is no reasoning. An answer whose reasoning does not end is empty.
    """
    for start in range(len(ids) - len(template.final_channel), -1, -1) if template.final_channel else ():
        if ids[start : start + len(template.final_channel)] == template.final_channel:
            return template.tokenizer.decode(ids[start + len(template.final_channel) :], skip_special_tokens=True)
    _, closed, after = text.rpartition("</think>")
    opened = text.lstrip().startswith("<think>") or template.opens_thought
    return after.lstrip() if closed else "" if opened else None


@contextmanager
def generation_config(model, config: GenerationConfig) -> Iterator[None]:
    """Replace the model's generation config, whose penalties change answers, and put the model in evaluation mode."""
    kept, training = model.generation_config, model.training
    model.generation_config = config
    model.eval()
    try:
        yield
    finally:
        model.generation_config = kept
        model.train(training)


def complete(
    model, template: Template, prompts: list[str | tuple[str, str]], max_new_tokens: int, keep_reasoning: bool = False
) -> list[Completion]:
    """Answer the prompts greedily in one batch, padded on the left. An answer ends before its first end token.

    The longest prompt and an answer to it fit into the model's context, even if `max_new_tokens` is more.

    Raises ValueError where a prompt fills the model's context.
    """
    tokenizer, encoded = template.tokenizer, [template.encode_prompt(prompt) for prompt in prompts]
    for ids in encoded:
        template.check_ids(ids)
    width = max(map(len, encoded))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and width >= context:
        raise ValueError(f"the prompt has {width} tokens, which fills the model's context of {context}")
    if context:
        max_new_tokens = min(max_new_tokens, context - width)
    eos = template.end_tokens(model.generation_config)
    rows = model.get_input_embeddings().weight.shape[0]
    pad = next(i for i in (tokenizer.pad_token_id, *eos, 0) if i is not None and i < rows)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=eos or None, pad_token_id=pad
    )
    device = model.get_input_embeddings().weight.device
    ids_BT = torch.tensor([[pad] * (width - len(ids)) + ids for ids in encoded], device=device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=device)
    with generation_config(model, config):
        new_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=config)[:, width:]
    completions = []
    for ids in new_BT.tolist():
        stop = next((t for t, token in enumerate(ids) if token in eos), None)
        text = tokenizer.decode(ids[:stop], skip_special_tokens=True)
        answer = None if keep_reasoning else final_answer(ids[:stop], text, template)
        completions.append(Completion(text, len(ids) if stop is None else stop + 1, stop is None, answer))
    return completions


def _complete_each(model, template: Template, prompts: list, **options) -> list[Completion | str]:
    """Answer the prompts in one batch, or one by one where that fails. A prompt that fails gives a sentence."""
    try:
        return complete(model, template, prompts, **options)
    except torch.AcceleratorError as error:  # a GPU that has failed stays so until the process ends
        raise OSError(f"the GPU failed on a batch that holds {prompts[0][:40]!r}: {sentence(error)}") from error
    except Exception as error:
        if os.environ.get("ESFT_DEBUG"):
            raise
        if len(prompts) == 1:
            return [sentence(error)]
    return [one for prompt in prompts for one in _complete_each(model, template, [prompt], **options)]


def score(row: dict, completion: Completion | str, evaluator: Evaluator) -> dict:
    """Return one line of a completions file. A failed answer, or failed metrics, give an `error` and no score."""
    error = completion if isinstance(completion, str) else None
    text, tokens, truncated, answer = (None, 0, False, None) if error else completion
    metrics: dict[str, float | None] = {}
    if not error:
        try:
            metrics = evaluator.metrics(text if answer is None else answer, row["raw_answers"], row)
        except Exception as raised:
            error = sentence(raised)
    primary = metrics[evaluator.primary] if metrics else None
    return {
        "example": {"prompt": row["prompt"], "raw_prediction": text, "raw_answers": row["raw_answers"]},
        **({} if answer is None else {"answer": answer}),
        "score": None if primary is None else primary / 100,
        "metrics": metrics,
        "tokens": tokens,
        "truncated": truncated,
        **({"skill": str(row["skill"])} if "skill" in row else {}),
        **({"error": error} if error else {}),
    }


def evaluate(model, template: Template, rows: list[dict], evaluator: Evaluator, **options) -> list[dict]:
    """Answer and score the rows of one batch, in their order. The options are `max_new_tokens` and `keep_reasoning`."""
    completions = _complete_each(model, template, [question(row) for row in rows], **options)
    return [score(row, completion, evaluator) for row, completion in zip(rows, completions)]
