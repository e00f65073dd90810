"""lm-eval, EleutherAI's harness, on a model that is in memory: suites by name, their data, and the answers to them.

    load_suites(["mmlu", "mine.yaml"]) -> suites by name;  ask(model, tokenizer, suite, Settings()) -> answers

All that touches lm-eval's ways is here; `lm_eval_results.py` makes figures and files of the answers. Log-likelihoods
are summed in float32 whatever the dtype of the weights: in bf16, lm-eval's default, close choices tie.
"""

import contextlib
import functools
import logging
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig

from deepseek.files import suggest, suggest_path
from utils import sentence

KNOWN = ("mmlu", "gsm8k", "humaneval", "hellaswag", "arc_challenge", "triviaqa", "ifeval", "ceval-valid")  # the paper's
ASKED_FOR = ("Overwriting default num_fewshot", "generation_kwargs")  # lm-eval warns of what the user wanted
FETCHING = ("datasets", "huggingface_hub", "httpx", "requests", "fsspec")  # whose errors are those of the data
CODE = {"HF_ALLOW_CODE_EVAL": "1"}  # without it the library that runs generated code refuses to

# ------------------------------------------------------------------------------------------------ tasks


@dataclass(frozen=True)
class Suite:
    """One line of the table: a task of lm-eval, or a group that has a mean of its own."""

    name: str
    tasks: dict  # name -> lm-eval's Task
    group: object = None  # lm-eval's Group

    def part(self, name: str) -> "Suite":
        """One of its tasks alone."""
        return Suite(name, {name: self.tasks[name]})

    def weights(self, key: str) -> dict[str, bool] | None:
        """{"by_size": ..} of a metric that the suite has; None where a group does not aggregate it."""
        if self.group is None:
            return {"by_size": True}
        name, _, filter_name = key.partition(",")
        for metric in self.group.aggregate_metric_list:
            if metric.metric == name and (not metric.filter_list or (filter_name or "none") in metric.filter_list):
                return {"by_size": metric.weight_by_size}
        return None


def load_suites(
    names: list[str], *, task_dir: str | Path | None = None, allow_code_execution: bool = False
) -> dict[str, list[Suite]]:
    """The suites of each name, with their data. A tag, or a group without a mean, stands for what it is made of.

    Raises ValueError, in one sentence: lm-eval is not installed; a name is unknown or doubled; a suite runs generated
    code and that is not allowed; its data cannot be fetched.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"the big suites need lm-eval, which is not installed ({error}): pip install -e '.[suites]' -c "
            "constraints.txt"
        ) from error
    if task_dir is not None and not Path(task_dir).is_dir():
        raise ValueError(f"--task_dir {task_dir}: no such folder{suggest_path(task_dir)}")
    if not names:
        raise ValueError(f"--suite names no suite: give one, or several split by commas, as {', '.join(KNOWN)}")
    with _captured():
        manager = TaskManager(include_path=task_dir and str(task_dir), include_defaults=False)
        leaves = {name: list(_leaves(manager.task_index, name)) for name in names}
        if any(None in found and not _is_path(name) for name, found in leaves.items()):  # lm-eval's own take seconds
            manager = TaskManager(include_path=str(task_dir)) if task_dir else _own_tasks()
            leaves = {name: list(_leaves(manager.task_index, name)) for name in names}
    for name, found in leaves.items():
        if not found or None in found:
            missing = (
                f"no such file{suggest_path(name)}" if _is_path(name) else "lm-eval knows no such task, nor --task_dir"
            )
            raise ValueError(f"--suite {name}: {missing}{suggest(name, [*KNOWN, *manager.all_tasks])}")
        if not allow_code_execution and any(leaf.get("unsafe_code", False) is not False for leaf in found):
            raise _refused(name)
    suites = {name: _load(manager, name, leaves[name], allow_code_execution) for name in names}
    tasks = [task for name in names for suite in suites[name] for task in suite.tasks]
    if doubled := [task for task, n in Counter(tasks).items() if n > 1]:
        raise ValueError(f"--suite {','.join(names)}: the task {doubled[0]} is in it twice, name it once")
    return suites


@functools.cache
def _own_tasks():
    """Those that come with lm-eval."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _refused(name: str) -> ValueError:
    return ValueError(
        f"--suite {name} runs the code that the model writes, with your rights: give --allow_code_execution, best in "
        "a container without network, or leave it out"
    )


def _leaves(index: dict, name: str | dict) -> Iterator[dict | None]:
    """Configs of the tasks that a name, or a member of a group, stands for, as written; None for an unknown one.

    Nothing is fetched, and no Python named in them is run.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    if isinstance(name, dict):  # a member with settings of its own
        config, member = name, name.get("group", name.get("task"))
        if not isinstance(name.get("task"), list) and member in index:
            own = {key: value for key, value in name.items() if key not in ("task", "group")}
            yield from (leaf and {**leaf, **own} for leaf in _leaves(index, member))
            return
    elif _is_path(name):
        try:
            config = load_yaml(Path(name), resolve_func=False)
        except FileNotFoundError:
            yield None
            return
        except Exception as error:
            raise ValueError(f"--suite {name} is no task of lm-eval ({sentence(error)})") from error
        if not isinstance(config.get("task"), str):
            raise ValueError(
                f"--suite {name} is no single task: for a group give its name, and its folder by --task_dir"
            )
    elif name in index:
        entry = index[name]
        if entry.kind.name == "TAG":
            for task in sorted(entry.tags):
                yield from _leaves(index, task)
            return
        config = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else entry.cfg or {}
    else:
        yield None
        return
    if isinstance(config.get("task"), list):
        for member in config["task"]:
            yield from _leaves(index, member)
    else:
        yield config


def _load(manager, name: str, leaves: list[dict], allow_code_execution: bool) -> list[Suite]:
    try:
        with _captured(), _environment(CODE if allow_code_execution else {}):
            loaded = manager.load([name])
    except Exception as error:
        if os.environ.get("ESFT_DEBUG"):
            raise
        data = sorted({str(leaf["dataset_path"]) for leaf in leaves if leaf.get("dataset_path")})
        if isinstance(error, ImportError):
            reason = f"cannot be loaded for want of a library ({sentence(error)})"
        elif isinstance(error, OSError) or type(error).__module__.split(".")[0] in FETCHING:
            files = [leaf["dataset_kwargs"].get("data_files") for leaf in leaves if leaf.get("dataset_kwargs")]
            of = f" {', '.join(map(repr, data[:3]))}{', ...' if len(data) > 3 else ''}" if data else ""
            of += f" ({files[0]})" if any(files) else ""
            reason = (
                f"needs the data set{of}, which could not be fetched ({sentence(error)}): fetch it where there is a "
                "network and set HF_HOME to that cache, or give a task with files of your own"
            )
        else:
            reason = f"cannot be loaded ({sentence(error)})"
        raise ValueError(f"--suite {name} {reason}") from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) and not allow_code_execution:
            raise _refused(name)
    group = loaded.get("groups", {}).get(name)
    return _units(group) if group else [_single(task) for task in loaded["tasks"].values()]


def _units(group) -> list[Suite]:
    if group.has_aggregation:
        return [Suite(group.name, {task.task_name: task for task in group.get_all_tasks()}, group)]
    return [
        unit for member in group for unit in (_units(member) if hasattr(member, "get_all_tasks") else [_single(member)])
    ]


def _single(task) -> Suite:
    return Suite(task.task_name, {task.task_name: task})


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    kept = {name: os.environ.get(name) for name in changes}
    os.environ |= changes
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Records(logging.Handler):
    """Warnings, each kind once, with how often it came."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.found: dict[str, list] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if not text.startswith(ASKED_FOR):
            self.found.setdefault(re.sub(r"\d+", "#", text)[:40], [text[:200], 0])[1] += 1

    def sentences(self) -> list[str]:
        return [f"{text} ({n} times)" if n > 1 else text for text, n in self.found.values()]


@contextlib.contextmanager
def _captured() -> Iterator[_Records]:
    """Keep what lm-eval, and the retries of a download, would log."""
    records = _Records()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    kept = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [records if logger.name == "lm_eval" else logging.NullHandler()], False
    try:
        yield records
    finally:
        for logger, (handlers, propagate) in zip(loggers, kept):
            logger.handlers, logger.propagate = handlers, propagate


# ------------------------------------------------------------------------------------------------ answers


@dataclass(frozen=True)
class Settings:
    """How suites are asked; None leaves it to the task. `n_samples` is of each task, drawn with `seed`."""

    n_samples: int | None = None
    batch_size: int = 16
    num_fewshot: int | None = None
    max_new_tokens: int | None = None
    apply_chat_template: bool = False
    allow_code_execution: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Answers:
    """Of one model to one suite: lm-eval's results with its samples, seconds, and what it warned of."""

    results: dict
    seconds: float
    notes: list[str]

    def values(self, task: str) -> dict[str, dict[int, object]]:
        """{metric, with ",filter" where there is one: {number of the sample: value}}, in lm-eval's order."""
        found: dict[str, dict[int, object]] = {}
        for sample in self.results["samples"][task]:
            for metric in sample["metrics"]:
                key = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                found.setdefault(key, {})[sample["doc_id"]] = sample[metric]
        return found

    def prompts(self, task: str) -> dict[int, str]:
        return {sample["doc_id"]: sample["prompt_hash"] for sample in self.results["samples"][task]}


@contextlib.contextmanager
def _own_generation_config(model, tokenizer) -> Iterator[None]:
    """Set the model's aside, whose penalties would change the answers, and keep its end tokens."""
    kept = model.generation_config
    eos = kept.eos_token_id if kept.eos_token_id is not None else tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, bos_token_id=tokenizer.bos_token_id)
    try:
        yield
    finally:
        model.generation_config = kept


def ask(model, tokenizer, suite: Suite, settings: Settings) -> Answers:
    """Answer a suite. Raises ValueError where the model's context has no room for the answers."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    samples = None
    if settings.n_samples is not None:
        sizes = {name: len(task.eval_docs) for name, task in suite.tasks.items()}
        draw = random.Random(settings.seed).sample
        samples = {n: sorted(draw(range(size), min(settings.n_samples, size))) for n, size in sizes.items()}
    start = time.perf_counter()
    changes = {"DISABLE_MULTIPROC": "1", **(CODE if settings.allow_code_execution else {})}
    with contextlib.ExitStack() as stack:
        for context in (_own_generation_config(model, tokenizer), _environment(changes)):
            stack.enter_context(context)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # where its bars go, too
        records = stack.enter_context(_captured())
        lm = HFLM(model, "causal", tokenizer=tokenizer, batch_size=settings.batch_size, softmax_dtype="float32")
        records.found.clear()  # that the model is in memory
        try:
            results = simple_evaluate(
                lm,
                tasks=[suite.group or next(iter(suite.tasks.values()))],
                task_manager=TaskManager(include_defaults=False),
                samples=samples,
                num_fewshot=settings.num_fewshot,
                batch_size=settings.batch_size,
                gen_kwargs={"max_gen_toks": settings.max_new_tokens} if settings.max_new_tokens else None,
                apply_chat_template=settings.apply_chat_template,
                confirm_run_unsafe_code=settings.allow_code_execution,
                bootstrap_iters=100,  # of its own table, for what is no mean
            )
        except (OSError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # a template, a filter or a metric of the task, or a context that is too short
            if os.environ.get("ESFT_DEBUG"):
                raise
            raise ValueError(f"--suite {suite.name} cannot be asked ({sentence(error)})") from error
    notes, shots = records.sentences(), set(results["n-shot"].values())
    if settings.num_fewshot is not None and shots != {settings.num_fewshot}:
        notes.append(f"num_fewshot={settings.num_fewshot} is left aside where a task fixes its own, 0")
    return Answers(results, time.perf_counter() - start, notes)
