"""Measure what frozen experts in fp8, int8 or nf4 cost in validation loss and save in memory.

    python scripts/experiments/frozen.py --output=results/tables/frozen

Loss: `train.py` trains results/models/tiny on a task, with experts selected by token scores, once per dtype and seed.
The seed draws the order of the data. Memory: a random DeepSeek-V2 of 317M parameters, nearly all in experts, trains
for a few steps. Peak memory on a CPU is the resident set. It includes Python, the libraries (about 450 MiB) and mapped
pages of the files.
"""

import functools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.frozen import DTYPES
from scripts.experiments.common import compared, loss_args, losses_of, publish, train, write_model
from utils import markdown_table, run_cli

KINDS = ("null", *DTYPES)
parse_args = functools.partial(loss_args, __doc__)


def memory(folder: Path) -> dict[str, dict]:
    """Return the results of short runs by dtype, on a model that is large enough to show a difference."""
    base = folder / "large"
    write_model(base)
    keys = f"--base_model_path={base}", "--train_dataset=law", f"--expert_config={base / 'experts.json'}"
    options = "seq_length=256", "max_steps=3", "per_device_train_batch_size=2", "validation_fraction=0"
    return {dtype: train(folder / "run", *keys, *options, f"frozen_dtype={dtype}") for dtype in KINDS}


def format_table(found: dict[str, list[float]], held: dict[str, dict]) -> str:
    """Return the comparison as Markdown, one line per dtype."""
    rows = []
    for dtype, values in found.items():
        row = ["none" if dtype == "null" else dtype, *compared(values, found["null"])]
        row += [f"{held[dtype][key] / 2**20:,.0f} MiB" for key in ("frozen_expert_bytes", "peak_memory_bytes")]
        rows.append([*row, f"{held[dtype]['step_seconds']:.2f}"])
    head = ["frozen experts", "validation loss", "of unquantized", "frozen experts take", "peak memory", "step (s)"]
    return markdown_table(head, rows)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        held = memory(Path(name))
        found = losses_of(Path(name), args, "frozen_dtype", KINDS, "--verify_frozen")
    remarks = (
        f"{args.train_dataset}, seeds {' '.join(map(str, args.seeds))}; loss (means, and the range of the ratio) on "
    )
    remarks += "results/models/tiny, memory and time on 317M random parameters in fp32"
    publish(args, __file__, argv, format_table(found, held), remarks, losses=found, memory=held)
    return found


if __name__ == "__main__":
    run_cli(main)
