"""A small model, an adapter that changes all of its answers, eval files, and a judge's endpoint."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedTokenizerFast

import esft
import eval_multigpu
from tests.helpers import KEY, PROMPTS, JudgeServer, Watched

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a pad token."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tok.train_from_iterator(PROMPTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session")
def model() -> DeepseekV2ForCausalLM:
    """Random weights, of a scale at which greedy answers differ between prompts."""
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, max_position_embeddings=256, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return DeepseekV2ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_dir(model, tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def adapter_dir(model_dir, tmp_path_factory) -> str:
    """An adapter that changes every answer."""
    model = DeepseekV2ForCausalLM.from_pretrained(model_dir, dtype="float32")
    esft.to_esft(model, esft.ExpertConfig({1: tuple(range(8))}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-20)
    folder = tmp_path_factory.mktemp("adapter")
    esft.save_adapter(model, folder)
    return str(folder)


@pytest.fixture
def eval_file(tmp_path) -> str:
    path = tmp_path / "mine.jsonl"
    rows = [
        {"idx": i, "prompt": prompt, "raw_answers": ["a b"], "answers": ["a b"], "skill": "even" if i % 2 else "odd"}
        for i, prompt in enumerate(PROMPTS)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def watched(tmp_path, monkeypatch) -> Watched:
    evaluator = Watched(tmp_path)
    monkeypatch.setattr(eval_multigpu, "get_evaluator", lambda *_: evaluator)
    return evaluator


@pytest.fixture
def server(monkeypatch):
    """A judge's endpoint; its key is in the environment as MY_KEY."""
    monkeypatch.setenv("MY_KEY", KEY)
    server = JudgeServer()
    yield server
    server.close()
