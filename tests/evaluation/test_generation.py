"""Generation against a loop without cache or padding, whatever the model's own settings."""

import logging
import warnings

import torch
from transformers import GenerationConfig

from evaluation.generation import Completion, complete, make_batches
from tests.helpers import PROMPTS
from training.data import Template, TemplateSettings


@torch.no_grad()
def greedy(model, ids: list[int], steps: int) -> list[int]:
    """The reference: one prompt, no padding, no cache."""
    new: list[int] = []
    for _ in range(steps):
        new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return new


def answers(model, tokenizer, prompts, batch_size=4, template="chat") -> list[Completion]:
    """Answer the prompts in batches of `batch_size`, and return the answers in the order of the prompts."""
    found = {}
    template = Template(tokenizer, TemplateSettings(template))
    for batch in make_batches(prompts, template, batch_size):
        found |= zip(batch, complete(model, template, [prompts[i] for i in batch], 6))
    return [found[i] for i in range(len(prompts))]


def test_batched_answers_are_those_of_a_plain_loop(model, tokenizer):
    expected = [tokenizer.decode(greedy(model, Template(tokenizer).encode_prompt(p), 6)) for p in PROMPTS]
    assert len(set(expected)) > 3
    for batch_size in (1, 4, 16):
        assert [answer.text for answer in answers(model, tokenizer, PROMPTS, batch_size)] == expected
    assert [answer.text for answer in answers(model, tokenizer, PROMPTS[:2], template="released")] != expected[:2]


def test_an_answer_ends_before_any_of_the_end_tokens(model, tokenizer, monkeypatch):
    new = greedy(model, Template(tokenizer).encode_prompt(PROMPTS[0]), 6)
    stop = next(i for i in range(1, 6) if new[i] not in new[:i])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [299, new[stop]])
    first, *others = answers(model, tokenizer, PROMPTS)
    assert first[:3] == (tokenizer.decode(new[:stop]), stop + 1, False)
    assert any(other.truncated and other.tokens == 6 for other in others)


def test_an_answer_ends_where_the_context_does(model, tokenizer, monkeypatch):
    template = Template(tokenizer)
    width = len(template.encode_prompt(PROMPTS[0]))
    monkeypatch.setattr(model.config, "max_position_embeddings", width + 3)
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    (answer,), (short,) = complete(model, template, PROMPTS[:1], 6), complete(model, template, PROMPTS[:1], 2)
    assert (answer.tokens, answer.truncated) == (3, True) and short.tokens == 2


def test_the_models_own_sampling_settings_neither_warn_nor_count(model, tokenizer, monkeypatch, capfd):
    expected = answers(model, tokenizer, PROMPTS)
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
            assert answers(model, tokenizer, PROMPTS) == expected
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert records == [] and capfd.readouterr().err == ""
    assert model.generation_config is theirs and model.training
    model.eval()


def test_a_batch_alone_forms_itself_again(tokenizer):
    batches = make_batches(PROMPTS, Template(tokenizer), 4)
    assert sorted(i for batch in batches for i in batch) == list(range(len(PROMPTS)))
    assert [len(batch) for batch in batches] == [4, 2] and batches[0][0] == 2  # the longest comes first
    for batch in batches:
        assert make_batches([PROMPTS[i] for i in batch], Template(tokenizer), 4) == [list(range(len(batch)))]
