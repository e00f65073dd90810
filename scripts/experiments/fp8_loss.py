"""Measure what products in fp8 (expert_compute=fp8) cost in validation loss, against bf16.

    python scripts/experiments/fp8_loss.py --output=results/tables/fp8_loss        # two hours on two CPU cores
    python scripts/experiments/fp8_loss.py --steps=20 --seeds=0                    # a look

`train.py` trains results/models/tiny in bf16 on a task, with experts selected by token scores, once with products in
fp8 and once without, for each seed. The seed draws the order of the data. Where no GPU can multiply in fp8, its
rounding is emulated. So the loss is measured and not the speed.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from deepseek.files import check_output
from deepseek.fp8 import EMULATE, reason_against
from scripts.experiments.common import compared, losses_of, publish
from utils import command_parser, markdown_table, positive, run_cli


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--train_dataset", default="law", metavar="NAME", help="the task (default: law)")
    add("--steps", type=positive, default=450, metavar="N", help="optimizer steps of each run (default: 450)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="two runs for each (default: 0 1 2)")
    add("--output", metavar="FILE", help="write FILE.md and FILE.json (default: print only)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if args.output:
        check_output(f"{args.output}.md")
    if emulated := reason_against(torch.device("cuda" if torch.cuda.is_available() else "cpu")) is not None:
        os.environ[EMULATE] = "1"
    with tempfile.TemporaryDirectory() as name:
        found = losses_of(Path(name), args, "expert_compute", ("null", "fp8"), "dtype=bfloat16")
    rows = [["bf16" if kind == "null" else kind, *compared(values, found["null"])] for kind, values in found.items()]
    page = markdown_table(["products", "validation loss", "of bf16"], rows)
    remarks = f"{args.train_dataset}, seeds {' '.join(map(str, args.seeds))}; results/models/tiny in bf16"
    remarks += "; the rounding of fp8 is emulated" * emulated
    publish(args, __file__, argv, page, remarks, losses=found, emulated=emulated)
    return found


if __name__ == "__main__":
    run_cli(main)
