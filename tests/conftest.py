"""Tiny random models, one per layout of the fused experts, and a runner of small process groups."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
OFFICIAL = ROOT.parent / "shared" / "official"

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FAMILIES = {
    "deepseek_v2": {
        **SMALL,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
    },
    "qwen3_moe": {**SMALL, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3},
    "mixtral": {**SMALL, "intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 3},
    "gpt_oss": {  # transposed, interleaved, biased
        **SMALL,
        "head_dim": 8,
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "layer_types": ["full_attention"] * 3,
    },
    "nemotron_h": {  # no gate
        **SMALL,
        "head_dim": 8,
        "layers_block_type": ["moe", "attention", "moe"],
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
    },
}


def make_model(family: str = "deepseek_v2", dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A small random model of a family, in evaluation mode, with weights large enough that every expert matters."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim > 1:
                param.normal_(std=0.15)
            elif "bias" in name:
                param.normal_(std=0.05)
    return model.to(dtype).eval()


@pytest.fixture
def tiny_model():
    return make_model()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE without merges of note, and the released chat format as its template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=128, special_tokens=special, initial_alphabet=list("abcdefghijklmnop"))
    bpe.train_from_iterator(["User: what is it?\n\nAssistant: it is 0123456789, yes {} no."], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\nAssistant:"
        "{% elif m.role == 'system' %}{{ m.content }}\n\n{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer):
    """A saved folder: the deepseek_v2 model and the tokenizer, through the ordinary Auto classes."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def official():
    """The released data of the paper's authors, where it is at hand."""
    if not OFFICIAL.is_dir():
        pytest.skip("the released data is not at hand")
    return OFFICIAL
