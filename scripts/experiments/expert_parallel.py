"""What expert parallelism saves and costs: bytes read, peak memory and step time of a rank for every ep_size.

    python scripts/experiments/expert_parallel.py --processes=4 --output=results/tables/expert_parallel

A random DeepSeek-V2 whose weights are almost all routed experts is written to a temporary folder, and trained for some
steps by `torchrun train_ep.py` with each ep_size that divides the processes, in turns. Read and peak memory are those
of the rank that has most; memory on a CPU is the resident set, with Python, libraries and mapped pages of the files.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.files import check_output, write_json, write_text
from utils import ROOT, command_parser, environment, positive, run_cli

TINY = ROOT / "results" / "models" / "tiny"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--processes", type=positive, default=4, metavar="N", help="of every run; GPUs where there are so many "
        "(default: 4)")  # fmt: skip
    add("--rounds", type=positive, default=3, metavar="N", help="runs of each ep_size, in turns (default: 3)")
    add("--steps", type=positive, default=6, metavar="N", help="optimizer steps of a run (default: 6)")
    add("--layers", type=positive, default=7, metavar="N", help="decoder layers, the first one dense (default: 7)")
    add("--hidden", type=positive, default=512, metavar="N", help="hidden size, and that of an expert (default: 512)")
    add("--n_trained", type=positive, default=8, metavar="N", help="trained experts of 64 per layer (default: 8)")
    add("--seed", type=int, default=0, metavar="N", help="of weights, experts and data order (default: 0)")
    add("--output", metavar="FILE", help="writes FILE.md and FILE.json (default: prints only)")
    return parser.parse_args(argv)


def write_model(folder: Path, args: argparse.Namespace) -> int:
    """The model, tokenizer and expert config of all runs; returns the bytes of the model's tensors."""
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = DeepseekV2ForCausalLM(
        DeepseekV2Config(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden,
            intermediate_size=args.hidden,
            moe_intermediate_size=args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=None,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            first_k_dense_replace=1,
            n_routed_experts=64,
            n_shared_experts=1,
            num_experts_per_tok=6,
            n_group=1,
            topk_group=1,
        )
    )
    model.save_pretrained(folder, max_shard_size="200MB")
    tokenizer.save_pretrained(folder)
    generator = random.Random(args.seed)
    experts = {str(layer): generator.sample(range(64), args.n_trained) for layer in range(1, args.layers)}
    write_json(folder / "experts.json", {"experts": experts, "shared_experts": False, "non_expert_modules": False})
    return sum(parameter.nbytes for parameter in model.parameters())


def train(folder: Path, ep_size: int, args: argparse.Namespace) -> dict:
    """One run; its results as run.json has them."""
    run = folder / f"run-{ep_size}"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"),
        *("train_ep.py", f"--base_model_path={folder}", "--train_dataset=law", f"--output_dir={run}"),
        *(f"--expert_config={folder / 'experts.json'}", f"ep_size={ep_size}", f"max_steps={args.steps}"),
        *("seq_length=256", "per_device_train_batch_size=2", "learning_rate=1e-4", f"seed={args.seed}"),
        *("validation_fraction=0", "overwrite=true", "disable_tqdm=true"),
        f"device={'cuda' if torch.cuda.device_count() >= args.processes else 'cpu'}",
    ]
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.processes)), **os.environ}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if ended.returncode:
        errors = [line for line in ended.stderr.splitlines() if "rror" in line] or [ended.stderr[-500:]]
        raise ChildProcessError(f"training with ep_size={ep_size} failed: {errors[0]}")
    return json.loads((run / "run.json").read_text(encoding="utf-8"))["results"]


def table(rows: list[dict]) -> str:
    """Markdown, one line per ep_size."""
    lines = ["| ep_size | replicas | read | peak memory | step (s) | of ep_size 1 |", "|---|---|---|---|---|---|"]
    for row in rows:
        low, high = min(row["ratios"]), max(row["ratios"])
        lines.append(
            f"| {row['ep_size']} | {row['replicas']} | {row['read_bytes'] / 2**20:,.0f} MiB | "
            f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB | {statistics.median(row['step_seconds']):.2f} | "
            f"{statistics.median(row['ratios']):.2f} [{low:.2f}, {high:.2f}] |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict]:
    args = parse_args(argv)
    if args.n_trained > 64:
        raise ValueError(f"--n_trained {args.n_trained}: a layer has 64 experts")
    if args.output:
        check_output(f"{args.output}.md")
    sizes = [size for size in range(1, args.processes + 1) if args.processes % size == 0 and size <= 64]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = write_model(folder, args)
        results: dict[int, list[dict]] = {size: [] for size in sizes}
        for number in range(args.rounds):
            for size in sizes:
                results[size].append(train(folder, size, args))
                print(f"round {number + 1} of {args.rounds}, ep_size {size}: {results[size][-1]['step_seconds']:.2f} s")
    rows = [
        {
            "ep_size": size,
            "replicas": args.processes // size,
            "read_bytes": runs[0]["read_bytes"] or whole,  # which transformers reads, and does not count
            "peak_memory_bytes": statistics.median(run["peak_memory_bytes"] for run in runs),
            "step_seconds": [run["step_seconds"] for run in runs],
            "ratios": [run["step_seconds"] / first["step_seconds"] for run, first in zip(runs, results[sizes[0]])],
        }
        for size, runs in results.items()
    ]
    text = table(rows)
    print(text)
    if args.output:
        command = f"python scripts/experiments/expert_parallel.py --processes={args.processes}"
        facts = environment()
        note = f"`{command}`, {facts['date'][:10]}, {facts['device']}, torch {facts['torch']}, seed {args.seed}"
        write_text(f"{args.output}.md", f"{text}\n\n{note}\n")
        write_json(f"{args.output}.json", {"rows": rows, "arguments": vars(args), "environment": facts})
    return rows


if __name__ == "__main__":
    run_cli(main)
