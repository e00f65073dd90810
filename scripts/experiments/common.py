"""What the experiments share: random models, one training as a child process, and the page of a result."""

import argparse
import random
import shlex
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedConfig

from deepseek.files import check_output, read_json, write_json, write_text
from deepseek.loading import load_config, load_tokenizer
from training.published_models import published_models
from utils import ROOT, command_parser, environment, positive, run_command

TINY = ROOT / "results" / "models" / "tiny"
PUBLISHED = {"v2-lite": "DeepSeek-V2-Lite", "qwen3-30b-a3b": "Qwen3-30B-A3B"}
SHAPES = ("tiny", "36m", *PUBLISHED)
LIKE_V2_LITE = {
    "first_k_dense_replace": 1, "q_lora_rank": None, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
}  # fmt: skip
SMALL_HEADS = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
}  # fmt: skip


def shape_config(shape: str) -> PreTrainedConfig:
    """Return the configuration of results/models/tiny, of a published model, or of 36m parameters."""
    if shape == "tiny":
        return load_config(TINY)
    if shape in PUBLISHED:
        return published_models()[PUBLISHED[shape]][0]
    size = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 1024, "moe_intermediate_size": 128}
    # queries and values are 48 wide: torch's fused attention needs one width on a CPU
    return DeepseekV2Config(**LIKE_V2_LITE, **SMALL_HEADS, v_head_dim=48, num_hidden_layers=6, **size)


def draw_experts(layers: Iterable[int], count: int, seed: int) -> dict[int, list[int]]:
    """Draw `count` of the first 64 experts of each layer. Raise ValueError if there are fewer."""
    if count > 64:
        raise ValueError(f"cannot train {count} experts of a layer: it has 64. Give a smaller --n_trained.")
    generator = random.Random(seed)
    return {layer: generator.sample(range(64), count) for layer in layers}


def write_model(folder: Path, seed: int = 0) -> int:
    """Write a random DeepSeek-V2 of 317M parameters, nearly all of it routed experts, with a tokenizer.

    `experts.json` beside it names 8 of the 64 experts of every layer. Returns the bytes of the model's tensors.
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(TINY)
    size = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 512)
    size |= {"vocab_size": len(tokenizer), "n_shared_experts": 1, "num_hidden_layers": 7, "v_head_dim": 32}
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**{**LIKE_V2_LITE, **SMALL_HEADS, **size}))
    model.save_pretrained(folder, max_shard_size="200MB")
    tokenizer.save_pretrained(folder)
    experts = draw_experts(range(1, 7), 8, seed)
    write_json(folder / "experts.json", {"experts": experts, "shared_experts": False, "non_expert_modules": False})
    return sum(parameter.nbytes for parameter in model.parameters())


def resident_bytes(key: str) -> int:
    """Return memory of this process: VmRSS is the resident set, VmHWM the highest so far, RssAnon without files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def train(out: Path, *keys: object, processes: int = 1) -> dict:
    """Train into `out`, over what is there, and return the results in its run.json."""
    script = "train_ep.py" if processes > 1 else "train.py"
    words = [script, f"--output_dir={out}", "overwrite=true", "disable_tqdm=true", *keys]
    run_command(words, processes=processes, quiet=True)
    return read_json(out / "run.json")["results"]


def loss_args(doc: str | None, argv: list[str] | None) -> argparse.Namespace:
    """Return the flags of an experiment that calls `losses_of`. Its output is known to be writable."""
    parser = command_parser(doc)
    add = parser.add_argument
    add("--train_dataset", default="law", metavar="NAME", help="the task (default: law)")
    add("--steps", type=positive, default=450, metavar="N", help="optimizer steps of each run (default: 450)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="all kinds with each (default: 0 1 2)")
    add("--output", metavar="FILE", help="write FILE.md and FILE.json (default: print only)")
    args = parser.parse_args(argv)
    if args.output:
        check_output(f"{args.output}.md")
    return args


def losses_of(folder: Path, args: argparse.Namespace, key: str, values: Iterable[str], *keys: str) -> dict:
    """Train results/models/tiny on a task, with each value of `key` and each of `args.seeds`. Return validation losses.

    The experts are selected by token scores. The seed draws the order of the data.
    """
    scores, experts, task = folder / "scores", folder / "experts.json", f"--eval_dataset={args.train_dataset}"
    base, size = f"--base_model_path={TINY}", ("--n_sample_tokens=16384", "--seq_length=256")
    run_command(["scripts/expert/get_expert_scores.py", task, base, f"--output_dir={scores}", *size], quiet=True)
    run_command(["scripts/expert/generate_expert_config.py", task, f"--expert_scores_dir={scores}",
                 f"--output_path={experts}", "--score_function=token", "--top_p=0.2"], quiet=True)  # fmt: skip
    keys += base, f"--train_dataset={args.train_dataset}", f"--expert_config={experts}", f"max_steps={args.steps}"
    keys += f"--train_config={ROOT}/configs/tiny.yaml", "load_best_model_at_end=false", "save_strategy=no"
    found: dict[str, list[float]] = {value: [] for value in values}
    for seed in args.seeds:
        for value, losses in found.items():
            losses.append(train(folder / "run", *keys, f"data_seed={seed}", f"{key}={value}")["eval_loss"])
            print(f"seed {seed}, {key}={value}: validation loss {losses[-1]:.4f}")
    return found


def compared(losses: list[float], plain: list[float]) -> list[str]:
    """Return the mean of losses, and that of their ratios to others with its range."""
    ratios = [loss / other for loss, other in zip(losses, plain)]
    mean = f"{statistics.fmean(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
    return [f"{statistics.fmean(losses):.4f}", mean]


def publish(args: argparse.Namespace, script: str, argv: list[str] | None, page: str, remarks="", **results) -> None:
    """Print a page, and the command that made it. Write them to `args.output`.md, and all results to .json, if asked.

    `script` is the file of the command and `argv` its flags, None for those of this process.
    """
    words = sys.argv[1:] if argv is None else argv
    command, facts = shlex.join(["python", f"scripts/experiments/{Path(script).name}", *words]), environment()
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
    page += f"\n\n`{command}`, {facts['date'][:10]}, {facts['device']}, {versions}{remarks and f', {remarks}'}\n"
    print(page)
    if args.output:
        write_text(f"{args.output}.md", page)
        write_json(
            f"{args.output}.json", {**results, "command": command, "arguments": vars(args), "environment": facts}
        )
        print(f"written to {args.output}.md and .json")
