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

import random
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from deepseek.files import suggest
from evaluation import code_runner
from evaluation.metrics import bleu, chrf, exact_match, json_exact_match, number_match, rouge_l, slot_f1
from training.data import SHAPES, read_rows

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


# ------------------------------------------------------------------------------------------------ results
