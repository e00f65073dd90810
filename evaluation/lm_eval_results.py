"""The big suites (MMLU, GSM8K, HellaSwag, ...) through lm-eval, EleutherAI's harness, on a model that is in memory.

    python eval_multigpu.py --suite=mmlu,gsm8k --base_model_path=M --adapter_dir=A --with_base

A suite is any task, group or tag that lm-eval knows by name, the path of a task's YAML file, or a name found in
`--task_dir`, a folder of such files. The prompts, the few-shot examples and the metrics are lm-eval's. Its data come
from the hub, or from the cache of Hugging Face where they have been fetched before; what cannot be fetched is told
before a model is loaded. Suites whose answers are programs (humaneval, mbpp) run what the model writes, with the rights
of the user; they are refused unless `--allow_code_execution` says so. A YAML file of one's own may name Python code
that lm-eval runs as well.

Written are, for each suite, the answers with their scores (<output_path>), a summary as eval_multigpu.py writes it
(.summary.json) and lm-eval's own results (.lm_eval.json); with several suites their names go before the suffix. With
both models, those of the base have ".base" before the suffix, and the summary of the adapter says what is gained or
lost: both answer the same prompts, so samples are drawn again in pairs.

Means and intervals are in percent where lm-eval's metric is a mean of shares, and else in its own unit. The primary
metric is the first that lm-eval names (acc_norm for HellaSwag and ARC, as is usual), and the mean of a group is
weighted as lm-eval weights it, so that a mean here is the one in lm-eval's table. Intervals are 95 % bootstrap
intervals over samples within each task.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import esft
from deepseek.files import write_json, write_jsonl
from evaluation.intervals import widened
from evaluation.lm_eval_harness import Answers, Settings, Suite, ask, load_suites
from evaluation.results import is_certain
from utils import environment, note

PRIMARY = {"hellaswag": "acc_norm", "arc_challenge": "acc_norm", "arc_easy": "acc_norm"}


# ------------------------------------------------------------------------------------------------ means and intervals


@dataclass(frozen=True)
class Stratum:
    """The values of one task and metric, a column for each model, of the same samples; `weight` in the suite."""

    columns: list[list]
    weight: float
    aggregate: Callable[[list], float] | None  # None: the mean

    def estimates(self) -> np.ndarray:
        """(C,), of C models."""
        return np.array([np.mean(c) if self.aggregate is None else self.aggregate(c) for c in self.columns])

    def resampled(self, rng: np.random.Generator, resamples: int) -> np.ndarray:
        """(C, resamples): the same draws for every model, of at least two samples."""
        n, found = len(self.columns[0]), np.empty((len(self.columns), resamples))
        values_CN = np.array(self.columns, float) if self.aggregate is None else None
        step = max(1, 5_000_000 // n)  # draws held in memory at once
        for start in range(0, resamples, step):
            draws_RN = rng.integers(n, size=(min(step, resamples - start), n))
            for c, column in enumerate(self.columns):
                part = found[c, start : start + step]
                if values_CN is not None:
                    part[:] = values_CN[c][draws_RN].mean(axis=1)
                else:
                    part[:] = [self.aggregate([column[i] for i in draws]) for draws in draws_RN]
        return widened(found, self.estimates()[:, None], n)


def _strata(suite: Suite, key: str, models: list[Answers]) -> list[Stratum]:
    """What the suite's mean of a metric is made of; samples without a value are left out for every model."""
    from lm_eval.api.metrics import mean

    found = []
    for name, task in suite.tasks.items():
        columns = [answers.values(name).get(key, {}) for answers in models]
        both = sorted(i for i in columns[0] if all(c.get(i) is not None for c in columns))
        if both:
            aggregate = task.aggregation().get(key.partition(",")[0], mean)
            values = [[column[i] for i in both] for column in columns]
            found.append(Stratum(values, float(len(both)), None if aggregate is mean else aggregate))
    if not suite.weights(key)["by_size"]:
        found = [Stratum(s.columns, 1.0, s.aggregate) for s in found]
    total = sum(s.weight for s in found)
    return [Stratum(s.columns, s.weight / total, s.aggregate) for s in found]


def _unit(suite: Suite, key: str, models: list[Answers]) -> float:
    """100 where the metric is a mean of shares of which more is better, else 1."""
    strata = _strata(suite, key, models)
    better = [task.higher_is_better().get(key.partition(",")[0], True) for task in suite.tasks.values()]
    values = (v for s in strata for column in s.columns for v in (column if s.aggregate is None else [None]))
    shares = all(_is_number(v) and 0 <= v <= 1 for v in values)
    return 100.0 if all(better) and shares else 1.0


def summarize(suite: Suite, answers: Answers, base: Answers | None = None, *, resamples=2000, seed=0) -> dict:
    """As summaries.summarize; with `base`, the answers of the base, also as summaries.compare, in "against_base".

    {"dataset", "primary", "unit": "percent" or "as in lm-eval", "higher_is_better", "n", "failed": 0, "mean", "ci95",
     "metrics": {name: mean}, "missing": {name: samples without it}, "groups": {task: {"n", "mean"}},
     "against_base": {"n", "base", "adapter", "difference", "ci95": of the difference, "certain": does it exclude 0}}

    With `base`, `mean` and `groups` are over the samples that have a value from both, and a group has its "base".
    """
    models = [answers] if base is None else [base, answers]
    for name in suite.tasks if base is not None else ():
        if base.prompts(name) != answers.prompts(name):
            raise ValueError(f"{name}: the two models were asked other prompts, so they cannot be compared")
    tables = {name: answers.values(name) for name in suite.tasks}
    keys = list(dict.fromkeys(key for table in tables.values() for key in table if suite.weights(key)))
    asked = PRIMARY.get(suite.name)
    if suite.group is not None:  # in the group's own order
        order = [metric.metric for metric in suite.group.aggregate_metric_list]
        keys.sort(key=lambda key: order.index(key.partition(",")[0]))
    if not keys:
        raise ValueError(f"--suite {suite.name} has no metric that its tasks give: name the tasks instead")
    primary = asked if asked in keys else keys[0]
    n = {name: len(answers.prompts(name)) for name in suite.tasks}
    strata = _strata(suite, primary, models)
    unit = _unit(suite, primary, models)
    better = next(iter(suite.tasks.values())).higher_is_better().get(primary.partition(",")[0], True)

    def rounded(value: float) -> float:
        return round(float(value), 4)

    def mean(of: list[Stratum], unit: float, model: int = -1) -> float | None:
        return rounded(unit * sum(s.weight * s.estimates()[model] for s in of)) if of else None

    def interval(values: np.ndarray, *percent: float) -> list[float]:
        bounds = np.percentile(values, [2.5, 97.5])
        return [rounded(bound) for bound in (bounds.clip(*percent) if unit == 100 else bounds)]

    summary = {
        "dataset": suite.name,
        "primary": primary,
        "unit": "percent" if unit == 100 else "as in lm-eval",
        "higher_is_better": bool(better),
        "n": sum(n.values()),
        "failed": 0,
        "mean": mean(strata, unit),
        "ci95": None,
        "metrics": {key: mean(_strata(suite, key, [answers]), _unit(suite, key, [answers])) for key in keys},
        "missing": {
            key: sum(n[name] - sum(v is not None for v in tables[name].get(key, {}).values()) for name in suite.tasks)
            for key in keys
        },
        "groups": {},
    }
    if strata:
        drawn = None
        if min(len(s.columns[0]) for s in strata) > 1:
            if any(s.aggregate for s in strata):
                resamples = min(resamples, 200)  # in Python, one after the other
            rng = np.random.default_rng(seed)
            drawn = unit * sum(s.weight * s.resampled(rng, resamples) for s in strata)
            summary["ci95"] = interval(drawn[-1], 0, 100)
        if base is not None:
            of_change = None if drawn is None else interval(drawn[1] - drawn[0], -100, 100)
            means = [mean(strata, unit, model) for model in (0, 1)]
            summary["against_base"] = {
                "n": sum(len(s.columns[0]) for s in strata),
                **dict(zip(("base", "adapter", "difference"), (*means, rounded(means[1] - means[0])))),
                "ci95": of_change,
                "certain": is_certain(of_change, sum(a != b for s in strata for a, b in zip(*s.columns))),
            }
    for name in suite.tasks if suite.group is not None else ():
        part = _strata(suite.part(name), primary, models)
        groups = {"n": sum(len(s.columns[0]) for s in part), "mean": mean(part, unit)}
        summary["groups"][name] = groups if base is None else {**groups, "base": mean(part, unit, 0)}
    return summary


def lines(suite: Suite, answers: Answers, summary: dict) -> Iterator[dict]:
    """The answers as lines of a completions file; what a choice is made of is its text.

    `score` is the primary metric as a share of 1 where that is in percent, else None.
    """
    for name in suite.tasks:
        samples = {sample["doc_id"]: sample for sample in reversed(answers.results["samples"][name])}
        table = answers.values(name)
        units = {key: _unit(suite.part(name), key, [answers]) for key in table}
        for i in sorted(samples):
            sample = samples[i]
            metrics = {key: _plain(values.get(i), units[key]) for key, values in table.items()}
            prediction, gold = _texts(sample)
            score = metrics.get(summary["primary"])
            yield {
                "example": {
                    "prompt": str(sample["arguments"][0][0]),
                    "raw_prediction": prediction,
                    "raw_answers": gold,
                },
                "score": score / 100 if summary["unit"] == "percent" and score is not None else None,
                "metrics": metrics,
                "idx": i,
                **({"skill": name} if suite.group is not None else {}),
            }


def _plain(value: object, unit: float) -> float | str | None:
    return unit * float(value) if _is_number(value) else None if value is None else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (bool, int, float, np.number, np.bool_))


def _texts(sample: dict) -> tuple[str | None, list[str]]:
    """The answer, and the gold ones: of choices the text of the likeliest, else what was written."""
    responses = [response[0] for response in sample["resps"]]
    target = sample["target"] if isinstance(sample["target"], list) else [sample["target"]]
    if isinstance(responses[0], str):
        return responses[0], [str(answer) for answer in target]
    if len(responses) == 1 or not isinstance(responses[0], tuple):
        return None, [str(answer) for answer in target]
    same = [i for i, (context, _) in enumerate(sample["arguments"]) if context == sample["arguments"][0][0]]
    choices = [sample["arguments"][i][1].strip() for i in same]
    if len(same) == 1:  # what differs is the prompt
        return None, [str(answer) for answer in target]
    best = max(same, key=lambda i: responses[i][0])
    gold = [choices[t] if isinstance(t, int) and 0 <= t < len(choices) else str(t) for t in target]
    return sample["arguments"][best][1].strip(), gold


# ------------------------------------------------------------------------------------------------ runs


def load(args: argparse.Namespace, names: list[str]) -> dict[str, list[Suite]]:
    """`load_suites` by the flags of eval_multigpu.py."""
    return load_suites(names, task_dir=args.task_dir, allow_code_execution=args.allow_code_execution)


def run_rank(
    args: argparse.Namespace,
    paths: dict[str, Path],
    loaded: dict[str, list[Suite]] | None,
    names: list[str],
    devices: list[str],
) -> Iterator[dict]:
    """One process's share of the suites, by the names that were asked for, from the model on: yields their summaries.

    `paths`: where the answers to each suite go. `loaded`: the suites, where they are at hand.
    """
    found = loaded or load(args, names)
    chosen = [suite for name in names for suite in found[name]]
    device = devices if len(devices) > 1 else devices[0]
    model, tokenizer = esft.load_base_model(args.base_model_path, dtype=args.dtype, device=device)
    settings = Settings(
        args.n_samples, args.eval_batch_size, args.num_fewshot, args.suite_max_new_tokens, args.apply_chat_template,
        args.allow_code_execution, args.seed,
    )  # fmt: skip
    yield from run(
        model, tokenizer, chosen, settings, [paths[suite.name] for suite in chosen], args.adapter_dir, args.with_base
    )


def run(
    model,
    tokenizer,
    suites: list[Suite],
    settings: Settings,
    paths: list[Path],
    adapter_dir: str | Path | None = None,
    with_base: bool = False,
) -> Iterator[dict]:
    """Evaluate a model on suites, write the results of each to its path (.jsonl), yield the summaries (see
    `summarize`).

    Without `adapter_dir` the model is taken as it is. With it, the adapter is put on the model (and stays there), after
    the base was evaluated where `with_base` asks for both. A suite's files are written as soon as it is done.

    Raises ValueError as `ask` and `esft.add_adapter` do.
    """
    base: dict[str, Answers] = {}
    adapter = None if adapter_dir is None else str(adapter_dir)
    arguments = {"base_model_path": model.name_or_path, "adapter_dir": adapter, **vars(settings)}
    if with_base and adapter_dir is not None:
        esft.check_base(model, adapter_dir)  # a wrong one is refused before the base has answered for hours
        for suite, path in zip(suites, paths):
            base[suite.name] = ask(model, tokenizer, suite, settings)
            _write(suite, base[suite.name], None, arguments, path.with_suffix(".base.jsonl"))
    if adapter_dir is not None:
        model = esft.add_adapter(model, adapter_dir)
    for suite, path in zip(suites, paths):
        answers = ask(model, tokenizer, suite, settings)
        yield _write(suite, answers, base.get(suite.name), arguments, path)


def _write(suite: Suite, answers: Answers, base: Answers | None, arguments: dict, path: Path) -> dict:
    from lm_eval.utils import handle_non_serializable

    own = {key: value for key, value in answers.results.items() if key != "samples"}
    summary = {
        **summarize(suite, answers, base, seed=arguments["seed"]),
        "seconds": round(answers.seconds, 2),
        "num_fewshot": {name: answers.results["n-shot"].get(name) for name in suite.tasks},
        "notes": answers.notes,
        "arguments": arguments,
        "environment": {**environment(), "lm_eval": own.get("lm_eval_version")},
    }
    write_jsonl(path, lines(suite, answers, summary))
    write_json(path.with_suffix(".lm_eval.json"), json.loads(json.dumps(own, default=handle_non_serializable)))
    write_json(path.with_suffix(".summary.json"), summary)
    for text in answers.notes:
        note(f"{suite.name}: {text}")
    return summary
