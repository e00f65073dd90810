r"""Does a training run fit, and what makes it fit? From a model's config alone: no weights, and no GPU.

    python scripts/estimate_memory.py --base_model_path=deepseek-ai/DeepSeek-V2-Lite --gpus 8 --gpu_gb 80 \
        --expert_config=results/expert_configs/law.json --seq_length 4096

A micro batch goes through the model without storage (training/dry_run.py). The command shows what the GPU that has most
holds at its peak, by kind. If that does not fit, it looks for settings that do, in the order of what they cost in time
or quality:

    activation_checkpointing -> more ep_size -> shard_dense -> frozen_dtype fp8 -> nf4 -> an 8-bit optimizer
    -> offload_frozen -> a shorter seq_length

It tries each of these alone, then as many together as it takes. The exit code is 0 if something fits, else 2. --table
does this for the published models of configs/published.json and cards of 24 to 141 GB, and writes
results/benchmarks/fits.md and .json. --base_model_path understands the names of these models, too.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.experts import moe_layers
from deepseek.files import check_output, write_json, write_text
from deepseek.loading import auto_class
from esft import ExpertConfig
from training.memory import CONTEXT_BYTES, FRAGMENTATION, FROZEN_BYTES, OPTIMIZERS, Estimator, MemorySettings
from training.published_models import open_model, published_models
from utils import command_parser, environment, markdown_table, positive, run_cli

METHODS = ("esft", "full", "lora")
COLUMNS = [(gpus, card) for gpus in (1, 8) for card in (24, 48, 80, 141)]  # of the table
SHARE = 10 / 64  # of the experts of a layer: the upper end of what the paper's settings choose of DeepSeek-V2-Lite
SHORT = {  # of settings, for a cell of the table
    **{"activation_checkpointing=true": "ckpt", "shard_dense=true": "dense", "offload_frozen=true": "host"},
    **{"optim=adamw_bnb_8bit": "8bit", "frozen_dtype=": "", "ep_size=": "ep", "seq_length=": "T", "as asked": "fits"},
}


def positive_or_auto(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--base_model_path", "--model", metavar="MODEL", help="a folder with config.json, a hub id, or a "
                      "name of configs/published.json")  # fmt: skip
    what.add_argument("--table", action="store_true", help="of the published models, cards and methods; see above")
    experts = parser.add_mutually_exclusive_group()
    experts.add_argument("--expert_config", metavar="FILE", help="the experts to train, from generate_expert_config.py")
    experts.add_argument("--experts_per_layer", type=positive, metavar="N", help="instead: N experts of every layer")
    add = parser.add_argument
    add("--method", choices=METHODS, default="esft", help="what is trained (default: %(default)s)")
    add("--gpus", type=positive, default=1, metavar="N", help="processes, a GPU each (default: 1)")
    add("--gpu_gb", type=float, default=80, metavar="GB", help="memory of each, GiB (default: 80)")
    add("--seq_length", type=positive, default=4096, metavar="T", help="tokens of a pack (default: 4096)")
    add("--per_device_train_batch_size", "--batch_size", dest="batch_size", type=positive, default=1, metavar="N",
        help="packs of a micro batch (default: 1)")  # fmt: skip
    add("--global_batch_size", type=positive, default=32, metavar="N", help="packs of an optimizer step: with more "
        "than the GPUs take at once, gradients are kept between micro batches (default: 32)")  # fmt: skip
    add("--label_share", type=float, default=1.0, metavar="P", help="share of tokens that bear a loss, for which alone "
        "there are logits (default: 1, the most)")  # fmt: skip
    add("--one_document", action="store_true", help="a pack is one document, so attention needs no mask")
    add("--ep_size", type=positive_or_auto, default="auto", metavar="N", help="GPUs that share the experts of a "
        "replica (default: auto, as few as fit)")  # fmt: skip
    add("--shard_dense", action="store_true", help="share out the weights outside the experts, too")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights (default: %(default)s)")
    add("--frozen_dtype", choices=tuple(FROZEN_BYTES), help="of frozen experts (default: that of the weights)")
    add("--offload_frozen", action="store_true", help="frozen experts in host memory")
    add("--optim", choices=tuple(OPTIMIZERS), default="adamw_torch_fused", metavar="NAME", help="transformers' name "
        "(default: %(default)s); known: " + ", ".join(OPTIMIZERS))  # fmt: skip
    add("--activation_checkpointing", choices=("auto", "true", "false"), default="auto", help="recompute activations "
        "(default: auto, only where it is needed)")  # fmt: skip
    add("--lora_rank", type=positive, default=8, metavar="R", help="of method lora (default: 8)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="whose code paths and overhead (default: cuda)")
    add("--json", action="store_true", help="print JSON")
    add("--output", default="results/benchmarks/fits", metavar="FILE", help="of --table: writes FILE.md and FILE.json "
        "(default: %(default)s)")  # fmt: skip
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------------------------
# one model


def first_experts(model: nn.Module, count: int | None = None) -> ExpertConfig:
    """Return `count` experts of every MoE layer (default: `SHARE` of them)."""
    sizes = {index: layer.num_experts for index, layer in moe_layers(model).items()}
    return ExpertConfig({index: tuple(range(count or max(1, round(SHARE * n)))) for index, n in sizes.items()})


def chosen(args: argparse.Namespace, model: nn.Module) -> ExpertConfig | None:
    if bool(args.expert_config or args.experts_per_layer) != (args.method == "esft"):
        raise ValueError("cannot choose experts: method esft alone needs --expert_config or --experts_per_layer")
    if args.expert_config:
        return ExpertConfig.load(args.expert_config)
    return first_experts(model, args.experts_per_layer) if args.experts_per_layer else None


def make_settings(args: argparse.Namespace) -> MemorySettings:
    if not (args.gpu_gb > 0 and 0 < args.label_share <= 1):
        raise ValueError("cannot estimate: --gpu_gb must be above 0, and --label_share above 0 and up to 1")
    same = (
        "seq_length",
        "batch_size",
        "label_share",
        "dtype",
        "shard_dense",
        "frozen_dtype",
        "offload_frozen",
        "optim",
    )
    return MemorySettings(
        **{key: getattr(args, key) for key in (*same, "device")},
        packed=not args.one_document,
        accumulation=args.global_batch_size > args.gpus * args.batch_size,
        world_size=args.gpus,
        ep_size=1 if args.ep_size == "auto" else args.ep_size,
        activation_checkpointing=args.activation_checkpointing == "true",
    )


def assumptions(settings: MemorySettings) -> list[str]:
    """Return what the figures rest on, beside the code that trains."""
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


def format_report(result: dict, sizes: dict[str, str]) -> str:
    """Return all that there is to say of one model."""
    settings, peak, gib = result["settings"], result["memory"]["peak"], 2**30
    lines = [f"  {kind:<20}{size:>14}" for kind, size in sizes.items()]
    how = f"ep_size={settings['ep_size']} activation_checkpointing={str(settings['activation_checkpointing']).lower()}"
    needed = (
        f"{peak / gib:,.1f} of {result['available'] / gib:g} GiB on each of {settings['world_size']} GPUs with {how}"
    )
    lines.append(f"{'fits' if result['fits'] else 'does not fit'}: {needed}")
    if not result["fits"] and result["advice"]:
        lines.append("what fits:")
        for one in result["advice"]:
            host = one["memory"]["host"]
            extra = f", {host / gib:,.1f} GiB in host memory per process" if host else ""
            lines.append(f"  {one['peak'] / gib:>8,.1f} GiB  {one['changes']}{extra}")
    return "\n".join([*lines, *(f"note: {note}" for note in result["assumptions"])])


# --------------------------------------------------------------------------------------------------------------------
# the table


def make_table() -> tuple[str, list[dict]]:
    """Return the table of the published models, and its rows as results."""
    lines, rows = [], []
    for name, (config, billions) in published_models().items():
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
        count = sum(param.numel() for param in model.parameters())
        for method, dtype in (("full", "float32"), ("full", "bfloat16"), ("lora", "bfloat16"), ("esft", "bfloat16")):
            estimator, cells = Estimator(model, method, first_experts(model) if method == "esft" else None), []
            for gpus, card in COLUMNS:
                asked = MemorySettings(world_size=gpus, dtype=dtype)
                found = estimator.advise(asked, card * 2**30)
                cells.append({"gpus": gpus, "gpu_gb": card, "fits": bool(found)})
                for settings, memory in found[:1]:
                    changes = settings.changed_from(asked)
                    cells[-1] |= {"changes": changes, "peak_bytes": memory.peak, "memory": vars(memory)}
            as_is = {n: estimator.estimate(MemorySettings(world_size=n, dtype=dtype)).peak for n, _ in COLUMNS}
            rows.append({"model": name, "parameters": count, "published_billions": billions, "method": method,
                         "dtype": dtype, "peak_bytes_as_is": as_is, "cells": cells})  # fmt: skip
            told = f"{method}, fp32" if dtype == "float32" else method
            lines.append((name, f"{count / 1e9:.2f}B", told, *map(format_cell, cells)))
            print(*lines[-1], sep=" | ", flush=True)
    return markdown_table(("model", "parameters", "method", *(f"{n} x {card} GB" for n, card in COLUMNS)), lines), rows


def format_cell(cell: dict) -> str:
    if not cell["fits"]:
        return "-"
    changes = cell["changes"]
    for long, brief in SHORT.items():
        changes = changes.replace(long, brief)
    return f"{changes} ({cell['peak_bytes'] / 2**30:.0f})"


LEGEND = f"""
Each cell says `fits` with the settings of configs/base.yaml (4096 tokens a pack, one pack at a time, gradients kept
between micro batches, a label on every token), or the least that makes it fit, and the GiB of a GPU's peak. With `-`
nothing fits. ckpt is `activation_checkpointing=true`, ep8 `ep_size=8`, dense `shard_dense=true`, fp8 and nf4
`frozen_dtype=`, 8bit `optim=adamw_bnb_8bit`, host `offload_frozen=true`, T2048 `seq_length=2048`. A card of 80 GB
counts as 80 GiB; {CONTEXT_BYTES / 2**30:g} GiB and {FRAGMENTATION:.0%} go to the device (a rule of thumb).

esft trains {SHARE:.1%} of the experts of every layer (10 of 64, the upper end of what the paper's settings choose).
lora has rank 8. Both are in bf16. full is in fp32, and in plain bf16, which rounds small updates away. train.py
shards neither full nor lora, so more GPUs do not help them. nf4 and 8bit need bitsandbytes. The parameters are
counted on the models that the configs make, and agree with what the makers give (deviation at most @WORST@). GPT-OSS
has no fused attention in transformers, so its scores of 4096 x 4096 are held. Weights published in fewer bits are
trained from bf16. All this was estimated, not run. The estimates were checked by measurement on the CPU
(results/tables/memory.md).
"""


def write_table(output: str) -> None:
    check_output(f"{output}.md")
    text, rows = make_table()
    worst = max(abs(row["parameters"] / 1e9 / row["published_billions"] - 1) for row in rows)
    facts = environment()
    made = f"{facts['date'][:10]}, torch {facts['torch']}, transformers {facts['transformers']}"
    legend = LEGEND.replace("@WORST@", f"{worst:.1%}") + f"\n`python scripts/estimate_memory.py --table`, {made}"
    write_text(f"{output}.md", f"# Which models fit which cards\n\n{text}\n{legend}\n")
    write_json(f"{output}.json", {"rows": rows, "environment": facts})
    print(f"wrote {output}.md and {output}.json")


def main(argv: list[str] | None = None) -> dict | None:
    args = parse_args(argv)
    if args.table:
        return write_table(args.output)
    settings, model = make_settings(args), open_model(args.base_model_path)
    estimator = Estimator(model, args.method, chosen(args, model), args.lora_rank)
    memory, limit = estimator.estimate(settings), int(args.gpu_gb * 2**30)
    fixed = [key for key in ("ep_size", "activation_checkpointing") if getattr(args, key) != "auto"]
    found = estimator.advise(settings, limit, fixed)
    result = {
        "settings": vars(settings),
        "memory": {**vars(memory), "peak": memory.peak},
        "available": limit,
        "fits": memory.peak <= limit,
        "advice": [
            {"changes": other.changed_from(settings), "settings": vars(other), "peak": needed.peak,
             "memory": vars(needed)}
            for other, needed in found
        ],
        "assumptions": assumptions(settings),
    }  # fmt: skip
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{args.base_model_path}, method {args.method}, by GPU, at the peak of a step")
        print(format_report(result, memory.sizes()))
    if not found:
        raise ValueError(
            f"nothing makes method {args.method} fit {settings.world_size} GPUs of {args.gpu_gb:g} GiB: take more or "
            "larger ones, train fewer experts, or a smaller model"
        )
    return result


if __name__ == "__main__":
    run_cli(main)
