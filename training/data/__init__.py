"""The data of a run: rows -> messages -> text -> tokens and labels -> packs -> tensors.

    sources.py     names, files and hub ids -> rows
    shapes.py      a row -> messages
    preferences.py a row of preference data -> the messages of two conversations
    templates.py   messages -> tokens and labels
    documents.py   what lies between: pieces of text, documents
    replay.py      which rows of a general data set stand beside those of the task
    packs.py       documents -> packs -> tensors

Tokens are made once, by all cores, and kept in memory-mapped tables. A second run of the same data starts at once, and
all processes of a run open the same files. What a run needs in memory is a few numbers per document.
"""

import functools
import hashlib
import json
import os
import random
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from deepseek.files import sha256
from deepseek.loading import vocab_size
from training.data.documents import (
    IGNORE,
    Documents,
    Encoded,
    Skeleton,
    TemplateSettings,
    add_template_flags,
    content_marks,
    template_settings,
)
from training.data.packs import Pack, Packs, best_fit, collate, has_label, pack, pack_of, pack_rows, sample_name, unpack
from training.data.preferences import SIDES, is_pair, read_chosen, read_pair, unused_in_pair
from training.data.replay import add_replay
from training.data.shapes import SHAPES, conversation, read_messages, unused_fields
from training.data.sources import Rows, dataset_files, is_known, open_rows, resolve, stream_rows, take_rows
from training.data.templates import Template

if TYPE_CHECKING:
    from deepseek.process_groups import Ranks
    from training.config import RunConfig

BATCH = 256  # conversations that are encoded at a time
FEW = 2000  # rows that are encoded without a progress bar; more are shared out to processes, so many to each
SOURCES = [Path(__file__).with_name(name) for name in ("shapes.py", "preferences.py", "documents.py", "templates.py")]


def features() -> "datasets.Features":  # noqa: F821
    """Return the columns of a table of documents."""
    import datasets  # slow, and not every command reads data

    int32 = datasets.Value("int32")
    columns = {"input_ids": datasets.List(int32), "labels": datasets.List(int32)}
    columns |= {"length": int32, "learned": int32, "row": int32, "notes": datasets.List(datasets.Value("string"))}
    return datasets.Features(columns)


def encode_rows(
    rows: Rows, template: Template, processes: int | None = None, quiet: bool = False, pairs: bool = False
) -> Documents:
    """Encode the rows of a data set, or open what an earlier call made of them.

    With `pairs`, the rows are preference data. A row becomes two documents: the chosen answer, then the rejected one.

    Of several processes of a machine that call this, one encodes and the others wait. Fields that training does not
    use, and what the template leaves out, are counted in one warning. `quiet`: no progress bar.
    """
    import datasets

    table = datasets.Dataset.from_dict({"row": range(len(rows))})
    state = [
        rows.fingerprint,
        pairs,
        asdict(template.settings),
        template.fingerprint,
        [sha256(path) for path in SOURCES],
    ]
    fingerprint = hashlib.sha256(json.dumps(state, default=str).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "esft"
    folder.mkdir(parents=True, exist_ok=True)
    processes = processes or min(os.cpu_count() or 1, len(rows) // FEW)
    no_bars = quiet or len(rows) <= FEW or datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS
    (datasets.disable_progress_bars if no_bars else datasets.enable_progress_bars)()
    with FileLock(folder / f"{fingerprint}.lock"):
        made = table.map(
            _encode_batch,
            batched=True,
            batch_size=BATCH,
            num_proc=processes if processes > 1 else None,
            fn_kwargs={"rows": rows, "template": template, "pairs": pairs},
            remove_columns=["row"],
            features=features(),
            new_fingerprint=fingerprint,
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            desc="tokenizing",
        )
    if notes := Counter(made.data.column("notes").combine_chunks().flatten().to_pylist()):
        found = ", ".join(f"{what} ({count:,}x)" for what, count in notes.items())
        warnings.warn(f"not trained on, as neither the method nor the template uses it: {found}", stacklevel=2)
    return Documents(made)


def _encode_batch(batch: dict, rows: Rows, template: Template, pairs: bool) -> dict:
    read, notes, where, indices = [], [], [], []
    for index in batch["row"]:
        place, row = rows[index]
        sides = read_pair(row, place) if pairs else [read_messages(row, place)]
        read += sides
        where += [place] * len(sides)
        indices += [index] * len(sides)
        unused = list((unused_in_pair if pairs else unused_fields)(row).elements())
        notes += [unused, []] if pairs else [unused]
    found = []
    for index, note, documents in zip(indices, notes, template.encode(read, where)):
        for number, document in enumerate(documents):
            labels = np.asarray(document.labels, np.int32)
            found.append(
                {
                    "input_ids": np.asarray(document.input_ids, np.int32),
                    "labels": labels,
                    "length": len(labels),
                    "learned": int((labels[1:] != IGNORE).sum()),
                    "row": index,
                    "notes": [*document.left_out, *(note if number == 0 else [])],
                }
            )
    return {key: [document[key] for document in found] for key in found[0]}


def load_data(tokenizer, config: "RunConfig", ranks: "Ranks") -> tuple[Packs, Packs]:
    """Return the (training packs, validation packs) of a run. All ranks call this; rank 0 makes what is not there.

    The `samples` of a pack are rows of the data set, from 1.

    Raises:
        ValueError: the data cannot be read or encoded, a sample is too long, or no sample is left to train on.
    """
    made: list[tuple] = []
    ranks.on_rank_zero(lambda: made.append(_load(tokenizer, config)))
    if made:
        return made[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rank 0 has said it
        return _load(tokenizer, config)


def _load(tokenizer, config: "RunConfig") -> tuple[Packs, Packs]:
    template = Template(tokenizer, template_settings(config), vocab_size(config.base_model_path))
    pairs = config.method == "dpo"
    how = {"quiet": config.training.get("disable_tqdm", False), "pairs": pairs}
    packed = functools.partial(pack_rows, settings=config, together=2 if pairs else 1)
    rows, numbers = sample_rows(config.train_dataset, config.n_train_samples, config.seed, config.streaming)
    documents = encode_rows(rows, template, **how)
    every = list(range(len(rows)))
    if config.validation_dataset:
        train = packed(documents, every, numbers)
        held_out = open_rows(config.validation_dataset, seed=config.seed)
        every = list(range(len(held_out)))
        validation = packed(encode_rows(held_out, template, **how), every, np.asarray(every) + 1)
    else:
        parts = split_samples(every, config.validation_fraction, config.seed)
        train, validation = (packed(documents, part, numbers) for part in parts)
    if not train:
        raise ValueError(f"cannot train on {config.train_dataset}: no sample is left. Raise seq_length.")
    if config.replay_dataset:
        rows = open_rows(config.replay_dataset, seed=config.seed)
        train = add_replay(train, validation, encode_rows(rows, template, **how), config)
    return train, validation


def sample_rows(dataset: str, n_samples: int | None, seed: int, streaming: bool = False) -> tuple[Rows, np.ndarray]:
    """Return the rows that a run takes, and the number of each in its data set, or in its stream, from 1."""
    if streaming:
        rows = take_rows(dataset, n_samples, seed=seed)
        return rows, np.arange(len(rows)) + 1
    rows = open_rows(dataset, seed=seed)
    chosen = list(range(len(rows)))
    if n_samples is not None and n_samples < len(rows):
        chosen = random.Random(seed).sample(chosen, n_samples)
        rows = rows.select(chosen)
    return rows, np.asarray(chosen) + 1


def split_samples(samples: list, fraction: float, seed: int) -> tuple[list, list]:
    """Return (train, validation), in the order of `samples`. A random `fraction` validates.

    If it is above 0, at least one of two or more samples validates. A single sample is always trained on.
    """
    count = min(max(round(fraction * len(samples)), 1), len(samples) - 1) if fraction > 0 and samples else 0
    chosen = set(random.Random(seed).sample(range(len(samples)), count))
    return [s for i, s in enumerate(samples) if i not in chosen], [s for i, s in enumerate(samples) if i in chosen]


def eval_file_of(train_dataset: str) -> str | None:
    """Return the questions on a training set: datasets/eval/law.jsonl for law, and for datasets/train/law.jsonl."""
    if is_known(train_dataset, "eval"):
        return train_dataset
    path = Path(train_dataset)
    beside = path.parent.with_name("eval") / path.name if path.parent.name == "train" else None
    return str(beside) if beside and beside.is_file() else None


def rows_of_run(run: dict, held_out: bool) -> Rows:
    """Return the rows that a run learned from, or those that it held out. `run` is the config in a run.json."""
    seed = run["training"].get("seed", 0)
    if held_out and run.get("validation_dataset"):
        return open_rows(run["validation_dataset"], seed=seed)
    rows, _ = sample_rows(run["train_dataset"], run["n_train_samples"], seed, run.get("streaming", False))
    if run.get("validation_dataset"):
        return rows
    return rows.select(split_samples(list(range(len(rows))), run["validation_fraction"], seed)[held_out])


def held_out_questions(run: dict) -> tuple[list[dict], int]:
    """Return what a run held out for validation, as rows of an eval file, and the number of samples held out.

    Samples of more than one question and one answer, beside a system message, are left out. `run` is the config in a
    run.json.
    """
    held_out, rows = rows_of_run(run, held_out=True), []
    for where, row in held_out:
        messages = read_chosen(row, where)
        system = {"system": messages.pop(0)["content"]} if messages[0]["role"] == "system" else {}
        if [message["role"] for message in messages] == ["user", "assistant"]:
            question, answer = (message["content"] for message in messages)
            rows.append({**system, "prompt": question, "answers": [answer]})
    return rows, len(held_out)
