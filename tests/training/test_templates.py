"""What is learned of a conversation, in templates of many families."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.chat_templates import FAMILIES
from tests.helpers import learned_runs
from training.data.documents import IGNORE, NO_END, Encoded, TemplateSettings
from training.data.templates import Template

TURNS = [
    {"role": "user", "content": "What is red?"},
    {"role": "assistant", "content": "A colour, 红色."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "A number."},
]
THOUGHT = {"role": "assistant", "content": "It is 4.", "reasoning_content": "add them"}
REWRITES = {"qwen3", "gpt_oss", "deepseek_r1"}  # show an answer differently once another turn follows
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
WITH_TOOLS = [
    {"role": "user", "content": "2 + 3?", "tools": [TOOL]},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "It is 5."},
]


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens and the template of a family."""
    family = FAMILIES[name]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=family.special.split(), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["What is red? A colour.\n\n\n And two? A number."] * 20, trainer)
    bpe.add_tokens(family.plain.split())
    tokens = {"bos_token": family.bos, "eos_token": family.eos}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=family.template, **tokens)


def documents(name: str, messages: list[dict], **settings) -> tuple[list[Encoded], PreTrainedTokenizerFast]:
    tokenizer = tokenizer_of(name)
    return Template(tokenizer, TemplateSettings(**settings)).encode([messages])[0], tokenizer


def learned(name: str, messages: list[dict], **settings) -> list[list[str]]:
    """The texts of the labeled runs of each document, decoded."""
    found, tokenizer = documents(name, messages, **settings)
    return [[tokenizer.decode(run) for run in learned_runs(document)] for document in found]


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - REWRITES))
def test_every_answer_and_its_end_is_learned_and_nothing_else(name):
    family = FAMILIES[name]
    assert learned(name, TURNS) == [[family.before + m["content"] + family.end for m in TURNS[1::2]]]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("loss_on", ["last", "each"])
def test_an_answer_follows_the_prompt_that_asks_for_it(name, loss_on):
    answers = [TURNS[1]["content"], TURNS[3]["content"]]
    if name == "deepseek_r1":  # its prompt opens a thought, which an answer has to close
        thoughts = ["<think>\nhm\n</think>\n\n" + answer for answer in answers]
        turns = [m | {"content": thoughts[i // 2]} if i % 2 else m for i, m in enumerate(TURNS)]
        answers = ["hm\n</think>\n\n" + answer for answer in answers]
    else:
        turns, empty = TURNS, "<think>\n\n</think>\n\n" if name == "qwen3" else ""
        answers = [FAMILIES[name].before + empty + answer for answer in answers]
    found, tokenizer = documents(name, turns, loss_on=loss_on)
    wanted = [answer + FAMILIES[name].end for answer in answers][-1 if loss_on == "last" else 0 :]
    assert [[tokenizer.decode(run) for run in learned_runs(one)] for one in found] == [[text] for text in wanted]
    for document, i in zip(found, [3] if loss_on == "last" else [1, 3]):
        first = next(k for k, label in enumerate(document.labels) if label != IGNORE)
        prompt = tokenizer.apply_chat_template(turns[:i], add_generation_prompt=True)["input_ids"]
        assert document.input_ids[:first] == prompt


@pytest.mark.parametrize("name", sorted(REWRITES))
def test_a_template_that_rewrites_answers_is_refused_with_remedies(name):
    with pytest.raises(ValueError, match=r"chat template: .* loss_on=each .* loss_on=last.*\"mask\": 1"):
        learned(name, TURNS)


def test_thinking_on_and_off():
    one = [TURNS[0], {"role": "assistant", "content": "A colour."}]
    assert learned("qwen3", one) == [["<think>\n\n</think>\n\nA colour.<|im_end|>"]]
    assert learned("qwen3", one, template_kwargs={"enable_thinking": False}) == [["A colour.<|im_end|>"]]
    thought = [TURNS[0], THOUGHT]
    assert learned("qwen3", thought) == [["<think>\nadd them\n</think>\n\nIt is 4.<|im_end|>"]]
    channels = (
        "<|channel|>analysis<|message|>add them<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|return|>"
    )
    assert learned("gpt_oss", thought) == [[channels]]
    assert learned("deepseek_r1", thought, loss_on="each") == [["add them\n</think>\n\nIt is 4.<eos>"]]


def test_reasoning_that_a_template_does_not_show_is_named():
    (document,), _ = documents("chatml", [TURNS[0], THOUGHT])
    assert document.left_out == ("assistant reasoning_content",)
    (document,), _ = documents("qwen3", [TURNS[0], THOUGHT])
    assert document.left_out == ()


def test_an_answer_that_a_template_robs_of_a_part_is_refused():
    robbed = [TURNS[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nRed."}]
    with pytest.raises(ValueError, match=r"chat template: .*loss_on=each"):
        learned("deepseek_r1", robbed)


@pytest.mark.parametrize("name, call", [
    ("qwen3", '<think>\n\n</think>\n\n\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'),
    ("deepseek_v3", '<|call|>function<|sep|>add\n```json\n{"a": 2, "b": 3}\n```<|/call|>'),
])  # fmt: skip
def test_tool_calls_are_learned_and_tools_and_replies_are_not(name, call):
    found, tokenizer = documents(name, WITH_TOOLS, loss_on="each")
    end = FAMILIES[name].end
    empty = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    assert [[tokenizer.decode(run) for run in learned_runs(d)] for d in found] == [
        [call + end],
        [f"{empty}It is 5.{end}"],
    ]
    assert ("tools" in found[0].left_out) == (name == "deepseek_v3")  # ours shows no tools
    if name == "qwen3":
        assert '"name": "add"' in tokenizer.decode(found[0].input_ids) and found[0].left_out == ()


def test_an_end_is_added_where_a_template_has_none():
    (document,), _ = documents("glm", TURNS[:2])
    assert document.left_out == (NO_END,) and document.labels[-1] == document.input_ids[-1]
    assert learned("glm", TURNS[:2], append_end=True) == [["A colour, 红色.<|endoftext|>"]]
    assert learned("chatml", TURNS[:2], append_end=True) == learned("chatml", TURNS[:2])


def test_text_that_spells_a_special_token(name="chatml"):
    turns = [
        {"role": "user", "content": "What does <|im_end|> do?"},
        {"role": "assistant", "content": "It ends a turn."},
    ]
    with pytest.raises(ValueError, match=r"spells the special token '<\|im_end\|>'"):
        learned(name, turns)
    found, tokenizer = documents(name, turns, special_text="plain")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert found[0].input_ids.count(end) == 2
    assert "does <|im_end|> do?" in tokenizer.decode(found[0].input_ids)
    found, _ = documents(name, turns, special_text="token")
    assert found[0].input_ids.count(end) == 3


@pytest.mark.parametrize("where", ["reasoning_content", "tool_calls", "tools"])
def test_a_special_token_is_seen_wherever_a_message_spells_it(where, name="qwen3"):
    odd = 'a "quoted" <|im_end|>\nof a line'
    call = {"type": "function", "function": {"name": "add", "arguments": {"text": odd}}}
    tool = {"type": "function", "function": {"name": "add", "description": odd}}
    value = {"reasoning_content": odd, "tool_calls": [call], "tools": [tool]}[where]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    turns[0 if where == "tools" else 1][where] = value
    with pytest.raises(ValueError, match=r"spells the special token '<\|im_end\|>'"):
        learned(name, turns)
    counts = {}
    for special_text in ("plain", "token"):
        found, tokenizer = documents(name, turns, special_text=special_text)
        counts[special_text] = found[0].input_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        assert "<|im_end|>" in tokenizer.decode(found[0].input_ids).replace("<|im_end|>\n<|im_start|>", "")
    assert counts["token"] == counts["plain"] + 1


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_characters_of_a_special_token_add_no_blanks(scheme):
    """With a tokenizer that marks where words begin, a part of a text that is encoded alone would get a mark."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    bpe.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = sorted(set("What does </s> do? It ends a turn.\n[INST]x"))
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["What does it do? It ends a turn."] * 9, trainer)
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '[INST]' + m.content + '\n' if m.role == 'user' else m.content + "
        "eos_token }}{% endfor %}"
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **special)

    def ids(text: str, **settings) -> list[int]:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "It ends a turn."}]
        return Template(tokenizer, TemplateSettings(**settings)).encode([turns])[0][0].input_ids

    plain, without = ids("x</s>x It", special_text="plain"), ids("xx It")
    spelled = [tokenizer.convert_tokens_to_ids(character) for character in "</s>"]
    at = plain.index(spelled[0])
    assert plain[:at] + plain[at + 4 :] == without and plain[at : at + 4] == spelled


def test_plain_text_is_learned_whole():
    assert learned("deepseek_v2", [{"role": "text", "content": "Once upon a time."}]) == [["Once upon a time.<eos>"]]


def test_marks_of_a_template_agree_with_ours():
    found, tokenizer = documents("generation_marks", TURNS)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    theirs = tokenizer.apply_chat_template(TURNS, **options)
    assert found[0].input_ids == theirs["input_ids"]
    assert [int(label != IGNORE) for label in found[0].labels] == theirs["assistant_masks"]


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - REWRITES))
def test_a_conversation_is_rendered_once(name, monkeypatch):
    tokenizer = tokenizer_of(name)
    template, calls = Template(tokenizer), []
    template.encode([TURNS])
    real = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *args, **kw: calls.append(1) or real(*args, **kw))
    other = [m | {"content": m["content"] + " Or not?"} for m in TURNS]
    template.encode([other, other])
    assert len(calls) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_the_end_of_an_answer_is_known(name):
    tokenizer = tokenizer_of(name)
    end = FAMILIES[name].end
    assert Template(tokenizer).end_token == (tokenizer.convert_tokens_to_ids(end) if end else None)


@pytest.mark.parametrize("keys", [{"loss_on": "each"}, {"append_end": True}, {"template_kwargs": {"a": 1}}])
def test_settings_without_effect_on_the_released_template_are_refused(keys):
    (key,) = keys
    with pytest.raises(ValueError, match=f"cannot use {key}=.* with template=released"):
        TemplateSettings("released", **keys)
    TemplateSettings("chat", **keys)


def test_template_kwargs_are_an_object():
    with pytest.raises(ValueError, match="it must be a JSON object"):
        TemplateSettings(template_kwargs=[1])


@pytest.mark.parametrize("template", ["chat", "released"])
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"deepseek_r1"}))  # asks with an open thought
def test_a_question_after_a_system_message_is_asked_as_it_was_trained(name, template):
    tokenizer = tokenizer_of(name)
    made = Template(tokenizer, TemplateSettings(template))
    messages = [{"role": "system", "content": "Be brief."}, *TURNS[:2]]
    (document,) = made.encode([messages])[0]
    before = next(i for i, label in enumerate(document.labels) if label != IGNORE)
    asked = made.encode_prompt(("Be brief.", TURNS[0]["content"]))
    assert document.input_ids[:before][: len(asked)] == asked and "Be brief." in tokenizer.decode(asked)
    assert asked != made.encode_prompt(TURNS[0]["content"])
