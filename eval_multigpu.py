"""Evaluate a model, with or without an adapter, or both, on one or several eval datasets.

    python eval_multigpu.py --eval_dataset=translation --base_model_path=M --adapter_dir=A --output_path=out.jsonl
    python eval_multigpu.py --eval_dataset=intent,general --base_model_path=M --output_path=out.jsonl --world_size=4
    python eval_multigpu.py --eval_dataset=law,general --base_model_path=M --adapter_dir=A --with_base --output_path=...

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

With --judge_model answers to summary, law and translation are graded by a language model behind an OpenAI-compatible
endpoint (judge.py); the key is read from the environment. Its grade becomes the score, and the other metrics stay
beside it. Datasets whose answers are programs are run only with --allow_code_execution (code_runner.py).
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers.utils import logging

import benchmarks
import code_runner
import esft
import metrics
from benchmarks import (
    EVALUATORS,
    ByRow,
    CodeEvaluator,
    Evaluator,
    compare,
    evaluate,
    get_evaluator,
    load_rows,
    make_batches,
    sentence,
    summarize,
)
from deepseek.loading import empty_model, plan_devices
from judge import NO_SCORE, RUBRICS, Judge, check_url, grade
from utils import Parser, check_output, environment, positive, run_cli, sha256, suggest_path, write_json, write_jsonl

OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Job:
    """One dataset: its rows, what scores them, where its results go, and whether the adapter is to be left off.

    `tasks`: for each row the judge's rubric, or None.
    """

    name: str
    rows: list[dict]
    evaluator: Evaluator
    output_path: Path
    tasks: list[str | None]
    base: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} (base)" if self.base else self.name

    @property
    def summary_path(self) -> Path:
        return self.output_path.with_suffix(".summary.json")

    @property
    def partial_path(self) -> Path:
        return self.output_path.with_name(f".{self.output_path.name}.partial")


class Partial:
    """The finished batches of one job: `results` by index in the dataset, and the `seconds` that they took.

    They are kept in a file that only grows, which leaving the `with` block removes, unless by an exception. Its lines
    are `key`, what decides the answers, and {"indices", "results", "seconds"} of each batch. With another key it starts
    over, and a batch with an error in it is tried again. With `keep` it stays. ValueError where another process is at
    work on the file.
    """

    keep = False

    def __init__(self, path: Path, key: dict):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.results: dict[int, dict] = {}
        self.seconds = 0.0
        self.path, self.file = path, open(path, "a+b")  # noqa: SIM115
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another evaluation is at work there, give another --output_path") from None
        found, *records = self._read() or [None]
        if found == key:
            for record in records:
                if not any("error" in result for result in record["results"]):
                    self._take(record)
            return
        if found:
            other = ", ".join(name for name in key if key[name] != found.get(name))
            _note(f"{path} is of an evaluation that was interrupted, with another {other}: starting over")
        self.file.truncate(0)
        self._write(key)

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, error_type, *_) -> None:
        self.file.close()
        if (error_type is None and not self.keep) or not self.results:
            self.path.unlink()

    @property
    def all_failed(self) -> bool:
        return all("error" in result for result in self.results.values())

    def add(self, record: dict) -> None:
        self._write(record)
        self._take(record)

    def _take(self, record: dict) -> None:
        self.results.update(zip(record["indices"], record["results"]))
        self.seconds += record["seconds"]

    def _write(self, record: dict) -> None:
        self.file.write(b"\n" + json.dumps(record).encode())  # the line break is first: the line before may be torn
        self.file.flush()
        os.fsync(self.file.fileno())

    def _read(self) -> list[dict]:
        records = []
        self.file.seek(0)
        for line in self.file:
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    dtypes, devices = ("auto", "float32", "bfloat16", "float16"), ("auto", "cpu", "cuda")
    count = {"type": positive, "metavar": "N"}
    dataset_help = "names (files of datasets/eval), paths (.jsonl, .json, .parquet) or hub ids, separated by commas"
    template_help = "how the prompt is rendered: the tokenizer's chat template or the published one (default: chat)"
    evaluator_help = (
        'metrics for every dataset (default: those that its rows name in "evaluator", else those of its name; for '
        "another name ROUGE-L, chrF and BLEU)"
    )
    base_help = "answer without the adapter, too, and print what it changed, with 95 %% intervals (default: no)"
    code_help = "run the programs that the model writes, in processes with limits (default: no, such data is refused)"
    key_help = "environment variable that holds the judge's key (default: OPENAI_API_KEY)"
    cache_help = "where the judge's replies are kept, so that none is asked for twice (default: %(default)s)"
    world_size_help = (
        "processes, each with a whole model; on the CPU each computes with one thread, so give as many as there are "
        "cores; the results are the same for any number (default: 1)"
    )
    add("--eval_dataset", "--eval_datasets", required=True, metavar="NAME[,NAME]", help=dataset_help)
    add("--base_model_path", "--model", required=True, metavar="MODEL", help="folder or hub id of the base model")
    add("--adapter_dir", metavar="DIR", help="folder of an adapter to put on it (default: none, the base alone)")
    add("--with_base", action="store_true", help=base_help)
    add("--output_path", required=True, metavar="FILE", help="the answers (.jsonl); the summary goes beside them")
    add("--world_size", **count, default=1, help=world_size_help)
    add("--gpus_per_rank", **count, default=1, help="GPUs over which each process spreads its model (default: 1)")
    add("--max_new_tokens", **count, default=512, help="longest answer, in tokens (default: 512)")
    add("--eval_batch_size", **count, default=16, help="samples per batch and process (default: 16)")
    add("--n_samples", **count, help="evaluate on this many samples, drawn with --seed (default: all)")
    add("--template", choices=("chat", "released"), default="chat", help=template_help)
    add("--evaluator", choices=tuple(EVALUATORS), help=evaluator_help)
    add("--allow_code_execution", action="store_true", help=code_help)
    add("--judge_model", metavar="NAME", help="grades summary, law and translation (default: none, offline metrics)")
    add("--judge_base_url", metavar="URL", help=f"of its endpoint, before /chat/completions (default: {OPENAI})")
    add("--judge_key_env", metavar="NAME", default="OPENAI_API_KEY", help=key_help)
    add("--judge_cache", metavar="DIR", default="results/completions/judge_cache", help=cache_help)
    add("--judge_parallel", **count, default=8, help="calls to the judge at a time (default: 8)")
    add("--dtype", choices=dtypes, default="auto", help="of the weights (default: auto, as stored)")
    add("--device", choices=devices, default="auto", help="where to run (default: auto, the GPUs if there are any)")
    add("--seed", type=int, default=0, metavar="N", help="of --n_samples and of the bootstrap interval (default: 0)")
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, or that could not be used in the end."""
    if args.with_base and not args.adapter_dir:
        raise ValueError("--with_base compares an adapter with its base: give --adapter_dir, too")
    if args.judge_base_url and not args.judge_model:
        raise ValueError("--judge_base_url needs --judge_model, the name of the model that grades there")
    check_url(args.judge_base_url or OPENAI)
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", args.judge_key_env):  # not shown: it may be the key itself
        raise ValueError("--judge_key_env is the NAME of an environment variable (capitals, digits, _), not a key")
    if args.judge_model:
        check_output(args.judge_cache, folder=True)


def plan_jobs(args: argparse.Namespace) -> list[Job]:
    """Read the datasets and name the outputs; with --with_base the base's jobs come first. Raises ValueError where a
    flag, a file or a metric's library is wrong."""
    output_path = Path(args.output_path)
    if output_path.suffix != ".jsonl":
        raise ValueError(f"--output_path {output_path} must end in .jsonl")
    datasets = [name.strip() for name in args.eval_dataset.split(",") if name.strip()]
    names = [Path(dataset).stem for dataset in datasets]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--eval_dataset {args.eval_dataset!r} must list datasets of different names, split by commas")
    jobs = []
    for name, dataset in zip(names, datasets):
        path = output_path if len(names) == 1 else output_path.with_suffix(f".{name}.jsonl")
        check_output(path)
        rows = load_rows(dataset, args.n_samples, args.seed)
        evaluator = get_evaluator(name, args.evaluator, rows, args.allow_code_execution)
        tasks = [args.evaluator or row.get("evaluator") or name for row in rows]
        jobs.append(Job(name, rows, evaluator, path, [task if task in RUBRICS else None for task in tasks]))
    base = [replace(job, output_path=job.output_path.with_suffix(".base.jsonl"), base=True) for job in jobs]
    jobs = [*base, *jobs] if args.with_base else jobs
    if len({job.output_path for job in jobs}) < len(jobs):
        raise ValueError(f"--eval_dataset {args.eval_dataset!r}: the base's answers need a name that a dataset has")
    return jobs


def plan_judge(args: argparse.Namespace, jobs: list[Job]) -> Judge | None:
    """The judge asked for, once it has answered; None, with a note, where it has nothing to grade or no key is set."""
    if not args.judge_model:
        return None
    graded = {job.name: job.evaluator.primary for job in jobs if any(job.tasks)}
    if spared := ", ".join(dict.fromkeys(job.name for job in jobs if not any(job.tasks))):
        _note(
            f"--judge_model grades {', '.join(RUBRICS)} only, so {spared} keeps its metrics (--evaluator sets the task)"
        )
    key = os.environ.get(args.judge_key_env, "").strip()
    if graded and not key:
        instead = ", ".join(f"{metric} on {name}" for name, metric in graded.items())
        _note(f"{args.judge_key_env} is not set in the environment, so there is no judge; in its place: {instead}")
    if not graded or not key:
        return None
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
        _note(f"programs that the model writes are run, in processes with limits, behind {fence}; no sandbox")


def answer_keys(args: argparse.Namespace, jobs: list[Job], device: str) -> list[dict]:
    """For each job all that decides its answers and their scores, as JSON; world_size and gpus_per_rank do not."""
    model, adapter = Path(args.base_model_path), args.adapter_dir and Path(args.adapter_dir)
    stats = {path.name: path.stat() for path in sorted(model.iterdir()) if path.is_file()} if model.is_dir() else {}
    adapter = adapter and {path.name: sha256(path) for path in sorted(adapter.iterdir()) if path.is_file()}
    shared = {
        "model": str(model.resolve()) if stats else args.base_model_path,
        "model files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        **{name: getattr(args, name) for name in ("template", "max_new_tokens", "eval_batch_size", "dtype")},
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
        **{f"{module.__name__}.py": sha256(Path(module.__file__)) for module in (benchmarks, metrics, code_runner)},
    }
    rows = [json.dumps(job.rows, default=str).encode() for job in jobs]
    digests = [hashlib.sha256(text).hexdigest() for text in rows]
    return [
        {**shared, "adapter": None if job.base else adapter, "dataset": d, "evaluator": args.evaluator or job.name}
        for job, d in zip(jobs, digests)
    ]


def run_rank(
    args: argparse.Namespace, jobs: list[Job], batches: list[tuple[int, list[int]]], devices: list[str]
) -> Iterator[tuple[int, dict] | None]:
    """Answer the batches, (number of the job, indices of its rows). Yields None when the model is loaded, then for each
    batch the number of its job and {"indices", "results", "seconds"}. The adapter is put on before the first job that
    wants it, and stays."""
    threads = torch.get_num_threads()
    if devices == ["cpu"]:
        torch.set_num_threads(1)
    try:
        device = devices if len(devices) > 1 else devices[0]
        model, tokenizer = esft.load_base_model(args.base_model_path, dtype=args.dtype, device=device)
        adapter = args.adapter_dir
        if adapter and jobs[batches[0][0]].base and not esft.is_lora(adapter):
            esft.check_base(model, adapter)  # a wrong one is refused before the base has answered for hours
        for done, (number, indices) in enumerate(batches):
            job = jobs[number]
            if adapter and not job.base:
                model, adapter = esft.add_adapter(model, adapter), None
            if not done:
                yield None
            start = time.perf_counter()
            rows = [job.rows[i] for i in indices]
            options = {"max_new_tokens": args.max_new_tokens, "template": args.template}
            results = evaluate(model, tokenizer, rows, job.evaluator, **options)
            yield number, {"indices": indices, "results": results, "seconds": time.perf_counter() - start}
    finally:
        torch.set_num_threads(threads)


def spawned(rank: int, sender: Connection, *work) -> None:
    """A process of its own: sends what `run_rank` yields, or a sentence that tells what is wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the parent ends this one
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # however the parent ends
    tqdm.set_lock(threading.RLock())  # its own, made for several processes, would outlive one that is killed
    if rank:
        logging.disable_progress_bar()
    try:
        for part in run_rank(*work):
            sender.send(part)
    except Exception as error:
        if os.environ.get("ESFT_DEBUG"):
            raise
        sender.send(sentence(error))


def run_ranks(
    args: argparse.Namespace, jobs: list[Job], shares: list[list[tuple[int, list[int]]]], devices: list[list[str]]
) -> Iterator[tuple[int, dict] | None]:
    """What `run_rank` yields of each share of the batches, as it comes, each in a process of its own.

    Raises what a rank raised as a ValueError, and ChildProcessError where one died; the others are ended with it.
    """
    context, processes, working = multiprocessing.get_context("spawn"), [], {}
    try:
        for rank, batches in enumerate(shares):
            receiver, sender = context.Pipe(duplex=False)
            work = (rank, sender, args, jobs, batches, devices[rank])
            processes.append(context.Process(target=spawned, args=work, daemon=True))
            processes[rank].start()
            sender.close()  # so that the rank's own copy is the last one, and its end the pipe's
            working[receiver] = rank
        while working:
            for receiver in wait(list(working)):
                rank = working[receiver]
                try:
                    message = receiver.recv()
                except (EOFError, OSError):
                    del working[receiver]
                    processes[rank].join()
                    if code := processes[rank].exitcode:
                        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                        raise ChildProcessError(
                            f"rank {rank} died ({cause}), perhaps of too little memory: the same command goes on from "
                            "the answers that are there, a lower --world_size takes less memory"
                        ) from None
                    continue
                if isinstance(message, str):
                    raise ValueError(f"rank {rank}: {message}")
                yield message
    finally:
        for process in processes:
            process.kill()
            process.join()


def answer(
    args: argparse.Namespace,
    jobs: list[Job],
    batches: list[tuple[int, list[int]]],
    devices: list[list[str]],
    partials: list[Partial],
) -> None:
    """Add to `partials` the batches that they lack, as they come, under a progress bar over the samples of all jobs."""
    left = [(number, batch) for number, batch in batches if not partials[number].results.keys() >= set(batch)]
    done, total = sum(len(partial.results) for partial in partials), sum(len(job.rows) for job in jobs)
    if done:
        _note(f"{done} of {total} answers are there from an evaluation that was interrupted: going on")
    shares = [left[rank :: args.world_size] for rank in range(min(args.world_size, len(left)))]
    parts = run_rank(args, jobs, left, devices[0]) if len(shares) == 1 else run_ranks(args, jobs, shares, devices)
    bar, seconds, tokens = None, 0.0, 0
    try:
        for part in parts:
            bar = bar or tqdm(total=total, initial=done, unit="sample", desc="evaluating")  # once a model is loaded
            if part is None:
                continue
            number, record = part
            record["seconds"] /= len(shares)  # so that those of all processes add up to the time that passes
            partials[number].add(record)
            seconds += record["seconds"]
            tokens += sum(result["tokens"] for result in record["results"])
            bar.set_postfix_str(f"{tokens / seconds:.1f} tokens/s", refresh=False)
            bar.update(len(record["indices"]))
    finally:
        if bar:
            bar.close()


def finish(
    args: argparse.Namespace, job: Job, partial: Partial, judge: Judge | None, base: list[dict] | None
) -> tuple[dict, list[dict]]:
    """Merge the batches in the order of the eval file, have them graded, write both outputs, return the summary and
    the results.

    `base`: the results of the base, which go in, compared, as "against_base". A judge that failed on some keeps the
    partial file, so that the same command asks about those again.
    """
    results, judged, primary = [partial.results[i] for i in range(len(job.rows))], {}, job.evaluator.primary
    if judge and any(job.tasks):
        results = grade(judge, job.tasks, results)
        primary = primary if isinstance(job.evaluator, ByRow) else "judge"
        judged = {"judge": {"model": judge.model, "base_url": judge.base_url, "failed": dict(judge.reasons)}}
        partial.keep = bool(judge.reasons.keys() - {NO_SCORE})
        if partial.keep:
            _note(f"the judge failed on some of {job.label}: the same command asks about those again, and those only")
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


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _interval(bounds: list[float] | None, form: str = ".1f") -> str:
    return f"[{_number(bounds[0], form)}, {_number(bounds[1], form)}]" if bounds else "-"


def table(summaries: list[dict]) -> str:
    """One line per dataset and, indented, per skill; percent but for n, seconds and tokens per second."""
    lines = [f"{'dataset':<20}{'n':>6}  {'metric':<12}{'mean':>7}{'95 % interval':>17}{'seconds':>9}{'tokens/s':>10}"]
    for s in summaries:
        lines.append(
            f"{s['dataset']:<20}{s['n']:>6}  {s['primary']:<12}{_number(s['mean']):>7}{_interval(s['ci95']):>17}"
            f"{s['seconds']:>9.1f}{s['tokens_per_second']:>10.1f}"
        )
        lines += [f"{'':<28}{name:<12}{_number(v):>7}" for name, v in s["metrics"].items() if name != s["primary"]]
        lines += [f"  {name:<18}{g['n']:>6}  {'':<12}{_number(g['mean']):>7}" for name, g in s["groups"].items()]
        lines += [f"  {line}" for line in remarks(s)]
    return "\n".join(lines)


def remarks(s: dict) -> list[str]:
    """What a summary left out of its means, and why."""
    lines = [f"{count} without {name}, left out" for name, count in s["missing"].items() if count]
    lines += [f"{n} not graded: {reason}" for reason, n in s.get("judge", {}).get("failed", {}).items()]
    if s["failed"]:
        lines.append(f"{s['failed']} failed and left out, each with its error in the answers")
    if s["truncated"]:
        lines.append(f"{s['truncated']} cut off at {s['arguments']['max_new_tokens']} tokens")
    return lines


def comparison(base: dict[str, dict], summaries: list[dict]) -> str:
    """One line per dataset: what the adapter changed, in percentage points, marked where its interval excludes 0."""
    head = f"{'dataset':<20}{'n':>6}  {'metric':<12}{'base':>7}{'adapter':>9}{'difference':>12}{'95 % interval':>18}"
    lines, below, certain = [head], [], False
    for s in summaries:
        c = s["against_base"]
        certain |= c["certain"]
        lines.append(
            f"{s['dataset']:<20}{c['n']:>6}  {s['primary']:<12}{_number(c['base']):>7}{_number(c['adapter']):>9}"
            f"{_number(c['difference'], '+.1f'):>12}{_interval(c['ci95'], '+.1f'):>18}{' *' if c['certain'] else ''}"
        )
        below += [f"  {s['dataset']} (base): {line}" for line in remarks(base[s["dataset"]])]
        below += [f"  {s['dataset']}: {line}" for line in remarks(s)]
    return "\n".join(
        [*lines, *below, *(["* the interval (paired bootstrap over samples) excludes 0"] if certain else [])]
    )


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the summaries, one per dataset; with --with_base those of the adapter."""
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
    tokenizer = esft.load_tokenizer(args.base_model_path)
    batches = [  # a missing chat template, too, shows before the model is loaded
        (number, batch)
        for number, job in enumerate(jobs)
        for batch in make_batches([row["prompt"] for row in job.rows], tokenizer, args.eval_batch_size, args.template)
    ]
    check_code(args, jobs)
    judge = plan_judge(args, jobs)
    with contextlib.ExitStack() as stack:
        keys = answer_keys(args, jobs, devices[0][0])
        partials = [stack.enter_context(Partial(job.partial_path, key)) for job, key in zip(jobs, keys)]
        answer(args, jobs, batches, devices, partials)
        failed = {job.label: p.results[0]["error"] for job, p in zip(jobs, partials) if p.all_failed}
        base, summaries, answers = {}, {}, {}
        for job, partial in zip(jobs, partials):
            if job.label not in failed:
                summary, results = finish(args, job, partial, judge, answers.get(job.name))
                (base if job.base else summaries)[job.name] = summary
                answers[job.name] = results
        compared = [summary for summary in summaries.values() if "against_base" in summary]
        alone = [summary for summary in {**base, **summaries}.values() if "against_base" not in summary]
        if compared:
            print(comparison(base, compared))
        if alone:
            print(table(alone))
        if failed:
            raise ValueError("; ".join(f"every sample of {name} failed, the first: {e}" for name, e in failed.items()))
    return list(summaries.values())


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
