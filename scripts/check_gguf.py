"""Check that every expert matrix of a GGUF file has exactly the numbers of the checkpoint it was converted from.

    python scripts/check_gguf.py --base_model_path=M --gguf=M.gguf    # compare them, expert by expert
    python scripts/check_gguf.py --base_model_path=M                  # print the --outtype that keeps every number

scripts/export_gguf.sh does both, before and after llama.cpp's converter. That stacks the experts of a layer, whatever
their names are in the checkpoint:

    blk.3.ffn_gate_exps.weight[7]  (F, D)   is   model.layers.3.mlp.experts.7.gate_proj.weight  (F, D)

A matrix may be stored in another type, such as bf16 as f32, if no number changes. Quantized types are refused.
"""

import argparse
import contextlib
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.checkpoint_files import expert_places, open_base
from deepseek.experts import moe_layers
from deepseek.files import check_file, import_extra, named
from deepseek.shards import Shard
from utils import command_parser, run_cli

# by the type in a checkpoint and in a GGUF file; in lower case it is the converter's --outtype
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def exact_outtype(base: Path) -> str:
    """Return the converter's --outtype in which each matrix of a checkpoint keeps its numbers."""
    dtypes = {one.dtype for one in open_base(base)[1].values() if len(one.shape) > 1}
    if unknown := dtypes - DTYPES.keys():
        raise ValueError(f"cannot convert {base}: it holds {', '.join(sorted(unknown))}. Save it as bf16 or fp32.")
    return dtypes.pop().lower() if len(dtypes) == 1 else "f32"


def gguf_name(layer: int, projection: str) -> str:
    """Return where llama.cpp has a projection of all experts of a layer: "gate_proj.weight" is in ffn_gate_exps."""
    name, _, kind = projection.partition(".")
    return f"blk.{layer}.ffn_{name.removesuffix('_proj')}_exps.{kind}"


def read_gguf(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Return (type, data) of the tensors of a GGUF file by name. The data is mapped, and numbers in bf16 are bytes."""
    check_file(path)
    gguf = import_extra("gguf", "gguf")
    with named(path):
        return {tensor.name: (tensor.tensor_type.name, tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def same_numbers(found: Tensor, wanted: Tensor) -> bool:
    """Return whether `found` is `wanted` bit by bit, or in another dtype that keeps every number of it."""
    there = wanted.to(found.dtype)
    pairs = ((found, there), (there.to(wanted.dtype), wanted))
    return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)


def check_experts(base: Path, path: Path) -> Counter[str]:
    """Compare all experts of a checkpoint with those of a GGUF file. Return the number of matrices by type there.

    Raises:
        ValueError: one is missing, quantized or of another shape, or has other numbers. The first is named.
    """
    model, stored = open_base(base)
    tensors = read_gguf(path)
    compared, wrong = Counter(), {}
    with contextlib.ExitStack() as stack:
        shards = {file: stack.enter_context(Shard(base / file)) for file in {one.file for one in stored.values()}}
        for layer in tqdm(moe_layers(model).values(), desc="comparing", unit="layer"):
            for projection, one in layer.expert_shapes().items():
                check_form(path, tensors, gguf_name(layer.index, projection), (layer.num_experts, *one.shape))
            for (expert, projection), place in expert_places(model, layer, stored).items():
                name = gguf_name(layer.index, projection)
                kind, data = tensors[name]
                found = torch.from_numpy(np.array(data[expert])).view(DTYPES[kind])
                wanted = place.select(shards[stored[place.key].file].read(place.key, place.row))
                compared[kind] += 1
                if not same_numbers(found, wanted):
                    wrong.setdefault(name, []).append(expert)
    if wrong:
        name, experts = next(iter(wrong.items()))
        raise ValueError(
            f"cannot use {path}: expert {experts[0]} of {name} has other numbers than in {base}, and so have "
            f"{sum(map(len, wrong.values())) - 1} more of {compared.total()} matrices. Convert it again with "
            f"--outtype={exact_outtype(base)}."
        )
    return compared


def check_form(path: Path, tensors: dict[str, tuple[str, np.ndarray]], name: str, shape: tuple[int, ...]) -> None:
    """Refuse a GGUF file that does not hold `name`, unquantized and in this shape."""
    kind, data = tensors.get(name, (None, None))
    cause = None
    if data is None:
        cause = f"it has no {name}"
    elif kind not in DTYPES:
        cause = f"{name} is quantized ({kind})"
    elif data.shape != (*shape[:-1], shape[-1] * DTYPES[kind].itemsize // data.itemsize):
        cause = f"{name} is {kind} of shape {data.shape}, and the checkpoint has {shape}"
    if cause:
        hint = "Convert without quantization and without --fuse-gate-up-exps, and quantize the result."
        raise ValueError(f"cannot check {path}: {cause}. {hint}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--base_model_path", "--model", type=Path, required=True, metavar="DIR", help="the checkpoint, such as a merge")
    add("--gguf", type=Path, metavar="FILE", help="the file to check; without it the exact --outtype is printed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.gguf is None:
        print(exact_outtype(args.base_model_path))
        return
    compared = check_experts(args.base_model_path, args.gguf)
    print(f"all {compared.total()} matrices of experts are exact, in {', '.join(compared)}")


if __name__ == "__main__":
    run_cli(main)
