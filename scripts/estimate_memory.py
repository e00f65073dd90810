r"""Estimate whether a training run fits its GPUs, and what makes it fit. This takes no weights and no GPU.

    python scripts/estimate_memory.py --base_model_path=deepseek-ai/DeepSeek-V2-Lite --gpus 8 --gpu_gb 80 \
        --expert_config=results/expert_configs/law.json --seq_length 4096

The command builds the model from its config and runs a training step on meta tensors (no memory is used;
training/dry_run.py). It prints what is on the fullest GPU at the peak of a step, by kind. If it does not fit, it tries
these changes one by one and then in combination, cheapest first:

    activation_checkpointing -> more ep_size -> shard_dense -> frozen_dtype fp8 -> nf4 -> an 8-bit optimizer
    -> offload_frozen -> a shorter seq_length

The exit code is 0 if something fits, and 2 if nothing does. --table does the same for the models of
configs/published.json on cards of 24 to 141 GB, and writes results/benchmarks/fits.md and .json. --base_model_path
takes the names of these models, too.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.experts import moe_layers
from deepseek.files import check_output, write_json, write_text
from deepseek.loading import model_of
from esft import ExpertConfig
from training.keys import LORA_SELECTED, ON_EXPERTS
from training.memory import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    FROZEN_BYTES,
    OPTIMIZERS,
    Estimator,
    MemoryEstimate,
    MemorySettings,
)
from training.published_models import open_model, published_models
from utils import command_parser, counted, environment, markdown_table, positive, run_cli, size

GIB = 2**30
COLUMNS = [(gpus, card) for gpus in (1, 8) for card in (24, 48, 80, 141)]  # of the table
SHARE = 10 / 64  # of the experts of a layer: the most that the paper's settings select in DeepSeek-V2-Lite
SHORT = {  # settings as the table writes them
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
    what.add_argument("--table", action="store_true", help="make the table of the published models; see above")
    experts = parser.add_mutually_exclusive_group()
    experts.add_argument("--expert_config", metavar="FILE", help="the experts to train, from generate_expert_config.py")
    experts.add_argument("--experts_per_layer", type=positive, metavar="N", help="train N experts of every layer")
    add = parser.add_argument
    add("--method", choices=("esft", "dpo", "full", "lora"), default="esft", help="what is trained (default: esft)")
    add(
        "--gpus",
        dest="world_size",
        type=positive,
        default=1,
        metavar="N",
        help="processes, with a GPU each (default: 1)",
    )
    add("--gpu_gb", type=float, default=80, metavar="GB", help="memory of a GPU in GiB (default: 80)")
    add("--seq_length", type=positive, default=4096, metavar="T", help="tokens of a pack (default: 4096)")
    add("--per_device_train_batch_size", "--batch_size", dest="batch_size", type=positive, default=1, metavar="N",
        help="packs of a micro batch (default: 1)")  # fmt: skip
    add("--global_batch_size", type=positive, default=32, metavar="N", help="packs of an optimizer step; if the GPUs "
        "do not take them at once, gradients are kept between micro batches (default: 32)")  # fmt: skip
    add("--label_share", type=float, default=1.0, metavar="P", help="share of the tokens that have a loss; only these "
        "have logits (default: 1)")  # fmt: skip
    add("--one_document", action="store_true", help="a pack is one document, and attention needs no mask")
    add("--ep_size", type=positive_or_auto, default="auto", metavar="N", help="GPUs that share one copy of the experts "
        "(default: auto, as few as fit)")  # fmt: skip
    add("--shard_dense", action="store_true", help="share out the weights outside the experts, too")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the weights (default: bfloat16)")
    add("--frozen_dtype", choices=FROZEN_BYTES, help="dtype of the frozen experts (default: that of the weights)")
    add("--offload_frozen", action="store_true", help="keep the frozen experts in host memory")
    add("--optim", choices=OPTIMIZERS, default="adamw_torch_fused", metavar="NAME", help="transformers' name "
        "(default: %(default)s); known: " + ", ".join(OPTIMIZERS))  # fmt: skip
    add("--activation_checkpointing", choices=("auto", "true", "false"), default="auto", help="recompute activations "
        "(default: auto, only if it is needed)")  # fmt: skip
    add("--lora_rank", type=positive, default=8, metavar="R", help="the rank of method lora (default: 8)")
    add("--lora_experts", choices=("all", "selected"), default="all", help="method lora: on all layers, or on the "
        "experts of --expert_config or --experts_per_layer alone (default: all)")  # fmt: skip
    add("--device", choices=("cuda", "cpu"), default="cuda", help="the device to estimate for (default: cuda)")
    add("--json", action="store_true", help="print JSON")
    add("--output", default="results/benchmarks/fits", metavar="FILE", help="--table writes FILE.md and FILE.json "
        "(default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    if not (args.gpu_gb > 0 and 0 < args.label_share <= 1):
        parser.error("--gpu_gb must be above 0, and --label_share above 0 and at most 1")
    if (args.method, args.lora_experts) == ("lora", "selected"):
        args.method = LORA_SELECTED
    on_experts = args.method in ON_EXPERTS
    if args.base_model_path and on_experts and not (args.expert_config or args.experts_per_layer):
        parser.error(f"method {args.method} needs --expert_config or --experts_per_layer")
    if not on_experts and (args.expert_config or args.experts_per_layer):
        parser.error(f"--expert_config and --experts_per_layer are for methods esft and dpo, not {args.method}")
    shared = args.ep_size not in (1, "auto") or args.shard_dense
    if not on_experts and (shared or args.frozen_dtype or args.offload_frozen):
        parser.error("--ep_size, --shard_dense, --frozen_dtype and --offload_frozen are for methods esft and dpo")
    if args.ep_size != "auto" and args.world_size % args.ep_size:
        parser.error(f"--ep_size {args.ep_size} does not divide --gpus {args.world_size}")
    return args


# ---------------------------------------------------------------------------------------------------------- one model


def first_experts(model: nn.Module, count: int | None = None) -> ExpertConfig:
    """Return a config of `count` experts of every MoE layer (default: the share `SHARE`)."""
    sizes = {index: layer.num_experts for index, layer in moe_layers(model).items()}
    return ExpertConfig({index: tuple(range(count or max(1, round(SHARE * n)))) for index, n in sizes.items()})


def make_settings(args: argparse.Namespace) -> MemorySettings:
    same = {field.name: getattr(args, field.name) for field in dataclasses.fields(MemorySettings) if field.name in args}
    return MemorySettings(**{
        **same,
        "packed": not args.one_document,
        "accumulation": args.global_batch_size > args.world_size * args.batch_size,
        "ep_size": 1 if args.ep_size == "auto" else args.ep_size,
        "activation_checkpointing": args.activation_checkpointing == "true",
    })  # fmt: skip


def assumptions(settings: MemorySettings) -> list[str]:
    """Return what the figures assume."""
    told = [
        "routed rows are spread evenly over experts and ranks, and trained experts over ranks",
        f"{settings.label_share:.0%} of the tokens have logits",
        "gradients are kept between micro batches" if settings.accumulation else "a step has one micro batch",
    ]
    if settings.device == "cuda":
        told.append(
            f"the device takes {CONTEXT_BYTES / GIB:g} GiB (context, workspaces) and {FRAGMENTATION:.0%} of what is in "
            "use (fragmentation): a rule of thumb"
        )
    elif settings.dtype == "bfloat16":
        told.append("the bfloat16 kernels of a CPU take memory that is not counted, and it can be the largest part")
    return told


def format_report(settings: MemorySettings, memory: MemoryEstimate, limit: int, advice: list) -> str:
    """Return the kinds of memory, whether they fit into `limit` bytes, and the settings that fit, as text."""
    fits = memory.peak <= limit
    checkpointing = str(settings.activation_checkpointing).lower()
    gpus = counted(settings.world_size, "GPU")
    lines = [f"  {kind:<20}{part:>14}" for kind, part in memory.sizes().items()]
    lines.append(
        f"{'fits' if fits else 'does not fit'}: {size(memory.peak)} of {limit / GIB:g} GiB on each of {gpus} "
        f"with ep_size={settings.ep_size} activation_checkpointing={checkpointing}"
    )
    if advice and not fits:
        lines.append("what fits:")
        for other, needed in advice:
            host = f", {size(needed.host)} in host memory per process" if needed.host else ""
            lines.append(f"  {size(needed.peak):>12}  {other.changed_from(settings)}{host}")
    return "\n".join([*lines, *(f"note: {note}" for note in assumptions(settings))])


# ---------------------------------------------------------------------------------------------------------- the table


def make_table() -> tuple[str, list[dict]]:
    """Return the table of the published models as Markdown, and its rows as results."""
    lines, rows = [], []
    for name, (config, billions) in published_models().items():
        model = model_of(config)
        count = sum(param.numel() for param in model.parameters())
        for method, dtype in (("full", "float32"), ("full", "bfloat16"), ("lora", "bfloat16"), ("esft", "bfloat16")):
            estimator, cells = Estimator(model, method, first_experts(model) if method == "esft" else None), []
            for gpus, card in COLUMNS:
                asked = MemorySettings(world_size=gpus, dtype=dtype)
                found = estimator.advise(asked, card * GIB)
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
    return f"{changes} ({cell['peak_bytes'] / GIB:.0f})"


LEGEND = f"""
A cell is `fits` if the settings of configs/base.yaml fit: 4096 tokens a pack, one pack at a time, gradients kept
between micro batches, a label on every token. Otherwise it names the least costly change that fits, or `-` if nothing
fits. The number is the peak of a GPU in GiB. ckpt is `activation_checkpointing=true`, ep8 `ep_size=8`, dense
`shard_dense=true`, fp8 and nf4 `frozen_dtype=`, 8bit `optim=adamw_bnb_8bit`, host `offload_frozen=true`, T2048
`seq_length=2048`. A card of 80 GB counts as 80 GiB. The device takes {CONTEXT_BYTES / GIB:g} GiB and
{FRAGMENTATION:.0%} of what is in use (a rule of thumb).

esft trains {SHARE:.1%} of the experts of every layer: 10 of 64, the most that the paper's settings select. lora has
rank 8. Both are in bf16. full is in fp32, and in bf16, which rounds small updates away. train.py shards neither full
nor lora, so more GPUs do not help them. nf4 and 8bit need bitsandbytes. The parameters are counted on the models that
the configs make. They differ from the makers' figures by at most @WORST@. GPT-OSS has no fused attention in
transformers, so its scores of 4096 x 4096 are held. Weights published in fewer bits are trained from bf16. All this
was estimated, not run. The estimates were checked by measurement on the CPU (results/tables/memory.md).
"""


def write_table(output: str) -> None:
    for suffix in (".md", ".json"):
        check_output(f"{output}{suffix}")
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
    settings, model, limit = make_settings(args), open_model(args.base_model_path), int(args.gpu_gb * GIB)
    experts = ExpertConfig.load(args.expert_config) if args.expert_config else None
    if args.experts_per_layer:
        experts = first_experts(model, args.experts_per_layer)
    estimator = Estimator(model, args.method, experts, args.lora_rank)
    memory = estimator.estimate(settings)
    fixed = [key for key in ("ep_size", "activation_checkpointing") if getattr(args, key) != "auto"]
    advice = estimator.advise(settings, limit, fixed)
    result = {
        "settings": vars(settings),
        "memory": {**vars(memory), "peak": memory.peak},
        "available": limit,
        "fits": memory.peak <= limit,
        "advice": [
            {"changes": other.changed_from(settings), "settings": vars(other), "peak": needed.peak,
             "memory": vars(needed)}
            for other, needed in advice
        ],
        "assumptions": assumptions(settings),
    }  # fmt: skip
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{args.base_model_path}, method {args.method}: memory of a GPU at the peak of a step")
        print(format_report(settings, memory, limit, advice))
    if not advice:
        raise ValueError(
            f"cannot fit method {args.method} into {counted(args.world_size, 'GPU')} of {args.gpu_gb:g} GiB. Take "
            "more or larger GPUs, fewer experts, or a smaller model."
        )
    return result


if __name__ == "__main__":
    run_cli(main)
