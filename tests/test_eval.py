"""Generation against a loop without cache or padding, ranks against one process, errors before a model is loaded."""

import json
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import esft
import eval_multigpu
from benchmarks import complete, generate, shard
from utils import encode_prompt, run_cli

PROMPTS = [
    "add 1 and 2",
    "a",
    "say the words of the sentence in the other order please",
    "sort 3 2 1",
    "copy b",
    "a b c",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def model_dir(model, tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
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


@torch.no_grad()
def greedy(model, ids: list[int], steps: int) -> list[int]:
    """The reference: one prompt, no padding, no cache."""
    new: list[int] = []
    for _ in range(steps):
        new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return new


def test_batched_answers_are_those_of_a_plain_loop(model, tokenizer):
    expected = [tokenizer.decode(greedy(model, encode_prompt(p, tokenizer), 6)) for p in PROMPTS]
    assert len(set(expected)) > 3
    options = {"max_new_tokens": 6, "progress": False}
    for batch_size in (1, 4, 16):
        assert generate(model, tokenizer, PROMPTS, batch_size=batch_size, **options) == expected
    assert generate(model, tokenizer, PROMPTS[:2], batch_size=2, template="released", **options) != expected[:2]
    assert generate(model, tokenizer, [], **options) == []


def test_an_answer_ends_before_any_of_the_end_tokens(model, tokenizer, monkeypatch):
    new = greedy(model, encode_prompt(PROMPTS[0], tokenizer), 6)
    stop = next(i for i in range(1, 6) if new[i] not in new[:i])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [299, new[stop]])
    first, *others = complete(model, tokenizer, PROMPTS, max_new_tokens=6, progress=False)
    assert first == (tokenizer.decode(new[:stop]), stop + 1, False)
    assert any(other.truncated and other.tokens == 6 for other in others)


def test_the_models_own_sampling_settings_neither_warn_nor_count(model, tokenizer, monkeypatch, capfd):
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6, progress=False)
    theirs = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=9.0, max_length=20)
    monkeypatch.setattr(model, "generation_config", theirs)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.train()
            assert generate(model, tokenizer, PROMPTS, max_new_tokens=6, progress=False) == expected
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert records == [] and capfd.readouterr().err == ""
    assert model.generation_config is theirs and model.training
    model.eval()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_whole_batches(tokenizer, world_size):
    options = {"batch_size": 2, "template": "chat", "world_size": world_size}
    whole = shard(PROMPTS, tokenizer, rank=0, **(options | {"world_size": 1}))
    batches = {tuple(whole[i : i + 2]) for i in range(0, len(whole), 2)}
    parts = [shard(PROMPTS, tokenizer, rank=rank, **options) for rank in range(world_size)]
    assert sorted(i for part in parts for i in part) == list(range(len(PROMPTS)))
    assert {tuple(part[i : i + 2]) for part in parts for i in range(0, len(part), 2)} == batches


def run(model_dir: str, eval_file: str, output_path, *more: str) -> list[dict]:
    flags = [f"--model={model_dir}", f"--eval_dataset={eval_file}", f"--output_path={output_path}"]
    return eval_multigpu.main([*flags, "--max_new_tokens=4", "--eval_batch_size=2", "--device=cpu", *more])


def test_two_processes_write_what_one_writes(model_dir, eval_file, tmp_path, capsys):
    (one,) = run(model_dir, eval_file, tmp_path / "one.jsonl")
    (two,) = run(model_dir, eval_file, tmp_path / "new" / "two.jsonl", "--world_size=2")
    text = (tmp_path / "one.jsonl").read_text()
    assert text == (tmp_path / "new" / "two.jsonl").read_text()
    assert [json.loads(line)["example"]["prompt"] for line in text.splitlines()] == PROMPTS
    timing = ("seconds", "tokens_per_second", "arguments", "environment")
    assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in two.items() if k not in timing}
    saved = json.loads((tmp_path / "one.summary.json").read_text())
    assert saved == one and saved["n"] == 6 and saved["tokens"] == 24 and saved["truncated"] == 6
    assert saved["groups"].keys() == {"odd", "even"} and saved["ci95"][0] <= saved["mean"] <= saved["ci95"][1]
    assert saved["arguments"]["max_new_tokens"] == 4 and "torch" in saved["environment"]
    assert re.search(r"mine +6 +rouge_l +\d", capsys.readouterr().out)
    assert not list(tmp_path.glob(".*"))


def test_several_datasets_get_a_file_each(model_dir, eval_file, tmp_path, monkeypatch):
    other = tmp_path / "general.jsonl"
    other.write_text(json.dumps({"prompt": "a", "answers": ["b"]}))
    loads = []
    load = esft.load_base_model
    monkeypatch.setattr(esft, "load_base_model", lambda *a, **k: loads.append(a) or load(*a, **k))
    summaries = run(model_dir, f"{eval_file},{other}", tmp_path / "out.jsonl", "--n_samples=3")
    assert [(s["dataset"], s["n"], s["primary"]) for s in summaries] == [
        ("mine", 3, "rouge_l"),
        ("general", 1, "exact_match"),
    ]
    written = {path.name for path in tmp_path.glob("out*")}
    assert written == {f"out.{name}.{kind}" for name in ("mine", "general") for kind in ("jsonl", "summary.json")}
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("gpus", "flags", "sentence"),
    [
        (0, ["--device=cuda"], "torch sees no GPU"),
        (0, ["--device=auto", "--gpus_per_rank=2"], "needs GPUs"),
        (4, ["--device=cuda", "--world_size=3", "--gpus_per_rank=2"], "needs 6 GPUs and torch sees 4"),
        (0, ["--adapter_dir=nowhere"], "--adapter_dir nowhere"),
        (0, ["--adapter_dir=testz"], "did you mean 'tests'"),
        (0, ["--adapter_dir=tests"], "expert_cfg.json"),
        (0, ["--adapter_dir=results/models/tiny"], "--base_model_path"),
        (0, ["--eval_dataset=datasets/train/law.jsonl"], "training data"),
        (0, ["--eval_dataset=nothing_known"], "nothing_known"),
        (0, ["--eval_dataset=a/x.jsonl,b/x.jsonl"], "different names"),
        (0, ["--eval_dataset=,"], "different names"),
        (0, ["--output_path=out.json"], r"must end in \.jsonl"),
        (0, ["--output_path=README.md/out.jsonl"], "cannot be written"),
    ],
)
def test_errors_are_one_sentence_before_the_model(monkeypatch, capsys, eval_file, tmp_path, gpus, flags, sentence):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(esft, "load_base_model", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: run("model", eval_file, tmp_path / "out.jsonl", *flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and re.search(sentence, error)


@pytest.mark.parametrize("flag", ["--world_size=0", "--max_new_tokens=-1", "--eval_batch_size=x", "--evaluator=judge"])
def test_a_flag_out_of_range_is_refused(capsys, flag):
    with pytest.raises(SystemExit) as stop:
        eval_multigpu.parse_args(["--eval_dataset=x", "--model=m", "--output_path=o.jsonl", flag])
    assert stop.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err


def test_an_adapter_changes_the_answers(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    eval_file = tmp_path / "mine.jsonl"
    eval_file.write_text(json.dumps({"prompt": "a", "answers": ["b"]}))
    esft.to_esft(tiny_model, esft.ExpertConfig({1: tuple(range(8))}))
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-20)
    esft.save_adapter(tiny_model, tmp_path / "adapter")
    outputs = []
    for name, more in {"base": [], "adapted": [f"--adapter_dir={tmp_path / 'adapter'}"]}.items():
        run(str(tmp_path / "base"), str(eval_file), tmp_path / f"{name}.jsonl", *more)
        outputs.append(json.loads((tmp_path / f"{name}.jsonl").read_text())["example"]["raw_prediction"])
    assert outputs[0] != outputs[1]


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        eval_multigpu.parse_args(["--help"])
    text = capsys.readouterr().out
    flags = re.findall(r"^  (--\w+)", text, flags=re.MULTILINE)
    optional = set(flags) - {"--eval_dataset", "--base_model_path", "--output_path"}
    assert len(optional) == 11 and text.count("(default:") == len(optional) and text.count("(required)") == 3
