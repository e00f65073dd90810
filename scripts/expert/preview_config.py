r"""What would a selection cost? For each score and --top_p: experts, parameters, adapter, memory and time of a step.

    python scripts/expert/preview_config.py --expert_scores_dir=results/expert_scores/law \
        --base_model_path=results/models/tiny --top_p 0.05 0.1 0.2 0.5 --budget_gb=24

The scores and the model's config suffice, no weights are read. Memory is that of scripts/estimate_memory.py: a real
step on tensors without storage. With --budget_gb, the command finds the largest top_p of each score (in steps of 0.01)
whose peak fits, and prints the command that selects it.

The time is relative to a step of full fine-tuning. It counts only the FLOPs of matrix products with weights, 2 per
weight and token:

    the forward
    the gradient of the inputs    ESFT has none below the first layer with a trained expert
    the gradient of the weights   full fine-tuning has all, ESFT those of the routed rows of its experts

So ESFT starts at about 2/3, or at 3/4 with checkpointing, where both run the forward twice. Two things are left out.
The attention scores cost both the same, and bring the ratio nearer to 1 in long documents. What moves memory, above all
the optimizer's step, favors ESFT. The time says what arithmetic is saved. It is not a measurement.
"""

import argparse
import bisect
import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.experts import moe_layers
from esft import ExpertConfig, ExpertScores, select_experts
from evaluation.selection import short_name
from scripts.expert.generate_expert_config import check_scores
from training.memory import FROZEN_BYTES, OPTIMIZERS, Estimator, MemorySettings
from training.published_models import open_model
from utils import command_parser, positive, run_cli

SWEEP = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
STEP = 0.01  # of top_p, in the search for what fits


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--expert_scores_dir", required=True, metavar="DIR", help="folder of scores, or a summary or flat JSON file")
    add("--base_model_path", "--model", required=True, metavar="MODEL", help="a folder with config.json, a hub id, or "
        "a name of configs/published.json")  # fmt: skip
    add("--top_p", type=float, nargs="+", default=list(SWEEP), metavar="P", help="sums of scores to preview, each "
        f"above 0 and up to 1 (default: {' '.join(map(str, SWEEP))})")  # fmt: skip
    add("--budget_gb", type=float, metavar="GB", help="memory of a GPU in GiB: find the largest top_p that fits")
    add("--seq_length", type=positive, default=4096, metavar="T", help="tokens of a pack (default: 4096)")
    add("--per_device_train_batch_size", "--batch_size", type=positive, default=1, metavar="N", help="packs of a "
        "micro batch (default: 1)")  # fmt: skip
    add("--one_micro_batch", action="store_true", help="a step has one micro batch (default: several, and gradients "
        "are kept between them)")  # fmt: skip
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the weights (default: bfloat16)")
    add("--activation_checkpointing", action="store_true", help="recompute activations (default: save them)")
    add("--ep_size", type=positive, default=1, metavar="N", help="GPUs that share the experts (default: 1)")
    add(
        "--frozen_dtype", choices=tuple(FROZEN_BYTES), help="dtype of the frozen experts (default: that of the weights)"
    )
    add("--offload_frozen", action="store_true", help="keep the frozen experts in host memory")
    add("--optim", choices=tuple(OPTIMIZERS), default="adamw_torch_fused", metavar="NAME", help="transformers' name "
        "(default: adamw_torch_fused)")  # fmt: skip
    add("--device", choices=("cuda", "cpu"), default="cuda", help="the device to estimate for (default: cuda)")
    add("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if any(not 0 < p <= 1 for p in args.top_p):
        raise ValueError(f"--top_p {' '.join(map(str, args.top_p))}: expected numbers above 0 and up to 1")
    if args.budget_gb is not None and not args.budget_gb > 0:
        raise ValueError(f"--budget_gb {args.budget_gb}: expected a number above 0")
    return args


def relative_time(model: nn.Module, scores: ExpertScores, config: ExpertConfig, checkpointing: bool) -> float | None:
    """Return the FLOPs of an ESFT step / a full fine-tuning step, or None if the experts per token are unknown."""
    top_k = scores.meta.get("top_k") or getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    if "token" not in scores.by_function or not top_k:
        return None
    layers = moe_layers(model)
    fused = tuple(f"{layer.name}." for layer in layers.values())
    first = min(layer for layer, ids in config.experts.items() if ids)
    looked_up = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    weights = {
        name: param.numel()
        for name, param in model.named_parameters()
        if param.ndim == 2 and not name.startswith(fused) and param is not looked_up
    }
    forward, below, trained = float(sum(weights.values())), 0.0, 0.0
    if head is not None and head.weight is looked_up:
        forward += looked_up.numel()
    for name, size in weights.items():
        number = re.search(r"\.(\d+)\.", name)
        below += size if number and int(number[1]) < first else 0
    for index, layer in layers.items():
        active = top_k * sum(layer.tensor(name)[0].numel() for name in layer.tensor_names)
        rows = sum(scores["token"][index][e] for e in config.experts.get(index, ()))  # share of the routed rows
        forward += active
        below += active if index < first else 0
        trained += active * rows
    again = forward if checkpointing else 0
    return (forward + (forward - below) + trained + again) / (3 * forward + again)


class Preview:
    """Estimates for one model and its scores."""

    def __init__(self, model: nn.Module, scores: ExpertScores, args: argparse.Namespace):
        self.model, self.scores = model, scores
        same = ("seq_length", "dtype", "ep_size", "frozen_dtype", "offload_frozen", "optim", "activation_checkpointing")
        self.settings = MemorySettings(
            **{name: getattr(args, name) for name in (*same, "device")},
            batch_size=args.per_device_train_batch_size,
            accumulation=not args.one_micro_batch,
            world_size=args.ep_size,
        )
        self.total = sum(param.numel() for param in model.parameters())
        self.each_L = {  # parameters of an expert
            index: sum(view.numel() for view in layer.expert_shapes().values())
            for index, layer in moe_layers(model).items()
        }
        self._kept: dict = {}

    def row(self, function: str, top_p: float) -> dict:
        """Return what `top_p` of a score selects, and what it costs to train."""
        config = select_experts(self.scores, score_function=function, top_p=top_p)
        key = tuple(config.experts.items())
        if key not in self._kept:
            checkpointing = self.settings.activation_checkpointing
            counts = [len(ids) for ids in config.experts.values()]
            trained = sum(len(ids) * self.each_L[layer] for layer, ids in config.experts.items())
            memory = Estimator(self.model, "esft", config).estimate(self.settings)
            self._kept[key] = {
                "experts": sum(counts),
                "experts_min": min(counts),
                "experts_max": max(counts),
                "trained_parameters": trained,
                "share": trained / self.total,
                "adapter_bytes": 2 * trained,
                "gradient_bytes": memory.gradients,
                "optimizer_bytes": memory.optimizer,
                "peak_bytes": memory.peak,
                "relative_step_time": relative_time(self.model, self.scores, config, checkpointing),
            }
        return {"score_function": function, "top_p": top_p, **self._kept[key]}

    def full_peak(self) -> int:
        """Return the peak in bytes of full fine-tuning on one device."""
        alone = dataclasses.replace(self.settings, world_size=1, ep_size=1, frozen_dtype=None, offload_frozen=False)
        return Estimator(self.model, "full").estimate(alone).peak

    def largest(self, function: str, budget: int) -> dict | None:
        """Return the row of the largest top_p, in steps of `STEP`, whose peak is within `budget` bytes, or None."""
        top_ps = [round(n * STEP, 4) for n in range(1, round(1 / STEP) + 1)]
        fitting = bisect.bisect_right(top_ps, budget, key=lambda top_p: self.row(function, top_p)["peak_bytes"])
        return self.row(function, top_ps[fitting - 1]) if fitting else None


def format_rows(rows: list[dict]) -> str:
    """Return a line per row, with memory in GiB, or in MiB if all peaks are below 1 GiB."""
    small = max(row["peak_bytes"] for row in rows) < 2**30
    unit, name = (2**20, "MiB") if small else (2**30, "GiB")
    heads = ("experts", "per layer", "parameters", "share", "adapter", "gradients", "optimizer", "peak", "step time")
    lines = [
        f"{'':>11}{'':>9}{'':>11}{'':>16}{'':>8}{f'memory in {name}':>40}{'of full':>11}",
        f"{'score':<6}{'p':>5}" + "".join(f"{head:>{w}}" for head, w in zip(heads, (9, 11, 16, 8, 10, 10, 10, 10, 11))),
    ]
    for row in rows:
        sizes = [row[key] / unit for key in ("adapter_bytes", "gradient_bytes", "optimizer_bytes", "peak_bytes")]
        time = row["relative_step_time"]
        lines.append(
            f"{row['score_function']:<6}{row['top_p']:>5g}{row['experts']:>9}"
            f"{row['experts_min']:>6} to{row['experts_max']:>3}{row['trained_parameters']:>15,}{row['share']:>8.1%}"
            + "".join(f"{size:>10,.2f}" for size in sizes)
            + (f"{time:>11.2f}" if time else f"{'-':>11}")
        )
    return "\n".join(lines)


def command(row: dict, args: argparse.Namespace, dataset: str | None) -> str:
    """Return the command that writes the config of a row."""
    name = Path(dataset).stem if dataset else short_name(args.expert_scores_dir)
    flags = {
        "expert_scores_dir": args.expert_scores_dir,
        "score_function": row["score_function"],
        "top_p": f"{row['top_p']:g}",
        "output_path": f"results/expert_configs/{name}_{row['score_function']}.json",
    }
    if Path(args.base_model_path).exists():
        flags["base_model_path"] = args.base_model_path
    script = "scripts/expert/generate_expert_config.py"
    return shlex.join(["python", script, *(f"--{key}={value}" for key, value in flags.items())])


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    scores = ExpertScores.load(args.expert_scores_dir)
    model = open_model(args.base_model_path)
    for function in scores.by_function:
        check_scores(scores, model, args.expert_scores_dir, function)
    preview = Preview(model, scores, args)
    rows = [preview.row(function, p) for function in scores.by_function for p in sorted(set(args.top_p))]
    result: dict = {"model": args.base_model_path, "expert_scores": args.expert_scores_dir, "rows": rows}
    result |= {"parameters": preview.total, "settings": vars(preview.settings), "full_peak_bytes": preview.full_peak()}
    result["budget"] = None
    if args.budget_gb:
        budget = int(args.budget_gb * 2**30)
        found = {function: preview.largest(function, budget) for function in scores.by_function}
        commands = {name: command(row, args, scores.meta.get("dataset")) for name, row in found.items() if row}
        result["budget"] = {"bytes": budget, "largest": found, "commands": commands}
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    if args.budget_gb and not any(result["budget"]["largest"].values()):
        raise ValueError(
            f"no top_p fits {args.budget_gb:g} GiB. Try --activation_checkpointing, --frozen_dtype=nf4 or a shorter "
            "--seq_length; scripts/estimate_memory.py finds what fits"
        )
    return result


def show(result: dict) -> None:
    """Print the tables."""
    settings = result["settings"]
    how = f"{settings['dtype']}, {settings['seq_length']} tokens a pack, {settings['optim']}, {settings['device']}"
    print(f"{result['model']}, {result['parameters']:,} parameters; {how}")
    print(format_rows(result["rows"]))
    full = result["full_peak_bytes"]
    print(f"full fine-tuning, on one device: a peak of {full / 2**30:,.2f} GiB in the same dtype")
    print("step time: FLOPs of matrix products, full fine-tuning is 1 (see --help)")
    if not result["budget"]:
        return
    print(f"\nlargest top_p within {result['budget']['bytes'] / 2**30:g} GiB:")
    if rows := [row for row in result["budget"]["largest"].values() if row]:
        print(format_rows(rows))
    for function, row in result["budget"]["largest"].items():
        print(f"  {result['budget']['commands'][function]}" if row else f"{function}: none fits")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_cli(main)
