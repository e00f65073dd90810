"""Shared by the experiments: a random model on disk, one training as a child process, and the files of a result."""

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM

from deepseek.files import write_json, write_text
from utils import ROOT, environment, run_command

TINY = ROOT / "results" / "models" / "tiny"
LIKE_V2_LITE = {
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
}


def write_model(folder: Path, hidden: int = 512, layers: int = 7, n_trained: int = 8, seed: int = 0) -> int:
    """Write a random DeepSeek-V2, nearly all of it routed experts, with a tokenizer and an `experts.json`.

    `hidden` is also the hidden size of an expert. `experts.json` names `n_trained` of the 64 experts of every layer.
    Returns the bytes of the model's tensors.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    config = DeepseekV2Config(
        **{**LIKE_V2_LITE, "n_shared_experts": 1},
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden,
        moe_intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    )
    model = DeepseekV2ForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="200MB")
    tokenizer.save_pretrained(folder)
    generator = random.Random(seed)
    experts = {str(layer): generator.sample(range(64), n_trained) for layer in range(1, layers)}
    write_json(folder / "experts.json", {"experts": experts, "shared_experts": False, "non_expert_modules": False})
    return sum(parameter.nbytes for parameter in model.parameters())


def train(out: Path, *keys: object, processes: int = 1) -> dict:
    """Train into `out`, over what is there, and return the results in its run.json."""
    script = "train_ep.py" if processes > 1 else "train.py"
    words = [script, f"--output_dir={out}", "overwrite=true", "disable_tqdm=true", *keys]
    run_command(words, processes=processes, quiet=True)
    return json.loads((out / "run.json").read_text(encoding="utf-8"))["results"]


def write_result(args: argparse.Namespace, command: str, table: str, remarks: str, **results: object) -> None:
    """Write `args.output`.md, the table and how it was made, and `args.output`.json, all results."""
    facts = environment()
    made = f"`{command}`, {facts['date'][:10]}, {facts['device']}, torch {facts['torch']}, {remarks}"
    write_text(f"{args.output}.md", f"{table}\n\n{made}\n")
    write_json(f"{args.output}.json", {**results, "arguments": vars(args), "environment": facts})
