"""A small model, an adapter that changes all of its answers, eval files, a judge's endpoint, and tasks of lm-eval."""

import json
from pathlib import Path

import pytest
import torch
import yaml
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


SUMS = [(10, 33), (14, 4), (8, 9), (21, 35), (40, 2), (3, 3), (12, 7), (55, 11), (6, 60), (31, 18), (9, 4), (70, 5)]
ACC = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
EXACT = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]


@pytest.fixture(scope="module")
def suite_dir(tmp_path_factory) -> Path:
    """A folder of lm-eval's task files: choices, written answers, likelihoods, two groups and a tag."""
    folder = tmp_path_factory.mktemp("tasks")

    def write(name: str, rows: list[dict], **config) -> None:
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        fixed = {"dataset_path": "json", "dataset_kwargs": source, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **fixed, **config}))

    rows = []
    for number, (a, b) in enumerate(SUMS):
        wrong = [f" {a + b + 1}", f" {a} and {b} more", " no"]
        choices = [*wrong[: number % 4], f" {a + b}", *wrong[number % 4 :]]
        rows.append({"q": f"What is {a} + {b}?", "choices": [c.strip() for c in choices], "label": number % 4})
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": "label"}
    choice |= {"doc_to_choice": "choices", "metric_list": ACC}
    write("mine_choices", rows, **choice)
    write("mine_few", rows[:3], **choice, tag="mine_tag")
    write("mine_many", rows[3:], **choice, tag="mine_tag")
    answers = [{"q": row["q"], "a": row["choices"][row["label"]]} for row in rows]
    stop = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    written = {"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}"}
    written |= {"generation_kwargs": stop, "metric_list": EXACT}
    written["filter_list"] = [
        {"name": "bare", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
    ]
    write("mine_written", answers, **written)
    lower = [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]
    likelihood = {"output_type": "loglikelihood", "doc_to_text": "{{q}}", "doc_to_target": " {{a}}"}
    write("mine_likelihood", answers, **likelihood, metric_list=lower)
    for name, by_size in (("mine_by_size", True), ("mine_by_task", False)):
        mean = [{"metric": "acc", "aggregation": "mean", "weight_by_size": by_size}]
        group = {"group": name, "task": ["mine_few", "mine_many"], "aggregate_metric_list": mean}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))
    (folder / "mine_bundle.yaml").write_text(
        yaml.safe_dump({"group": "mine_bundle", "task": ["mine_few", "mine_many"]})
    )
    return folder
