"""Messages -> tokens and labels, in any chat template.

Labels fall on what the model itself has to say: an answer, and the token that ends it. They are found in the text:

    prompt     User: 2 + 2?\n\nAssistant:                    the turns before, with the template's prompt for an answer
    answer                                It is 4.<eos>      what the turn adds to it, up to the first special token
    after it                                           ...   never generated: a line break, the next header

A conversation is rendered once. What the template writes around contents is known from a skeleton: the same roles with
marks in place of contents, rendered turn by turn. If the skeleton with the contents put in is the rendered text, then
the answers lie where the marks lay. Where it is not, because the template looks into contents, the conversation itself
is rendered turn by turn.

The tokens before an answer are those of the prompt alone, as at generation. If a token would reach over the start or
the end of an answer, the parts are encoded alone.

Some templates show an answer differently once another turn follows. They drop its reasoning (Qwen3, DeepSeek-R1), or
end it with another token (gpt-oss). What to learn is then not in the text of the whole conversation. `loss_on="each"`
makes a document of each answer, as the model is asked for it; `loss_on="last"` keeps the last answer only.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

from training.data.documents import (
    IGNORE,
    NO_END,
    THINK,
    Document,
    Encoded,
    Piece,
    Skeleton,
    TemplateSettings,
    content_marks,
    lacking,
    numbered,
    texts_of,
)
from training.data.shapes import TEXT, conversation


class Template:
    """Renders and encodes conversations for one tokenizer and one `TemplateSettings`."""

    def __init__(self, tokenizer, settings: TemplateSettings | None = None, vocab_size: int | None = None):
        """`vocab_size`: tokens that the model knows, which may be fewer than the tokenizer has. None: not checked."""
        self.tokenizer, self.settings, self.vocab_size = tokenizer, settings or TemplateSettings(), vocab_size
        added = tokenizer.added_tokens_decoder.values()
        special = sorted({str(token) for token in added if token.special}, key=len, reverse=True)
        pattern = "|".join(map(re.escape, special)) or r"(?!)"
        self._special, self._closing = re.compile(pattern), re.compile(rf"(?:{pattern})\Z")
        self._skeletons: dict[tuple, Skeleton | None] = {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells this tokenizer and its template from others."""
        tokenizer = self.tokenizer
        text = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
        parts = (text, str(tokenizer.chat_template), tokenizer.bos_token, tokenizer.eos_token, self.vocab_size)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    # ---------------------------------------------------------------------------------------- text -> tokens

    def encode(self, conversations: list[list[dict]], where: list[str] | None = None) -> list[list[Encoded]]:
        """Return the documents of each conversation: one, or with loss_on="each" one per answer.

        `where` names the conversations in errors.

        Raises:
            ValueError: the answers cannot be found exactly in the template's text, the template refuses the messages,
                a message spells a special token (`special_text`), or a token is not one of the model.
        """
        found, encoded = [], []
        for number, messages in enumerate(conversations):
            with numbered(where, number):
                found.append(self.documents(messages))
        documents = list(itertools.chain(*found))
        texts = [text for document in documents for text in self._batched(document)]
        endings = {ending for d in documents if d.whole and self.tokenizer.is_fast for ending in d.endings()}
        ending_ids = dict(zip(endings, (encoding.ids[-2:] for encoding in self._encode_texts(list(endings)))))
        encodings = iter(self._encode_texts(texts))
        for number, documents in enumerate(found):
            with numbered(where, number):
                encoded.append([self._encoded(document, encodings, ending_ids) for document in documents])
        return encoded

    def _batched(self, document: Document) -> list[str]:
        """Return the texts of a document that are encoded together with those of others."""
        if document.whole:
            return [document.text]
        alone = self.settings.template == "released"  # encodes each piece alone
        return [piece.text for piece in document.pieces if alone and not piece.plain]

    def check_ids(self, ids: list[int]) -> None:
        """Raise ValueError for a token that the model lacks: its embedding has no row for that."""
        if self.vocab_size is not None and (largest := max(ids, default=0)) >= self.vocab_size:
            raise ValueError(lacking(self.tokenizer.decode([largest]), largest, self.vocab_size))

    def _encoded(self, document: Document, encodings: Iterator, ending_ids: dict[str, list[int]]) -> Encoded:
        pieces = document.pieces
        if document.whole:
            encoding = next(encodings)
            if starts := self._starts(encoding, document, ending_ids):
                parts = [encoding.ids[a:b] for a, b in itertools.pairwise([*starts, len(encoding.ids)])]
            else:
                parts = [self._ids(piece.text) for piece in pieces]
                if self.tokenizer.decode(list(itertools.chain(*parts))) != self.tokenizer.decode(encoding.ids):
                    raise ValueError(
                        f"cannot use the chat template: a token of the sample that begins {document.text[:40]!r} spans "
                        "the start or end of an answer. Set template=released."
                    )
        elif self.settings.template == "released":
            parts = [self._plain_ids(p.text) if p.plain else next(encodings).ids for p in pieces]
        else:
            first = self._plain_ids if pieces[0].plain else self._ids
            parts = [first(pieces[0].text), *(self._ids_after(*pair) for pair in itertools.pairwise(pieces))]
        ids = list(itertools.chain(*parts))
        self.check_ids(ids)
        labels = [token if piece.loss else IGNORE for piece, part in zip(pieces, parts) for token in part]
        return Encoded(ids, labels, document.left_out)

    def _starts(self, encoding, document: Document, ending_ids: dict[str, list[int]]) -> list[int] | None:
        """Return the first token of each piece of a text that was encoded whole, or None if a token reaches over a cut.

        A cut is good if the text before it ends with the same tokens when nothing follows, as at generation. What is
        far before a cut has no influence on that.
        """
        ids, starts, cuts = encoding.ids, [0], document.cuts()
        if not self.tokenizer.is_fast:  # it does not say where a token lies in the text
            heads = [self._ids(document.text[:cut]) for cut in cuts]
            return [0, *map(len, heads)] if all(ids[: len(head)] == head for head in heads) else None
        for cut, ending in zip(cuts, document.endings()):
            token, before = encoding.char_to_token(cut), ending_ids[ending]
            if token is None or encoding.token_to_chars(token)[0] != cut or before != ids[token - len(before) : token]:
                return None
            starts.append(token)
        return starts

    def _encode_texts(self, texts: list[str]) -> list:
        """Return an encoding (`ids`, and where tokens lie in the text) of each text."""
        if not self.tokenizer.is_fast:
            return [SimpleNamespace(ids=self._ids(text)) for text in texts]
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding(), backend.no_truncation()
        return backend.encode_batch(texts, add_special_tokens=False)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _plain_ids(self, text: str) -> list[int]:
        """Return the tokens of a text in which special tokens are characters like any other."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _ids_after(self, before: Piece, piece: Piece) -> list[int]:
        """Return the tokens of a piece that follows another. Some tokenizers put a mark before a text that is alone."""
        encode, special = (self._plain_ids, None) if piece.plain else (self._ids, self._closing.search(before.text))
        head = special.group() if special and not before.plain else "\n"
        ids, first = encode(head + piece.text), encode(head)
        return ids[len(first) :] if ids[: len(first)] == first else encode(piece.text)

    # ---------------------------------------------------------------------------------------- messages -> text

    def documents(self, messages: list[dict]) -> list[Document]:
        """Return the text of a conversation's documents, cut into what carries loss and what does not."""
        spelled = [text for text in texts_of(messages) if self._special.search(text)]
        if spelled and self.settings.special_text == "error":
            token = self._special.search(spelled[0]).group()
            raise ValueError(
                f"cannot encode {_name(messages)}: it spells the special token {token!r}. Set special_text=plain to "
                "take it as characters, or special_text=token."
            )
        spelled = spelled if self.settings.special_text == "plain" else []
        if messages[0]["role"] == TEXT:
            pieces = [Piece(self.tokenizer.bos_token or ""), *self._split(messages[0]["content"], spelled, loss=True)]
            return [Document([*pieces, Piece(self.tokenizer.eos_token or "", loss=True)], whole=False)]
        if self.settings.loss_on == "last":
            last = max(i for i, message in enumerate(messages) if _learned(message))
            messages = [m | {"mask": 1} if i < last else m for i, m in enumerate(messages)]
        if self.settings.template == "released":
            return [self._released(messages, spelled)]
        if self.settings.loss_on == "all":
            text, spans, complete = self._spans(messages)
            found = [(text, spans)]
        else:
            answers = [i for i, message in enumerate(messages) if _learned(message)]
            found, complete = [self._answer(messages[: i + 1]) for i in answers], False
        left_out = () if complete else self._left_out(messages, "".join(text for text, _ in found))
        if not self.settings.append_end and not all(self._ends(text[a:b]) for text, spans in found for a, b in spans):
            left_out += (NO_END,)
        return [Document(self._pieces(text, spans, spelled), not spelled, left_out) for text, spans in found]

    def encode_prompt(self, prompt: str | tuple[str, str]) -> list[int]:
        """Return the tokens before the answer to `prompt`, a user's plain text, as `encode` has them.

        A pair is a system message's text and the user's. A prompt that is rendered already ("User: ... Assistant:", as
        in the published evaluation files) gets BOS only.
        """
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        system, prompt = ("", prompt) if isinstance(prompt, str) else prompt
        if not system and prompt.startswith("User: ") and prompt.endswith("Assistant:"):
            return bos + self._ids(prompt)
        if self.settings.template == "released":
            return bos + self._ids(f"{system.strip()}\n\nUser: {prompt.strip()}\n\nAssistant:".lstrip())
        turns = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        return self._ids(self._render(turns[not system :], answer_next=True))

    @functools.cached_property
    def end_token(self) -> int | None:
        """The token that ends an answer in training, or None if the template ends it with nothing."""
        alone = Template(self.tokenizer, replace(self.settings, loss_on="last"))
        for answer in ("7", f"{THINK}\n7\n</think>\n\n7"):  # some prompts open a thought
            with contextlib.suppress(ValueError):
                (document,) = alone.encode([conversation("7", answer)["messages"]])[0]
                learned = [label for label in document.labels if label != IGNORE]
                return learned[-1] if NO_END not in document.left_out else None
        return None

    def end_tokens(self, generation_config) -> list[int]:
        """Return all tokens that end an answer: the tokenizer's, the model's, and the one that training teaches."""
        configured = generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        return sorted({i for i in [self.tokenizer.eos_token_id, self.end_token, *configured] if i is not None})

    @functools.cached_property
    def opens_thought(self) -> bool:
        """Whether the prompt for an answer ends with an open <think>."""
        if self.settings.template == "released":
            return False
        return self._render([{"role": "user", "content": "7"}], answer_next=True).rstrip().endswith(THINK)

    @functools.cached_property
    def final_channel(self) -> list[int]:
        """The tokens before the answer proper where a model writes into channels (gpt-oss); empty elsewhere."""
        return self._ids("<|channel|>final<|message|>") if "<|channel|>" in self.tokenizer.get_vocab() else []

    def _pieces(self, text: str, spans: list[tuple[int, int]], spelled: list[str]) -> list[Piece]:
        pieces, at = [], 0
        for start, end in spans:
            pieces += self._split(text[at:start], spelled) + self._split(text[start:end], spelled, loss=True)
            if self.settings.append_end and not self._ends(text[start:end]):
                pieces.append(Piece(self.tokenizer.eos_token, loss=True))
            at = end
        return [piece for piece in [*pieces, *self._split(text[at:], spelled)] if piece.text]

    def _split(self, text: str, spelled: list[str], loss: bool = False) -> list[Piece]:
        """Cut a text where it holds parts of messages that spell special tokens, as they are or in JSON."""
        if not spelled:
            return [Piece(text, loss)]
        shown = {form for text in spelled for form in (text.strip(), json.dumps(text, ensure_ascii=False)[1:-1])}
        parts = re.split("(" + "|".join(map(re.escape, sorted(shown, key=len, reverse=True))) + ")", text)
        return [Piece(part, loss, plain=number % 2 == 1) for number, part in enumerate(parts) if part]

    def _ends(self, answer: str) -> bool:
        """Whether the last thing in the text of an answer is a special token."""
        return self._closing.search(answer) is not None

    def _spans(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]], bool]:
        """Return the text of a conversation, (start, end) of each answer, and whether it surely shows all contents."""
        if all(message.keys() <= {"role", "content", "mask"} for message in messages):
            key = tuple((message["role"], _learned(message)) for message in messages)
            if key not in self._skeletons:
                self._skeletons[key] = self._skeleton(messages)
            if skeleton := self._skeletons[key]:
                text = self._render(messages)
                if contents := skeleton.contents(text, messages):
                    spans = [(contents[i][0] + start, contents[i][1] + end) for i, start, end in skeleton.answers]
                    return text, spans, True
        return *self._turn_by_turn(messages), False

    def _skeleton(self, messages: list[dict]) -> "Skeleton | None":
        marks = content_marks(messages)
        try:
            text, spans = self._turn_by_turn([{**m, "content": mark} for m, mark in zip(messages, marks)])
        except ValueError:
            return None
        between = re.split("|".join(marks), text)
        if len(between) != len(messages) + 1:
            return None
        answers = [i for i, message in enumerate(messages) if _learned(message)]
        where = [(i, start - text.index(marks[i]), end - text.index(marks[i]) - len(marks[i]))
                 for i, (start, end) in zip(answers, spans)]  # fmt: skip
        return Skeleton(between, where)

    def _turn_by_turn(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """Find the answers by rendering the conversation up to each one, without it and with it."""
        text, spans = self._render(messages), []
        for i, message in enumerate(messages):
            if not _learned(message):
                continue
            before, after = self._render(messages[:i], answer_next=True), self._render(messages[: i + 1])
            end = self._end(after, len(before), message)
            if not after.startswith(before) or text[:end] != after[:end]:
                raise ValueError(
                    f"cannot use the chat template: it changes the text around message {i + 1} of {_name(messages)} "
                    "when more turns follow. Set loss_on=each (a document of each answer), loss_on=last or "
                    'template=released, or give the answer "mask": 1.'
                )
            spans.append((len(before), end))
        return text, spans

    def _answer(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text that asks for the last message, and the message as the model has to say it."""
        before, after, last = self._render(messages[:-1], answer_next=True), self._render(messages), messages[-1]
        if after.startswith(before):
            end = self._end(after, len(before), last)
            return after[:end], [(len(before), end)]
        answer = last["content"]
        if last.get("reasoning_content"):
            answer = f"{THINK}\n{last['reasoning_content'].strip()}\n</think>\n\n{answer}"
        opened = before.rstrip()
        if not opened.endswith(THINK) or not answer.startswith(THINK) or "</think>" not in answer:
            raise ValueError(
                f"cannot use the chat template: it does not show the last answer of {_name(messages)} as it asks for "
                "it. Set template=released, or other template_kwargs."
            )
        space = before[len(opened) :]
        answer = answer[len(THINK) :].lstrip() if space else answer[len(THINK) :]
        closing = self._special.search(after, after.rfind(answer.rsplit("</think>", 1)[1].strip()))
        text = before + answer + (closing.group() if closing else "")
        return text, [(len(before), len(text))]

    def _end(self, text: str, start: int, message: dict) -> int:
        """Return where an answer that starts at `start` ends in a text that ends with it.

        That is behind the first special token after its content. What follows, a line break or the next header, is
        never generated.
        """
        content = message["content"].strip()
        at = text.find(content, start)
        if content and at >= 0 and not message.get("tool_calls"):
            closing = self._special.search(text, at + len(content))
            return closing.end() if closing else len(text)
        turn = text.rstrip()
        return len(turn) if self._ends(turn) else len(text)

    def _left_out(self, messages: list[dict], text: str) -> tuple[str, ...]:
        """Return what of the messages is not in the text. Raise ValueError if it is a part of an answer to learn."""
        squeezed = "".join(text.split())
        lost = []
        for number, message in enumerate(messages, 1):
            shown = {"content": [message["content"]], "reasoning_content": [message.get("reasoning_content", "")]}
            shown["tool_calls"] = [call["function"]["name"] for call in message.get("tool_calls", ())]
            for key, parts in shown.items():
                if all("".join(part.split()) in squeezed for part in parts):
                    continue
                if key == "content" and _learned(message):
                    raise ValueError(
                        f"cannot use the chat template: it leaves out a part of message {number} of {_name(messages)}. "
                        "Set loss_on=each, template=released or other template_kwargs."
                    )
                lost.append(f"{message['role']} {key}")
        if messages[0].get("tools"):
            without = [{k: v for k, v in m.items() if k != "tools"} for m in messages]
            lost += ["tools"] * (self._render(messages) == self._render(without))
        return tuple(dict.fromkeys(lost))

    def _released(self, messages: list[dict], spelled: list[str]) -> Document:
        """Return the pieces of the format of the published checkpoints, each of which is encoded alone."""
        eos, text, lost, pieces = self.tokenizer.eos_token, "", [], [Piece(self.tokenizer.bos_token or "")]
        for message in messages:
            role, content = message["role"], message["content"].strip()
            if role == "assistant":
                loss = _learned(message)
                answer = [*self._split(f" {content}", spelled, loss), Piece(eos, loss)]
                pieces, text = [*pieces, *self._split(f"{text}Assistant:", spelled), *answer], ""
            else:
                text += f"User: {content}\n\n" if role == "user" else f"{content}\n\n"
            lost += [key for key in ("reasoning_content", "tool_calls", "tools") if message.get(key)]
        pieces += self._split(text, spelled)
        return Document([p for p in pieces if p.text], whole=False, left_out=tuple(dict.fromkeys(lost)))

    def _render(self, messages: list[dict], answer_next: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                "cannot use the chat template: the tokenizer has none. Give template=released, or add "
                "a chat_template to the tokenizer."
            )
        plain = [{key: value for key, value in m.items() if key not in ("mask", "tools")} for m in messages]
        tools = messages[0].get("tools") if messages else None
        options = {"tokenize": False, "add_generation_prompt": answer_next, **self.settings.template_kwargs}
        try:
            return self.tokenizer.apply_chat_template(plain, tools=tools, **options)
        except Exception as error:  # a template is code
            raise ValueError(f"cannot use the chat template: it refuses {_name(messages)} ({error})") from error


def _learned(message: dict) -> bool:
    return message["role"] == "assistant" and not message.get("mask")


def _name(messages: list[dict]) -> str:
    return f"the sample that begins {messages[0]['content'][:40]!r}"
