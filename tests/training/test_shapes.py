"""The shapes of a row, and the messages that each becomes."""

import json

import pytest

from training.data.shapes import read_messages, unused_fields

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
REPLY = {"role": "tool", "content": "2"}
SAME = {
    "messages": {"messages": [ASK, ANSWER]},
    "messages with from and value": {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "conversations with role and content": {"conversations": [ASK, ANSWER]},
    "text parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
    "texts": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
}
WITH_TOOLS = {
    "messages": {"messages": [ASK, {**CALLING, "content": None}, REPLY, ANSWER], "tools": [TOOL]},
    "JSON in texts": {
        "messages": [ASK, {**CALLING, "tool_calls": json.dumps([CALL])}, REPLY, ANSWER],
        "tools": json.dumps([TOOL]),
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps([TOOL]),
    },
}  # fmt: skip


def read(row: dict) -> list[dict]:
    return read_messages(row, "f:1")


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_shapes_of_one_question_are_the_same_messages(row):
    assert read(row) == [ASK, ANSWER] and not unused_fields(row)


@pytest.mark.parametrize("row", WITH_TOOLS.values(), ids=WITH_TOOLS)
def test_tools_calls_and_replies_are_kept(row):
    assert read(row) == [{**ASK, "tools": [TOOL]}, CALLING, REPLY, ANSWER] and not unused_fields(row)


@pytest.mark.parametrize("row", [*SAME.values()][:1] + [*SAME.values()][2:3] + [*SAME.values()][-2:])
def test_a_system_text_beside_the_turns_comes_first(row):
    assert read({**row, "system": "s"}) == [{"role": "system", "content": "s"}, ASK, ANSWER]


def test_history_and_input_of_alpaca():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["q", "a"]]}
    assert [m["content"] for m in read(row)] == ["q", "a", "Add.\n\n1 2", "3"]


def test_only_the_completion_of_messages_carries_loss():
    row = {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]}
    assert [m.get("mask") for m in read(row)] == [1, 1, 1, None]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(key):
    assert read({"messages": [ASK, {**ANSWER, key: "hm"}]})[1]["reasoning_content"] == "hm"


@pytest.mark.parametrize(
    "name, out", [("mask", 1), ("mask", True), ("weight", 0.0), ("train", False), ("training", False), ("loss", 0)]
)
def test_a_mark_of_any_name_takes_a_turn_out(name, out):
    assert read({"messages": [ASK, {**ANSWER, name: out}, ASK, ANSWER]})[1]["mask"] == 1
    assert "mask" not in read({"messages": [ASK, {**ANSWER, name: 1 - out}]})[1]


@pytest.mark.parametrize("row, told", [
    ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, "message 2: .*between 0 and 1"),
    ({"prompt": "q", "completion": "a", "label": False}, "'label' is false, so its answer is not one to learn"),
    ({"messages": [ASK, ANSWER], "kto_tag": False}, "'kto_tag' is false"),
    ({"messages": [ASK, {**ANSWER, "mask": "1"}]}, 'message 2: "mask" must be 0 or 1'),
    ({"messages": [ASK, {**ANSWER, "content": None}]}, "message 2: the content of assistant must be text"),
    ({"messages": [{**ASK, "content": [{"type": "image"}]}, ANSWER]}, "message 1: the content must be text"),
    ({"messages": [ASK, {**CALLING, "tool_calls": [{"arguments": {}}]}]}, 'message 2: a tool call needs a "name"'),
    ({"messages": [ASK, {**CALLING, "tool_calls": "{"}]}, "message 2: the tool calls must be JSON"),
    ({"messages": [ASK, ANSWER], "tools": "{}"}, "'tools' must be a list"),
    ({"instruction": ["Add."], "output": "3"}, "'instruction' must be text"),
    ({"instruction": "Add.", "output": "3", "history": ["q"]}, "'history' must be a list of pairs"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "Preference rows"),
])  # fmt: skip
def test_what_cannot_be_trained_on_is_refused_by_row(row, told):
    with pytest.raises(ValueError, match=rf"^f:1: .*{told}"):
        read(row)


def test_fields_without_use_are_counted():
    row = {"messages": [{**ASK, "time": 3}, {**ANSWER, "time": 4, "name": None}], "id": 1, "source": None}
    assert unused_fields(row) == {"id": 1, "messages.time": 2}
