"""Evaluate a model, with or without an adapter, or both, on eval data sets and on the big suites.

    python eval_multigpu.py --model ./output
    python eval_multigpu.py --eval_dataset=translation --base_model_path=M --adapter_dir=A --output_path=out.jsonl
    python eval_multigpu.py --eval_dataset=law,general --base_model_path=M --adapter_dir=A --with_base --world_size=4
    python eval_multigpu.py --suite=mmlu,gsm8k,ifeval --base_model_path=M --adapter_dir=A --with_base --world_size=8

The first form takes a folder that train.py wrote. The base, the adapter and the task come from the run. Without an eval
file for the task, the model is evaluated on the samples that training kept for validation.

The answers go to <output_path>, in the order of the eval file. The means and their 95 % intervals go to
<output_path without .jsonl>.summary.json. With several data sets the names go before the suffix: out.law.jsonl,
out.general.jsonl. --output_dir gets <name>.jsonl instead. Without either, the answers of a run go to completions/ in
its folder. With --with_base the model answers first without the adapter (out.base.jsonl) and then with it. One table
then shows what was gained and what was forgotten.

--strength=0.5,0.7,1 prints the curve of these strengths. The answers are in a folder for each. --choose_strength names
the command that merges the one it takes.

Finished batches are kept in a hidden file beside the output. After an interruption the same command continues from
them. A sample that fails becomes a line with an "error" and without a score. The summary counts it as "failed".

--suite asks the tasks of lm-eval (EleutherAI's harness) with its prompts, few-shot examples and metrics. Each process
answers whole suites.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
from collections import Counter
from pathlib import Path

from transformers import HfArgumentParser

import esft
from benchmarks import CodeEvaluator, EvaluatorByRow, get_evaluator, load_rows
from deepseek.adapters import is_adapter
from deepseek.files import check_output, read_json, sha256, write_json, write_jsonl
from deepseek.loading import empty_model, load_config
from evaluation import code_runner
from evaluation.config import EvalConfig, fill_from_run
from evaluation.journal import AnswerJournal, find_finished
from evaluation.judge import NO_SCORE, Judge, grade
from evaluation.lm_eval_harness import Suite, load_suites
from evaluation.lm_eval_results import evaluate_share
from evaluation.results import compare, format_results, summarize
from evaluation.rubrics import RUBRICS
from evaluation.runner import Job, answer_jobs, answer_key, check_prompts
from evaluation.strength import evaluate_strengths
from evaluation.workers import plan_devices, run_ranks
from utils import CommandParser, environment, locked, note, run_cli


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return super()._get_help_string(action) if action.default not in (None, "", False) else action.help


class _Parser(CommandParser, HfArgumentParser):
    pass


def parse_args(argv: list[str] | None = None) -> EvalConfig:
    parser = _Parser(EvalConfig, description=__doc__, formatter_class=_Help, allow_abbrev=False)
    to_environment = "the judge's key, put into the environment as --judge_key_env; no file keeps it"
    parser.add_argument("--openai_api_key", metavar="KEY", help=to_environment)
    values = vars(parser.parse_args(argv))
    key, config = values.pop("openai_api_key"), EvalConfig(**values)
    if key:
        os.environ[config.judge_key_env] = key
        if not config.judge_model:
            note("openai_api_key has an effect with --judge_model only: no judge is asked")
    return config


# ------------------------------------------------------------------------------------------------ before the model


def split_by_adapter(config: EvalConfig) -> list[EvalConfig]:
    """Return one config for each data set, if --adapter_dir holds folders of their names, and else the config itself.

    Raises ValueError if suites are asked for as well, which have no adapter of their own.
    """
    folder = Path(config.adapter_dir or "")
    own = {dataset: folder / Path(dataset).stem for dataset in config.datasets}
    if not config.adapter_dir or is_adapter(folder) or not any(map(is_adapter, own.values())):
        return [config]
    if config.suites:
        raise ValueError(f"cannot ask suites: {folder} holds an adapter for each data set. Give one of them.")
    parts = [dataclasses.replace(config, eval_dataset=name, adapter_dir=str(adapter)) for name, adapter in own.items()]
    if not config.output_path or len(parts) == 1:
        return parts
    paths = [str(output_path(config, Path(part.eval_dataset).stem, alone=False)) for part in parts]
    return [dataclasses.replace(part, output_path=path) for part, path in zip(parts, paths)]


def output_path(config: EvalConfig, name: str, alone: bool) -> Path:
    """Return where the answers to a data set or suite go. The name is left out if the data set is `alone`.

    Raises ValueError where --output_path is not given and the usual place holds the answers of another model.
    """
    if config.output_dir:
        return Path(config.output_dir, f"{name}.jsonl")
    if config.output_path:
        path = Path(config.output_path)
        return path if alone else path.with_suffix(f".{name}.jsonl")
    model = Path(config.adapter_dir or config.base_model_path).resolve()
    if (model / "run.json").is_file():
        return model / "completions" / f"{name}.jsonl"
    path = Path("results/completions", f"{model.name}.{name}.jsonl")
    if (summary := path.with_suffix(".summary.json")).is_file():
        was = read_json(summary, "arguments")["arguments"]
        other = was.get("adapter_dir") or was.get("base_model_path", "another model")
        if Path(other).resolve() != model:
            raise ValueError(f"cannot write {path}: {summary} is of {other}. Give an --output_path, or move it away.")
    return path


def plan_jobs(config: EvalConfig) -> list[Job]:
    """Read the data sets and name the outputs. With --with_base the jobs of the base come first."""
    names, jobs = [Path(dataset).stem for dataset in config.datasets], []
    for name, dataset in zip(names, config.datasets):
        path = output_path(config, name, alone=len(names) == 1 and not config.suites)
        rows = load_rows(dataset, config.n_samples, config.seed)
        evaluator = get_evaluator(name, config.evaluator, rows, config.allow_code_execution)
        tasks = [config.evaluator or row.get("evaluator") or name for row in rows]
        jobs.append(Job(name, rows, evaluator, path, [task if task in RUBRICS else None for task in tasks]))
    if any(isinstance(job.evaluator, (CodeEvaluator, EvaluatorByRow)) for job in jobs) and config.allow_code_execution:
        network = "without network" if code_runner.isolated() else "with your network"
        note(f"programs that the model writes are run with your rights, {network}, and limits; this is not a sandbox")
    check_prompts(config.base_model_path, config.template_settings, [job.rows[0] for job in jobs])
    base = [dataclasses.replace(j, output_path=j.output_path.with_suffix(".base.jsonl"), base=True) for j in jobs]
    return [*base, *jobs] if config.with_base else jobs


def plan_suites(config: EvalConfig, jobs: list[Job]) -> tuple[dict[str, list[Suite]], dict[str, Path]]:
    """Load the suites of each name in --suite, and return them and where the answers to each suite go.

    Raises ValueError where a suite cannot be loaded, and where two outputs have one name.
    """
    options = {"task_dir": config.task_dir, "allow_code_execution": config.allow_code_execution}
    found = load_suites(config.suites, **options) if config.suites else {}
    names = [suite.name for loaded in found.values() for suite in loaded]
    alone = len(names) == 1 and not jobs
    paths = {name: output_path(config, name.replace("/", "_"), alone) for name in names}
    for path, n in Counter([*(job.output_path for job in jobs), *map(paths.get, names)]).items():
        if n > 1:
            raise ValueError(f"cannot write two data sets or suites to {path}. Give one of them at a time.")
        check_output(path)
        check_output(path.with_suffix(".summary.json"))
    return found, paths


def plan_judge(config: EvalConfig, jobs: list[Job]) -> Judge | None:
    """Return the judge once it has answered, or None if it has nothing to grade or OpenAI's key is missing."""
    if not config.judge_model:
        return None
    for job in jobs:
        graded = sum(task is not None for task in job.tasks)
        if graded < len(job.tasks) and not job.base:
            rows = f"{graded} of {len(job.tasks)} rows of {job.name}"
            note(f"--judge_model grades {rows}: its tasks are {', '.join(RUBRICS)} (see --evaluator)")
    key = os.environ.get(config.judge_key_env, "").strip()
    if not any(any(job.tasks) for job in jobs) or not (key or config.judge_base_url):
        return None
    check_output(config.judge_cache, folder=True)
    cache = Path(config.judge_cache)
    judge = Judge(config.judge_model, key, cache, config.judge_base_url, parallel=config.judge_parallel)
    note(f"asking {judge.model} at {judge.base_url}{'' if key else ', without a key'}")
    judge.check()
    return judge


def stand_ins(config: EvalConfig, jobs: list[Job]) -> str:
    """Say why no judge graded and which metrics count in its place, or return "" if there was nothing to grade."""
    instead = {job.name: job.evaluator.primary for job in jobs if any(job.tasks)}
    why = f"{config.judge_key_env} is not set" if config.judge_model else "no --judge_model was given"
    counting = ", ".join(f"{metric} on {name}" for name, metric in instead.items())
    return f"no judge graded ({why}); in its place: {counting}" if instead else ""


# ------------------------------------------------------------------------------------------------ after the model


def write_results(
    config: EvalConfig, job: Job, journal: AnswerJournal, judge: Judge | None, base: list[dict] | None
) -> tuple[dict, list[dict]]:
    """Have the answers of a job graded, write them and their summary, and return the summary and the answers.

    `base` holds the answers of the base, with which these are compared. The journal is kept where the judge failed on
    some answers. The same command then asks about those again.
    """
    results, judged, primary = [journal.results[i] for i in range(len(job.rows))], {}, job.evaluator.primary
    if judge and any(job.tasks):
        results = grade(judge, job.tasks, results)
        primary = "judge" if all(job.tasks) else "score"  # the primary metric of each row
        judged = {"judge": {"model": judge.model, "base_url": judge.base_url, "failed": dict(judge.reasons)}}
        journal.keep = bool(judge.reasons.keys() - {NO_SCORE})
        if NO_SCORE in judge.reasons:
            note(f"replies without a score are kept in {config.judge_cache}, too: remove it to ask for them again")
        if journal.keep:
            note(f"the judge failed on some of {job.label}: the same command asks about those again, and those only")
    tokens = sum(result["tokens"] for result in results)
    summary = {
        "dataset": job.name,
        "primary": primary,
        **summarize(results, seed=config.seed),
        "truncated": sum(result["truncated"] for result in results),
        "seconds": round(journal.seconds, 2),
        "tokens": tokens,
        "tokens_per_second": round(tokens / journal.seconds, 1),
        **judged,
        **({"against_base": compare(base, results, seed=config.seed)} if base else {}),
        "arguments": dataclasses.asdict(config),
        "environment": environment(),
    }
    write_jsonl(job.output_path, results)
    summary |= {} if journal.keep else {"key": journal.finished_key, "answers": sha256(job.output_path)}
    write_json(job.summary_path, summary)
    return summary, results


def open_journal(
    config: EvalConfig, job: Job, device: str, judge: Judge | None, finished: tuple[Path, ...]
) -> AnswerJournal:
    """Return the journal of a job, with what is there of it in the folders `finished` and in --base_answers."""
    graded_by = [judge.model, judge.base_url] if judge and any(job.tasks) else None
    journal = AnswerJournal(job.output_path, answer_key(config, job, device), graded_by)
    of_base = [config.base_answers] if config.base_answers and (job.base or not config.adapter_dir) else []
    if found := find_finished([*finished, *of_base], journal.finished_key):
        journal.take_finished(found)
    elif of_base:
        note(f"{config.base_answers} has no answers of this base to {job.name} with these settings: it is asked")
    return journal


def run(config: EvalConfig, finished: tuple[Path, ...] = ()) -> list[dict]:
    """Evaluate, and return the summaries of all data sets and suites, with --with_base those of the adapter.

    What can be checked without the model is checked before it is loaded. Folders `finished` may hold answers of an
    earlier evaluation. Those of the same model to the same questions are taken as they are.
    """
    if config.adapter_dir:
        esft.check_adapter(empty_model(config.base_model_path), config.adapter_dir)
    devices = plan_devices(config.device, config.world_size, config.gpus_per_rank)
    jobs = plan_jobs(config)
    loaded, suite_paths = plan_suites(config, jobs)
    judge = plan_judge(config, jobs)
    unjudged = "" if judge else stand_ins(config, jobs)
    if config.judge_model and unjudged:
        note(unjudged)  # now, and again below the table
    bases, summaries, failed = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for path in {*(job.output_path for job in jobs), *suite_paths.values()}:
            stack.enter_context(locked(path))
        opened = (open_journal(config, job, devices[0][0], judge, finished) for job in jobs)
        journals = [stack.enter_context(journal) for journal in opened]
        answer_jobs(config, jobs, devices, journals)
        answers: dict[str, list[dict]] = {}
        for job, journal in zip(jobs, journals):
            if journal.all_failed:
                failed[job.label] = journal.results[0]["error"]
                continue
            summary, answers[job.name] = write_results(config, job, journal, judge, answers.get(job.name))
            (bases if job.base else summaries)[job.name] = summary
        keep = any(journal.keep for journal in journals)
        for journal in journals:  # the next run asks the judge again, and no model
            journal.keep = keep
        try:
            here = min(len(loaded), len(devices)) == 1  # other processes load their suites themselves
            work = functools.partial(evaluate_share, config, suite_paths, loaded if here else None, finished)
            ranks = run_ranks(work, list(loaded), devices, config.timeout, "suite {}".format)
            for summary in filter(None, stack.enter_context(contextlib.closing(ranks))):
                summaries[summary["dataset"]] = summary
        finally:  # show what is done, also where a suite fails
            paths = {job.name: job.output_path for job in jobs if not job.base} | suite_paths
            show(paths, bases, summaries, unjudged)
        if failed:
            told = "; ".join(f"every sample of {name} failed, the first: {error}" for name, error in failed.items())
            raise ValueError(f"cannot evaluate: {told}")
    return [summaries[name] for name in paths if name in summaries]


def show(paths: dict[str, Path], bases: dict[str, dict], summaries: dict[str, dict], unjudged: str) -> None:
    """Print one table, in the order of `paths`, and where the answers are."""
    shown = [summaries[name] for name in paths if name in summaries]
    with_base = bases.keys() | {name for name, summary in summaries.items() if "against_base" in summary}
    written = [str(path.with_suffix(".base.jsonl")) for name, path in paths.items() if name in with_base]
    written += [str(path) for name, path in paths.items() if name in summaries]
    alone = [base for name, base in bases.items() if name not in summaries]
    if text := format_results([*alone, *shown], bases):
        print(f"{text}\nanswers in {', '.join(written)}")
    if unjudged:
        print(unjudged)


def main(argv: list[str] | None = None) -> list[dict]:
    config = fill_from_run(parse_args(argv))
    config.check()
    load_config(config.base_model_path)  # raises if there is no such model
    if not config.datasets and not config.suites:
        cause = "it is not a run, which knows its own task"
        raise ValueError(f"cannot evaluate {config.base_model_path}: {cause}. Give --eval_dataset or --suite.")
    if config.is_curve:
        esft.check_adapter(empty_model(config.base_model_path), config.adapter_dir)
        return evaluate_strengths(config, run, output_path(config, "strength", alone=True).with_suffix(""))
    first, *more = split_by_adapter(config)
    for part in more:  # `run` checks the first before its model answers
        esft.check_adapter(empty_model(part.base_model_path), part.adapter_dir)
        plan_suites(part, plan_jobs(part))
    return [summary for part in (first, *more) for summary in run(part)]


if __name__ == "__main__":
    run_cli(main)
