r"""What would a selection cost? For each score and --top_p: experts, parameters, adapter, memory and time of a step.

    python scripts/expert/preview_config.py --expert_scores_dir=results/expert_scores/law \
        --base_model_path=results/models/tiny --top_p 0.05 0.1 0.2 0.5 --budget_gb=24

The scores and the model's config suffice, no weights are read. Memory is that of scripts/estimate_memory.py: a training
step on meta tensors (no memory is used). With --budget_gb, the command finds the largest top_p of each score (in steps
of 0.01) whose peak fits, and prints the command that selects it.

The time is relative to a step of full fine-tuning. It counts only the FLOPs of matrix products with weights, 2 per
weight and token:

    the forward
    the gradient of the inputs    ESFT has none below the first layer with a trained expert
    the gradient of the weights   full fine-tuning has all, ESFT those of the routed rows of its experts

So ESFT starts at about 2/3, or at 3/4 with checkpointing, where both run the forward twice. Only
arithmetic is counted, so this is an estimate. Memory traffic (mostly the optimizer step) is not counted; it would favor
ESFT further. Attention scores are not counted either; they cost both the same, which matters in long documents.
"""

import argparse
import bisect
import dataclasses
import functools
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.experts import moe_layers
from esft import ExpertConfig, ExpertScores, adapter_views, select_experts
from evaluation.selection import short_name
from scripts.expert.generate_expert_config import load_scores
from training.memory import FROZEN_BYTES, OPTIMIZERS, Estimator, MemorySettings
from training.published_models import open_model
from utils import PYTHON, ROOT, command_parser, markdown_table, positive, run_cli, size

STEP = 0.01  # of top_p, in the search for what fits


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    sweep = [0.05, 0.1, 0.15, 0.2, 0.3, 0.5]
    add("--expert_scores_dir", required=True, metavar="DIR", help="folder of scores, or a summary or flat JSON file")
    add("--base_model_path", "--model", required=True, metavar="MODEL", help="a folder with config.json, a hub id, or "
        "a name of configs/published.json")  # fmt: skip
    reach = "sums of scores to reach (default: %(default)s)"
    add("--top_p", type=float, nargs="+", default=sweep, metavar="P", help=reach)
    add("--budget_gb", type=float, metavar="GB", help="memory of a GPU in GiB: find the largest top_p that fits")
    add("--seq_length", type=positive, default=4096, metavar="N", help="tokens of a pack (default: 4096)")
    add("--per_device_train_batch_size", "--batch_size", dest="batch_size", type=positive, default=1,
        metavar="N", help="packs of a micro batch (default: 1)")  # fmt: skip
    add("--one_micro_batch", dest="accumulation", action="store_false", help="a step has one micro batch (default: "
        "several, and gradients are kept between them)")  # fmt: skip
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the weights (default: bfloat16)")
    add("--activation_checkpointing", action="store_true", help="recompute activations (default: save them)")
    add("--ep_size", type=positive, default=1, metavar="N", help="GPUs that share the experts (default: 1)")
    add("--frozen_dtype", choices=FROZEN_BYTES, help="dtype of the frozen experts (default: that of the weights)")
    add("--offload_frozen", action="store_true", help="keep the frozen experts in host memory")
    add("--optim", choices=OPTIMIZERS, default="adamw_torch_fused", metavar="NAME", help="default: %(default)s")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="the device to estimate for (default: cuda)")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def relative_time(model: nn.Module, scores: ExpertScores, config: ExpertConfig, checkpointing: bool) -> float | None:
    """Return the FLOPs of an ESFT step / a full fine-tuning step, or None if the experts per token are unknown."""
    top_k = scores.meta.get("top_k") or getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    if "token" not in scores.by_function or not top_k:
        return None
    layers, head = moe_layers(model), model.get_output_embeddings()
    fused = tuple(f"{layer.name}." for layer in layers.values())
    first = min(layer for layer, ids in config.experts.items() if ids)
    looked_up = model.get_input_embeddings().weight
    forward, below, trained = 0.0, 0.0, 0.0
    if head is not None and head.weight is looked_up:
        forward += looked_up.numel()
    for name, param in model.named_parameters():
        if param.ndim == 2 and not name.startswith(fused) and param is not looked_up:
            forward += param.numel()
            number = re.search(r"\.(\d+)\.", name)
            below += param.numel() if number and int(number[1]) < first else 0
    for index, layer in layers.items():
        active = top_k * sum(layer.tensor(name)[0].numel() for name in layer.tensor_names)
        forward += active
        below += active if index < first else 0
        # of the routed rows, those of the trained experts
        trained += active * sum(scores["token"][index][e] for e in config.experts.get(index, ()))
    again = forward if checkpointing else 0
    return (forward + (forward - below) + trained + again) / (3 * forward + again)


def preview(model: nn.Module, scores: ExpertScores, settings: MemorySettings, function: str, top_p: float) -> dict:
    """Return what `top_p` of a score selects, and what it costs to train."""
    config = select_experts(scores, score_function=function, top_p=top_p)
    counts = [len(ids) for ids in config.experts.values()]
    trained = sum(view.numel() for view in adapter_views(model, config).values())
    memory = Estimator(model, "esft", config).estimate(settings)
    return {
        "score_function": function,
        "top_p": top_p,
        "experts": sum(counts),
        "experts_min": min(counts),
        "experts_max": max(counts),
        "trained_parameters": trained,
        "share": trained / sum(param.numel() for param in model.parameters()),
        "adapter_bytes": 2 * trained,
        "gradient_bytes": memory.gradients,
        "optimizer_bytes": memory.optimizer,
        "peak_bytes": memory.peak,
        "relative_step_time": relative_time(model, scores, config, settings.activation_checkpointing),
    }


def largest(row_of: Callable[[float], dict], budget: int) -> dict | None:
    """Return the row of the largest top_p, in steps of `STEP`, whose peak is within `budget` bytes, or None."""
    top_ps = [round(n * STEP, 4) for n in range(1, round(1 / STEP) + 1)]
    fitting = bisect.bisect_right(top_ps, budget, key=lambda top_p: row_of(top_p)["peak_bytes"])
    return row_of(top_ps[fitting - 1]) if fitting else None


def format_rows(rows: list[dict]) -> str:
    """Return a line per row."""
    memory = ["adapter", "gradients", "optimizer", "peak"]
    heads = ["score", "p", "experts", "per layer", "parameters", "share", *memory]
    lines = []
    for row in rows:
        each = " to ".join(map(str, sorted({row["experts_min"], row["experts_max"]})))
        counts = [row["experts"], each, f"{row['trained_parameters']:,}"]
        sizes = [size(row[f"{what.removesuffix('s')}_bytes"]) for what in memory]
        time = row["relative_step_time"]
        start = [row["score_function"], f"{row['top_p']:g}", *counts, f"{row['share']:.1%}"]
        lines.append([*start, *sizes, f"{time:.2f}" if time else "-"])
    return markdown_table([*heads, "step time of full"], lines)


def command(row: dict, args: argparse.Namespace, dataset: str | None) -> str:
    """Return the command that writes the config of a row."""
    name, function = Path(dataset).stem if dataset else short_name(args.expert_scores_dir), row["score_function"]
    words = [f"--expert_scores_dir={args.expert_scores_dir}", f"--score_function={function}"]
    words += [f"--top_p={row['top_p']:g}", f"--output_path=results/expert_configs/{name}_{function}.json"]
    words += [f"--base_model_path={args.base_model_path}"] if Path(args.base_model_path).exists() else []
    return shlex.join([PYTHON, os.path.relpath(ROOT / "scripts" / "expert" / "generate_expert_config.py"), *words])


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    model = open_model(args.base_model_path)
    (scores,) = load_scores([args.expert_scores_dir], model)
    if args.budget_gb is not None and not 0 < args.budget_gb < math.inf:
        raise ValueError(f"cannot use --budget_gb {args.budget_gb:g}: it is not a size above 0.")
    for top_p in args.top_p:  # raises for a wrong one, before the estimates of the others
        select_experts(scores, score_function=next(iter(scores.by_function)), top_p=top_p)
    known = {field.name for field in dataclasses.fields(MemorySettings)}
    settings = MemorySettings(world_size=args.ep_size, **{k: v for k, v in vars(args).items() if k in known})
    row_of = {name: functools.partial(preview, model, scores, settings, name) for name in scores.by_function}
    alone = dataclasses.replace(settings, world_size=1, ep_size=1, frozen_dtype=None, offload_frozen=False)
    result: dict = {
        "model": args.base_model_path,
        "expert_scores": args.expert_scores_dir,
        "rows": [row(top_p) for row in row_of.values() for top_p in sorted(set(args.top_p))],
        "parameters": sum(param.numel() for param in model.parameters()),
        "settings": vars(settings),
        "full_peak_bytes": Estimator(model, "full").estimate(alone).peak,
        "budget": None,
    }
    if args.budget_gb is not None:
        budget = int(args.budget_gb * 2**30)
        found = {function: largest(row, budget) for function, row in row_of.items()}
        commands = {name: command(row, args, scores.meta.get("dataset")) for name, row in found.items() if row}
        result["budget"] = {"bytes": budget, "largest": found, "commands": commands}
    print(json.dumps(result, indent=2) if args.json else format_preview(result))
    if result["budget"] and not result["budget"]["commands"]:
        hint = "Try --activation_checkpointing or a shorter --seq_length; scripts/estimate_memory.py finds what fits."
        raise ValueError(f"cannot fit any top_p into {args.budget_gb:g} GiB. {hint}")
    return result


def format_preview(result: dict) -> str:
    """Return the tables."""
    settings, full, budget = result["settings"], size(result["full_peak_bytes"]), result["budget"]
    how = f"{settings['dtype']}, {settings['seq_length']} tokens a pack, {settings['optim']}, {settings['device']}"
    lines = [
        f"{result['model']}, {result['parameters']:,} parameters; {how}\n",
        f"{format_rows(result['rows'])}\n",
        f"full fine-tuning, on one device: a peak of {full} in the same dtype",
        "step time: FLOPs of matrix products, full fine-tuning is 1 (see --help)",
    ]
    if budget:
        lines.append(f"\nlargest top_p within {budget['bytes'] / 2**30:g} GiB:\n")
        if rows := [row for row in budget["largest"].values() if row]:
            lines.append(f"{format_rows(rows)}\n")
        lines += [budget["commands"].get(function, f"{function}: none fits") for function in budget["largest"]]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_cli(main)
