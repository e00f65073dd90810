"""Measure what expert parallelism saves and costs: the bytes read, peak memory and step time of a rank by ep_size.

    python scripts/experiments/expert_parallel.py --processes=4 --output=results/tables/expert_parallel

A random DeepSeek-V2, nearly all routed experts, is written to a temporary folder. `torchrun train_ep.py` trains it for
some steps with each ep_size that divides the processes, in turns. The bytes read and the peak memory are those of the
rank with the most. Memory on a CPU is the resident set, with Python, libraries and mapped pages of the files.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.files import check_output
from scripts.experiments.common import publish, train, write_model
from utils import command_parser, markdown_table, positive, run_cli


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--processes", type=positive, default=4, metavar="N", help="processes of every run, each with a GPU where "
        "there are enough (default: 4)")  # fmt: skip
    add("--rounds", type=positive, default=3, metavar="N", help="runs of each ep_size, in turns (default: 3)")
    add("--steps", type=positive, default=6, metavar="N", help="optimizer steps of a run (default: 6)")
    add("--seed", type=int, default=0, metavar="N", help="seed of weights, experts and data order (default: 0)")
    add("--output", metavar="FILE", help="write FILE.md and FILE.json (default: print only)")
    return parser.parse_args(argv)


def measure(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Train with every ep_size in every round; return one row per ep_size."""
    whole = write_model(folder, args.seed)
    keys = [f"--base_model_path={folder}", "--train_dataset=law", f"--expert_config={folder / 'experts.json'}"]
    keys += [f"max_steps={args.steps}", "seq_length=256", "per_device_train_batch_size=2", "learning_rate=1e-4"]
    keys += [f"seed={args.seed}", "validation_fraction=0"]
    keys.append(f"device={'cuda' if torch.cuda.device_count() >= args.processes else 'cpu'}")
    sizes = [size for size in range(1, args.processes + 1) if args.processes % size == 0 and size <= 64]
    results: dict[int, list[dict]] = {size: [] for size in sizes}
    for number in range(args.rounds):
        for size, runs in results.items():
            runs.append(train(folder / f"run-{size}", *keys, f"ep_size={size}", processes=args.processes))
            print(f"round {number + 1} of {args.rounds}, ep_size {size}: {runs[-1]['step_seconds']:.2f} s")
    return [
        {
            "ep_size": size,
            "replicas": args.processes // size,
            "read_bytes": runs[0]["read_bytes"] or whole,  # transformers reads a whole model, and counts nothing
            "peak_memory_bytes": statistics.median(run["peak_memory_bytes"] for run in runs),
            "step_seconds": [run["step_seconds"] for run in runs],
            "ratios": [run["step_seconds"] / one["step_seconds"] for run, one in zip(runs, results[1])],
        }
        for size, runs in results.items()
    ]


def format_table(rows: list[dict]) -> str:
    """Return the rows as Markdown, one line per ep_size."""
    lines = []
    for row in rows:
        ratios = row["ratios"]
        line = [row["ep_size"], row["replicas"]]
        line += [f"{row[key] / 2**20:,.0f} MiB" for key in ("read_bytes", "peak_memory_bytes")]
        line.append(f"{statistics.median(row['step_seconds']):.2f}")
        lines.append([*line, f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"])
    return markdown_table(["ep_size", "replicas", "read", "peak memory", "step (s)", "of ep_size 1"], lines)


def main(argv: list[str] | None = None) -> list[dict]:
    args = parse_args(argv)
    if args.output:
        check_output(f"{args.output}.md")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args)
    publish(args, __file__, argv, format_table(rows), f"seed {args.seed}", rows=rows)
    return rows


if __name__ == "__main__":
    run_cli(main)
