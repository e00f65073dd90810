"""The evaluator of each task, and the rows of eval files.

`Evaluator` in evaluation/generation.py says what an evaluator is. evaluation/metrics.py defines the metrics.
"""

import random
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from deepseek.files import suggest
from evaluation import code_runner
from evaluation.generation import Evaluator
from evaluation.metrics import bleu, chrf, exact_match, json_exact_match, number_match, rouge_l, slot_f1
from training.data import SHAPES, open_rows

# ------------------------------------------------------------------------------------------------ evaluators


@dataclass(frozen=True)
class TextEvaluator:
    """Compare a prediction with each gold answer. A metric is its best over the answers."""

    primary: str
    functions: dict[str, Callable[[str, str], float | None]]

    def metrics(self, prediction: str, answers: list[str], row: dict | None = None) -> dict[str, float | None]:
        values = {name: [function(prediction, gold) for gold in answers] for name, function in self.functions.items()}
        return {name: max((v for v in found if v is not None), default=None) for name, found in values.items()}


@dataclass(frozen=True)
class CodeEvaluator:
    """Run the program as HumanEval does: the row's `test` defines `check(candidate)`, called with `entry_point`.

    evaluation/code_runner.py says what holds the program, and what does not.
    """

    limits: code_runner.Limits = code_runner.DEFAULT_LIMITS
    primary: str = "pass@1"

    def metrics(self, prediction: str, answers: list[str], row: dict) -> dict[str, float | None]:
        return {self.primary: 100.0 * (not code_runner.run(programs(prediction, row), self.limits))}


_END_OF_BODY = re.compile(r"\n(?=class |def |@|#|if |print|assert )")
_CODE_BLOCK = re.compile(r"```[ \t]*(?:python|py)?[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def programs(prediction: str, row: dict) -> list[str]:
    """Return what `prediction` may mean as a program with its test, likeliest first. The first valid one is to be run.

    It is the whole function, after the prompt's own lines (imports, helpers) if the prompt is code. Or it is the body
    of the function, which may lack its first indent.
    """
    prompt, entry = row["prompt"], row["entry_point"]
    defined = re.compile(rf"^(?:async )?def {re.escape(entry)}\b", re.MULTILINE)
    blocks = _CODE_BLOCK.findall(prediction) or [prediction]
    code = next(filter(defined.search, blocks), blocks[0])
    if defined.search(code):
        candidates = [f"{prompt}\n\n{code}", code]
    else:
        body = _END_OF_BODY.split(code, maxsplit=1)[0]
        whole = textwrap.indent(textwrap.dedent(code), "    ")
        candidates = [prompt + body, f"{prompt}    {body.lstrip()}", prompt + whole]
    return [f"{candidate}\n\n{row['test']}\n\ncheck({entry})\n" for candidate in candidates]


@dataclass(frozen=True)
class EvaluatorByRow:
    """Use the evaluator that a row names in "evaluator", or else `usual`. `score` is the primary metric of each."""

    usual: Evaluator
    primary: str = "score"

    def metrics(self, prediction: str, answers: list[str], row: dict) -> dict[str, float | None]:
        own = EVALUATORS[row["evaluator"]] if row.get("evaluator") is not None else self.usual
        metrics = own.metrics(prediction, answers, row)
        return {self.primary: metrics[own.primary], **metrics}


EVALUATORS: dict[str, Evaluator] = {
    "intent": TextEvaluator("exact_match", {"exact_match": json_exact_match, "slot_f1": slot_f1}),
    "summary": TextEvaluator("rouge_l", {"rouge_l": rouge_l, "chrf": chrf, "bleu": bleu}),
    "law": TextEvaluator("rouge_l", {"rouge_l": rouge_l, "chrf": chrf, "bleu": bleu}),
    "translation": TextEvaluator("chrf", {"chrf": chrf, "bleu": bleu, "rouge_l": rouge_l}),
    "general": TextEvaluator("exact_match", {"exact_match": exact_match}),
    "math": TextEvaluator("final_number", {"final_number": number_match, "exact_match": exact_match}),
    "code": CodeEvaluator(),
}
ANY_TEXT = "summary"  # whose metrics fit any text
OTHER_NAMES = {"gsm8k": "math", "humaneval": "code"}


def get_evaluator(
    dataset_name: str, evaluator_name: str | None = None, rows: list[dict] = (), allow_code: bool = False
) -> Evaluator:
    """Return the evaluator of a data set: the one asked for, else those that rows name, else the one of its name.

    Other names get the metrics of ANY_TEXT. Raises ValueError for an unknown name, a library that is missing, a row
    that lacks what its evaluator needs, and an evaluator that runs programs without `allow_code`.
    """
    asked = [evaluator_name or row.get("evaluator") for row in rows] or [evaluator_name]
    for name in asked:
        if name is not None and (not isinstance(name, str) or name not in EVALUATORS):
            known = f"{', '.join(EVALUATORS)}{suggest(name, EVALUATORS)}"
            raise ValueError(f"cannot score {dataset_name}: the evaluator {name} is none of {known}.")
    usual = OTHER_NAMES.get(dataset_name, dataset_name)
    usual = usual if usual in EVALUATORS else ANY_TEXT
    names = [name or usual for name in asked]
    for name in set(names) - {"code"}:
        EVALUATORS[name].metrics("a", ["a"], {})  # shows that a library is missing before a model is loaded
    if "code" in names:
        _check_code(dataset_name, [row for row, name in zip(rows, names) if name == "code"], allow_code)
    return EVALUATORS[names[0]] if len(set(names)) == 1 else EvaluatorByRow(EVALUATORS[usual])


def _check_code(dataset_name: str, rows: list[dict], allowed: bool) -> None:
    if not allowed:
        raise ValueError(
            f"cannot score {dataset_name} without running the model's programs. Give --allow_code_execution (not a "
            "sandbox: see evaluation/code_runner.py), or another --evaluator."
        )
    for row in rows:
        if not all(isinstance(row.get(key), str) and row[key].strip() for key in ("test", "entry_point")):
            raise ValueError(
                f'cannot score {dataset_name} as code: the row {row["prompt"][:60]!r} lacks "test" (which defines '
                'check(candidate)) or "entry_point" (the name of the function). Add them.'
            )


# ------------------------------------------------------------------------------------------------ eval files


def load_rows(dataset: str, n_samples: int | None = None, seed: int = 0) -> list[dict]:
    """Return the rows {"prompt", "raw_answers", ...} of an eval data set, in the order of its file.

    `n_samples` draws that many with `seed`, and keeps the order. Where "raw_answers" is missing, "answers" is used, or
    the "canonical_solution" of a row with a "test". Raises ValueError with file and line for a row that lacks them.
    """
    rows = []
    for where, row in open_rows(dataset, "eval"):
        answers = row.get("raw_answers", row.get("answers"))
        if answers is None and isinstance(row.get("test"), str):
            answers = [row.get("canonical_solution", "")]
        prompted = isinstance(row.get("prompt"), str) and row["prompt"].strip()
        prompted = prompted and isinstance(row.get("system", ""), str)
        answered = isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers)
        if not prompted or not answered:
            training = answers is None and any(row.keys() >= set(keys) for keys in SHAPES)
            raise ValueError(
                f'{where}: a row needs "prompt" (and may have "system"), a text, and "raw_answers" (or "answers"), a '
                f"list of texts"
                f"{'; this one is training data' if training else ''}"
            )
        rows.append({**row, "raw_answers": answers})
    if not rows:
        raise ValueError(f"cannot evaluate on {dataset}: it holds no row. Give another --eval_dataset.")
    if n_samples is not None and n_samples < len(rows):
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), n_samples))]
    return rows
