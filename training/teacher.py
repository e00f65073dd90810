"""What a teacher says about documents, kept in a folder: its k most likely tokens at every label, and the rest.

    DIR/manifest.json            the teacher, its vocabulary, the template, top_k; it is written last
    DIR/logits-00001.safetensors the documents of some packs, one after the other:
        keys        int64 (D)        of each document, by its tokens and labels
        starts      int64 (D + 1)    where its labels begin
        ids         int32 (N, k)     the most likely tokens at each of N labels, best first
        log_probs   fp16 (N, k + 1)  log p of each, and log of what all other tokens have together

A document is found by its tokens and labels. So packing, order, sampling and the number of processes do not matter, and
one folder serves several runs. Each part is mapped into memory and read where it is asked for.

Legend: D documents, N label tokens, k tokens of the teacher, V vocabulary.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek.files import read_json
from training.data import Pack, Packs, Template, unpack
from utils import counted

MANIFEST = "manifest.json"
LEAST = -1e4  # of a log-probability in a file: in fp16 there is no room for much less


def key_of(document: Pack) -> int:
    """Return the key of a document as it lies in a pack."""
    digest = hashlib.sha256(np.asarray([document.input_ids, document.labels], np.int64).tobytes()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def top_and_rest(log_MV: Tensor, ids_Mk: Tensor) -> Tensor:
    """Return log-probabilities (M, k + 1): of the tokens `ids_Mk`, and of all others together."""
    rest_M1 = log_MV.scatter(1, ids_Mk, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_MV.gather(1, ids_Mk), rest_M1], 1)


def describe(template: Template) -> dict:
    """Return what the documents of a folder depend on beside the rows: vocabulary and template."""
    vocabulary, settings = template.tokenizer.get_vocab(), template.settings
    text = template.tokenizer.chat_template if settings.template == "chat" else None
    return {
        "vocabulary": hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest(),
        "tokens": max(vocabulary.values()) + 1,
        "template": {**dataclasses.asdict(settings), "text": text},
    }


def read_part(path: Path, *names: str) -> tuple:
    """Return the metadata of a part, and the arrays of these names."""
    try:
        with safe_open(path, "np") as part:
            return part.metadata() or {}, *(part.get_tensor(name) for name in names)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"cannot use {path}: missing or damaged ({error}). Remove it, and run scripts/teacher_logits.py again."
        ) from error


class Teacher:
    """A folder of scripts/teacher_logits.py, open for reading.

    Raises:
        ValueError: a file of it is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise ValueError(
                f"cannot distil from {folder}: it is neither base nor a folder that scripts/teacher_logits.py has "
                "finished. Run that first."
            )
        self.manifest = read_json(self.folder / MANIFEST, "vocabulary", "tokens", "template", "top_k", "parts")
        found = []
        for number, name in enumerate(self.manifest["parts"]):
            _, keys_D, starts = read_part(self.folder / name, "keys", "starts")
            found.append(np.stack([keys_D, np.full_like(keys_D, number), starts[:-1], starts[1:]]))
        found = np.concatenate(found, 1)
        self.keys_D, *self.places = found[:, found[0].argsort(kind="stable")]

    def __contains__(self, key: int) -> bool:
        at = self.keys_D.searchsorted(key)
        return at < len(self.keys_D) and self.keys_D[at] == key

    def read(self, document: Pack) -> tuple[Tensor, Tensor]:
        """Return (ids (n, k), log-probabilities (n, k + 1)) at the n labels of a document that is there."""
        number, start, end = (int(values[self.keys_D.searchsorted(key_of(document))]) for values in self.places)
        with safe_open(self.folder / self.manifest["parts"][number], "pt") as part:
            return part.get_slice("ids")[start:end], part.get_slice("log_probs")[start:end]

    def check(self, template: Template, vocab_size: int, packs: Packs, wanted: Iterable[int]) -> None:
        """Check that this teacher fits a run: its tokens, and a document of the folder for each in `wanted` packs.

        vocab_size: tokens that the student knows.

        Raises:
            ValueError: it does not.
        """
        cannot, now = f"cannot distil from {self.folder}", describe(template)
        if now["vocabulary"] != self.manifest["vocabulary"] or self.manifest["tokens"] > vocab_size:
            raise ValueError(f"{cannot}: its teacher has other tokens than this model. Give a teacher with the same.")
        was, now = self.manifest["template"], now["template"]
        if differing := [key for key in now if now[key] != was.get(key)]:
            what = ", ".join(differing).replace("text", "the text of the chat template")
            raise ValueError(
                f"{cannot}: its documents were made otherwise ({what}). Make it again with these settings."
            )
        documents = unpack(packs[index] for index in wanted)
        if missing := [document for document in documents if key_of(document) not in self]:
            raise ValueError(
                f"{cannot}: it lacks {len(missing):,} of {counted(len(documents), 'document')}. Run "
                "scripts/teacher_logits.py on the same data, with the same seq_length."
            )
