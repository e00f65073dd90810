"""The shapes of preference data: two conversations, of which only what differs carries loss."""

import json

import pytest

from training.data.preferences import is_pair, read_chosen, read_pair, unused_in_pair
from training.data.shapes import read_messages

ASK, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)
MASKED = {**ASK, "mask": 1}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
HUMAN, GPT, OTHER = (
    {"from": who, "value": turn["content"]} for who, turn in (("human", ASK), ("gpt", YES), ("gpt", NO))
)
SAME = {
    "texts": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "messages": {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    "a prompt and messages": {"prompt": "q", "chosen": [YES], "rejected": [NO]},
    "whole conversations": {"chosen": [ASK, YES], "rejected": [ASK, NO]},
    "whole conversations and the prompt in them": {"prompt": "q", "chosen": [ASK, YES], "rejected": [ASK, NO]},
    "sharegpt": {"conversations": [HUMAN], "chosen": GPT, "rejected": OTHER},
    "messages before": {"messages": [ASK], "chosen": YES, "rejected": NO},
    "alpaca": {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    "rejected_response": {"messages": [ASK, YES], "rejected_response": "b"},
    "rejected_messages": {"messages": [ASK, YES], "rejected_messages": [ASK, NO]},
    "a table": {"prompt": "q", "chosen": "a", "rejected": "b", "messages": None, "rejected_response": None},
}


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_every_shape_of_one_question_is_the_same_pair(row):
    assert is_pair(row) and read_pair(row, "f:1") == ([MASKED, YES], [MASKED, NO])
    assert read_chosen(row, "f:1") == [MASKED, YES] and not unused_in_pair(row)


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_system_and_tools_come_first_in_both(row):
    for tools in ([TOOL], json.dumps([TOOL])):
        for turns in read_pair({**row, "system": "s", "tools": tools}, "f:1"):
            assert turns[:2] == [{**SYSTEM, "tools": [TOOL], "mask": 1}, MASKED] and len(turns) == 3
    assert not unused_in_pair({**row, "system": "s", "tools": [TOOL]})


def test_only_what_differs_carries_loss():
    chosen, rejected = [SYSTEM, ASK, YES, ASK, YES, ASK, NO], [SYSTEM, ASK, YES, ASK, NO, ASK, NO]
    for row in ({"chosen": chosen, "rejected": rejected}, {"messages": chosen, "rejected_messages": rejected}):
        for turns in read_pair(row, "f:1"):
            assert [turn.get("mask") for turn in turns] == [1, 1, 1, 1, None, None, None]
    row = {"instruction": "Add.", "input": "1 2", "history": [["q", "a"]], "chosen": "3", "rejected": "4"}
    assert [turn["content"] for turn in read_pair(row, "f:1")[0]] == ["q", "a", "Add.\n\n1 2", "3"]


def test_rows_of_well_known_data_sets():
    binarized = {  # as HuggingFaceH4/ultrafeedback_binarized
        **{"prompt": "q", "prompt_id": "1", "chosen": [ASK, YES], "rejected": [ASK, NO]},
        **{"messages": [ASK, YES], "score_chosen": 8.0, "score_rejected": 4.0},
    }
    assert read_pair(binarized, "f:1") == ([MASKED, YES], [MASKED, NO])
    assert sorted(unused_in_pair(binarized)) == ["messages", "prompt_id", "score_chosen", "score_rejected"]
    assert read_messages(binarized, "f:1") == [ASK, YES]  # which method esft may train on
    several = {**SAME["rejected_response"], "prompt": "r", "rejected_messages": [ASK, NO, ASK, NO]}
    assert read_pair(several, "f:1") == ([MASKED, YES], [MASKED, NO])
    assert sorted(unused_in_pair(several)) == ["prompt", "rejected_messages"]
    scored = {"conversations": [{**HUMAN, "id": 3}], "chosen": {**GPT, "score": 1}, "rejected": OTHER}
    assert sorted(unused_in_pair(scored)) == ["chosen.score", "conversations.id"]


WRONG = [
    (
        {"messages": [ASK, YES]},
        "f:1: a row of preference data needs the keys chosen[+]rejected or messages[+]rejected_r",
    ),
    ({"prompt": "q", "chosen": "a", "rejected": None}, "this one has prompt, chosen. Rows without"),
    ({"prompt": "q", "completion": "a"}, "this one has prompt, completion. Rows without a rejected .* method=esft"),
    ({"prompt": "q", "chosen": "a"}, "needs the keys chosen[+]rejected"),
    ({"chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"}, "nothing stands before .*Add prompt"),
    ({"chosen": [YES], "rejected": [NO]}, "nothing stands before chosen and rejected"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "do not differ in an answer. Drop the row"),
    ({"chosen": [ASK, YES], "rejected": [ASK, YES, ASK, NO]}, "do not differ in an answer"),
    ({"chosen": [SYSTEM, ASK, YES], "rejected": [SYSTEM, {**ASK, "content": "r"}, NO]}, "not answer the same question"),
    ({"prompt": "r", "chosen": [ASK, YES], "rejected": [ASK, NO]}, "the prompt is not in it"),
    ({"prompt": "q", "chosen": "a", "rejected": [ASK, NO]}, "is a whole conversation, and the other is not"),
    ({"prompt": "q", "chosen": [ASK, YES], "rejected": "b"}, "is a whole conversation, and the other is not"),
    ({"messages": [ASK, YES], "chosen": "a", "rejected": "b"}, "before chosen and rejected ends with an answer"),
    ({"prompt": "q", "chosen": "a", "rejected": ""}, "f:1, rejected: message 2: the assistant turn is empty"),
    ({"instruction": "q", "history": 1, "chosen": "a", "rejected": "b"}, "'history' must be a list of pairs"),
    ({"prompt": "q", "chosen": 3, "rejected": "b"}, "'chosen' must be a text, a message, or a list of messages"),
    (
        {"prompt": "q", "chosen": [YES], "rejected": [{**NO, "mask": 1}]},
        "f:1, rejected: no assistant turn carries loss",
    ),
    ({"chosen": [ASK, YES, ASK, YES], "rejected": [ASK, YES, {**ASK, "content": "r"}]}, "rejected: no answer carries"),
]


@pytest.mark.parametrize("row, words", WRONG)
def test_a_wrong_row_is_refused_in_one_sentence_with_its_place(row, words):
    with pytest.raises(ValueError, match=words):
        read_pair(row, "f:1")


def test_a_preference_row_is_not_for_other_methods():
    with pytest.raises(ValueError, match=r"Preference rows \(chosen, rejected\) are for method=dpo"):
        read_messages(SAME["texts"], "f:1")
