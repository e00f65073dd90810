"""Evaluate a model, with or without an adapter, or both, on eval datasets and on the big suites.

    python eval_multigpu.py --eval_dataset=translation --base_model_path=M --adapter_dir=A --output_path=out.jsonl
    python eval_multigpu.py --eval_dataset=intent,general --base_model_path=M --output_path=out.jsonl --world_size=4
    python eval_multigpu.py --eval_dataset=law,general --base_model_path=M --adapter_dir=A --with_base
    python eval_multigpu.py --suite=mmlu,gsm8k,ifeval --base_model_path=M --adapter_dir=A --with_base --world_size=8

Each of `world_size` processes holds the whole model, on `gpus_per_rank` GPUs or on one thread of the CPU, and answers
every world_size-th batch. Written are the answers with their scores in the order of the eval file (<output_path>), and
the means with their interval (<output_path without .jsonl>.summary.json). With several datasets their names go before
the suffix: out.intent.jsonl, out.general.jsonl. Everything that can be checked without the model is checked before it
is loaded.

The results are the same for every world_size: batches are made before they are dealt out, and on the CPU each process
computes with one thread, since the number of threads changes the last bits of the logits.

Finished batches are kept in a hidden file beside the output (.out.jsonl.partial) until all are there. After an
interruption of any kind the same command goes on from them, with any world_size; one whose answers could be others
(another adapter, dataset, batch size, ...) starts over. A sample that fails is a line with an "error" and no score,
counted as "failed" in the summary, and the rest goes on.

With --with_base the loaded model answers first as it is and then with the adapter, and one table shows what was gained
and what was forgotten: base, adapter, and the difference with its interval. The base's answers go to out.base.jsonl.

With --suite the tasks of lm-eval, EleutherAI's harness, are asked, too: its prompts, few-shot examples and
metrics. Each process answers whole suites, every world_size-th; after an interruption they start over.

With --judge_model answers to summary, law and translation are graded by a language model behind an OpenAI-compatible
endpoint (judge.py); the key is read from the environment. Its grade becomes the score, and the other metrics stay
beside it. Datasets whose answers are programs are run only with --allow_code_execution (code_runner.py).
"""

import argparse
import contextlib
import functools
import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import esft
from benchmarks import EVALUATORS, ByRow, CodeEvaluator, get_evaluator, load_rows
from deepseek.files import check_output, suggest_path, write_json, write_jsonl
from deepseek.loading import empty_model, plan_devices
from evaluation import code_runner
from evaluation.generation import make_batches
from evaluation.judge import NO_SCORE, RUBRICS, Judge, check_url, grade
from evaluation.lm_eval_harness import KNOWN, Suite, load_suites
from evaluation.lm_eval_results import evaluate_share
from evaluation.results import compare, format_results, summarize
from evaluation.runner import Job, Partial, answer, answer_keys, run_ranks
from utils import command_parser, environment, note, positive, run_cli

OPENAI = "https://api.openai.com/v1"
OF_DATASETS = ("max_new_tokens", "template", "evaluator", "judge_model", "judge_base_url")  # flags that suites ignore
OF_SUITES = ("task_dir", "num_fewshot", "suite_max_new_tokens", "apply_chat_template")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    dtypes, devices = ("auto", "float32", "bfloat16", "float16"), ("auto", "cpu", "cuda")
    count = {"type": positive, "metavar": "N"}
    model_help = "folder or hub id of the base model"
    dataset_help = (
        "names (files of datasets/eval), paths (.jsonl, .json, .parquet) or hub ids, by commas (default: none)"
    )
    template_help = "how the prompt is rendered: the tokenizer's chat template or the published one (default: chat)"
    output_help = (
        "the answers (.jsonl), the summary goes beside them (default: results/completions/MODEL.DATASET.jsonl, MODEL "
        "being the adapter's folder or the model's)"
    )
    samples_help = "this many samples of each dataset, and of each task of a suite, drawn with --seed (default: all)"
    suite_help = f"names that lm-eval knows ({', '.join(KNOWN)}, ...) or task files (.yaml), by commas (default: none)"
    shots_help = "few-shot examples of a suite, where its tasks do not fix none (default: the task's own number)"
    chat_help = "ask suites through the tokenizer's chat template (default: plain text, as lm-eval does)"
    evaluator_help = (
        'metrics for every dataset (default: those that its rows name in "evaluator", else those of its name; for '
        "another name ROUGE-L, chrF and BLEU)"
    )
    base_help = "answer without the adapter, too, and print what it changed, with 95 %% intervals (default: no)"
    code_help = (
        "run the programs that the model writes: those of a dataset in processes with limits, those of a suite with "
        "your rights (default: no, such data is refused)"
    )
    key_help = "environment variable that holds the judge's key (default: OPENAI_API_KEY)"
    cache_help = "where the judge's replies are kept, so that none is asked for twice (default: %(default)s)"
    world_size_help = (
        "processes, each with a whole model; on the CPU each computes with one thread, so give as many as there are "
        "cores; the results are the same for any number (default: 1)"
    )
    add("--eval_dataset", "--eval_datasets", default="", metavar="NAME[,NAME]", help=dataset_help)
    add("--suite", default="", metavar="NAME[,NAME]", help=suite_help)
    add("--base_model_path", "--model", required=True, metavar="MODEL", help=model_help)
    add("--adapter_dir", metavar="DIR", help="folder of an adapter to put on it (default: none, the base alone)")
    add("--with_base", action="store_true", help=base_help)
    add("--output_path", metavar="FILE", help=output_help)
    add("--world_size", **count, default=1, help=world_size_help)
    add("--gpus_per_rank", **count, default=1, help="GPUs over which each process spreads its model (default: 1)")
    add("--max_new_tokens", **count, default=512, help="longest answer, in tokens (default: 512)")
    add("--eval_batch_size", **count, default=16, help="samples per batch and process (default: 16)")
    add("--n_samples", **count, help=samples_help)
    add("--template", choices=("chat", "released"), default="chat", help=template_help)
    add("--evaluator", choices=tuple(EVALUATORS), help=evaluator_help)
    add("--allow_code_execution", action="store_true", help=code_help)
    add("--judge_model", metavar="NAME", help="grades summary, law and translation (default: none, offline metrics)")
    add("--judge_base_url", metavar="URL", help=f"of its endpoint, before /chat/completions (default: {OPENAI})")
    add("--judge_key_env", metavar="NAME", default="OPENAI_API_KEY", help=key_help)
    add("--judge_cache", metavar="DIR", default="results/completions/judge_cache", help=cache_help)
    add("--judge_parallel", **count, default=8, help="calls to the judge at a time (default: 8)")
    add("--task_dir", metavar="DIR", help="task files of your own for --suite, looked at first (default: none)")
    add("--num_fewshot", type=int, metavar="N", help=shots_help)
    add("--suite_max_new_tokens", **count, help="longest answer to a suite, in tokens (default: the task's own)")
    add("--apply_chat_template", action="store_true", help=chat_help)
    add("--dtype", choices=dtypes, default="auto", help="of the weights (default: auto, as stored)")
    add("--device", choices=devices, default="auto", help="where to run (default: auto, the GPUs if there are any)")
    add("--seed", type=int, default=0, metavar="N", help="of --n_samples and of the bootstrap interval (default: 0)")
    args = parser.parse_args(argv)
    if not split(args.eval_dataset) and not split(args.suite):
        raise ValueError("nothing to evaluate on: give --eval_dataset, --suite or both")
    for flags, needed, what in ((OF_DATASETS, "eval_dataset", "data sets"), (OF_SUITES, "suite", "the suites")):
        given = [flag for flag in flags if getattr(args, flag) != parser.get_default(flag)]
        if given and not split(getattr(args, needed)):
            raise ValueError(f"--{given[0]} is of {what}: give --{needed}, or leave it out")
    return args


def split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, or that could not be used in the end."""
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ValueError(f"--num_fewshot {args.num_fewshot} must be at least 0")
    if args.output_path and Path(args.output_path).suffix != ".jsonl":
        raise ValueError(f"--output_path {args.output_path} must end in .jsonl")
    if args.with_base and not args.adapter_dir:
        raise ValueError("--with_base compares an adapter with its base: give --adapter_dir, too")
    if args.judge_base_url and not args.judge_model:
        raise ValueError("--judge_base_url needs --judge_model, the name of the model that grades there")
    check_url(args.judge_base_url or OPENAI)
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", args.judge_key_env):  # not shown: it may be the key itself
        raise ValueError("--judge_key_env is the NAME of an environment variable (capitals, digits, _), not a key")
    if args.judge_model:
        check_output(args.judge_cache, folder=True)


def output_path(args: argparse.Namespace, name: str, alone: bool) -> Path:
    """Where the answers to a data set or suite go: --output_path, with the name before its suffix unless it is `alone`;
    without it results/completions/<adapter or model>.<name>.jsonl, never over those of another one."""
    if args.output_path:
        path = Path(args.output_path)
        return path if alone else path.with_suffix(f".{name}.jsonl")
    model = Path(args.adapter_dir or args.base_model_path).resolve()
    path = Path("results/completions", f"{model.name}.{name}.jsonl")
    if (summary := path.with_suffix(".summary.json")).is_file():
        try:
            was = json.loads(summary.read_text(encoding="utf-8"))["arguments"]
            other = was.get("adapter_dir") or was["base_model_path"]
        except (ValueError, KeyError, TypeError, AttributeError):
            other = "something else"
        if Path(other).resolve() != model:
            raise ValueError(f"{summary} is of {other}: give an --output_path, or move it away")
    return path


def plan_jobs(args: argparse.Namespace) -> list[Job]:
    """Read the datasets and name the outputs; with --with_base the base's jobs come first. Raises ValueError where a
    flag, a file or a metric's library is wrong."""
    datasets, jobs = split(args.eval_dataset), []
    names = [Path(dataset).stem for dataset in datasets]
    if len(set(names)) < len(names):
        raise ValueError(f"--eval_dataset {args.eval_dataset!r} must list datasets of different names")
    for name, dataset in zip(names, datasets):
        path = output_path(args, name, alone=len(names) == 1 and not args.suite)
        rows = load_rows(dataset, args.n_samples, args.seed)
        evaluator = get_evaluator(name, args.evaluator, rows, args.allow_code_execution)
        tasks = [args.evaluator or row.get("evaluator") or name for row in rows]
        jobs.append(Job(name, rows, evaluator, path, [task if task in RUBRICS else None for task in tasks]))
    base = [replace(job, output_path=job.output_path.with_suffix(".base.jsonl"), base=True) for job in jobs]
    return [*base, *jobs] if args.with_base else jobs


def plan_suites(args: argparse.Namespace, jobs: list[Job]) -> tuple[dict[str, list[Suite]], dict[str, Path]]:
    """The suites of each name in --suite, with their data, and where the answers to each suite go. Raises ValueError as
    `load_suites`, and where two outputs would have one name."""
    found = (
        load_suites(split(args.suite), task_dir=args.task_dir, allow_code_execution=args.allow_code_execution)
        if args.suite
        else {}
    )
    plan = [suite for loaded in found.values() for suite in loaded]
    suite_paths = {
        suite.name: output_path(args, suite.name.replace("/", "_"), alone=len(plan) == 1 and not jobs) for suite in plan
    }
    for path, n in Counter([*(job.output_path for job in jobs), *suite_paths.values()]).items():
        if n > 1:
            raise ValueError(
                f"--eval_dataset {args.eval_dataset!r}, --suite {args.suite!r}: two of them would be written to {path}"
            )
        check_output(path)
        check_output(path.with_suffix(".summary.json"))
    return found, suite_paths


def plan_judge(args: argparse.Namespace, jobs: list[Job]) -> Judge | None:
    """The judge asked for, once it has answered; None where it has nothing to grade, or OpenAI's lacks its key."""
    if not args.judge_model:
        return None
    if spared := ", ".join(dict.fromkeys(job.name for job in jobs if not any(job.tasks))):
        note(
            f"--judge_model grades {', '.join(RUBRICS)} only, so {spared} keeps its metrics (--evaluator sets the task)"
        )
    for job in jobs:
        if (graded := sum(task is not None for task in job.tasks)) and graded < len(job.tasks):
            note(f"--judge_model grades {graded} of {len(job.tasks)} rows of {job.label}, the rest keep their metric")
    key = os.environ.get(args.judge_key_env, "").strip()
    if not any(any(job.tasks) for job in jobs) or not (key or args.judge_base_url):
        return None
    note(f"asking {args.judge_model} at {args.judge_base_url or OPENAI}{'' if key else ', without a key'}")
    judge = Judge(
        args.judge_model, args.judge_base_url or OPENAI, key, Path(args.judge_cache), parallel=args.judge_parallel
    )
    judge.check()
    return judge


def check_code(args: argparse.Namespace, jobs: list[Job]) -> None:
    """Say what holds the programs that are to be run. Raises ValueError where none can be."""
    if args.allow_code_execution and any(isinstance(job.evaluator, (ByRow, CodeEvaluator)) for job in jobs):
        outcome = code_runner.run(["pass"])
        if not outcome.passed:
            raise ValueError(f"--allow_code_execution: no program can be run on this machine ({outcome.reason})")
        fence = " and ".join([*outcome.fence, "an audit hook"]) if outcome.fence else "an audit hook alone"
        note(f"programs that the model writes are run, in processes with limits, behind {fence}; no sandbox")


def finish(
    args: argparse.Namespace, job: Job, partial: Partial, judge: Judge | None, base: list[dict] | None
) -> tuple[dict, list[dict]]:
    """Merge the batches in the order of the eval file, have them graded, write both outputs, return the summary and
    the results.

    `base`: the results of the base, which go in, compared, as "against_base". A judge that failed on some marks the
    partial file to be kept, so that the same command asks about those again.
    """
    results, judged, primary = [partial.results[i] for i in range(len(job.rows))], {}, job.evaluator.primary
    if judge and any(job.tasks):
        results = grade(judge, job.tasks, results)
        primary = "judge" if all(job.tasks) else "score"  # each row its own
        judged = {"judge": {"model": judge.model, "base_url": judge.base_url, "failed": dict(judge.reasons)}}
        partial.keep = bool(judge.reasons.keys() - {NO_SCORE})
        if NO_SCORE in judge.reasons:
            note(f"replies without a score are kept in {args.judge_cache}, too: remove it to ask for them again")
        if partial.keep:
            note(f"the judge failed on some of {job.label}: the same command asks about those again, and those only")
    tokens = sum(result["tokens"] for result in results)
    summary = {
        "dataset": job.name,
        "primary": primary,
        **summarize(results, seed=args.seed),
        "truncated": sum(result["truncated"] for result in results),
        "seconds": round(partial.seconds, 2),
        "tokens": tokens,
        "tokens_per_second": round(tokens / partial.seconds, 1),
        **judged,
        **({"against_base": compare(base, results, seed=args.seed)} if base else {}),
        "arguments": vars(args),
        "environment": environment(),
    }
    write_jsonl(job.output_path, results)
    write_json(job.summary_path, summary)
    return summary, results


def stand_ins(args: argparse.Namespace, jobs: list[Job]) -> str:
    """Why no judge graded, and which metrics count in its place; "" where there was nothing to grade."""
    instead = {job.name: job.evaluator.primary for job in jobs if any(job.tasks)}
    why = f"{args.judge_key_env} is not set in the environment" if args.judge_model else "no --judge_model was given"
    counting = ", ".join(f"{metric} on {name}" for name, metric in instead.items())
    return f"no judge graded ({why}); in its place: {counting}" if instead else ""


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the summaries, one per dataset and suite; with --with_base those of the adapter."""
    args = parse_args(argv)
    check_flags(args)
    if args.adapter_dir:
        if not Path(args.adapter_dir).is_dir():
            raise ValueError(f"--adapter_dir {args.adapter_dir}: no such folder{suggest_path(args.adapter_dir)}")
        if not esft.is_lora(args.adapter_dir):
            config = esft.ExpertConfig.load(args.adapter_dir)  # raises where the folder is no adapter
            config.check(empty_model(args.base_model_path))
    devices = plan_devices(args.device, args.world_size, args.gpus_per_rank)
    jobs = plan_jobs(args)
    loaded, suite_paths = plan_suites(args, jobs)
    tokenizer = esft.load_tokenizer(args.base_model_path)
    batches = [  # a missing chat template, too, shows before the model is loaded
        (number, batch)
        for number, job in enumerate(jobs)
        for batch in make_batches([row["prompt"] for row in job.rows], tokenizer, args.eval_batch_size, args.template)
    ]
    check_code(args, jobs)
    judge = plan_judge(args, jobs)
    if args.judge_model and not judge and (instead := stand_ins(args, jobs)):
        note(instead)  # now, and again below the table
    with contextlib.ExitStack() as stack:
        keys = answer_keys(args, jobs, devices[0][0])
        partials = [stack.enter_context(Partial(job.partial_path, key)) for job, key in zip(jobs, keys)]
        answer(args, jobs, batches, devices, partials)
        failed = {job.label: p.results[0]["error"] for job, p in zip(jobs, partials) if p.all_failed}
        bases, summaries, answers = {}, {}, {}
        for job, partial in zip(jobs, partials):
            if job.label not in failed:
                summary, results = finish(args, job, partial, judge, answers.get(job.name))
                (bases if job.base else summaries)[job.name] = summary
                answers[job.name] = results
        if any(partial.keep for partial in partials):  # the next run asks the judge again, and no model
            for partial in partials:
                partial.keep = True
        try:
            names = list(loaded)
            shares = [names[rank :: args.world_size] for rank in range(min(args.world_size, len(names)))]
            work = functools.partial(evaluate_share, args, suite_paths, loaded if len(shares) == 1 else None)
            for summary in stack.enter_context(contextlib.closing(run_ranks(work, shares, devices))):
                summaries[summary["dataset"]] = summary
        finally:  # what is done is shown, also where a suite ends the rest
            order = [*(job.name for job in jobs), *suite_paths]
            summaries = {name: summaries[name] for name in order if name in summaries}
            alone = [base for name, base in bases.items() if name not in summaries]
            if shown := format_results([*alone, *summaries.values()], bases):
                written = {job.name: job.output_path for job in jobs if not job.base} | suite_paths
                print(f"{shown}\nwritten to {', '.join(str(written[name]) for name in summaries) or 'the base alone'}")
            if not judge and (instead := stand_ins(args, jobs)):
                print(instead)
        if failed:
            raise ValueError("; ".join(f"every sample of {name} failed, the first: {e}" for name, e in failed.items()))
    return list(summaries.values())


if __name__ == "__main__":
    run_cli(main)
