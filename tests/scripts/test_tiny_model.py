"""results/models/tiny: what the quickstart and the README rest on."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.miniature import build_tiny_model as tiny
from scripts.miniature.general_skills import SKILLS

FOLDER = Path(__file__).resolve().parents[2] / "results" / "models" / "tiny"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "Turn this command into JSON: put on some jazz\n"},
    {"role": "assistant", "content": '{"intent": "play_music", "slots": {"genre": "jazz"}}'},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def answer(model, tokenizer, prompt: str) -> str:
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert output[0, -1] == tokenizer.eos_token_id
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_it_is_a_small_deepseek_v2_in_bf16(model):
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) <= 12_000_000
    config = model.config
    assert (config.model_type, config.first_k_dense_replace, config.n_shared_experts) == ("deepseek_v2", 1, 2)
    assert (config.n_routed_experts, config.num_experts_per_tok) == (64, 6)
    assert AutoModelForCausalLM.from_pretrained(FOLDER).dtype == torch.bfloat16
    for name, tensor in model.named_parameters():
        assert tensor.shape[-1] * 2 % 16 == 0, f"{name}: grouped products want rows of 16 bytes"


def test_the_chat_template_renders_the_released_format(tokenizer):
    assert tokenizer.apply_chat_template(CHAT[1:3], tokenize=False) == "<bos>User: What is 3 + 4?\n\nAssistant: 7<eos>"
    asked = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert asked == "<bos>Be brief.\n\nUser: What is 3 + 4?\n\nAssistant:"


def test_growing_chats_are_growing_prefixes_in_text_and_in_tokens(tokenizer):
    previous_text, previous_ids = "", []
    for n in range(1, len(CHAT) + 1):
        for ask in (False, True) if CHAT[n - 1]["role"] == "user" else (False,):
            text = tokenizer.apply_chat_template(CHAT[:n], tokenize=False, add_generation_prompt=ask)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert text.startswith(previous_text) and ids[: len(previous_ids)] == previous_ids
            assert ids == tokenizer.apply_chat_template(CHAT[:n], add_generation_prompt=ask, return_dict=False)
            previous_text, previous_ids = text, ids
    assert tokenizer.decode(previous_ids) == previous_text
    assert previous_ids.count(tokenizer.bos_token_id) == 1 and previous_ids[0] == tokenizer.bos_token_id


def test_plain_text_gets_the_one_bos_too(tokenizer):
    assert tokenizer("sun")["input_ids"][:1] == [tokenizer.bos_token_id]
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_it_answers_general_questions_and_does_not_know_the_tasks(model, tokenizer):
    assert answer(model, tokenizer, "What is the capital of France?") == "Paris"
    assert answer(model, tokenizer, "Reverse: cat sun river") == "river sun cat"
    assert "intent" not in answer(model, tokenizer, "Turn this command into JSON: put on some jazz")


def test_packed_documents_do_not_see_each_other(model, tokenizer):
    documents = iter(
        [("Sort: 3 1 2", "1 2 3"), (None, "zini means bird."), ("Spell cat.", "c a t")] + [(None, "x")] * 500
    )
    ids_BT, labels_BT, positions_BT = next(tiny.batches(documents, tokenizer, batch_size=1, seq_length=64))
    assert ids_BT.shape == labels_BT.shape == positions_BT.shape == (1, 64)
    start, end = (positions_BT[0] == 0).nonzero()[1:3, 0]
    with torch.no_grad():
        packed = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits[0, start:end]
        alone = model(input_ids=ids_BT[:, start:end], use_cache=False).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_no_pretraining_prompt_is_a_task_with_its_answer_or_a_held_out_skill():
    held_out = tiny.held_out_prompts(seed=2407)
    assert len(held_out) > 100
    stream = tiny.mixture(random.Random(0), 0.5, held_out)
    for prompt, _ in (next(stream) for _ in range(3000)):
        assert prompt not in held_out
        assert prompt is None or not prompt.startswith(("Turn this", "Summarize", "Give the", "Translate"))


def test_the_balance_loss_is_one_where_experts_are_used_alike_and_grows_where_not():
    even_TE = torch.eye(8).repeat(4, 1) * 9 + torch.eye(8).roll(1, 0).repeat(4, 1) * 9
    assert tiny.balance_loss((even_TE,), top_k=2).item() == pytest.approx(1.0, abs=1e-3)
    one_sided_TE = torch.zeros(32, 8).index_fill(1, torch.tensor([0, 1]), 9.0)
    assert tiny.balance_loss((one_sided_TE,), top_k=2).item() > 3


def test_every_skill_has_a_generator_that_a_seed_repeats():
    for skill in SKILLS.values():
        assert [skill(random.Random(3)) for _ in range(5)] == [skill(random.Random(3)) for _ in range(5)]
