"""Evaluate a model, with or without an adapter, on one or several eval datasets.

    python eval_multigpu.py --eval_dataset=translation --base_model_path=M --adapter_dir=A --output_path=out.jsonl
    python eval_multigpu.py --eval_dataset=intent,general --base_model_path=M --output_path=out.jsonl --world_size=4

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
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers.utils import logging

import benchmarks
import esft
from benchmarks import EVALUATORS, Evaluator, evaluate, get_evaluator, load_rows, make_batches, sentence, summarize
from deepseek.loading import empty_model, plan_devices
from utils import Parser, check_output, environment, positive, run_cli, sha256, suggest_path, write_json, write_jsonl


@dataclass(frozen=True)
class Job:
    """One dataset: its rows, what scores them, and where its results go."""

    name: str
    rows: list[dict]
    evaluator: Evaluator
    output_path: Path

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
    over, and a batch with an error in it is tried again. ValueError where another process is at work on the file.
    """

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
        if error_type is None or not self.results:
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
    evaluator_help = "metrics for every dataset (default: those of its name; for another name ROUGE-L and chrF)"
    world_size_help = (
        "processes, each with a whole model; on the CPU each computes with one thread, so give as many as there are "
        "cores; the results are the same for any number (default: 1)"
    )
    add("--eval_dataset", "--eval_datasets", required=True, metavar="NAME[,NAME]", help=dataset_help)
    add("--base_model_path", "--model", required=True, metavar="MODEL", help="folder or hub id of the base model")
    add("--adapter_dir", metavar="DIR", help="folder of an adapter to put on it (default: none, the base alone)")
    add("--output_path", required=True, metavar="FILE", help="the answers (.jsonl); the summary goes beside them")
    add("--world_size", **count, default=1, help=world_size_help)
    add("--gpus_per_rank", **count, default=1, help="GPUs over which each process spreads its model (default: 1)")
    add("--max_new_tokens", **count, default=512, help="longest answer, in tokens (default: 512)")
    add("--eval_batch_size", **count, default=16, help="samples per batch and process (default: 16)")
    add("--n_samples", **count, help="evaluate on this many samples, drawn with --seed (default: all)")
    add("--template", choices=("chat", "released"), default="chat", help=template_help)
    add("--evaluator", choices=tuple(EVALUATORS), help=evaluator_help)
    add("--dtype", choices=dtypes, default="auto", help="of the weights (default: auto, as stored)")
    add("--device", choices=devices, default="auto", help="where to run (default: auto, the GPUs if there are any)")
    add("--seed", type=int, default=0, metavar="N", help="of --n_samples and of the bootstrap interval (default: 0)")
    return parser.parse_args(argv)


def plan_jobs(args: argparse.Namespace) -> list[Job]:
    """Read the datasets and name the outputs. Raises ValueError where a flag, a file or a metric's library is wrong."""
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
        jobs.append(Job(name, rows, get_evaluator(name, args.evaluator), path))
    return jobs


def load_model(args: argparse.Namespace, devices: list[str]):
    """-> (model, tokenizer), with the adapter, on `devices`."""
    device = devices if len(devices) > 1 else devices[0]
    model, tokenizer = esft.load_base_model(args.base_model_path, dtype=args.dtype, device=device)
    return esft.add_adapter(model, args.adapter_dir) if args.adapter_dir else model, tokenizer


def answer_keys(args: argparse.Namespace, jobs: list[Job], device: str) -> list[dict]:
    """For each job all that decides its answers and their scores, as JSON; world_size and gpus_per_rank do not."""
    model, adapter = Path(args.base_model_path), args.adapter_dir and Path(args.adapter_dir)
    stats = {path.name: path.stat() for path in sorted(model.iterdir()) if path.is_file()} if model.is_dir() else {}
    shared = {
        "model": str(model.resolve()) if stats else args.base_model_path,
        "model files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "adapter": adapter and {path.name: sha256(path) for path in sorted(adapter.iterdir()) if path.is_file()},
        **{name: getattr(args, name) for name in ("template", "max_new_tokens", "eval_batch_size", "dtype")},
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
        "benchmarks.py": sha256(Path(benchmarks.__file__)),
    }
    rows = [json.dumps(job.rows, default=str).encode() for job in jobs]
    digests = [hashlib.sha256(text).hexdigest() for text in rows]
    return [{**shared, "dataset": d, "evaluator": args.evaluator or job.name} for job, d in zip(jobs, digests)]


def run_rank(
    args: argparse.Namespace, jobs: list[Job], batches: list[tuple[int, list[int]]], devices: list[str]
) -> Iterator[tuple[int, dict] | None]:
    """Answer the batches, (number of the job, indices of its rows). Yields None when the model is loaded, then for each
    batch the number of its job and {"indices", "results", "seconds"}."""
    threads = torch.get_num_threads()
    if devices == ["cpu"]:
        torch.set_num_threads(1)
    try:
        model, tokenizer = load_model(args, devices)
        yield None
        for number, indices in batches:
            start, job = time.perf_counter(), jobs[number]
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


def finish(args: argparse.Namespace, job: Job, partial: Partial) -> dict:
    """Merge the batches in the order of the eval file, write both outputs, return the summary."""
    results = [partial.results[i] for i in range(len(job.rows))]
    tokens = sum(result["tokens"] for result in results)
    summary = {
        "dataset": job.name,
        "primary": job.evaluator.primary,
        **summarize(results, seed=args.seed),
        "truncated": sum(result["truncated"] for result in results),
        "seconds": round(partial.seconds, 2),
        "tokens": tokens,
        "tokens_per_second": round(tokens / partial.seconds, 1),
        "arguments": vars(args),
        "environment": environment(),
    }
    write_jsonl(job.output_path, results)
    write_json(job.summary_path, summary)
    return summary


def table(summaries: list[dict]) -> str:
    """One line per dataset and, indented, per skill; percent but for n, seconds and tokens per second."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    lines = [f"{'dataset':<20}{'n':>6}  {'metric':<12}{'mean':>7}{'95 % interval':>17}{'seconds':>9}{'tokens/s':>10}"]
    for s in summaries:
        interval = f"[{number(s['ci95'][0])}, {number(s['ci95'][1])}]" if s["ci95"] else "-"
        lines.append(
            f"{s['dataset']:<20}{s['n']:>6}  {s['primary']:<12}{number(s['mean']):>7}{interval:>17}"
            f"{s['seconds']:>9.1f}{s['tokens_per_second']:>10.1f}"
        )
        lines += [f"{'':<28}{name:<12}{number(v):>7}" for name, v in s["metrics"].items() if name != s["primary"]]
        lines += [f"  {name:<18}{g['n']:>6}  {'':<12}{number(g['mean']):>7}" for name, g in s["groups"].items()]
        lines += [f"  {count} without {name}, left out" for name, count in s["missing"].items() if count]
        if s["failed"]:
            lines.append(f"  {s['failed']} failed and left out, each with its error in the answers")
        if s["truncated"]:
            lines.append(f"  {s['truncated']} cut off at {s['arguments']['max_new_tokens']} tokens")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the summaries, one per dataset."""
    args = parse_args(argv)
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
    with contextlib.ExitStack() as stack:
        keys = answer_keys(args, jobs, devices[0][0])
        partials = [stack.enter_context(Partial(job.partial_path, key)) for job, key in zip(jobs, keys)]
        answer(args, jobs, batches, devices, partials)
        failed = {job.name: p.results[0]["error"] for job, p in zip(jobs, partials) if p.all_failed}
        summaries = [finish(args, job, p) for job, p in zip(jobs, partials) if job.name not in failed]
        if summaries:
            print(table(summaries))
        if failed:
            raise ValueError("; ".join(f"every sample of {name} failed, the first: {e}" for name, e in failed.items()))
    return summaries


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
