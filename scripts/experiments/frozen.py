"""Measure what frozen experts in fp8, int8 or nf4 cost in validation loss and save in memory.

    python scripts/experiments/frozen.py --output=results/tables/frozen

Loss: `train.py` trains results/models/tiny on a task, with experts selected by token scores, once per dtype and seed.
The seed draws the order of the data. Memory: a random DeepSeek-V2 of 317M parameters, nearly all in experts, trains
for a few steps. Peak memory on a CPU is the resident set. It includes Python, the libraries (about 450 MiB) and mapped
pages of the files.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.files import check_output
from deepseek.frozen import DTYPES
from scripts.experiments.common import TINY, publish, train, write_model
from utils import ROOT, command_parser, markdown_table, positive, run_cli, run_command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--train_dataset", default="law", metavar="NAME", help="the task (default: law)")
    add("--steps", type=positive, default=450, metavar="N", help="optimizer steps of each run (default: 450)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="one run for each (default: 0 1 2)")
    add("--output", metavar="FILE", help="write FILE.md and FILE.json (default: print only)")
    return parser.parse_args(argv)


def as_key(dtype: str) -> str:
    return f"frozen_dtype={'null' if dtype == 'none' else dtype}"


def losses(folder: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the validation losses by dtype, one per seed."""
    scores, experts = folder / "scores", folder / "experts.json"
    task, base = f"--eval_dataset={args.train_dataset}", f"--base_model_path={TINY}"
    size = "--n_sample_tokens=16384", "--seq_length=256"
    run_command(["scripts/expert/get_expert_scores.py", task, base, f"--output_dir={scores}", *size], quiet=True)
    run_command(["scripts/expert/generate_expert_config.py", task, f"--expert_scores_dir={scores}",
                 f"--output_path={experts}", "--score_function=token", "--top_p=0.2"], quiet=True)  # fmt: skip
    keys = [base, f"--train_dataset={args.train_dataset}", f"--expert_config={experts}", f"max_steps={args.steps}"]
    keys += [f"--train_config={ROOT}/configs/tiny.yaml", "load_best_model_at_end=false", "save_strategy=no"]
    keys += ["--verify_frozen"]
    found: dict[str, list[float]] = {dtype: [] for dtype in ("none", *DTYPES)}
    for seed in args.seeds:
        for dtype, values in found.items():
            values.append(train(folder / "run", *keys, f"data_seed={seed}", as_key(dtype))["eval_loss"])
            print(f"seed {seed}, {dtype}: validation loss {values[-1]:.4f}, frozen tensors kept their bits")
    return found


def memory(folder: Path) -> dict[str, dict]:
    """Return the results of short runs by dtype, on a model that is large enough to show a difference."""
    base = folder / "large"
    write_model(base)
    keys = f"--base_model_path={base}", "--train_dataset=law", f"--expert_config={base / 'experts.json'}"
    options = "seq_length=256", "max_steps=3", "per_device_train_batch_size=2", "validation_fraction=0"
    return {dtype: train(folder / "run", *keys, *options, as_key(dtype)) for dtype in ("none", *DTYPES)}


def format_table(found: dict[str, list[float]], held: dict[str, dict]) -> str:
    """Return the comparison as Markdown, one line per dtype."""
    rows = []
    for dtype, values in found.items():
        ratios = [value / plain for value, plain in zip(values, found["none"])]
        row = [dtype, f"{statistics.fmean(values):.4f}"]
        row.append(f"{statistics.fmean(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")
        row += [f"{held[dtype][key] / 2**20:,.0f} MiB" for key in ("frozen_expert_bytes", "peak_memory_bytes")]
        rows.append([*row, f"{held[dtype]['step_seconds']:.2f}"])
    head = ["frozen experts", "validation loss", "of unquantized", "frozen experts take", "peak memory", "step (s)"]
    return markdown_table(head, rows)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if args.output:
        check_output(f"{args.output}.md")
    with tempfile.TemporaryDirectory() as name:
        held, found = memory(Path(name)), losses(Path(name), args)
    remarks = (
        f"{args.train_dataset}, seeds {' '.join(map(str, args.seeds))}; loss (means, and the range of the ratio) on "
    )
    remarks += "results/models/tiny, memory and time on 317M random parameters in fp32"
    publish(args, __file__, argv, format_table(found, held), remarks, losses=found, memory=held)
    return found


if __name__ == "__main__":
    run_cli(main)
