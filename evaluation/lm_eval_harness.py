"""lm-eval, EleutherAI's harness, on a model in memory: suites by name, their data, and a model's answers to them.

    suites = load_suites(["mmlu", "mine.yaml"])["mmlu"]
    answers = evaluate_suite(model, tokenizer, suites[0], EvalConfig(...))

This file knows lm-eval's interface. lm_eval_results.py turns the answers into means, tables and files. Log-likelihoods
are summed in float32 for any dtype of the weights, because close choices tie in bf16, lm-eval's default.
"""

import contextlib
import functools
import logging
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from logging.handlers import BufferingHandler
from pathlib import Path
from types import SimpleNamespace

from transformers import GenerationConfig

from deepseek.files import import_extra, suggest
from evaluation.config import KNOWN, EvalConfig, is_task_file
from evaluation.generation import generation_config
from evaluation.journal import AnswerJournal
from evaluation.workers import still_here
from training.data import Template
from utils import sentence

EXPECTED = ("Overwriting default num_fewshot", "generation_kwargs")  # warnings about what the user asked for

# ------------------------------------------------------------------------------------------------ suites


@dataclass(frozen=True)
class Suite:
    """One line of the table: a task of lm-eval, or a group of tasks that has a mean of its own."""

    name: str
    tasks: dict  # name -> lm-eval's Task
    group: object = None  # lm-eval's Group

    def weighs_by_size(self, key: str) -> bool | None:
        """Return whether tasks count by their samples in the mean of a metric; None if the group has no such mean."""
        if self.group is None:
            return True
        name, _, filter_name = key.partition(",")
        for metric in self.group.aggregate_metric_list:
            if metric.metric == name and (not metric.filter_list or (filter_name or "none") in metric.filter_list):
                return metric.weight_by_size
        return None


def load_suites(
    names: list[str], *, task_dir: str | Path | None = None, allow_code_execution: bool = False
) -> dict[str, list[Suite]]:
    """Return the suites of each name, with their data. A tag, or a group without a mean, stands for its members.

    A name is a task, group or tag of lm-eval, one of `task_dir`, or the path of a task's YAML file.

    Raises:
        ValueError: lm-eval is missing, a task is unknown, its data cannot be fetched, or it runs code of the model
            without `allow_code_execution`.
    """
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # an error says what they log about it
    with _lm_eval_session(allow_code_execution):
        manager = _task_manager(task_dir, False)
        if not all(is_task_file(name) or name in manager.task_index for name in names):
            manager = _task_manager(task_dir, True)
        return {name: _load(manager, name, allow_code_execution) for name in names}


@functools.cache
def _task_manager(task_dir: str | Path | None, with_defaults: bool):
    """Return lm-eval's index of the tasks in a folder, and of its own tasks `with_defaults`, which takes seconds."""
    task_manager = import_extra("lm_eval.tasks", "suites").TaskManager
    return task_manager(include_path=task_dir and str(task_dir), include_defaults=with_defaults)


@contextlib.contextmanager
def _errors_of(suite: str) -> Iterator[None]:
    """Put the name of a suite before any error: tasks, their templates, filters and metrics raise every type."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot run --suite {suite}: {sentence(error)}") from error


def _load(manager, name: str, allow_code_execution: bool) -> list[Suite]:
    from lm_eval.tasks._yaml_loader import load_yaml

    with _errors_of(name):
        written = load_yaml(Path(name), resolve_func=False) if is_task_file(name) else name
        if is_task_file(name) and "group" in written:
            raise ValueError("it is a group. Give its name, and its folder with --task_dir.")
        unsafe = any(config.get("unsafe_code") for config in _task_configs(manager.task_index, written))
        if unsafe and not allow_code_execution:
            raise ValueError(
                "it runs the code that the model writes, with your rights. Give --allow_code_execution, best in a "
                "container without a network."
            )
        loaded = manager.load([name])
    tops = list(loaded["groups"].values())[:1] or loaded["tasks"].values()  # a group comes before its members
    return [suite for top in tops for suite in _suites_of(top)]


def _task_configs(index: dict, member: str | dict) -> Iterator[dict]:
    """Yield the settings, as written, of every task that a name or a group's member stands for.

    Fetches nothing and runs no Python that the settings name. Raises ValueError for an unknown name.
    """
    own = member if isinstance(member, dict) else {}
    name = own.get("group", own.get("task")) if own else member
    entry = index.get(name) if isinstance(name, str) else None
    if entry is None and not own:
        raise ValueError(f"neither lm-eval nor --task_dir has a task {name}{suggest(name, [*KNOWN, *index])}")
    written = (entry.cfg or {}) if entry else own
    parts = sorted(entry.tags) if entry and entry.kind.name == "TAG" else written.get("task")
    if isinstance(parts, list):
        for part in parts:
            yield from _task_configs(index, part)
    else:
        yield {**written, **own}


def _suites_of(member) -> list[Suite]:
    """Return a task, or a group with a mean, as one suite, and any other group as the suites of its members."""
    from lm_eval.api.group import Group

    if not isinstance(member, Group):
        return [Suite(member.task_name, {member.task_name: member})]
    if member.has_aggregation:
        return [Suite(member.name, {task.task_name: task for task in member.get_all_tasks()}, member)]
    return [suite for part in member for suite in _suites_of(part)]


# ------------------------------------------------------------------------------------------------ answers


@dataclass(frozen=True)
class SuiteAnswers:
    """A model's answers to a suite: lm-eval's results with its samples, the seconds, and lm-eval's warnings."""

    results: dict
    seconds: float
    notes: list[str]

    def values(self, task: str) -> dict[str, dict[int, object]]:
        """Return {metric, with ",filter" if there is one: {number of the sample: value}}, in lm-eval's order."""
        found: dict[str, dict[int, object]] = {}
        for sample in self.results["samples"][task]:
            for metric in sample["metrics"]:
                key = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                found.setdefault(key, {})[sample["doc_id"]] = sample[metric]
        return found


def evaluate_suite(
    model, tokenizer, suite: Suite, config: EvalConfig, journal: AnswerJournal | None = None
) -> SuiteAnswers:
    """Return the model's answers. What the journal holds already is not asked again.

    Raises ValueError if the suite cannot be asked, as when the context is too short.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    samples, before, start = None, journal.seconds if journal else 0.0, time.perf_counter()
    if config.n_samples is not None:
        sizes = {name: len(task.eval_docs) for name, task in suite.tasks.items()}
        draw = random.Random(config.seed).sample
        samples = {n: sorted(draw(range(size), min(config.n_samples, size))) for n, size in sizes.items()}
    template = Template(tokenizer, config.template_settings)
    greedy = GenerationConfig(
        eos_token_id=template.end_tokens(model.generation_config), bos_token_id=tokenizer.bos_token_id
    )
    with generation_config(model, greedy), _lm_eval_session(config.allow_code_execution) as warnings:
        batch_size, most = config.eval_batch_size, config.suite_max_new_tokens
        options = {"tokenizer": tokenizer, "batch_size": batch_size, "softmax_dtype": "float32"}
        lm = HFLM(model, "causal", trust_remote_code=False, **options)
        if journal is not None:
            _keep_answers(lm, journal)
        warnings.clear()  # lm-eval warns that the model is in memory
        with _errors_of(suite.name):
            results = simple_evaluate(
                lm,
                tasks=[suite.group or next(iter(suite.tasks.values()))],
                task_manager=TaskManager(include_defaults=False),
                samples=samples,
                num_fewshot=config.num_fewshot,
                batch_size=batch_size,
                gen_kwargs={"max_gen_toks": most} if most else None,
                apply_chat_template=config.apply_chat_template,
                confirm_run_unsafe_code=config.allow_code_execution,
                bootstrap_iters=100,  # for its own table, where a metric is not a mean
            )
        notes = _notes(warnings)
    if config.num_fewshot is not None and set(results["n-shot"].values()) != {config.num_fewshot}:
        notes.append(f"num_fewshot={config.num_fewshot} is ignored where a task fixes its own at 0")
    return SuiteAnswers(results, before + time.perf_counter() - start, notes)


def _keep_answers(lm, journal: AnswerJournal) -> None:
    """Let a model of lm-eval answer from the journal what it has answered before, and write down the rest."""
    from lm_eval.api.model import hash_args

    last = time.perf_counter()

    def keep(kind: str, request: tuple, answer: object) -> None:
        nonlocal last
        before, last = last, time.perf_counter()
        answers = {"indices": [hash_args(kind, request)], "results": [{"answer": answer}]}
        journal.add({**answers, "seconds": last - before})
        still_here()

    def answer(kind: str, ask: Callable, requests: list, **options) -> list:
        keys = [hash_args(kind, request.args) for request in requests]
        drawn = [kind == "generate_until" and request.args[1].get("do_sample", False) for request in requests]
        known = [not random and key in journal.results for random, key in zip(drawn, keys)]
        asked = iter(ask([request for request, here in zip(requests, known) if not here], **options))
        return [_as_answer(journal.results[key]) if here else next(asked) for here, key in zip(known, keys)]

    lm.set_cache_hook(SimpleNamespace(add_partial=keep))  # called after each answer
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, kind, functools.partial(answer, kind, getattr(lm, kind)))


def _as_answer(record: dict) -> object:
    answer = record["answer"]
    return tuple(answer) if isinstance(answer, list) else answer


@contextlib.contextmanager
def _lm_eval_session(allow_code_execution: bool) -> Iterator[list[logging.LogRecord]]:
    """Keep lm-eval's warnings in a list and its progress bars on stderr, and leave the environment as it was."""
    logger, handler = logging.getLogger("lm_eval"), BufferingHandler(capacity=100_000)
    handler.setLevel(logging.WARNING)
    handlers, propagate, variables = logger.handlers, logger.propagate, dict(os.environ)
    logger.handlers, logger.propagate = [handler], False
    os.environ["DISABLE_MULTIPROC"] = "1"  # for the errors in its own table
    if allow_code_execution:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the library that runs generated code asks for it
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield handler.buffer
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        os.environ.clear()
        os.environ.update(variables)


def _notes(warnings: list[logging.LogRecord]) -> list[str]:
    """Return each kind of warning once, with how often it came."""
    kinds: dict[str, list[str]] = {}
    for text in (" ".join(record.getMessage().split()) for record in warnings):
        if not text.startswith(EXPECTED):
            kinds.setdefault(re.sub(r"\d+", "#", text)[:40], []).append(text[:200])
    return [texts[0] + (f" ({len(texts)} times)" if len(texts) > 1 else "") for texts in kinds.values()]
