"""The peak memory that deepseek/memory.py estimates, against that of a process that trains, on the CPU.

    python scripts/experiments/memory.py --output=results/tables/memory

Each case is a process of its own: it imports all, trains a miniature for a step so that libraries and threads are
warm, notes its resident set, and then builds a random model of the case's shape and trains it for three steps, as
trainer.py does (packed documents, AdamW, a label on every token). Measured is the highest resident set less the one
noted. The C library's allocator is told to give every block above 64 KiB back at once (MALLOC_MMAP_THRESHOLD_,
MALLOC_TRIM_THRESHOLD_), as otherwise what it keeps for later would count.
"""

import argparse
import copy
import ctypes
import dataclasses
import functools
import gc
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.experts import moe_layers
from deepseek.files import check_output, write_json, write_text
from esft import ExpertConfig
from scripts.experiments.common import LIKE_V2_LITE, shape_config
from training.memory import Estimator, MemoryEstimate, MemorySettings, train_everything
from training.methods import prepare_model
from utils import ROOT, command_parser, environment, positive, run_cli

METHODS = ("esft", "full", "lora")
IN_BF16 = (
    "In bfloat16 it does not agree on a CPU: the kernels hold memory that no tensor shows. Part of it is what oneDNN\n"
    "keeps of kernels (esft took 457 MiB with ONEDNN_PRIMITIVE_CACHE_CAPACITY=0); the rest was not tracked down.\n"
)
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
WIDE = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
SMALL = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
OTHERS = {
    "qwen3_moe": {
        **SMALL,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "moe_intermediate_size": 256,
        "num_experts": 32,
        "num_experts_per_tok": 4,
    },
    "mixtral": {
        **SMALL,
        "num_key_value_heads": 4,
        "intermediate_size": 1024,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "gpt_oss": {
        **SMALL,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 512,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "layer_types": ["full_attention"] * 4,
    },
}
TOKENS = {  # packs of a micro batch, and their length
    "tiny": (8, 256),
    "36m": (8, 256),
    "wide": (1, 2048),
    "qwen3_moe": (2, 1024),
    "mixtral": (2, 1024),
    "gpt_oss": (2, 512),
}
SHAPES = tuple(TOKENS)


def case_config(shape: str) -> PreTrainedConfig:
    """The configuration of a named shape; `wide` is a DeepSeek-V2 of 0.5B parameters."""
    if shape == "wide":
        return AutoConfig.for_model("deepseek_v2", **{**LIKE_V2_LITE, **WIDE})
    return AutoConfig.for_model(shape, **OTHERS[shape]) if shape in OTHERS else shape_config(shape)


def trained_experts(config: PreTrainedConfig) -> dict[int, list[int]]:
    """A sixth of the experts of every MoE layer, drawn."""
    with torch.device("meta"):
        layers = moe_layers(AutoModelForCausalLM.from_config(config))
    draw = random.Random(0)
    return {i: sorted(draw.sample(range(layer.num_experts), -(-layer.num_experts // 6))) for i, layer in layers.items()}


def case_settings(case: dict) -> MemorySettings:
    batch_size, seq_length = TOKENS[case["shape"]]
    return MemorySettings(
        seq_length=seq_length,
        batch_size=batch_size,
        accumulation=case["accumulation"],
        activation_checkpointing=case["checkpointing"],
        dtype=case["dtype"],
        device="cpu",
    )


def estimate(case: dict) -> MemoryEstimate:
    """Memory of a case, as estimated."""
    config = case_config(case["shape"])
    if case["method"] == "esft":
        estimator = Estimator(config, trained_experts(config))
    else:
        lora = functools.partial(prepare_model, method="lora")
        estimator = Estimator(config, prepare=train_everything if case["method"] == "full" else lora)
    return estimator.estimate(case_settings(case))


# --------------------------------------------------------------------------------------------------------------------
# the process that trains


def train(config: PreTrainedConfig, settings: MemorySettings, method: str, steps: int) -> None:
    """Steps of a random model as trainer.py makes them, on one process."""
    torch.manual_seed(0)
    experts = ExpertConfig({i: tuple(ids) for i, ids in trained_experts(config).items()})
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype)).train()
    model.set_experts_implementation("grouped_mm")
    model = prepare_model(model, method, experts if method == "esft" else None)
    if settings.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    B, T = settings.batch_size, settings.seq_length
    position_ids_BT = torch.cat([torch.arange(T // 2), torch.arange(T - T // 2)]).expand(B, T)  # two documents
    for _ in range(steps):
        for _ in range(2 if settings.accumulation else 1):
            ids_BT = torch.randint(config.vocab_size, (B, T))
            kept = torch.arange(T)
            outputs = model(input_ids=ids_BT, position_ids=position_ids_BT, logits_to_keep=kept, use_cache=False)
            loss = nn.functional.cross_entropy(outputs.logits.flatten(0, 1).float(), ids_BT.flatten(), reduction="sum")
            del outputs
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _resident(key: str) -> int:
    """VmRSS (now) or VmHWM (highest so far) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def work(case: dict, steps: int) -> int:
    """The peak of a case, measured in this process, which is to be a fresh one."""
    config = case_config(case["shape"])
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 2, 512
    settings = case_settings(case)
    train(small, dataclasses.replace(settings, seq_length=32, batch_size=1), case["method"], 1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the miniature left in the heap
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = _resident("VmRSS")
    train(config, settings, case["method"], steps)
    return _resident("VmHWM") - before


def measure(case: dict, steps: int = 3) -> int:
    """Bytes, of a fresh process on one thread."""
    command = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps(case), f"--steps={steps}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **MALLOC}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if ended.returncode:
        raise ChildProcessError(f"{case} failed: {(ended.stderr.strip() or 'killed').splitlines()[-1]}")
    return int(ended.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------------------------------------
# all cases


def cases(shapes: list[str], methods: list[str]) -> list[dict]:
    """Shapes, methods and checkpointing, all with all; beside these, accumulation and bf16 on one shape."""
    found = [
        {"shape": shape, "method": method, "checkpointing": on, "accumulation": False, "dtype": "float32"}
        for shape in shapes
        for method in methods
        for on in (False, True)
        if method != "lora" or shape in ("tiny", "36m", "qwen3_moe")
    ]
    if "36m" in shapes:
        base = {"shape": "36m", "checkpointing": True, "accumulation": True, "dtype": "float32"}
        found += [{**base, "method": method} for method in methods]
        found += [{**base, "method": method, "dtype": "bfloat16"} for method in methods]
    return found


def table(rows: list[dict]) -> str:
    """Markdown, one line per case."""
    lines = [
        "| shape | tokens | method | dtype | checkpointing | accumulation | measured (MiB) | estimated | off |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        B, T = row["tokens"]
        flags = ["yes" if row[key] else "no" for key in ("checkpointing", "accumulation")]
        cells = [row["shape"], f"{B} x {T}", row["method"], row["dtype"], *flags]
        cells += [f"{row[key] / 2**20:,.0f}" for key in ("measured_bytes", "estimated_bytes")]
        lines.append("| " + " | ".join([*cells, f"{row['off']:+.1%}"]) + " |")
    worst = max(rows, key=lambda row: abs(row["off"]))
    within = sum(abs(row["off"]) <= 0.1 for row in rows)
    lines.append(f"\n{within} of {len(rows)} within 10 %; the farthest is {worst['off']:+.1%}.")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--shapes", default=",".join(SHAPES), help="comma-separated (default: %(default)s)")
    add("--methods", default=",".join(METHODS), help="comma-separated (default: %(default)s)")
    add("--steps", type=positive, default=3, metavar="N", help="optimizer steps of a case (default: 3)")
    add("--output", metavar="FILE", help="writes FILE.md and FILE.json (default: prints only)")
    add("--case", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict] | None:
    args = parse_args(argv)
    if args.case:
        print(work(json.loads(args.case), args.steps))
        return None
    for given, known in ((args.shapes, SHAPES), (args.methods, METHODS)):
        for name in given.split(","):
            if name not in known:
                raise ValueError(f"{name!r} is unknown: give some of {', '.join(known)}")
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("the highest resident set can be reset on Linux only: run this there")
    if args.output:
        check_output(f"{args.output}.md")
    rows = []
    for case in cases(args.shapes.split(","), args.methods.split(",")):
        start = time.perf_counter()
        memory = estimate(case)
        seconds, measured = time.perf_counter() - start, measure(case, args.steps)
        B, T = TOKENS[case["shape"]]
        rows.append({**case, "tokens": [B, T], "measured_bytes": measured, "estimated_bytes": memory.peak})
        rows[-1] |= {"off": memory.peak / measured - 1, "estimate": vars(memory), "estimate_seconds": seconds}
        print(table(rows[-1:]).splitlines()[2], flush=True)
    text = table(rows)
    print(text.splitlines()[-1])
    if args.output:
        facts = environment()
        note = (
            f"`python scripts/experiments/memory.py`, {facts['date'][:10]}, {facts['device']}, torch {facts['torch']}, "
            f"transformers {facts['transformers']}, one thread, seed 0, "
            f"{' '.join(f'{k}={v}' for k, v in MALLOC.items())}"
        )
        bf16 = IN_BF16 if any(row["dtype"] == "bfloat16" and abs(row["off"]) > 0.1 for row in rows) else ""
        write_text(f"{args.output}.md", f"{text}\n{bf16}\n{note}\n")
        write_json(f"{args.output}.json", {"rows": rows, "arguments": vars(args), "environment": facts})
    return rows


if __name__ == "__main__":
    run_cli(main)
