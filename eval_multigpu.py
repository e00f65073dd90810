"""Evaluate a model, with or without an adapter, on one or several eval datasets.

    python eval_multigpu.py --eval_dataset=translation --base_model_path=M --adapter_dir=A --output_path=out.jsonl
    python eval_multigpu.py --eval_dataset=intent,general --base_model_path=M --output_path=out.jsonl --world_size=4

Each of `world_size` processes holds the whole model, on `gpus_per_rank` GPUs or on its share of the CPU's threads, and
answers every world_size-th batch. Written are the answers with their scores in the order of the eval file
(<output_path>), and the means with their interval (<output_path without .jsonl>.summary.json). With several datasets
their names go before the suffix: out.intent.jsonl, out.general.jsonl. Everything that can be checked without the model
is checked before it is loaded.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException

import esft
from benchmarks import EVALUATORS, Evaluator, evaluate, get_evaluator, load_rows, shard, summarize
from deepseek.loading import empty_model, plan_devices
from utils import (
    Parser,
    check_output,
    encode_prompt,
    environment,
    positive,
    run_cli,
    suggest_path,
    write_json,
    write_jsonl,
    write_text,
)


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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    dtypes, devices = ("auto", "float32", "bfloat16", "float16"), ("auto", "cpu", "cuda")
    count = {"type": positive, "metavar": "N"}
    dataset_help = "names (files of datasets/eval), paths (.jsonl, .json, .parquet) or hub ids, separated by commas"
    template_help = "how the prompt is rendered: the tokenizer's chat template or the published one (default: chat)"
    evaluator_help = "metrics for every dataset (default: those of its name; for another name ROUGE-L and chrF)"
    add("--eval_dataset", "--eval_datasets", required=True, metavar="NAME[,NAME]", help=dataset_help)
    add("--base_model_path", "--model", required=True, metavar="MODEL", help="folder or hub id of the base model")
    add("--adapter_dir", metavar="DIR", help="folder of an adapter to put on it (default: none, the base alone)")
    add("--output_path", required=True, metavar="FILE", help="the answers (.jsonl); the summary goes beside them")
    add("--world_size", **count, default=1, help="processes, each with a whole model (default: 1)")
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


def run_rank(args: argparse.Namespace, jobs: list[Job], rank: int, devices: list[str]) -> Iterator[dict]:
    """Yield for each job what this rank has done: {"rows": [[index, result], ...], "seconds"}."""
    model, tokenizer = load_model(args, devices)
    for job in jobs:
        start = time.perf_counter()
        prompts = [row["prompt"] for row in job.rows]
        options = {"batch_size": args.eval_batch_size, "template": args.template}
        mine = shard(prompts, tokenizer, rank=rank, world_size=args.world_size, **options)
        options |= {"max_new_tokens": args.max_new_tokens, "progress": rank == 0}
        results = evaluate(model, tokenizer, [job.rows[i] for i in mine], job.evaluator, **options)
        yield {"rows": list(zip(mine, results)), "seconds": time.perf_counter() - start}


def spawned(rank: int, args: argparse.Namespace, jobs: list[Job], devices: list[list[str]], threads: int, folder: Path):
    """A process of its own: leaves the parts of `run_rank` as <folder>/<job>.<rank>.json, or what is wrong in error."""
    torch.set_num_threads(threads)
    try:
        for number, part in enumerate(run_rank(args, jobs, rank, devices[rank])):
            write_json(folder / f"{number}.{rank}.json", part)
    except (ValueError, OSError) as error:
        write_text(folder / "error", str(error))
        sys.exit(2)


def run_ranks(args: argparse.Namespace, jobs: list[Job], devices: list[list[str]]) -> list[list[dict]]:
    """`run_rank` in world_size processes -> for each job the parts of all ranks. Raises the first rank's error."""
    threads = max(1, torch.get_num_threads() // args.world_size)
    with tempfile.TemporaryDirectory() as name:
        folder, ranks = Path(name), range(args.world_size)
        try:
            multiprocessing.spawn(spawned, (args, jobs, devices, threads, folder), nprocs=args.world_size)
        except ProcessExitedException as exited:
            if (folder / "error").exists():
                raise ValueError((folder / "error").read_text(encoding="utf-8")) from None
            cause = exited.signal_name or f"exit code {exited.exit_code}"
            raise ChildProcessError(
                f"rank {exited.error_index} died ({cause}), perhaps of too little memory: lower --world_size or "
                "--eval_batch_size"
            ) from None
        return [[json.loads((folder / f"{n}.{r}.json").read_text("utf-8")) for r in ranks] for n in range(len(jobs))]


def finish(args: argparse.Namespace, job: Job, parts: list[dict]) -> dict:
    """Merge the ranks' parts in the order of the eval file, write both outputs, return the summary."""
    found = dict(pair for part in parts for pair in part["rows"])
    results = [found[i] for i in range(len(job.rows))]
    seconds, tokens = max(part["seconds"] for part in parts), sum(result["tokens"] for result in results)
    summary = {
        "dataset": job.name,
        "primary": job.evaluator.primary,
        **summarize(results, seed=args.seed),
        "truncated": sum(result["truncated"] for result in results),
        "seconds": round(seconds, 2),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
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
    for job in jobs:  # a missing chat template, too, shows before the model is loaded
        encode_prompt(job.rows[0]["prompt"], tokenizer, args.template)
    if args.world_size == 1:
        done = ([part] for part in run_rank(args, jobs, 0, devices[0]))  # a job is written before the next one begins
    else:
        done = run_ranks(args, jobs, devices)
    summaries = [finish(args, job, parts) for job, parts in zip(jobs, done)]
    print(table(summaries))
    return summaries


if __name__ == "__main__":
    run_cli(main)
