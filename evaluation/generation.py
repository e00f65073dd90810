"""Batched greedy answers of a model, scored."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from benchmarks import Evaluator
from training.data import encode_prompt
from utils import sentence


class Completion(NamedTuple):
    """An answer: its text, the tokens generated (with the one that ends it), and whether max_new_tokens cut it off."""

    text: str
    tokens: int
    truncated: bool


def _batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Indices sorted by length, longest first (what does not fit in memory fails at once), cut into batches."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def make_batches(prompts: list[str], tokenizer, batch_size: int, template: str) -> list[list[int]]:
    """Indices of the prompts in batches, as `complete` forms them; given one of the batches, it forms that again."""
    return _batches([len(encode_prompt(prompt, tokenizer, template)) for prompt in prompts], batch_size)


def _eos_ids(model, tokenizer) -> list[int]:
    """Tokens that end an answer: the tokenizer's and those of the generation config (chat models may have several)."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [tokenizer.eos_token_id, *configured] if i is not None})


@contextmanager
def _plain_greedy(model, config: GenerationConfig) -> Iterator[None]:
    """Set the model's own generation config aside: its temperature would warn, its penalties change the answers."""
    kept, model.generation_config = model.generation_config, config
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.generation_config = kept
        model.train(training)


def complete(
    model,
    tokenizer,
    prompts: list[str],
    *,
    max_new_tokens: int = 512,
    batch_size: int = 16,
    template: str = "chat",
    progress: bool = True,
) -> list[Completion]:
    """Greedy answers to `prompts`, in their order.

    Prompts are padded on the left to the longest of their batch; an answer ends before its first end token.
    `progress` shows a bar over samples on stderr. Raises ValueError for a prompt that fills the model's context.
    """
    encoded = [encode_prompt(prompt, tokenizer, template) for prompt in prompts]
    eos = _eos_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos or [0])[0]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=eos or None, pad_token_id=pad
    )
    device = model.get_input_embeddings().weight.device
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    done: dict[int, Completion] = {}
    with _plain_greedy(model, config), tqdm(total=len(prompts), unit="sample", disable=not progress) as bar:
        for batch in _batches([len(ids) for ids in encoded], batch_size):
            width = len(encoded[batch[0]])
            if context and width >= context:
                raise ValueError(f"the prompt has {width} tokens, which fills the model's context of {context}")
            ids_BT = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i in batch], device=device)
            lengths = [len(encoded[i]) for i in batch]
            mask_BT = torch.tensor([[0] * (width - length) + [1] * length for length in lengths], device=device)
            new_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=config)[:, width:]
            for i, ids in zip(batch, new_BT.tolist()):
                stop = next((t for t, token in enumerate(ids) if token in eos), None)
                text = tokenizer.decode(ids[:stop], skip_special_tokens=True)
                done[i] = Completion(text, len(ids) if stop is None else stop + 1, stop is None)
            bar.update(len(batch))
    return [done[i] for i in range(len(prompts))]


def generate(model, tokenizer, prompts: list[str], **options) -> list[str]:
    """The texts of `complete`, which takes the options."""
    return [completion.text for completion in complete(model, tokenizer, prompts, **options)]


def _complete_each(model, tokenizer, prompts: list[str], **options) -> list[Completion | str]:
    """`complete` in one batch; where that fails (of memory, of one prompt), one by one, a failure as a sentence."""
    try:
        return complete(model, tokenizer, prompts, batch_size=len(prompts), progress=False, **options)
    except torch.AcceleratorError as error:  # a GPU that has failed stays so until the process ends
        raise OSError(f"the GPU failed on a batch that holds {prompts[0][:40]!r}: {sentence(error)}") from error
    except Exception as error:
        if os.environ.get("ESFT_DEBUG"):
            raise
        if len(prompts) == 1:
            return [sentence(error)]
    return [one for prompt in prompts for one in _complete_each(model, tokenizer, [prompt], **options)]


def score(row: dict, completion: Completion | str, evaluator: Evaluator) -> dict:
    """One line of a completions file: `score` is the primary metric as a share of 1, `metrics` are in percent.

    Where the metrics raise, or a sentence says why there is no completion, `error` tells it: no score, no metrics.
    """
    error = completion if isinstance(completion, str) else None
    text, tokens, truncated = (None, 0, False) if error else completion
    metrics: dict[str, float | None] = {}
    if not error:
        try:
            metrics = evaluator.metrics(text, row["raw_answers"], row)
        except Exception as raised:
            error = sentence(raised)
    primary = metrics[evaluator.primary] if metrics else None
    return {
        "example": {"prompt": row["prompt"], "raw_prediction": text, "raw_answers": row["raw_answers"]},
        "score": None if primary is None else primary / 100,
        "metrics": metrics,
        "tokens": tokens,
        "truncated": truncated,
        **({"skill": str(row["skill"])} if "skill" in row else {}),
        **({"error": error} if error else {}),
    }


def evaluate(model, tokenizer, rows: list[dict], evaluator: Evaluator, **options) -> list[dict]:
    """Answer the rows of one batch and score them: the lines of a completions file, in the order of `rows`.

    What fails is a line with an `error`, and the rest goes on. The options are `max_new_tokens` and `template`.
    """
    completions = _complete_each(model, tokenizer, [row["prompt"] for row in rows], **options)
    return [score(row, completion, evaluator) for row, completion in zip(rows, completions)]
