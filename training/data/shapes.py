"""The shapes that a row of training data may have, and the messages that each becomes.

    {"messages": [{"role", "content", ...}, ...], "tools"?, "system"?}          also with "from" and "value"
    {"conversations": [{"from", "value"}, ...], "tools"?, "system"?}            ShareGPT, also with role and content
    {"prompt", "completion", "system"?}                                         texts, or lists of messages
    {"instruction", "input"?, "output", "history"?, "system"?}                  Alpaca
    {"text"}                                                                    loss on all of it

A conversation is a list of messages {"role", "content"}. A message may also have "reasoning_content", "tool_calls",
"tool_call_id", "name", and "mask": 1 if it carries no loss. The first may have "tools": the tools of the row.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator

from deepseek.files import suggest

ROLES = ("system", "user", "assistant", "tool")
TEXT = "text"  # the role of the one message of a plain text
SPEAKERS = {  # names of other tools
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
SHAPES = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",))
ALSO = {  # what a row of a shape may hold beside its keys
    "messages": ("tools", "system"),
    "conversations": ("tools", "system"),
    "prompt": ("system", "tools"),
    "instruction": ("input", "history", "system"),
    "text": (),
}
REASONING = ("reasoning_content", "reasoning", "thinking")
MARKS = {"mask": 1, **dict.fromkeys(("weight", "train", "trainable", "training", "loss"), 0)}  # value of no loss
AVOIDED = ("label", "kto_tag")  # keys that are false in rows of KTO whose answer is a bad one
MESSAGE_KEYS = ("role", "content", "from", "value", "tool_calls", "tool_call_id", "name", *REASONING, *MARKS)


def read_messages(row: dict, where: str) -> list[dict]:
    """Return the messages of a row of any shape. A ValueError names the row by `where` and says what is wrong."""
    try:
        turns = _turns(row)
        if complaint := next(_complaints(turns), None):
            raise ValueError(complaint)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return turns


def conversation(question: str, answer: str) -> dict:
    """Return a row of a user's question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def unused_fields(row: dict) -> Counter:
    """Count the fields of a row and of its messages that `read_messages` leaves out, by name."""
    shape = _shape(row)
    return unused_beside(row, (*shape, *ALSO[shape[0]]), shape[:1])


def unused_beside(row: dict, used: Iterable[str], with_turns: Iterable[str]) -> Counter:
    """Count the fields of a row that are not `used`, and those of the messages under the keys `with_turns`, by name."""
    found = Counter(key for key, value in row.items() if value is not None and key not in used)
    for name in with_turns:
        turns = [row[name]] if isinstance(row[name], dict) else row[name]
        for turn in turns if isinstance(turns, list) else ():
            unused = (key for key, value in turn.items() if value is not None and key not in MESSAGE_KEYS)
            found.update(f"{name}.{key}" for key in unused)
    return found


def _shape(row: dict) -> tuple[str, ...]:
    keys = {key for key, value in row.items() if value is not None}  # tables have None in place of a missing key
    if shape := next((shape for shape in SHAPES if keys >= set(shape)), None):
        return shape
    wanted = " or ".join("+".join(shape) for shape in SHAPES)
    found = ", ".join(key for key in row if key in keys)
    hint = next(filter(None, (suggest(key, itertools.chain(*SHAPES)) for key in row)), "")
    if keys >= {"chosen", "rejected"}:
        hint = ". Preference rows (chosen, rejected) are for method=dpo"
    raise ValueError(f"a row needs the keys {wanted}, this one has {found or 'none'}{hint}")


def _turns(row: dict) -> list[dict]:
    shape = _shape(row)
    if bad := [key for key in AVOIDED if row.get(key) is False]:
        raise ValueError(f"{bad[0]!r} is false, so its answer is not one to learn. Drop such rows.")
    if shape == ("text",):
        return [{"role": TEXT, "content": row["text"]}]
    if shape[0] == "instruction":
        turns = alpaca(row)
    elif shape[0] == "prompt":
        sides = zip(shape, ("user", "assistant"))
        parts = [row[k] if isinstance(row[k], list) else [{"role": r, "content": row[k]}] for k, r in sides]
        turns = [*parts[0], *parts[1]]
        if isinstance(row["prompt"], list):  # the loss is on the completion alone
            turns = [*({**turn, "mask": 1} for turn in parts[0] if isinstance(turn, dict)), *parts[1]]
    else:
        turns = row[shape[0]]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{shape[0]!r} must be a list of objects")
    turns = [_message(turn, f"message {number}") for number, turn in enumerate(turns, 1)]
    if row.get("system"):
        turns.insert(0, {"role": "system", "content": row["system"]})
    if row.get("tools") and turns:
        turns[0]["tools"] = _tools(row["tools"])
    return turns


def alpaca(row: dict) -> list[dict]:
    """Return the turns of a row with "instruction" and "output"."""
    instruction, given = row["instruction"], row.get("input")
    for key, value in (("instruction", instruction), ("input", given)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{key!r} must be text, not {type(value).__name__}")
    past = row.get("history") or []
    if not isinstance(past, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in past):
        raise ValueError("'history' must be a list of pairs [question, answer]")
    pairs = [*past, (f"{instruction}\n\n{given}" if given else instruction, row["output"])]
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]


def _message(turn: dict, at: str) -> dict:
    """Return a message with the keys that a template knows, and "mask" where a mark of any name takes it out."""
    turn = {key: value for key, value in turn.items() if value is not None}
    speaker = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    message = {"role": SPEAKERS.get(str(speaker), speaker)}
    if isinstance(content, list):  # parts, as for models that see images
        content = _join_parts(content, at)
    calls = turn.get("tool_calls")
    if speaker == "function_call":
        calls, content, at = content, "", f"{at} (function_call)"
    if calls:
        message["tool_calls"] = _calls(calls, at)
        content = "" if content is None else content
    message["content"] = content
    message |= {key: turn[key] for key in ("tool_call_id", "name") if key in turn}
    for key in REASONING:
        if turn.get(key):
            message.setdefault("reasoning_content", turn[key])
    for key, out in MARKS.items():
        if (value := turn.get(key, 1 - out)) not in (0, 1):
            part = ": a weight between 0 and 1 is not supported" if isinstance(value, float) else ""
            raise ValueError(f'{at}: "{key}" must be 0 or 1, not {value!r:.60}{part}')
        if value == out:
            message["mask"] = 1
    return message


def _join_parts(parts: list, at: str) -> str:
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{at}: the content must be text, not a list with other parts. Only text can be trained on.")
    return "".join(texts)


def _calls(calls: object, at: str) -> list[dict]:
    """Return tool calls as templates expect them, with arguments as an object."""
    calls = _parsed(calls, f"{at}: the tool calls")
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'{at}: a tool call needs a "name" and "arguments", found {call!r:.60}')
        arguments = _parsed(function.get("arguments", function.get("parameters", {})), f"{at}: the arguments")
        own = {"id": call["id"]} if call.get("id") else {}
        result.append({"type": "function", **own, "function": {"name": function["name"], "arguments": arguments}})
    return result


def _tools(tools: object) -> list[dict]:
    tools = _parsed(tools, "'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' must be a list of objects")
    return tools


def _parsed(value: object, what: str) -> object:
    """Return `value`, or what it says where it is JSON in a text, as in tables."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be JSON ({error})") from error


def _complaints(turns: list[dict]) -> Iterator[str]:
    """Yield what is wrong with the messages of a row."""
    for number, turn in enumerate(turns, 1):
        role, content, at = turn["role"], turn["content"], f"message {number}"
        answer = role == "assistant" and not turn.get("mask")
        if role not in (*ROLES, TEXT):
            names = (*ROLES, *SPEAKERS)
            yield f"{at}: unknown role {role!r}{suggest(str(role), names)}. Known are {', '.join(names)}."
        if not isinstance(content, str):
            yield f"{at}: the content of {role} must be text, not {type(content).__name__}"
        if not isinstance(turn.get("reasoning_content", ""), str):
            yield f"{at}: the reasoning must be text, not {type(turn['reasoning_content']).__name__}"
        if role in ("assistant", TEXT) and not content.strip() and not turn.get("tool_calls"):
            yield f"{at}: the {role} turn is empty. Fill it or drop the row."
        if answer and number == 1:
            yield f'{at}: an assistant turn comes first and answers nothing. Drop it or give it "mask": 1.'
    if not any(turn["role"] == TEXT or (turn["role"] == "assistant" and not turn.get("mask")) for turn in turns):
        yield "no assistant turn carries loss. Add one or drop the row."
