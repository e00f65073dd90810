"""The data layer: what is labeled, that nothing is lost or cut, that packed documents do not see each other."""

import itertools
import json
import random
import time
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedTokenizerFast

from deepseek.files import read_jsonl, write_json, write_jsonl
from deepseek.process_groups import Ranks
from tests.data_helpers import encode, encode_prompt, load_samples
from tests.helpers import config_of, learned_runs
from training import data
from training.data import (
    IGNORE,
    Encoded,
    collate,
    pack_of,
    sources,
    split_samples,
)

DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}"
    "{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CHATML = (  # inserts a system prompt of its own, and a line break behind each end-of-turn token
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (  # shows an empty thought in the last turn only, so that every new turn rewrites the one before
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last and m.role == 'assistant' %}"
    "{{ '<think></think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADLESS = "{% for m in messages %}{{ m.content }}{% endfor %}"  # not even the generation prompt separates the turns

TURNS = [
    {"role": "user", "content": "What is red?"},
    {"role": "assistant", "content": "A colour, 红色。\n\n"},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "A number."},
]


@pytest.fixture(scope="module")
def data_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE which, like GPT's, merges a blank with the word behind it and line breaks with each other."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["User: What is red?\n\nAssistant: A colour.\n\n\n And two? A number."] * 20, trainer)
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, additional_special_tokens=special[3:], **tokens)


@pytest.fixture
def chat(data_tokenizer):
    """chat(template) -> the tokenizer with that template."""

    def with_template(template):
        data_tokenizer.chat_template = template
        return data_tokenizer

    return with_template


def pack(encoded: list[Encoded], seq_length: int, numbers: list[int] | None = None, **options) -> list[data.Pack]:
    numbers = numbers or list(range(len(encoded)))
    sizes = [min(len(document), seq_length) for document in encoded]
    learns = lambda i: data.has_label(encoded[i], sizes[i])  # noqa: E731
    found = data.pack(list(map(len, encoded)), learns, numbers, seq_length, **options)
    return [pack_of(encoded, members, sizes, numbers) for members in found]


def learned(encoded: Encoded, tokenizer) -> list[str]:
    """The texts of the labeled runs, each decoded."""
    return [tokenizer.decode(run) for run in learned_runs(encoded)]


# ------------------------------------------------------------------------------------------------ tokens and labels


@pytest.mark.parametrize(
    "template, before, end", [(DEEPSEEK, " ", "<eos>"), (CHATML, "", "<|im_end|>"), ("released", " ", "<eos>")]
)
def test_labels_are_the_answers_and_nothing_else(chat, template, before, end):
    tokenizer = chat(CHATML if template == "released" else template)
    sample = encode(TURNS, tokenizer, "released" if template == "released" else "chat")
    contents = [m["content"].strip() if template == "released" else m["content"] for m in TURNS[1::2]]
    assert learned(sample, tokenizer) == [before + content + end for content in contents]
    assert len(sample.input_ids) == len(sample.labels) == len(sample)


def test_chat_tokens_are_those_of_the_template(chat):
    for template in (DEEPSEEK, CHATML):
        tokenizer = chat(template)
        assert encode(TURNS, tokenizer).input_ids == tokenizer.apply_chat_template(TURNS)["input_ids"]


@pytest.mark.parametrize("template", ["chat", "released"])
def test_one_bos_without_label(chat, template):
    tokenizer = chat(DEEPSEEK)
    sample = encode(TURNS, tokenizer, template)
    assert sample.input_ids.count(tokenizer.bos_token_id) == 1 and sample.input_ids[0] == tokenizer.bos_token_id
    assert sample.labels[0] == IGNORE


def test_released_format_is_built_of_pieces(data_tokenizer):
    def ids(text):
        return data_tokenizer.encode(text, add_special_tokens=False)

    system = [{"role": "system", "content": "Be brief."}, *TURNS]
    bos, eos = [data_tokenizer.bos_token_id], [data_tokenizer.eos_token_id]
    prompt = bos + ids("Be brief.\n\nUser: What is red?\n\nAssistant:")
    again = ids("User: And two?\n\nAssistant:")
    answers = [
        ids(" A colour, 红色。") + eos,
        ids(" A number.") + eos,
    ]  # without blanks around, as in the released code
    padded = [message | {"content": f"\n{message['content']} "} for message in system]
    sample = encode(padded, data_tokenizer, "released")
    assert sample == encode(system, data_tokenizer, "released")
    assert encode_prompt(" What is red?\n", data_tokenizer, "released") == bos + ids("User: What is red?\n\nAssistant:")
    assert sample.input_ids == prompt + answers[0] + again + answers[1]
    assert sample.labels == [IGNORE] * len(prompt) + answers[0] + [IGNORE] * len(again) + answers[1]


@pytest.mark.parametrize("template", ["chat", "released"])
def test_masked_answers_carry_no_loss(chat, template):
    tokenizer = chat(DEEPSEEK)
    masked = [TURNS[0], TURNS[1] | {"mask": 1}, *TURNS[2:]]
    assert encode(masked, tokenizer, template).input_ids == encode(TURNS, tokenizer, template).input_ids
    assert learned(encode(masked, tokenizer, template), tokenizer) == [" A number.<eos>"]
    assert not learned(encode(masked[:2], tokenizer, template), tokenizer)


@pytest.mark.parametrize("template", [DEEPSEEK, CHATML])
@pytest.mark.parametrize("answer", ["\n\nbelow", " indented", "\n", "a\n", "<|im_end", "٣"])
def test_prompt_at_generation_is_the_prompt_in_training(chat, template, answer):
    tokenizer = chat(template)
    for name in ("chat", "released"):
        sample = encode([TURNS[0], {"role": "assistant", "content": answer}], tokenizer, name)
        prompt = encode_prompt(TURNS[0]["content"], tokenizer, name)
        first = next(i for i, label in enumerate(sample.labels) if label != IGNORE)
        assert sample.input_ids[:first] == prompt
        assert (answer.strip() if name == "released" else answer) in learned(sample, tokenizer)[0]


def test_rendered_prompt_is_taken_verbatim(chat):
    tokenizer = chat(CHATML)
    text = "User: 1 User: 2\n\nAssistant:"
    for template in ("chat", "released"):
        assert encode_prompt(text, tokenizer, template) == [tokenizer.bos_token_id, *tokenizer.encode(text)]
    assert encode_prompt("1 User: 2\n\nAssistant:", tokenizer, "released") != [1, *tokenizer.encode(text)]


def test_a_template_that_rewrites_history(chat):
    tokenizer = chat(THINKING)
    assert learned(encode(TURNS[:2], tokenizer), tokenizer) == ["<think></think>A colour, 红色。\n\n<|im_end|>"]
    with pytest.raises(ValueError, match=r"^cannot use the chat template: .*message 2 .*template=released"):
        encode(TURNS, tokenizer)
    last_only = [TURNS[0], TURNS[1] | {"mask": 1}, *TURNS[2:]]  # what the error advises: then it is exact
    assert learned(encode(last_only, tokenizer), tokenizer) == ["<think></think>A number.<|im_end|>"]


def test_templates_that_cannot_serve_say_so(chat):
    with pytest.raises(ValueError, match=r"the tokenizer has none\. .*template=released.*chat_template"):
        encode(TURNS, chat(None))
    with pytest.raises(ValueError, match=r"refuses .*roles must alternate"):
        encode(TURNS, chat("{{ raise_exception('roles must alternate') }}"))
    assert learned(encode(TURNS[:2], chat(HEADLESS)), chat(HEADLESS)) == [TURNS[1]["content"]]


# ------------------------------------------------------------------------------------------------------------ packs


def documents(count: int, longest: int, seed: int = 0) -> list[Encoded]:
    """Random documents over the tokens 3 ..; document i holds tokens that tell it apart from the others."""
    rng = random.Random(seed)
    ids = [[1000 * i + j + 3 for j in range(rng.randint(2, longest))] for i in range(count)]
    return [Encoded(tokens, [IGNORE, *tokens[1:]]) for tokens in ids]


def parts(p: data.Pack) -> list[tuple[list[int], list[int]]]:
    """The documents of a pack, cut where the positions start again."""
    starts = [i for i, position in enumerate(p.position_ids) if position == 0] + [len(p)]
    for a, b in itertools.pairwise(starts):
        assert p.position_ids[a:b] == list(range(b - a))
    return [(p.input_ids[a:b], p.labels[a:b]) for a, b in itertools.pairwise(starts)]


def test_every_sample_is_in_one_pack_whole():
    encoded = documents(500, 64)
    packs = pack(encoded, 64)
    assert all(len(p.input_ids) == len(p.labels) == len(p.position_ids) <= 64 for p in packs)
    found = [(i, part) for p in packs for i, part in zip(p.samples, parts(p), strict=True)]
    assert sorted(i for i, _ in found) == list(range(500))
    assert all(part == (encoded[i].input_ids, encoded[i].labels) for i, part in found)
    assert len(packs) <= 1.05 * sum(map(len, encoded)) / 64 + 1


def test_no_document_predicts_across_its_end():
    labeled = [Encoded(e.input_ids, e.input_ids) for e in documents(50, 20)]  # even the first token carries a label
    for p in pack(labeled, 32):
        assert all(labels[0] == IGNORE and labels[1:] == ids[1:] for ids, labels in parts(p))


def test_an_exact_fill_adds_nothing():
    encoded = [Encoded([5] * 8, [5] * 8) for _ in range(6)]
    packs = pack(encoded, 16)
    assert [len(p) for p in packs] == [16, 16, 16]
    batch = collate(packs, pad_token_id=2)
    assert batch["input_ids"].shape == (3, 16) and (batch["input_ids"] == 5).all()
    assert pack([], 16) == []


def test_the_seed_decides_the_packs():
    encoded = documents(100, 30)
    assert pack(encoded, 32, seed=1) == pack(encoded, 32, seed=1) != pack(encoded, 32, seed=2)
    longest = [len(parts(p)[0][0]) for p in pack(encoded, 32)]
    assert longest != sorted(
        longest, reverse=True
    )  # the first packs, which may be all that is scored, are not the longest


def test_overlong_samples():
    long = Encoded(list(range(10, 30)), [IGNORE] * 4 + list(range(14, 30)))
    unlearnable = Encoded(list(range(40, 60)), [IGNORE] * 15 + list(range(55, 60)))
    short = documents(3, 8)
    with pytest.raises(
        ValueError, match=r"sample 3 has 20 tokens.*\(2 such samples\)\. Set seq_length=20 or overlong=trunc"
    ):
        pack([*short, long, unlearnable], 8)
    with pytest.warns(UserWarning, match="2 of 5 .* 1 truncated, 1 dropped") as caught:
        packs = pack([*short, long, unlearnable], 8, overlong="truncate")
    assert len(caught) == 1
    assert sorted(i for p in packs for i in p.samples) == [0, 1, 2, 3]
    assert any(parts(p) == [(long.input_ids[:8], long.labels[:8])] for p in packs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack([*short, long, unlearnable], 20)  # all fit: nothing to warn about


def test_packing_time_is_near_linear():
    rng = random.Random(0)
    encoded = [Encoded([7] * n, [7] * n) for n in (rng.randint(2, 60) for _ in range(30_000))]
    start = time.process_time()
    packs = pack(encoded, 4096)
    assert time.process_time() - start < 3
    assert len(packs) <= sum(map(len, encoded)) / 4096 + 1


def test_collate_pads_with_a_document_of_its_own():
    a, b = pack([Encoded([5, 6, 7], [IGNORE, 6, 7])], 8) + pack([Encoded([8, 9], [IGNORE, 9])], 8)
    batch = collate([a, b], pad_token_id=2)
    assert set(batch) == {"input_ids", "labels", "position_ids"}  # an attention_mask would switch the boundaries off
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 2]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [IGNORE, 9, IGNORE]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def packed_model(request) -> DeepseekV2ForCausalLM:
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        initializer_range=0.2,  # so that attention tells something: with 0.02 a leak would hardly show
        use_cache=False,
    )
    model = DeepseekV2ForCausalLM._from_config(config, attn_implementation=request.param)
    return model.eval()


@pytest.mark.parametrize("batch_size", [1, 2])
@torch.no_grad()
def test_packed_documents_have_the_logits_they_have_alone(packed_model, batch_size):
    rng = random.Random(1)
    samples = [[rng.randrange(3, 64) for _ in range(n)] for n in (9, 7, 12, 3)]
    encoded = [Encoded(ids, ids) for ids in samples]
    packs = [pack(encoded[2 * i : 2 * i + 2], 16, seed=i)[0] for i in range(batch_size)]
    batch = collate([*packs, data.Pack([5] * 18, [5] * 18, [*range(18)], [0])], pad_token_id=2)  # a longer one: padding
    together = packed_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    one = {"position_ids": torch.arange(18).expand(batch_size + 1, -1)}
    leaking = packed_model(input_ids=batch["input_ids"], **one).logits  # the negative: positions that never restart
    cached = packed_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=True).logits
    assert not torch.allclose(cached, together, atol=1e-2)  # why `use_cache=False` is demanded
    for row, p in enumerate(packs):
        start = 0
        for number, (ids, _) in enumerate(parts(p)):
            alone = packed_model(input_ids=torch.tensor([ids])).logits[0]
            here = slice(start, start + len(ids))
            torch.testing.assert_close(together[row, here], alone, atol=1e-5, rtol=0)
            assert torch.allclose(leaking[row, here], alone, atol=1e-5, rtol=0) == (number == 0)
            start += len(ids)
        assert start < 18  # there was padding


# -------------------------------------------------------------------------------------------------------- data sets

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SAME = {
    "messages": {"messages": MESSAGES, "id": 7},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    "completion": {"prompt": "q", "completion": "a", "system": "s"},
    "alpaca": {"instruction": "q", "input": "", "output": "a", "system": "s"},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_all_shapes_and_files_give_the_same_messages(tmp_path, suffix, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for shape, row in SAME.items():
        path = tmp_path / f"{shape}{suffix}"
        if suffix == ".jsonl":
            write_jsonl(path, [row, row])
        elif suffix == ".json":
            write_json(path, [row, row])
        else:
            import datasets

            datasets.Dataset.from_list([row, row]).to_parquet(path)
        assert load_samples(path) == [{"messages": MESSAGES}] * 2


def test_alpaca_input_and_masks(tmp_path):
    path = tmp_path / "rows.json"
    masked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "mask": 1}]
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"messages": [*masked, {"role": "assistant", "content": "b", "mask": 0}]},
    ]
    write_jsonl(path, rows)  # JSON lines under the name .json
    first, second = load_samples(path)
    assert first["messages"][0] == {"role": "user", "content": "Add.\n\n1 2"}
    assert second["messages"] == [*masked, {"role": "assistant", "content": "b"}]


def turns(*roles_and_texts: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in roles_and_texts]})


@pytest.mark.parametrize(
    "line, error",
    [
        ('{"messages": [}', r"not valid JSON \(Expecting value at column 15\)"),
        ('{"prompt": "q\t"}', r"not valid JSON \(Invalid control character at column 14\)"),
        (b'{"prompt": "\xff"}', "byte 0xff in position 12"),
        ("[1]", "expected a JSON object, found list"),
        ('{"mesages": []}', r"needs the keys messages or .*this one has mesages \(did you mean 'messages'\?\)"),
        ('{"prompt": "q"}', r"prompt\+completion"),
        ('{"messages": "q"}', "'messages' must be a list"),
        (turns(("user", "q"), ("asistant", "a")), r"message 2: unknown role 'asistant' \(did you mean 'assistant'\?\)"),
        (
            '{"conversations": [{"from": "bing", "value": "q"}]}',
            "message 1: unknown role 'bing'. Known are system, user, assistant, tool, human, gpt",
        ),
        ('{"conversations": [{"from": "humam", "value": "q"}]}', r"message 1: .*'humam' \(did you mean 'human'\?\)"),
        ('{"conversations": [{"from": ["gpt"], "value": "q"}]}', r"message 1: unknown role \['gpt'\]"),
        (turns(("user", ["q"]), ("assistant", "a")), "message 1: the content must be text, not a list"),
        (turns(("user", "q"), ("assistant", " \n")), "message 2: the assistant turn is empty"),
        (turns(("assistant", "a"), ("user", "q")), "message 1: an assistant turn comes first and answers nothing"),
        (turns(("user", "q")), "no assistant turn"),
        ('{"messages": [{"role": "user", "content": "q", "mask": 2}]}', 'message 1: "mask" must be 0 or 1, not 2'),
    ],
)
def test_errors_name_file_and_line(tmp_path, line, error):
    path = tmp_path / "rows.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(json.dumps(SAME["messages"]).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(
        ValueError, match=rf"^{path}:3: .*{error}" if "message " not in error else rf"^{path}:3: {error}"
    ):
        load_samples(path)


def test_errors_in_arrays_and_tables_name_the_row(tmp_path, monkeypatch):
    array = tmp_path / "rows.json"
    array.write_text(json.dumps([SAME["alpaca"], {"prompt": "q"}]))
    with pytest.raises(ValueError, match=rf"^{array}: row 2: "):
        load_samples(array)
    array.write_text('[{"a": 1},\n{"b": }]')
    with pytest.raises(ValueError, match=rf"^{array}:2: not valid JSON"):
        load_samples(array)
    array.write_text("[]")
    with pytest.raises(ValueError, match="has no rows"):
        load_samples(array)
    broken = tmp_path / "rows.parquet"
    broken.write_text("no parquet")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"cannot read data set '.*rows.parquet'"):
        load_samples(broken)


def test_lines_end_at_line_feeds_only(tmp_path):
    rows = [{"text": "a\u2028b\x85c\rd"}, {"text": "红"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert "红" in (tmp_path / "rows.jsonl").read_text(encoding="utf-8")


def test_names_are_files_of_the_data_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for split in ("train", "eval"):
        write_jsonl(tmp_path / "datasets" / split / "law.jsonl", [{"split": split}])
        assert [row for _, row in data.open_rows("law", split)] == [{"split": split}]
    assert data.dataset_files("datasets/train/law.jsonl") == [Path("datasets/train/law.jsonl")]
    with pytest.raises(
        ValueError, match=r"'lwa' \(did you mean 'law'\?\)\. Give one of those in datasets/train \(law\)"
    ):
        data.resolve("lwa")
    with pytest.raises(ValueError, match=r"'datasets/train/laww.jsonl' \(did you mean 'law.jsonl'\?\)"):
        data.resolve("datasets/train/laww.jsonl")


def test_split_is_of_samples_disjoint_and_deterministic():
    samples = [{"id": i} for i in range(100)]
    train, validation = split_samples(samples, 0.1, seed=3)
    assert len(validation) == 10 and sorted(train + validation, key=lambda s: s["id"]) == samples
    assert (train, validation) == split_samples(samples, 0.1, seed=3)
    assert validation != split_samples(samples, 0.1, seed=4)[1]
    assert split_samples(samples, 0, seed=3) == (samples, []) and split_samples([], 0, seed=3) == ([], [])
    assert [len(part) for part in split_samples(samples, 0.999, seed=3)] == [1, 99]
    assert [len(part) for part in split_samples(samples[:2], 0.02, seed=3)] == [1, 1]
    assert split_samples(samples[:1], 0.5, seed=3) == (samples[:1], [])


def test_a_pack_comes_apart_into_its_documents():
    encoded = documents(20, 30)
    packs = pack(encoded, 64, numbers=[100 + i for i in range(20)])
    alone = [one for p in packs for one in p.documents()]
    assert sorted(one.samples[0] for one in alone) == list(range(100, 120))
    for one in alone:
        number = one.samples[0] - 100
        assert one.input_ids == encoded[number].input_ids and one.position_ids == list(range(len(one)))
        assert one.labels[1:] == encoded[number].labels[1:]


def test_an_overlong_sample_goes_by_its_number():
    with pytest.raises(ValueError, match="sample 7 has"):
        pack([Encoded([1] * 9, [1] * 9)], 8, numbers=[7])


def test_a_broken_character_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(
        r'{"prompt": "\ud83d\ude00", "completion": "b"}' + "\n" + r'{"prompt": "\ud800", "completion": "b"}'
    )
    with pytest.raises(ValueError, match=r"d\.jsonl:2: not valid JSON .*surrogates not allowed"):
        load_samples(path)


def test_a_validation_set_of_its_own(files, tiny_tokenizer, tmp_path):
    rows = [{"prompt": f"what is {i}?", "completion": "yes"} for i in range(3)]
    write_jsonl(tmp_path / "held.jsonl", rows)
    config = config_of(files, tmp_path / "out", validation_dataset=str(tmp_path / "held.jsonl"))
    train, validation = data.load_data(tiny_tokenizer, config, Ranks())
    assert sorted(i for pack in train for i in pack.samples) == list(range(1, 31))  # all of them
    found = [tiny_tokenizer.decode(document.input_ids) for pack in validation for document in pack.documents()]
    assert len(found) == 3 and all(any(row["prompt"] in text for text in found) for row in rows)
