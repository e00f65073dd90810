"""Answer the data sets of an evaluation in one or several processes, and keep the answers as they come.

Each process holds the whole model, and answers every world_size-th batch.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import esft
from deepseek.files import named, sha256
from deepseek.loading import vocab_size
from evaluation import code_runner, generation, metrics
from evaluation.config import EvalConfig
from evaluation.generation import Evaluator, evaluate, make_batches, question
from evaluation.journal import AnswerJournal
from evaluation.workers import dtype_on, load_on, run_ranks
from training.data import Template, TemplateSettings, templates
from utils import note

ANSWER_FLAGS = ("template", "template_kwargs", "keep_reasoning", "max_new_tokens", "eval_batch_size", "dtype")


@dataclass(frozen=True)
class Job:
    """One data set, to be answered with the adapter or, if `base`, without it.

    `tasks` holds the judge's rubric for each row, or None.
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


def answer_key(config: EvalConfig, job: Job, device: str) -> dict:
    """Return all that decides the answers to a job and their scores. world_size and gpus_per_rank do not."""
    modules = (code_runner, templates, esft, generation, metrics)
    sources = [inspect.getfile(type(job.evaluator)), *(module.__file__ for module in modules)]
    return {
        **model_key(config, job.base, device, sources),
        "dataset": hashlib.sha256(json.dumps(job.rows, default=str).encode()).hexdigest(),
        "evaluator": config.evaluator or job.name,
    }


def model_key(config: EvalConfig, base: bool, device: str, sources: list[str]) -> dict:
    """Return what decides the answers of a model to any question, with this code (`sources`)."""
    folder, adapter = Path(config.base_model_path), None if base else config.adapter_dir
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return {
        "model": str(folder.resolve()) if files else config.base_model_path,
        "model files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        "adapter": adapter and {path.name: sha256(path) for path in sorted(Path(adapter).iterdir()) if path.is_file()},
        **{name: getattr(config, name) for name in (*ANSWER_FLAGS, *(("strength",) if adapter else ()))},
        "dtype": dtype_on([device], config.base_model_path, config.dtype),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
        "version of this code": [sha256(Path(source)) for source in sources],
    }


def check_prompts(base_model_path: str, settings: TemplateSettings, rows: list[dict]) -> None:
    """Raise ValueError if a question cannot be asked, as with a tokenizer without a chat template."""
    template = Template(esft.load_tokenizer(base_model_path), settings)
    for row in rows:
        template.encode_prompt(question(row))


def answer_jobs(config: EvalConfig, jobs: list[Job], devices: list[list[str]], journals: list[AnswerJournal]) -> None:
    """Add to the journals of the jobs the batches that they lack, under one progress bar."""
    tokenizer, known = esft.load_tokenizer(config.base_model_path), vocab_size(config.base_model_path)
    template = Template(tokenizer, config.template_settings, known)
    left = [
        (number, batch)
        for number, (job, journal) in enumerate(zip(jobs, journals))
        for batch in make_batches([question(row) for row in job.rows], template, config.eval_batch_size)
        if not journal.results.keys() >= set(batch)
    ]
    done, total = sum(len(journal.results) for journal in journals), sum(len(job.rows) for job in jobs)
    if done:
        note(f"{done} of {total} answers are there from an earlier evaluation: going on")
    bar, seconds, tokens = None, 0.0, 0
    with contextlib.ExitStack() as stack:
        work = functools.partial(_answer_share, config, jobs)
        ranks = run_ranks(
            work, left, devices, config.timeout, lambda item: f"samples {item[1]} of {jobs[item[0]].label}"
        )
        for part in stack.enter_context(contextlib.closing(ranks)):
            if bar is None:  # a model is loaded
                bar = stack.enter_context(tqdm(total=total, initial=done, unit="sample", desc="evaluating"))
            if part is None:
                continue
            number, record = part
            record["seconds"] /= min(len(devices), len(left))  # of all processes they add up to the time that passes
            journals[number].add(record)
            seconds += record["seconds"]
            tokens += sum(result["tokens"] for result in record["results"])
            bar.set_postfix_str(f"{tokens / seconds:.1f} tokens/s", refresh=False)
            bar.update(len(record["indices"]))


def _answer_share(
    config: EvalConfig, jobs: list[Job], batches: list[tuple[int, list[int]]], devices: list[str]
) -> Iterator[tuple[int, dict] | None]:
    """Answer batches, each (number of the job, indices of its rows).

    Yields None when the model is loaded, then (number of the job, record for its journal) of each batch. The adapter is
    put on before the first job that needs it, and stays. The jobs of the base come first.
    """
    model, tokenizer = load_on(devices, config.base_model_path, config.dtype)
    template = Template(tokenizer, config.template_settings, vocab_size(config.base_model_path))
    adapter = config.adapter_dir
    if adapter and jobs[batches[0][0]].base:
        with named(f"adapter {adapter}"):
            esft.check_base({"router": esft.router_fingerprint(model)}, adapter)  # before the base answers for hours
    for done, (number, indices) in enumerate(batches):
        job = jobs[number]
        if adapter and not job.base:
            model, adapter = esft.add_adapter(model, adapter, config.strengths[0]), None
        if not done:
            yield None
        start = time.perf_counter()
        rows = [job.rows[i] for i in indices]
        options = {"max_new_tokens": config.max_new_tokens, "keep_reasoning": config.keep_reasoning}
        results = evaluate(model, template, rows, job.evaluator, **options)
        yield number, {"indices": indices, "results": results, "seconds": time.perf_counter() - start}
