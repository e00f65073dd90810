"""Compare the peak memory that training/memory.py estimates with that of a process that trains, on the CPU of Linux.

    python scripts/experiments/memory.py --output=results/tables/memory

Each case is a process of its own. It trains a miniature for a step, so that libraries and threads are warm, and notes
its resident set. Then it builds a random model of the case's shape and trains it for three steps, as trainer.py does
(packed documents, AdamW, a label on every token). Measured is the highest resident set less the one noted. The C
library's allocator has to give every block above 64 KiB back at once. Otherwise what it keeps for later would count.
"""

import argparse
import copy
import ctypes
import dataclasses
import gc
import json
import random
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.experts import moe_layers
from deepseek.files import check_output
from esft import ExpertConfig
from scripts.experiments.common import LIKE_V2_LITE, shape_config, write_result
from training.memory import Estimator, MemoryEstimate, MemorySettings
from training.methods import prepare_model
from utils import command_parser, markdown_table, positive, run_cli, run_command

METHODS = ("esft", "full", "lora")
IN_BF16 = (
    "In bfloat16 it does not agree on a CPU: the kernels hold memory that no tensor shows. Part of it is what oneDNN\n"
    "keeps of kernels (esft took 457 MiB with ONEDNN_PRIMITIVE_CACHE_CAPACITY=0); the rest was not tracked down."
)
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
WIDE = {  # a DeepSeek-V2 of 0.5B parameters
    **LIKE_V2_LITE,
    **{"vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048, "moe_intermediate_size": 512},
    **{"num_hidden_layers": 6, "num_attention_heads": 12, "num_key_value_heads": 12, "kv_lora_rank": 256},
    **{"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64},
}
SMALL = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 64, "num_experts_per_tok": 4}
CONFIGS = {
    "wide": ("deepseek_v2", WIDE),
    "qwen3_moe": ("qwen3_moe", {**GROUPED, "moe_intermediate_size": 256, "num_experts": 32}),
    "mixtral": ("mixtral", {**SMALL, "num_key_value_heads": 4, "intermediate_size": 1024}),
    "gpt_oss": ("gpt_oss", {**GROUPED, "intermediate_size": 512, "num_local_experts": 16,
                            "layer_types": ["full_attention"] * 4}),
}  # fmt: skip
TOKENS = {  # packs of a micro batch, and their length
    **{"tiny": (8, 256), "36m": (8, 256), "wide": (1, 2048)},
    **{"qwen3_moe": (2, 1024), "mixtral": (2, 1024), "gpt_oss": (2, 512)},
}


def case_config(shape: str) -> PreTrainedConfig:
    """Return the configuration of a named shape."""
    if shape not in CONFIGS:
        return shape_config(shape)
    family, values = CONFIGS[shape]
    return AutoConfig.for_model(family, **values)


def trained_experts(model: nn.Module, method: str) -> ExpertConfig | None:
    """Return a sixth of the experts of every MoE layer, drawn, for method esft."""
    draw, sizes = random.Random(0), {index: layer.num_experts for index, layer in moe_layers(model).items()}
    drawn = {index: tuple(sorted(draw.sample(range(size), -(-size // 6)))) for index, size in sizes.items()}
    return ExpertConfig(drawn) if method == "esft" else None


def case_settings(case: dict) -> MemorySettings:
    """Return what the memory of a case depends on."""
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
    """Return the memory of a case, as estimated."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(case_config(case["shape"]))
    experts = trained_experts(empty, case["method"])
    return Estimator(empty, case["method"], experts).estimate(case_settings(case))


# --------------------------------------------------------------------------------------------------------------------
# the process that trains


def train(config: PreTrainedConfig, settings: MemorySettings, method: str, steps: int) -> None:
    """Train a random model for some steps, as trainer.py does, on one process."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype)).train()
    model.set_experts_implementation("grouped_mm")
    model = prepare_model(model, method, trained_experts(model, method))
    if settings.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    B, T = settings.batch_size, settings.seq_length
    position_ids_BT = torch.cat([torch.arange(T // 2), torch.arange(T - T // 2)]).expand(B, T)  # two documents
    for _ in range(steps):
        for _ in range(2 if settings.accumulation else 1):
            ids_BT, kept = torch.randint(config.vocab_size, (B, T)), torch.arange(T)
            outputs = model(input_ids=ids_BT, position_ids=position_ids_BT, logits_to_keep=kept, use_cache=False)
            loss = nn.functional.cross_entropy(outputs.logits.flatten(0, 1).float(), ids_BT.flatten(), reduction="sum")
            del outputs
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _resident(key: str) -> int:
    """Return VmRSS (now) or VmHWM (highest so far) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def work(case: dict, steps: int) -> int:
    """Return the peak of a case, measured in this process, which must be a fresh one."""
    config, settings = case_config(case["shape"]), case_settings(case)
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 2, 512
    train(small, dataclasses.replace(settings, seq_length=32, batch_size=1), case["method"], 1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the miniature left in the heap
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = _resident("VmRSS")
    train(config, settings, case["method"], steps)
    return _resident("VmHWM") - before


def measure(case: dict, steps: int = 3) -> int:
    """Return the peak in bytes of a fresh process on one thread."""
    words = [__file__, "--case", json.dumps(case), f"--steps={steps}"]
    return int(run_command(words, quiet=True, env={"OMP_NUM_THREADS": "1", **MALLOC}).splitlines()[-1])


# --------------------------------------------------------------------------------------------------------------------
# all cases


def cases() -> list[dict]:
    """Return shapes, methods and checkpointing, all with all; beside these, accumulation and bf16 on one shape."""
    plain = {"accumulation": False, "dtype": "float32"}
    found = [
        {"shape": shape, "method": method, "checkpointing": on, **plain}
        for shape in TOKENS
        for method in METHODS
        for on in (False, True)
        if method != "lora" or shape in ("tiny", "36m", "qwen3_moe")
    ]
    base = {"shape": "36m", "checkpointing": True, "accumulation": True}
    return found + [{**base, "method": m, "dtype": dtype} for dtype in ("float32", "bfloat16") for m in METHODS]


def format_rows(rows: list[dict]) -> str:
    """Return the table, a line per case, and how many estimates are within 10 %."""
    head = ("shape", "tokens", "method", "dtype", "checkpointing", "accumulation", "measured (MiB)", "estimated", "off")
    lines = []
    for row in rows:
        B, T = row["tokens"]
        flags = ["yes" if row[key] else "no" for key in ("checkpointing", "accumulation")]
        sizes = [f"{row[key] / 2**20:,.0f}" for key in ("measured_bytes", "estimated_bytes")]
        lines.append((row["shape"], f"{B} x {T}", row["method"], row["dtype"], *flags, *sizes, f"{row['off']:+.1%}"))
    worst = max((row["off"] for row in rows), key=abs)
    within = sum(abs(row["off"]) <= 0.1 for row in rows)
    return f"{markdown_table(head, lines)}\n\n{within} of {len(rows)} within 10 %; the farthest is {worst:+.1%}."


def main(argv: list[str] | None = None) -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=positive, default=3, metavar="N", help="optimizer steps of a case (default: 3)")
    add("--output", default="results/tables/memory", metavar="FILE", help="of FILE.md and .json (default: %(default)s)")
    add("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case:
        print(work(json.loads(args.case), args.steps))
        return
    check_output(f"{args.output}.md")
    rows = []
    for case in cases():
        start = time.perf_counter()
        memory = estimate(case)
        seconds, measured = time.perf_counter() - start, measure(case, args.steps)
        rows.append(
            {**case, "tokens": TOKENS[case["shape"]], "measured_bytes": measured, "estimated_bytes": memory.peak}
        )
        rows[-1] |= {"off": memory.peak / measured - 1, "estimate": vars(memory), "estimate_seconds": seconds}
        print(format_rows(rows[-1:]).splitlines()[2], flush=True)
    table = format_rows(rows)
    print(table.splitlines()[-1])
    remarks = f"one thread, seed 0, {' '.join(f'{key}={value}' for key, value in MALLOC.items())}"
    write_result(args, "python scripts/experiments/memory.py", f"{table}\n{IN_BF16}", remarks, rows=rows)


if __name__ == "__main__":
    run_cli(main)
