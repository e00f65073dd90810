"""Fixtures for all tests."""

import functools
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepseek.files import write_json, write_jsonl
from tests.helpers import EXPERTS, OFFICIAL, make_model


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
def bases(tmp_path_factory, tiny_tokenizer):
    """`bases(family, **changes)`: the folder of a model, in shards, with a tokenizer."""

    @functools.cache
    def folder(family: str = "deepseek_v2", **changes) -> Path:
        path = tmp_path_factory.mktemp(family)
        make_model(family, **changes).save_pretrained(path, max_shard_size="50KB")
        tiny_tokenizer.save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def official():
    """The released data of the paper's authors, where it is at hand."""
    if not OFFICIAL.is_dir():
        pytest.skip("the released data is not at hand")
    return OFFICIAL


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_tokenizer):
    """A folder with models m32 and m16, a dataset, and expert configs."""
    folder = tmp_path_factory.mktemp("train")
    for name, dtype in (("m32", torch.float32), ("m16", torch.bfloat16)):
        make_model(dtype=dtype).save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    rows = []
    for i in range(30):
        answer = " ".join([f"yes {i}"] * (1 + i % 4))  # uneven: means of means differ
        rows.append(
            {"messages": [{"role": "user", "content": f"is it {i}?"}, {"role": "assistant", "content": answer}]}
        )
    write_jsonl(folder / "data.jsonl", rows)
    write_json(folder / "experts.json", EXPERTS)
    write_json(folder / "all.json", {**EXPERTS, "shared_experts": True, "non_expert_modules": True})
    return folder
