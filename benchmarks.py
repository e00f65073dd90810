"""Answers and their scores: the evaluator of each task, and batched greedy generation.

    rows -> evaluate(model, tokenizer, rows, EVALUATORS["intent"]) -> results -> summaries.summarize(results)

An evaluator has `.metrics(prediction, answers, row)`, which returns every metric of the task in percent (0..100), and
`.primary`, the name of the one that counts. With several gold answers a metric is its best over them. A metric that
cannot be computed is None: it is left out of every mean and counted in the summary, never taken for a 0. The metrics
themselves are in metrics.py, the judge's in judge.py.

Generation sorts the prompts by length and cuts the sorted list into batches. In which batch a prompt is answered can
change the last bits of its logits, and so the answer: `make_batches` comes before any dealing out, and a sample meets
the same neighbours, and the same padding, however many processes there are.
"""

import os
import random
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import GenerationConfig

import code_runner
from data import SHAPES, encode_prompt, read_rows
from metrics import bleu, chrf, exact_match, json_exact_match, number_match, rouge_l, slot_f1
from utils import suggest

# ------------------------------------------------------------------------------------------------ evaluators


@dataclass(frozen=True)
class Evaluator:
    """Metrics that compare a prediction with one gold answer at a time. What has both members can replace it."""

    primary: str
    functions: dict[str, Callable[[str, str], float | None]]

    def metrics(self, prediction: str, answers: list[str], row: dict | None = None) -> dict[str, float | None]:
        """Every metric by its name: the best over `answers`, 0..100, or None where none of them allows it."""
        values = {name: [function(prediction, gold) for gold in answers] for name, function in self.functions.items()}
        return {name: max((v for v in found if v is not None), default=None) for name, found in values.items()}


class CodeEvaluator:
    """HumanEval style: does the program pass the row's `test`, a `check(candidate)`, with its `entry_point`?

    It runs what the model wrote (code_runner.py says behind which fence).
    """

    primary = "pass@1"
    _STOPS = re.compile(r"\n(?=class |def |@|#|if |print|assert )")  # where a continuation of the prompt has ended
    _FENCE = re.compile(r"```[ \t]*(?:python|py)?[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)

    def metrics(self, prediction: str, answers: list[str], row: dict) -> dict[str, float | None]:
        passed = code_runner.run(self.programs(prediction, row)).passed
        return {self.primary: 100.0 * passed}

    def programs(self, prediction: str, row: dict) -> list[str]:
        """What `prediction` may mean, likeliest first, each with the test; the first that is Python is to be run.

        It is the function, after the prompt's own lines (imports, helpers) where the prompt is code, or its body,
        whose first indent may have been lost at the end of the prompt.
        """
        prompt, entry = row["prompt"], row["entry_point"]
        blocks = self._FENCE.findall(prediction)
        defined = re.compile(rf"^(?:async )?def {re.escape(entry)}\b", re.MULTILINE)
        code = next((block for block in blocks if defined.search(block)), blocks[0] if blocks else prediction)
        if defined.search(code):
            candidates = [f"{prompt}\n\n{code}", code]
        else:
            body = self._STOPS.split(code, maxsplit=1)[0]
            whole = textwrap.indent(textwrap.dedent(code), "    ")
            candidates = [prompt + body, f"{prompt}    {body.lstrip()}", prompt + whole]
        return [f"{candidate}\n\n{row['test']}\n\ncheck({entry})\n" for candidate in candidates]


@dataclass(frozen=True)
class ByRow:
    """Each row's own evaluator, by the row's "evaluator" or else `usual`; `score` is the primary metric of each."""

    usual: Evaluator | CodeEvaluator
    primary: str = "score"

    def metrics(self, prediction: str, answers: list[str], row: dict) -> dict[str, float | None]:
        own = EVALUATORS[row["evaluator"]] if row.get("evaluator") is not None else self.usual
        metrics = own.metrics(prediction, answers, row)
        return {self.primary: metrics[own.primary], **metrics}


EVALUATORS = {
    "intent": Evaluator("exact_match", {"exact_match": json_exact_match, "slot_f1": slot_f1}),
    "summary": Evaluator("rouge_l", {"rouge_l": rouge_l, "chrf": chrf, "bleu": bleu}),
    "law": Evaluator("rouge_l", {"rouge_l": rouge_l, "chrf": chrf, "bleu": bleu}),
    "translation": Evaluator("chrf", {"chrf": chrf, "bleu": bleu, "rouge_l": rouge_l}),
    "general": Evaluator("exact_match", {"exact_match": exact_match}),
    "math": Evaluator("final_number", {"final_number": number_match, "exact_match": exact_match}),
    "code": CodeEvaluator(),
}
_KNOWN_DATASETS = {"gsm8k": "math", "humaneval": "code"}


def get_evaluator(
    dataset_name: str, evaluator_name: str | None = None, rows: list[dict] = (), allow_code: bool = False
) -> Evaluator | CodeEvaluator | ByRow:
    """The evaluator asked for, else the one that the rows ask for in "evaluator" (each its own, where they differ),
    else the one of the dataset's name, else ROUGE-L, chrF and BLEU, which fit any text.

    Raises ValueError for an unknown name, where a library that the metrics need is not installed, for a row that lacks
    what its evaluator needs, and for an evaluator that runs generated code without `allow_code`.
    """
    usual = evaluator_name or _KNOWN_DATASETS.get(dataset_name, dataset_name)
    asked = [None if evaluator_name else row.get("evaluator") for row in rows] or [None]
    for name, where in [
        (evaluator_name, "--evaluator"),
        *((name, f"{dataset_name}: a row's evaluator") for name in asked),
    ]:
        if name is not None and (not isinstance(name, str) or name not in EVALUATORS):
            raise ValueError(f"{where} {name} is none of {', '.join(EVALUATORS)}{suggest(name, EVALUATORS)}")
    names = [name or usual if (name or usual) in EVALUATORS else "summary" for name in asked]
    for name in set(names) - {"code"}:
        EVALUATORS[name].metrics("a", ["a"])  # a library that is missing shows here, before a model is loaded
    if "code" in names:
        if not allow_code:
            raise ValueError(
                f"{dataset_name} is scored by running what the model writes: give --allow_code_execution to do so (in "
                "a process with limits, behind a fence that is no sandbox: code_runner.py), or another --evaluator"
            )
        for row in (row for row, name in zip(rows, names) if name == "code"):
            if not all(isinstance(row.get(key), str) and row[key].strip() for key in ("test", "entry_point")):
                raise ValueError(
                    f'{dataset_name}: a row scored as code needs "test" (Python that defines check(candidate)) and '
                    f'"entry_point" (the name of the function), this one lacks them: {row["prompt"][:60]!r}'
                )
    return (
        EVALUATORS[names[0]] if len(set(names)) == 1 else ByRow(EVALUATORS[usual if usual in EVALUATORS else "summary"])
    )


# ------------------------------------------------------------------------------------------------ eval files


def load_rows(dataset: str, n_samples: int | None = None, seed: int = 0) -> list[dict]:
    """The rows {"prompt", "raw_answers", ...} of an eval dataset, in the order of its file.

    `n_samples` draws that many without replacement (seeded) and keeps the order. `answers` stands in where
    `raw_answers` is missing, and in a row with a "test" its `canonical_solution`. Raises ValueError naming file and
    line for a row that lacks them.
    """
    rows = []
    for where, row in read_rows(dataset, "eval"):
        answers = row.get("raw_answers", row.get("answers"))
        if answers is None and isinstance(row.get("test"), str):
            answers = [row.get("canonical_solution", "")]
        wrong = None
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            wrong = "prompt"
        elif not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
            wrong = "raw_answers"
        if wrong:
            hint = ""
            if answers is None and any(row.keys() >= set(keys) for keys in SHAPES):
                hint = "; this is a row of training data: give its question and, as the one gold answer, its answer"
            raise ValueError(
                f'{where}: "{wrong}" is missing or wrong, an evaluation row needs "prompt", the question as text, and '
                f'"raw_answers" (or "answers"), a list of at least one gold answer as text{hint}'
            )
        rows.append({**row, "raw_answers": answers})
    if not rows:
        raise ValueError(f"{dataset} holds no row to evaluate on")
    if n_samples is not None and n_samples < len(rows):
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), n_samples))]
    return rows


# ------------------------------------------------------------------------------------------------ generation


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


# ------------------------------------------------------------------------------------------------ results


def sentence(error: Exception) -> str:
    """What went wrong in one line, with the error's type where its text was not written for users."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"


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
