"""The shapes of preference data, for method=dpo: what comes before two answers, the chosen and the rejected one.

    {"prompt", "chosen", "rejected"}                          texts, or lists of messages
    {"chosen", "rejected"}                                    whole conversations, which begin with the same messages
    {"conversations" or "messages", "chosen", "rejected"}     messages before the answers (ShareGPT)
    {"instruction", "input"?, "chosen", "rejected"}           Alpaca, also with "history"
    {"messages", "rejected_response"}                         the last message is the chosen answer
    {"messages", "rejected_messages"}                         whole conversations

An answer is a text, a message, or a list of messages. "system" and "tools" may stand beside, and messages are those of
shapes.py. A row becomes two conversations. Only the assistant's turns after their common beginning carry loss.
"""

from collections import Counter

from training.data.shapes import ALSO, alpaca, read_messages, unused_beside

SIDES = ("chosen", "rejected")
REJECTED = ("rejected_response", "rejected_messages")  # beside "messages"
BEGINNINGS = ("prompt", "conversations", "messages", "instruction")
ASKING = ("system", "user", "human")  # who begins a conversation, and never an answer


def is_pair(row: dict) -> bool:
    """Return whether a row is of preference data."""
    keys = _keys(row)
    return keys >= set(SIDES) or ("messages" in keys and bool(keys & set(REJECTED)))


def read_chosen(row: dict, where: str) -> list[dict]:
    """Return the messages of a row: in preference data, the conversation with the chosen answer."""
    return read_pair(row, where)[0] if is_pair(row) else read_messages(row, where)


def read_pair(row: dict, where: str) -> tuple[list[dict], list[dict]]:
    """Return the conversations with the chosen and with the rejected answer. What both begin with has "mask".

    Raises:
        ValueError: the row is no preference data, or something in it is wrong. `where` names it.
    """
    beside = {key: row[key] for key in ("system", "tools") if row.get(key)}
    try:
        sides = _conversations(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    pair = [read_messages({"messages": turns, **beside}, f"{where}, {side}") for side, turns in zip(SIDES, sides)]
    shortest = min(map(len, pair))
    shared = next((number for number in range(shortest) if pair[0][number] != pair[1][number]), shortest)
    if shared == shortest:
        raise ValueError(f"{where}: chosen and rejected do not differ in an answer. Drop the row.")
    if all(turn["role"] == "system" for turn in pair[0][:shared]):
        raise ValueError(f"{where}: chosen and rejected do not answer the same question. Give it as prompt.")
    if all(turns[shared - 1]["role"] == turns[shared]["role"] == "assistant" for turns in pair):
        raise ValueError(f"{where}: what stands before chosen and rejected ends with an answer. Leave that out.")
    masked = [[*({**turn, "mask": 1} for turn in turns[:shared]), *turns[shared:]] for turns in pair]
    for side, turns in zip(SIDES, masked):
        if not any(turn["role"] == "assistant" and not turn.get("mask") for turn in turns):
            raise ValueError(f"{where}, {side}: no answer carries loss. Add one or drop the row.")
    return masked[0], masked[1]


def unused_in_pair(row: dict) -> Counter:
    """Count the fields of a row and of its messages that `read_pair` leaves out, by name."""
    beginning = _beginning(row)
    keys = [*_answers(row), *([beginning] if beginning else [])]
    return unused_beside(row, {*keys, *ALSO.get(beginning, ()), "system", "tools"}, keys)


def _keys(row: dict) -> set[str]:
    return {key for key, value in row.items() if value is not None}  # tables have None in place of a missing key


def _answers(row: dict) -> tuple[str, ...]:
    """Return the keys of the answers: chosen and rejected, or the rejected one beside "messages"."""
    keys = _keys(row)
    return SIDES if keys >= set(SIDES) else tuple(key for key in REJECTED if key in keys)[:1]


def _is_whole(answer: object) -> bool:
    """Return whether what stands for an answer is a whole conversation."""
    first = answer[0] if isinstance(answer, list) and answer else None
    return isinstance(first, dict) and first.get("role", first.get("from")) in ASKING


def _beginning(row: dict) -> str | None:
    """Return the key of the messages before the answers. Whole conversations need none, but may have a prompt."""
    if _answers(row) != SIDES:
        return "messages"
    whole = _is_whole(row.get("chosen"))
    return next((key for key in BEGINNINGS[: 1 if whole else None] if key in _keys(row)), None)


def _conversations(row: dict) -> tuple[list, list]:
    if not is_pair(row):
        found = ", ".join(key for key in row if key in _keys(row)) or "none"
        raise ValueError(
            "a row of preference data needs the keys chosen+rejected or messages+rejected_response, this one has "
            f"{found}. Rows without a rejected answer are for method=esft"
        )
    *_, rejected = answers = {key: _turns(row[key], key) for key in _answers(row)}
    beginning = _beginning(row)
    if beginning == "instruction":
        before = alpaca({**row, "output": ""})[:-1]
    else:
        before = _turns(row[beginning], beginning, "user") if beginning else []
    if rejected in REJECTED:
        same = [] if rejected == "rejected_messages" else before[:-1]
        return before, [*same, *answers[rejected]]
    if _is_whole(answers["chosen"]) != _is_whole(answers["rejected"]):
        raise ValueError("one of chosen and rejected is a whole conversation, and the other is not. Make both alike.")
    if _is_whole(answers["chosen"]):  # what a prompt says is in them
        contents = [turn.get("content", turn.get("value")) for turn in answers["chosen"]]
        if not all(turn.get("content", turn.get("value")) in contents for turn in before):
            raise ValueError("chosen is a whole conversation, and the prompt is not in it. Leave out one of them.")
        before = []
    elif not before:
        raise ValueError("nothing stands before chosen and rejected. Add prompt, or make them whole conversations.")
    return [*before, *answers["chosen"]], [*before, *answers["rejected"]]


def _turns(value: object, key: str, role: str = "assistant") -> list[dict]:
    turns = [{"role": role, "content": value}] if isinstance(value, str) else value
    turns = [turns] if isinstance(turns, dict) else turns
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{key!r} must be a text, a message, or a list of messages")
    return turns
