"""Measure what products in fp8 (expert_compute=fp8) cost in validation loss, against bf16.

    python scripts/experiments/fp8_loss.py --steps=100 --output=results/tables/fp8_loss   # 5 minutes on two CPU cores
    python scripts/experiments/fp8_loss.py --steps=20 --seeds=0                           # a look

`train.py` trains results/models/tiny in bf16 on a task, with experts selected by token scores, once with products in
fp8 and once without, for each seed. The seed draws the order of the data. Where no GPU can multiply in fp8, its
rounding is emulated. So the loss is measured and not the speed.
"""

import functools
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from deepseek.fp8 import EMULATE, reason_against
from scripts.experiments.common import compared, loss_args, losses_of, publish
from utils import markdown_table, run_cli

parse_args = functools.partial(loss_args, __doc__)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
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
