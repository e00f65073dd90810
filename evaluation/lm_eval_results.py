"""The big suites (MMLU, GSM8K, HellaSwag, ...) through lm-eval: means, intervals and files of a model's answers.

    python eval_multigpu.py --suite=mmlu,gsm8k --base_model_path=M --adapter_dir=A --with_base

The prompts, the few-shot examples and the metrics are lm-eval's. Each suite gets three files: the answers with their
scores (<output_path>), a summary as data sets have it (.summary.json) and lm-eval's own results (.lm_eval.json). The
base's files have ".base" before the suffix, and with --with_base the summary compares both on the same samples.

A mean here is the one in lm-eval's table. It is in percent if the metric is a mean of shares, else in the metric's own
unit, and a group weighs its tasks as lm-eval does. The primary metric is the first that lm-eval names, or acc_norm for
HellaSwag and ARC, as is usual. Intervals are 95 % bootstrap intervals over samples within each task.
"""

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import esft
from deepseek.files import named, read_json, sha256, write_json, write_jsonl
from evaluation import generation, lm_eval_harness
from evaluation.config import EvalConfig
from evaluation.intervals import RESAMPLES, Strata, compare_pairs, interval
from evaluation.journal import AnswerJournal, find_finished
from evaluation.lm_eval_harness import Suite, SuiteAnswers, evaluate_suite, load_suites
from evaluation.runner import model_key
from evaluation.workers import load_on
from utils import environment, note

PRIMARY = {"hellaswag": "acc_norm", "arc_challenge": "acc_norm", "arc_easy": "acc_norm"}
ARGUMENTS = (
    "base_model_path", "adapter_dir", "n_samples", "num_fewshot", "apply_chat_template", "allow_code_execution", "seed"
)  # fmt: skip

# ------------------------------------------------------------------------------------------------ means and intervals


class SuiteMetric:
    """One metric of a suite for C models. A sample that lacks a value from one model is left out for all."""

    def __init__(self, suite: Suite, key: str, models: list[SuiteAnswers], unit: float | None = None):
        from lm_eval.api.metrics import mean

        name, tasks = key.partition(",")[0], suite.tasks.values()
        columns, weights, aggregates = [], [], []
        for task in tasks:
            values = [answers.values(task.task_name).get(key, {}) for answers in models]
            if both := sorted(i for i in values[0] if all(v.get(i) is not None for v in values)):
                columns.append([[v[i] for i in both] for v in values])
                weights.append(float(len(both)) if suite.weighs_by_size(key) else 1.0)
                aggregate = task.aggregation().get(name, mean)
                aggregates.append(np.mean if aggregate is mean else aggregate)
        self.strata = Strata(columns, weights, aggregates)
        self.are_means = all(aggregate is np.mean for aggregate in aggregates)
        better = [task.higher_is_better().get(name, True) for task in tasks]
        self.higher_is_better = bool(better[0])
        every = [value for task in columns for column in task for value in column]
        shares = self.are_means and all(_is_number(v) and 0 <= v <= 1 for v in every)
        self.unit = unit or (100.0 if all(better) and shares else 1.0)  # 100: the mean is in percent
        self.n = sum(len(task[0]) for task in columns)

    def mean(self, model: int = -1) -> float | None:
        return round(float(self.unit * self.strata.means()[model]), 4) if self.n else None

    def draws(self, seed: int) -> np.ndarray:
        """Return (C, R) bootstrap draws of the mean. They are NaN if a task has a single sample."""
        resamples = RESAMPLES if self.are_means else 200  # others are aggregated in Python
        return self.unit * self.strata.draws(seed, resamples)


def summarize_suite(suite: Suite, answers: SuiteAnswers, base: SuiteAnswers | None = None, *, seed: int = 0) -> dict:
    """Return what `results.summarize` returns, with "dataset", "primary", "unit" ("percent" or "as in lm-eval") and
    "higher_is_better".

    With `base`, the means are over the samples that have a value from both models, each of "groups" has its "base", and
    "against_base" is there.
    """
    models = [answers] if base is None else [base, answers]
    keys = _metric_keys(suite, answers)
    primary = PRIMARY[suite.name] if PRIMARY.get(suite.name) in keys else keys[0]
    metric = SuiteMetric(suite, primary, models)
    every = {key: SuiteMetric(suite, key, [answers]) for key in keys}
    n = sum(len({sample["doc_id"] for sample in answers.results["samples"][name]}) for name in suite.tasks)
    means, draws_CR = [metric.mean(i) for i in range(len(models))], metric.draws(seed) if metric.n else None
    low, high = (0, 100) if metric.unit == 100 else (-np.inf, np.inf)
    groups = {}
    for name, task in suite.tasks.items() if suite.group is not None else ():
        part = SuiteMetric(Suite(name, {name: task}), primary, models, metric.unit)
        groups[name] = {"n": part.n, "mean": part.mean(), **({"base": part.mean(0)} if base else {})}
    return {
        "dataset": suite.name,
        "primary": primary,
        "unit": "percent" if metric.unit == 100 else "as in lm-eval",
        "higher_is_better": metric.higher_is_better,
        "n": n,
        "failed": 0,
        "mean": means[-1],
        "ci95": interval(draws_CR[-1], (low, high)) if metric.n else None,
        "metrics": {key: one.mean() for key, one in every.items()},
        "missing": {key: n - one.n for key, one in every.items()},
        "groups": groups,
        **({"against_base": compare_pairs(metric.strata, means, draws_CR, high)} if base and metric.n else {}),
    }


def _metric_keys(suite: Suite, answers: SuiteAnswers) -> list[str]:
    """Return the metrics that the suite has a mean of, in lm-eval's order."""
    found = [key for name in suite.tasks for key in answers.values(name) if suite.weighs_by_size(key) is not None]
    keys = list(dict.fromkeys(found))
    if not keys:
        raise ValueError(f"cannot summarize --suite {suite.name}: its tasks lack its metric. Name the tasks instead.")
    if suite.group is not None:
        order = [metric.metric for metric in suite.group.aggregate_metric_list]
        keys.sort(key=lambda key: order.index(key.partition(",")[0]))
    return keys


# ------------------------------------------------------------------------------------------------ answers


def completion_lines(suite: Suite, answers: SuiteAnswers, summary: dict) -> Iterator[dict]:
    """Yield the answers as lines of a completions file. "score" is None if the primary metric is not in percent."""
    for name, task in suite.tasks.items():
        samples = {sample["doc_id"]: sample for sample in reversed(answers.results["samples"][name])}
        table = answers.values(name)
        units = {key: SuiteMetric(Suite(name, {name: task}), key, [answers]).unit for key in table}
        for i in sorted(samples):
            metrics = {key: _as_json(values.get(i), units[key]) for key, values in table.items()}
            prediction, gold = _texts(samples[i])
            score = metrics.get(summary["primary"])
            prompt = str(samples[i]["arguments"][0][0])
            yield {
                "example": {"prompt": prompt, "raw_prediction": prediction, "raw_answers": gold},
                "score": score / 100 if summary["unit"] == "percent" and score is not None else None,
                "metrics": metrics,
                "idx": i,
                **({"skill": name} if suite.group is not None else {}),
            }


def _as_json(value: object, unit: float) -> float | str | None:
    return unit * float(value) if _is_number(value) else None if value is None else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (bool, int, float, np.number, np.bool_))


def _texts(sample: dict) -> tuple[str | None, list[str]]:
    """Return the answer and the gold answers: of choices the text of the likeliest, else what was written."""
    responses = [response[0] for response in sample["resps"]]
    target = sample["target"] if isinstance(sample["target"], list) else [sample["target"]]
    if isinstance(responses[0], str):
        return responses[0], [str(answer) for answer in target]
    same = [i for i, (context, *_) in enumerate(sample["arguments"]) if context == sample["arguments"][0][0]]
    if not isinstance(responses[0], tuple) or len(same) == 1:  # a likelihood, or choices that differ in their prompts
        return None, [str(answer) for answer in target]
    choices = [sample["arguments"][i][1].strip() for i in same]
    best = max(same, key=lambda i: responses[i][0])
    gold = [choices[t] if isinstance(t, int) and 0 <= t < len(choices) else str(t) for t in target]
    return sample["arguments"][best][1].strip(), gold


# ------------------------------------------------------------------------------------------------ runs


def evaluate_share(
    config: EvalConfig,
    paths: dict[str, Path],
    loaded: dict[str, list[Suite]] | None,
    finished: tuple[Path, ...],
    names: list[str],
    devices: list[str],
) -> Iterator[dict]:
    """Load the model and yield the summaries of one process's suites, by the flags of eval_multigpu.py.

    `paths` says where the answers to each suite go. `loaded` has the suites, if this process has loaded them already.
    Suites that the folders `finished` have results of are not asked.
    """
    found = loaded or load_suites(names, task_dir=config.task_dir, allow_code_execution=config.allow_code_execution)
    suites = [suite for name in names for suite in found[name]]
    known = [find_finished(finished, finished_key(config, suite, devices[0])) for suite in suites]
    yield from (read_json(path) for path in known if path)
    if left := [suite for suite, path in zip(suites, known) if not path]:
        model, tokenizer = load_on(devices, config.base_model_path, config.dtype)
        yield from evaluate_suites(model, tokenizer, left, config, paths)


def evaluate_suites(
    model, tokenizer, suites: list[Suite], config: EvalConfig, paths: dict[str, Path]
) -> Iterator[dict]:
    """Evaluate a model on suites, write each one's results to its path (.jsonl) as soon as it is done, yield summaries.

    An adapter is put on the model and stays there. `with_base` evaluates the base before that. Until all suites are
    done, the answers are kept beside the outputs, and an evaluation that was interrupted goes on from them.
    """
    base: dict[str, SuiteAnswers] = {}
    device = str(model.device)
    with contextlib.ExitStack() as stack:

        def ask(suite: Suite, path: Path, of_base: bool) -> SuiteAnswers:
            journal = stack.enter_context(AnswerJournal(path, suite_key(config, suite, of_base, device)))
            if journal.results:
                note(f"{len(journal.results)} answers to {suite.name} are there from an interrupted evaluation")
            return evaluate_suite(model, tokenizer, suite, config, journal)

        if config.with_base:
            with named(f"adapter {config.adapter_dir}"):
                esft.check_base({"router": esft.router_fingerprint(model)}, config.adapter_dir)  # before hours of it
            for suite in suites:
                path = paths[suite.name].with_suffix(".base.jsonl")
                base[suite.name] = ask(suite, path, of_base=True)
                _write(suite, base[suite.name], None, config, path, None)
        if config.adapter_dir:
            model = esft.add_adapter(model, config.adapter_dir, config.strengths[0])
        for suite in suites:
            key = finished_key(config, suite, device)  # first: lm-eval changes its tasks as it asks them
            answers = ask(suite, paths[suite.name], of_base=False)
            yield _write(suite, answers, base.get(suite.name), config, paths[suite.name], key)


def suite_key(config: EvalConfig, suite: Suite, of_base: bool, device: str) -> dict:
    """Return what decides a model's answers to the requests of a suite. Each request decides its own, too."""
    key = model_key(config, of_base, device, [lm_eval_harness.__file__, esft.__file__, generation.__file__])
    return {**key, "suite": suite.name, "version of lm-eval": importlib.metadata.version("lm_eval")}


def finished_key(config: EvalConfig, suite: Suite, device: str) -> dict:
    """Return what decides the results of a suite: also all that decides its requests, and how they are summarized."""
    tasks = {name: [task.dump_config(), list(task.eval_docs)] for name, task in suite.tasks.items()}
    digest = hashlib.sha256(json.dumps(tasks, default=str).encode()).hexdigest()
    return {**suite_key(config, suite, False, device), "tasks": digest, **_arguments(config)}


def _arguments(config: EvalConfig) -> dict:
    arguments = {name: getattr(config, name) for name in ARGUMENTS}
    return arguments | {"batch_size": config.eval_batch_size, "max_new_tokens": config.suite_max_new_tokens}


def _write(
    suite: Suite, answers: SuiteAnswers, base: SuiteAnswers | None, config: EvalConfig, path: Path, key: dict | None
) -> dict:
    from lm_eval.utils import handle_non_serializable

    own = {key: value for key, value in answers.results.items() if key != "samples"}
    summary = {
        **summarize_suite(suite, answers, base, seed=config.seed),
        "seconds": round(answers.seconds, 2),
        "num_fewshot": {name: answers.results["n-shot"].get(name) for name in suite.tasks},
        "notes": answers.notes,
        "arguments": _arguments(config),
        "environment": {**environment(), "lm_eval": own.get("lm_eval_version")},
    }
    write_jsonl(path, completion_lines(suite, answers, summary))
    write_json(path.with_suffix(".lm_eval.json"), json.loads(json.dumps(own, default=handle_non_serializable)))
    summary |= {"key": key, "answers": sha256(path)} if key and not base else {}
    write_json(path.with_suffix(".summary.json"), summary)
    for text in answers.notes:
        note(f"{suite.name}: {text}")
    return summary
