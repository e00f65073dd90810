r"""Does a training run fit, and what makes it fit? From a model's config alone: no weights, and no GPU.

    python scripts/estimate_memory.py --base_model_path=deepseek-ai/DeepSeek-V2-Lite --gpus 8 --gpu_gb 80 \
        --expert_config=results/expert_configs/law.json --seq_length 4096

A micro batch goes through the model without storage (deepseek/memory.py), and what it would hold at its peak is shown
by kind, for the GPU that has most. Where that does not fit, settings that do are looked for in the order of what they
cost in time or quality:

    activation_checkpointing -> more ep_size -> shard_dense -> frozen_dtype fp8 -> nf4 -> an 8-bit optimizer
    -> offload_frozen -> a shorter seq_length

First every one of these alone, then as many together as it takes. The exit code is 0 where something fits, else 2.
With --table it is asked for the published models of configs/published.json and cards of 24 to 141 GB, and
results/benchmarks/fits.md and .json are written. These models' names are understood by --base_model_path, too.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.experts import moe_layers
from deepseek.files import check_output, write_json, write_text
from deepseek.loading import auto_class
from esft import ExpertConfig
from training.memory import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    FROZEN_BYTES,
    OPTIMIZERS,
    MemoryEstimate,
    MemorySettings,
)
from training.plan import make_estimator
from training.published_models import open_model, published_models
from utils import command_parser, environment, positive, run_cli

METHODS = ("esft", "full", "lora")
CARDS = (24, 48, 80, 141)
GPUS = (1, 8)
SHARE = 10 / 64  # of the experts of a layer: the upper end of what the paper's settings choose of DeepSeek-V2-Lite
SHORT = {  # of settings, for a cell of the table
    "activation_checkpointing=true": "ckpt",
    "shard_dense=true": "dense",
    "offload_frozen=true": "host",
    "optim=adamw_bnb_8bit": "8bit",
    "frozen_dtype=": "",
    "ep_size=": "ep",
    "seq_length=": "T",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--base_model_path", "--model", metavar="MODEL", help="a folder with config.json, a hub id, or a name of "
        "configs/published.json (required but with --table)")  # fmt: skip
    add("--expert_config", metavar="FILE", help="the experts to train, from generate_expert_config.py")
    add("--experts_per_layer", type=positive, metavar="N", help="instead of a config: so many experts of every layer")
    add("--method", choices=METHODS, default="esft", help="what is trained (default: %(default)s)")
    add("--gpus", type=positive, default=1, metavar="N", help="processes, a GPU each (default: 1)")
    add("--gpu_gb", type=float, default=80, metavar="GB", help="memory of each, GiB (default: 80)")
    add("--seq_length", type=positive, default=4096, metavar="T", help="tokens of a pack (default: 4096)")
    add("--per_device_train_batch_size", "--batch_size", type=positive, default=1, metavar="N", help="packs of a micro "
        "batch (default: 1)")  # fmt: skip
    add("--global_batch_size", type=positive, default=32, metavar="N", help="packs of an optimizer step: with more "
        "than the GPUs take at once, gradients are kept between micro batches (default: 32)")  # fmt: skip
    add("--label_share", type=float, default=1.0, metavar="P", help="share of tokens that bear a loss, for which alone "
        "there are logits (default: 1, the most)")  # fmt: skip
    add("--one_document", action="store_true", help="a pack is one document, so that attention needs no mask")
    add("--ep_size", default="auto", metavar="N", help="GPUs that share the experts of a replica (default: auto, as "
        "few as fit)")  # fmt: skip
    add("--shard_dense", action="store_true", help="share out the weights outside the experts, too")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights (default: %(default)s)")
    add("--frozen_dtype", choices=tuple(FROZEN_BYTES), help="of frozen experts (default: that of the weights)")
    add("--offload_frozen", action="store_true", help="frozen experts in host memory")
    add("--optim", choices=tuple(OPTIMIZERS), default="adamw_torch_fused", metavar="NAME", help="transformers' name "
        "(default: %(default)s); known: " + ", ".join(OPTIMIZERS))  # fmt: skip
    add("--activation_checkpointing", choices=("auto", "true", "false"), default="auto", help="recompute activations "
        "(default: auto, only where it is needed)")  # fmt: skip
    add("--lora_rank", type=positive, default=8, metavar="R", help="of method lora (default: 8)")
    add(
        "--device", choices=("cuda", "cpu"), default="cuda", help="whose code paths and overhead (default: %(default)s)"
    )
    add("--json", action="store_true", help="print JSON")
    add("--table", action="store_true", help="of the published models, cards and methods; see above")
    add("--output", default="results/benchmarks/fits", metavar="FILE", help="of --table: writes FILE.md and FILE.json "
        "(default: %(default)s)")  # fmt: skip
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------------------------
# one model


def first_experts(model: nn.Module, count: int | None = None) -> ExpertConfig:
    """`count` experts of every MoE layer (default: `SHARE` of them)."""
    layers = {index: layer.num_experts for index, layer in moe_layers(model).items()}
    if count and count > min(layers.values()):
        raise ValueError(f"--experts_per_layer {count}: a layer has {min(layers.values())} experts")
    return ExpertConfig({layer: tuple(range(count or max(1, round(SHARE * n)))) for layer, n in layers.items()})


def chosen(args: argparse.Namespace, model: nn.Module) -> ExpertConfig | None:
    if args.method != "esft":
        if args.expert_config or args.experts_per_layer:
            raise ValueError(f"method {args.method} trains no chosen experts: leave out the expert flags")
        return None
    if bool(args.expert_config) == bool(args.experts_per_layer):
        raise ValueError("method esft needs either --expert_config or --experts_per_layer")
    if args.expert_config:
        return ExpertConfig.load(args.expert_config)
    return first_experts(model, args.experts_per_layer)


def make_settings(args: argparse.Namespace) -> tuple[MemorySettings, list[str]]:
    """(settings, keys that advice must leave alone)."""
    fixed = []
    if args.ep_size != "auto":
        if not args.ep_size.isdecimal() or int(args.ep_size) < 1:
            raise ValueError(f"--ep_size {args.ep_size}: expected a whole number above 0, or auto")
        fixed.append("ep_size")
    if args.activation_checkpointing != "auto":
        fixed.append("activation_checkpointing")
    if args.gpu_gb <= 0:
        raise ValueError(f"--gpu_gb {args.gpu_gb}: expected a number above 0")
    settings = MemorySettings(
        seq_length=args.seq_length,
        batch_size=args.per_device_train_batch_size,
        label_share=args.label_share,
        packed=not args.one_document,
        accumulation=args.global_batch_size > args.gpus * args.per_device_train_batch_size,
        dtype=args.dtype,
        world_size=args.gpus,
        ep_size=1 if args.ep_size == "auto" else int(args.ep_size),
        shard_dense=args.shard_dense,
        frozen_dtype=args.frozen_dtype,
        offload_frozen=args.offload_frozen,
        optim=args.optim,
        activation_checkpointing=args.activation_checkpointing == "true",
        device=args.device,
    )
    return settings, fixed


def assumptions(settings: MemorySettings) -> list[str]:
    """What the figures rest on, beside the code that trains."""
    told = [
        "routed rows are spread evenly over experts and ranks; trained experts over ranks within one",
        f"{settings.label_share:.0%} of the tokens have logits",
        "gradients are kept between micro batches" if settings.accumulation else "one micro batch per step",
    ]
    if settings.device == "cuda":
        told.append(
            f"device overhead is {CONTEXT_BYTES / 2**30:g} GiB (context, workspaces) and {FRAGMENTATION:.0%} of what "
            "is in use (fragmentation): a rule of thumb"
        )
    elif settings.dtype == "bfloat16":
        told.append("in bfloat16, the kernels of a CPU hold memory of their own, which is left out and can be the most")
    return told


def report(
    settings: MemorySettings, memory: MemoryEstimate, found: list[tuple[MemorySettings, MemoryEstimate]], gpu_gb: float
) -> str:
    """All that is to be said of one model."""
    fits = memory.peak <= gpu_gb * 2**30
    lines = [memory.format_table()]
    verdict = "fits" if fits else "does not fit"
    how = f"with ep_size={settings.ep_size} activation_checkpointing={str(settings.activation_checkpointing).lower()}"
    lines.append(f"{verdict}: {memory.peak / 2**30:,.1f} of {gpu_gb:g} GiB on each of {settings.world_size} GPUs {how}")
    if not fits and found:
        lines.append("what fits:" if len(found) > 1 else "what fits is:")
        for other, needed in found:
            host = f", {needed.host / 2**30:,.1f} GiB in host memory per process" if needed.host else ""
            lines.append(f"  {needed.peak / 2**30:>8,.1f} GiB  {other.changed_from(settings)}{host}")
    return "\n".join([*lines, *(f"note: {note}" for note in assumptions(settings))])


# --------------------------------------------------------------------------------------------------------------------
# the table


def make_table() -> tuple[str, list[dict]]:
    """(Markdown, rows) of the published models."""
    columns = [(gpus, card) for gpus in GPUS for card in CARDS]
    lines = [
        "| model | parameters | method | " + " | ".join(f"{gpus} x {card} GB" for gpus, card in columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    rows = []
    for name, (config, billions) in published_models().items():
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
        count = sum(param.numel() for param in model.parameters())
        for method, dtype in (("full", "float32"), ("full", "bfloat16"), ("lora", "bfloat16"), ("esft", "bfloat16")):
            start = time.perf_counter()
            experts = first_experts(model) if method == "esft" else None
            estimator, cells = make_estimator(model, method, experts), []
            for gpus, card in columns:
                settings = MemorySettings(world_size=gpus, dtype=dtype)
                found = estimator.advise(settings, int(card * 2**30))
                cell = {"gpus": gpus, "gpu_gb": card, "fits": bool(found)}
                if found:
                    chosen, memory = found[0]
                    cell |= {
                        "changes": chosen.changed_from(settings),
                        "peak_bytes": memory.peak,
                        "memory": vars(memory),
                    }
                cells.append(cell)
            as_is = [estimator.estimate(MemorySettings(world_size=gpus, dtype=dtype)).peak for gpus in GPUS]
            rows.append(
                {"model": name, "parameters": count, "published_billions": billions, "method": method, "dtype": dtype}
            )
            rows[-1] |= {"peak_bytes_as_is": dict(zip(map(str, GPUS), as_is)), "cells": cells}
            shown = [short(cell) for cell in cells]
            told = f"{method}, fp32" if dtype == "float32" else method
            lines.append(f"| {name} | {count / 1e9:.2f}B | {told} | " + " | ".join(shown) + " |")
            print(f"{lines[-1]}  ({time.perf_counter() - start:.0f} s)", flush=True)
    return "\n".join(lines), rows


def short(cell: dict) -> str:
    """A cell of the table."""
    if not cell["fits"]:
        return "-"
    changes = cell["changes"]
    for long, brief in SHORT.items():
        changes = changes.replace(long, brief)
    return ("fits" if changes == "as asked" else changes) + f" ({cell['peak_bytes'] / 2**30:.0f})"


LEGEND = f"""
Each cell: `fits` with the settings of configs/base.yaml (4096 tokens a pack, one pack at a time, gradients kept between
micro batches, a label on every token), or the least that makes it fit, and the GiB that a GPU then needs at its peak;
`-` where nothing does. ckpt is `activation_checkpointing=true`, ep8 `ep_size=8`, dense `shard_dense=true`, fp8 and nf4
`frozen_dtype=`, 8bit `optim=adamw_bnb_8bit`, host `offload_frozen=true`, T2048 `seq_length=2048`. A card of 80 GB is
counted as 80 GiB; {CONTEXT_BYTES / 2**30:g} GiB and {FRAGMENTATION:.0%} go to the device (a rule of thumb).

esft trains {SHARE:.1%} of the experts of every layer (10 of 64, the upper end of what the paper's settings choose; its
released config for the task intent has 7.5 %) and lora has rank 8, both in bf16; full is given in the precision that
configs/base.yaml asks for, and in plain bf16, which rounds small updates away. train.py shards neither full nor lora,
so that more GPUs do not help them. nf4 and 8bit need bitsandbytes. The parameters are counted on the models that the
configs make; they agree with the totals that the makers give (deviation at most @WORST@). GPT-OSS has no fused
attention in transformers, so its scores of 4096 x 4096 are held; weights published in fewer bits are trained from bf16.
What is shown as fitting was
estimated, not run; the estimates were checked by measurement on the CPU (results/tables/memory.md).
"""


def write_table(output: str) -> None:
    check_output(f"{output}.md")
    text, rows = make_table()
    worst = max(abs(row["parameters"] / 1e9 / row["published_billions"] - 1) for row in rows)
    facts = environment()
    note = (
        f"`python scripts/estimate_memory.py --table`, {facts['date'][:10]}, torch {facts['torch']}, transformers "
        f"{facts['transformers']}"
    )
    legend = LEGEND.replace("@WORST@", f"{worst:.1%}")
    write_text(f"{output}.md", f"# Which models fit which cards\n\n{text}\n{legend}\n{note}\n")
    write_json(f"{output}.json", {"rows": rows, "environment": facts})
    print(f"wrote {output}.md and {output}.json")


def main(argv: list[str] | None = None) -> dict | None:
    args = parse_args(argv)
    if args.table:
        return write_table(args.output)
    if not args.base_model_path:
        raise ValueError("--base_model_path is missing; --table needs none")
    settings, fixed = make_settings(args)
    model = open_model(args.base_model_path)
    estimator = make_estimator(model, args.method, chosen(args, model), args.lora_rank)
    memory = estimator.estimate(settings)
    limit = int(args.gpu_gb * 2**30)
    found = estimator.advise(settings, limit, fixed)
    result = {
        "settings": dataclasses.asdict(settings),
        "memory": {**dataclasses.asdict(memory), "peak": memory.peak},
        "available": limit,
        "fits": memory.peak <= limit,
        "advice": [
            {"changes": other.changed_from(settings), "settings": dataclasses.asdict(other), "peak": needed.peak,
             "memory": dataclasses.asdict(needed)}
            for other, needed in found
        ],
        "assumptions": assumptions(settings),
    }  # fmt: skip
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{args.base_model_path}, method {args.method}, by GPU, at the peak of a step")
        print(report(settings, memory, found, args.gpu_gb))
    if not found:
        raise ValueError(
            f"nothing makes method {args.method} fit {settings.world_size} GPUs of {args.gpu_gb:g} GiB: take more or "
            "larger ones, train fewer experts, or a smaller model"
        )
    return result


if __name__ == "__main__":
    run_cli(main)
