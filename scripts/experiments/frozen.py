"""What it costs, and saves, to store the frozen experts as fp8, int8 or nf4: validation loss and memory.

    python scripts/experiments/frozen.py --output=results/tables/frozen

Loss: results/models/tiny is trained on a task by `train.py`, experts by token scores, once per dtype and seed; the seed
draws the order of the data. Memory: a random DeepSeek-V2 of 317M parameters, nearly all in experts, for a few steps;
peak memory on a CPU is the resident set, with Python, libraries (some 450 MiB) and mapped pages of the files.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.files import check_output, write_json, write_text
from deepseek.frozen import DTYPES
from scripts.experiments.expert_parallel import write_model
from utils import ROOT, command_parser, environment, positive, run_cli

TINY = ROOT / "results" / "models" / "tiny"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--train_dataset", default="law", metavar="NAME", help="the task (default: law)")
    add("--steps", type=positive, default=450, metavar="N", help="optimizer steps of a run on it (default: 450)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="a run for each (default: 0 1 2)")
    add("--output", metavar="FILE", help="writes FILE.md and FILE.json (default: prints only)")
    return parser.parse_args(argv)


def run(*words: object) -> None:
    ended = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise ChildProcessError(f"{words[0]} failed: {(ended.stderr.strip().splitlines() or ['without a word'])[-1]}")


def train(out: Path, *keys: object) -> dict:
    run("train.py", f"--output_dir={out}", "overwrite=true", "disable_tqdm=true", "save_strategy=no", *keys)
    return json.loads((out / "run.json").read_text(encoding="utf-8"))["results"]


def losses(folder: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Validation loss by dtype, one per seed."""
    common = f"--base_model_path={TINY}", f"--eval_dataset={args.train_dataset}"
    run("scripts/expert/get_expert_scores.py", *common, f"--output_dir={folder / 'scores'}",
        "--n_sample_tokens=16384", "--seq_length=256")  # fmt: skip
    run("scripts/expert/generate_expert_config.py", common[1], f"--expert_scores_dir={folder / 'scores'}",
        f"--output_path={folder / 'experts.json'}", "--score_function=token", "--top_p=0.2")  # fmt: skip
    found: dict[str, list[float]] = {dtype: [] for dtype in ("none", *DTYPES)}
    for seed in args.seeds:
        for dtype in found:
            results = train(
                folder / "run",
                *(common[0], f"--train_dataset={args.train_dataset}", f"--expert_config={folder / 'experts.json'}"),
                *("--train_config=configs/tiny.yaml", f"max_steps={args.steps}", "load_best_model_at_end=false"),
                *("--verify_frozen", f"data_seed={seed}", f"frozen_dtype={'null' if dtype == 'none' else dtype}"),
            )
            found[dtype].append(results["eval_loss"])
            print(f"seed {seed}, {dtype}: validation loss {results['eval_loss']:.4f}, frozen tensors kept their bits")
    return found


def memory(folder: Path) -> dict[str, dict]:
    """Results of short runs by dtype, on a model large enough to tell."""
    shape = argparse.Namespace(seed=0, hidden=512, layers=7, n_trained=8)
    write_model(folder / "large", shape)
    return {
        dtype: train(
            folder / "run",
            *(f"--base_model_path={folder / 'large'}", "--train_dataset=law", "seq_length=256", "max_steps=3"),
            *(f"--expert_config={folder / 'large' / 'experts.json'}", "per_device_train_batch_size=2"),
            *("validation_fraction=0", f"frozen_dtype={'null' if dtype == 'none' else dtype}"),
        )
        for dtype in ("none", *DTYPES)
    }


def table(found: dict[str, list[float]], held: dict[str, dict]) -> str:
    """Markdown, one line per dtype."""
    lines = ["| frozen experts | validation loss | of unquantized | frozen experts take | peak memory | step (s) |"]
    lines += ["|---|---|---|---|---|---|"]
    for dtype, values in found.items():
        ratios = [value / plain for value, plain in zip(values, found["none"])]
        results = held[dtype]
        lines.append(
            f"| {dtype} | {statistics.fmean(values):.4f} | {statistics.fmean(ratios):.3f} [{min(ratios):.3f}, "
            f"{max(ratios):.3f}] | {results['frozen_expert_bytes'] / 2**20:,.0f} MiB | "
            f"{results['peak_memory_bytes'] / 2**20:,.0f} MiB | {results['step_seconds']:.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if args.output:
        check_output(f"{args.output}.md")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as name:
        held, found = memory(Path(name)), losses(Path(name), args)
    text = table(found, held)
    print(text)
    if args.output:
        facts = environment()
        command = f"python scripts/experiments/frozen.py --steps={args.steps}"
        note = (
            f"`{command}`, {facts['date'][:10]}, {facts['device']}, torch {facts['torch']}, {args.train_dataset}, "
            f"seeds {' '.join(map(str, args.seeds))}; loss on results/models/tiny (means, and the range of the ratio), "
            "memory and time on 317M random parameters in fp32"
        )
        write_text(f"{args.output}.md", f"{text}\n\n{note}\n")
        rows = {"losses": found, "memory": held}
        write_json(f"{args.output}.json", {**rows, "arguments": vars(args), "environment": facts})
    return found


if __name__ == "__main__":
    run_cli(main)
