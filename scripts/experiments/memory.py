"""Compare the peak memory that training/memory.py estimates with the memory of a process that trains, on a Linux CPU.

    python scripts/experiments/memory.py --output=results/tables/memory

Each case has a process of its own. The process first trains a miniature for one step. This loads libraries and starts
threads. It notes its resident set. Then it trains a random model of the case's shape for `--steps` steps, as trainer.py
does: packed documents, AdamW, a label on every token. The result is the highest resident set minus the one noted.

The allocator of the C library usually keeps freed memory, and that would count. Two environment variables make it
return every block above 64 KiB at once.
"""

import argparse
import copy
import ctypes
import gc
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.experts import moe_layers
from deepseek.files import check_output
from deepseek.loading import model_of
from esft import ExpertConfig
from scripts.experiments.common import LIKE_V2_LITE, publish, resident_bytes, shape_config
from training.memory import Estimator, MemoryEstimate, MemorySettings
from training.methods import prepare_model
from utils import command_parser, markdown_table, positive, run_cli, run_command

METHODS = ("esft", "full", "lora")
IN_BF16 = (
    "The estimate does not hold for bfloat16 on a CPU: its kernels use memory that no tensor shows. oneDNN keeps some "
    "of it (esft took 457 MiB with ONEDNN_PRIMITIVE_CACHE_CAPACITY=0). We do not know where the rest comes from."
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


def cases() -> list[dict]:
    """Return every shape with every method, with and without checkpointing; then accumulation and bf16 on one shape."""
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


def open_case(case: dict) -> tuple[PreTrainedConfig, MemorySettings]:
    """Return the configuration of a case's model, and what else its memory depends on."""
    shape = case["shape"]
    family, values = CONFIGS.get(shape, ("", {}))
    config = AutoConfig.for_model(family, **values) if family else shape_config(shape)
    settings = {key: case[key] for key in ("accumulation", "dtype")} | {
        "activation_checkpointing": case["checkpointing"]
    }
    batch_size, seq_length = TOKENS[shape]
    return config, MemorySettings(seq_length=seq_length, batch_size=batch_size, device="cpu", **settings)


def trained_experts(model: nn.Module, method: str) -> ExpertConfig | None:
    """Draw a sixth of the experts of every MoE layer, for method esft."""
    draw, sizes = random.Random(0), {index: layer.num_experts for index, layer in moe_layers(model).items()}
    drawn = {index: tuple(sorted(draw.sample(range(size), -(-size // 6)))) for index, size in sizes.items()}
    return ExpertConfig(drawn) if method == "esft" else None


def estimate(case: dict) -> MemoryEstimate:
    config, settings = open_case(case)
    empty = model_of(config)
    return Estimator(empty, case["method"], trained_experts(empty, case["method"])).estimate(settings)


def train(config: PreTrainedConfig, settings: MemorySettings, method: str, steps: int) -> None:
    """Train a random model for some steps in this process, as trainer.py does."""
    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).train()
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


def work(case: dict, steps: int) -> int:
    """Return the peak of a case in bytes, measured in this process. The process must be fresh."""
    config, settings = open_case(case)
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 2, 512
    train(small, replace(settings, seq_length=32, batch_size=1), case["method"], 1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # return what the miniature left in the heap
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
    before = resident_bytes("VmRSS")
    train(config, settings, case["method"], steps)
    return resident_bytes("VmHWM") - before


def measure(case: dict, steps: int = 3) -> int:
    """Return the peak of a case in bytes, from a fresh process on one thread."""
    words = [__file__, "--case", json.dumps(case), f"--steps={steps}"]
    return int(run_command(words, quiet=True, env={"OMP_NUM_THREADS": "1", **MALLOC}).splitlines()[-1])


def format_rows(rows: list[dict]) -> str:
    """Return the table, with one line per case, and how many estimates are within 10 %."""
    head = ("shape", "tokens", "method", "dtype", "checkpointing", "accumulation", "measured (MiB)", "estimated", "off")
    lines = []
    for row in rows:
        B, T = row["tokens"]
        flags = ["yes" if row[key] else "no" for key in ("checkpointing", "accumulation")]
        sizes = [f"{row[key] / 2**20:,.0f}" for key in ("measured_bytes", "estimated_bytes")]
        lines.append((row["shape"], f"{B} x {T}", row["method"], row["dtype"], *flags, *sizes, f"{row['off']:+.1%}"))
    worst = max((row["off"] for row in rows), key=abs)
    within = sum(abs(row["off"]) <= 0.1 for row in rows)
    return (
        f"{markdown_table(head, lines)}\n\n{within} of {len(rows)} are within 10 %. The worst is off by {worst:+.1%}."
    )


def compare(case: dict, steps: int) -> dict:
    """Estimate and measure a case, and return its row of the table."""
    start = time.perf_counter()
    found = estimate(case)
    row = {**case, "tokens": TOKENS[case["shape"]], "estimate_seconds": time.perf_counter() - start}
    row |= {"measured_bytes": measure(case, steps), "estimated_bytes": found.peak, "estimate": vars(found)}
    return {**row, "off": found.peak / row["measured_bytes"] - 1}


def main(argv: list[str] | None = None) -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=positive, default=3, metavar="N", help="optimizer steps of a case (default: 3)")
    add("--output", default="results/tables/memory", metavar="FILE", help="write FILE.md and FILE.json (default: "
        "%(default)s)")  # fmt: skip
    add("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case:
        print(work(args.case, args.steps))
        return
    check_output(f"{args.output}.md")
    rows = []
    for case in cases():
        rows.append(compare(case, args.steps))
        print(format_rows(rows[-1:]).splitlines()[2], flush=True)
    remarks = f"one thread, seed 0, {' '.join(f'{key}={value}' for key, value in MALLOC.items())}"
    publish(args, __file__, argv, f"{format_rows(rows)} {IN_BF16}", remarks, rows=rows)


if __name__ == "__main__":
    run_cli(main)
