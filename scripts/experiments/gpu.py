"""Run on one GPU what only a GPU can show: the tests marked gpu, a comparison of methods, and a profile of one step.

    bash scripts/experiments/gpu.sh                 # under 9 minutes on one H200
    bash scripts/experiments/gpu.sh --rehearse      # the same code on a CPU, with small shapes

Every part is written when it is done, to OUTPUT.json, OUTPUT.md and OUTPUT_trace.json.gz. A part that does not fit the
time that is left is left out, and one that fails is told with its error. So there is always a result.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells its stages otherwise

from deepseek.files import write_json, write_text
from scripts.experiments import benchmark
from utils import ROOT, command_parser, environment, markdown_table, positive, run_cli, sentence

START = time.monotonic()


@dataclass(frozen=True)
class Run:
    """A method on a shape, and the seconds that it takes on an H200 at most."""

    shape: str
    method: str
    checkpointing: bool
    seconds: int

    @property
    def name(self) -> str:
        return f"{self.shape} {self.method}{' checkpointing' if self.checkpointing else ''}"


# what is to be known first comes first
METHODS = ("esft", "full", "lora", "lora_selected", "experts", "floor")
RUNS = [Run("v2-lite", method, False, 35) for method in METHODS]
RUNS += [Run("qwen3-30b-a3b", "esft", True, 50), Run("qwen3-30b-a3b", "esft", False, 50)]
RUNS += [Run("v2-lite", method, True, 35) for method in METHODS]
REHEARSED = [Run("tiny", method, False, 20) for method in METHODS]
REHEARSED += [Run("36m", "esft", True, 20), Run("tiny", "full", True, 20)]
TESTS, PROFILE = 120, 40  # seconds at most


class Report:
    """The results so far. `save` writes them."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.tests, self.profile = args, "not run", ""
        self.runs: dict[str, dict] = {}
        self.left_out: list[str] = []

    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - START)

    def attempt(self, name: str, seconds: float, part: Callable[[], None]) -> None:
        """Run a part that takes so long at most, if there is time for it."""
        if self.left() < seconds:
            self.left_out.append(name)
        else:
            part()

    def save(self) -> None:
        facts = environment()
        write_json(f"{self.args.output}.json", {
            "environment": facts, "arguments": vars(self.args), "seconds": time.monotonic() - START,
            "tests": self.tests, "runs": self.runs, "left_out": self.left_out,
        })  # fmt: skip
        versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
        parts = [self.table(), f"Tests marked gpu: {self.tests}."]
        parts += [f"Left out for lack of time: {', '.join(self.left_out)}."] * bool(self.left_out)
        parts += ["This was a rehearsal: one step of small shapes, which measures nothing."] * self.args.rehearse
        command = f"bash scripts/experiments/gpu.sh{' --rehearse' * self.args.rehearse}"
        parts += [f"`{command}`, {facts['date'][:10]}, {facts['device']}, {versions}", self.profile]
        write_text(f"{self.args.output}.md", "\n\n".join(part for part in parts if part) + "\n")

    def table(self) -> str:
        """Return a line per run, with its speed as a multiple of full fine-tuning's in the same setting."""
        rows = []
        for name, found in self.runs.items():
            if "error" in found:
                rows.append([name, found["error"][:80], *["-"] * 6])
                continue
            shape, _, *setting = name.split()
            full = self.runs.get(" ".join([shape, "full", *setting]), {}).get("tokens_per_second")
            rate = found["tokens_per_second"]["median"]
            row = [name, f"{rate:,.0f}", f"{found['mfu']:.1%}" if "mfu" in found else "-"]
            row.append(f"{rate / full['median']:.2f}" if full else "-")
            sizes = [found[f"{key}_bytes"] / 2**30 for key in ("peak_memory", "gradient", "optimizer")]
            rows.append([*row, *(f"{size:,.2f}" for size in sizes), f"{found['trained_share']:.2%}"])
        head = ["shape, method", "tokens/s", "MFU", "of full", "peak GiB", "gradients", "optimizer", "trained"]
        return markdown_table(head, rows) if rows else ""


def run_tests(report: Report) -> None:
    """Run the tests of a GPU, or in a rehearsal their bodies on the CPU."""
    marks = ["-m", "not gpu and not slow" if report.args.rehearse else "gpu"]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--show-capture=no", "tests/gpu", *marks]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=min(TESTS, report.left()))
        lines = done.stdout.splitlines()
        report.tests = lines[-1] if lines else done.stderr[-300:]
        write_text(f"{report.args.output}_tests.txt", done.stdout)
    except subprocess.TimeoutExpired:
        report.tests = f"not done after {TESTS} s"


def settings(run: Run, args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags of benchmark.py for a run: one process, all labels."""
    words = [f"--shape={run.shape}", f"--methods={run.method}", f"--device={'cpu' if args.rehearse else 'cuda'}"]
    words += [f"--batch_size={args.batch_size}", f"--seq_length={args.seq_length}"]
    words += ["--rounds=1", "--steps=1"] if args.rehearse else ["--rounds=3", "--steps=5"]
    return benchmark.parse_args(words + ["--activation_checkpointing"] * run.checkpointing)


def measure(run: Run, report: Report) -> None:
    """Measure a run in a process of its own, which frees its memory at the end."""
    flags = settings(run, report.args)
    try:
        report.runs[run.name] = benchmark.summarize(benchmark.measure([run.method], flags), flags)[run.method]
    except (ValueError, RuntimeError) as error:  # too little memory is a result, too
        report.runs[run.name] = {"error": sentence(error)}


def profile(run: Run, report: Report) -> None:
    """Write a trace of one step, and its longest operations, in a process of its own."""
    with benchmark.new_process() as process:
        table = process.submit(trace, run.method, settings(run, report.args), report.args.output).result()
    report.profile = f"One step of {run.name}:\n\n```\n{table}\n```"


def trace(method: str, flags: argparse.Namespace, output: str) -> str:
    """Write the trace of a step to OUTPUT_trace.json.gz. Return a table of its longest operations."""
    held, on_gpu = benchmark.Method(method, flags), flags.device == "cuda"
    held.turn(benchmark.WARMUP)
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU]) as found:
        held.turn(1)
    found.export_chrome_trace(f"{output}_trace.json.gz")
    key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--rehearse", action="store_true", help="run on the CPU, with small shapes")
    add("--seconds", type=positive, default=520, help="time for all parts (default: %(default)s)")
    add("--batch_size", type=positive, help="rows per step (default: 1)")
    add("--seq_length", type=positive, help="tokens per row (default: 4096; 64 in a rehearsal)")
    add("--output", help="path without suffix (default: results/benchmarks/gpu, or gpu_rehearsal in results/runs)")
    args = parser.parse_args(argv)
    args.batch_size = args.batch_size or 1
    args.seq_length = args.seq_length or (64 if args.rehearse else 4096)
    args.output = args.output or ("results/runs/gpu_rehearsal" if args.rehearse else "results/benchmarks/gpu")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        raise ValueError("cannot measure a GPU: torch sees none. Give --rehearse to try the script on a CPU.")
    report, runs = Report(args), REHEARSED if args.rehearse else RUNS
    print(f"{environment()['device']}, free disk {shutil.disk_usage(ROOT).free / 2**30:.0f} GiB")
    parts = [("tests", TESTS / 2, lambda: run_tests(report))]
    parts += [(run.name, run.seconds, lambda run=run: measure(run, report)) for run in runs]
    parts.insert(3, ("profile", PROFILE, lambda: profile(runs[0], report)))  # after the tests, esft and full
    for name, seconds, part in parts:
        report.attempt(name, seconds, part)
        report.save()
        print(f"{time.monotonic() - START:5.0f} s: {name} done", flush=True)
    print(f"\n{report.table()}\n\ntests: {report.tests}\nwrote {args.output}.json, .md and _trace.json.gz")


if __name__ == "__main__":
    run_cli(main)
