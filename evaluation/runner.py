"""The answers of one or several processes to the data sets of an evaluation, kept as they come.

    Job: a data set and where its results go;  Partial: its finished batches, on disk;  answer(jobs, ...): fills them in

Each process holds the whole model, and answers every world_size-th batch. Batches are made before they are dealt out,
and on the CPU a process computes with one thread, so that the answers are the same for any number of processes.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import benchmarks
import esft
from benchmarks import Evaluator
from deepseek.files import sha256
from evaluation import code_runner, metrics
from evaluation.generation import evaluate
from evaluation.workers import run_ranks
from training import data
from utils import note


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
            note(f"{path} is of an evaluation that was interrupted, with another {other}: starting over")
        self.file.truncate(0)
        self._write(key)

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, error_type, *_) -> None:
        if (error_type is None and not self.keep) or not self.results:
            self.path.unlink()
        self.file.close()  # and with it the lock

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
        **{
            f"{module.__name__}.py": sha256(Path(module.__file__))
            for module in (benchmarks, data, esft, metrics, code_runner)
        },
    }
    rows = [json.dumps(job.rows, default=str).encode() for job in jobs]
    digests = [hashlib.sha256(text).hexdigest() for text in rows]
    return [
        {**shared, "adapter": None if job.base else adapter, "dataset": d, "evaluator": args.evaluator or job.name}
        for job, d in zip(jobs, digests)
    ]


def answer_batches(
    args: argparse.Namespace, jobs: list[Job], batches: list[tuple[int, list[int]]], devices: list[str]
) -> Iterator[tuple[int, dict] | None]:
    """Answer the batches, (number of the job, indices of its rows). Yields None when the model is loaded, then for each
    batch the number of its job and {"indices", "results", "seconds"}. The adapter is put on before the first job that
    wants it, and stays."""
    device = devices if len(devices) > 1 else devices[0]
    model, tokenizer = esft.load_base_model(args.base_model_path, dtype=args.dtype, device=device)
    adapter = args.adapter_dir
    if adapter and jobs[batches[0][0]].base:
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
        note(f"{done} of {total} answers are there from an evaluation that was interrupted: going on")
    shares = [left[rank :: args.world_size] for rank in range(min(args.world_size, len(left)))]
    bar, seconds, tokens = None, 0.0, 0
    with contextlib.ExitStack() as stack:
        work = functools.partial(answer_batches, args, jobs)
        for part in stack.enter_context(contextlib.closing(run_ranks(work, shares, devices))):
            if bar is None:  # a model is loaded
                bar = stack.enter_context(tqdm(total=total, initial=done, unit="sample", desc="evaluating"))
            if part is None:
                continue
            number, record = part
            record["seconds"] /= len(shares)  # so that those of all processes add up to the time that passes
            partials[number].add(record)
            seconds += record["seconds"]
            tokens += sum(result["tokens"] for result in record["results"])
            bar.set_postfix_str(f"{tokens / seconds:.1f} tokens/s", refresh=False)
            bar.update(len(record["indices"]))
