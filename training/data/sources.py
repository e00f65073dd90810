"""Where rows come from: names, files, folders, globs and hub ids, read into memory-mapped tables.

    law                                    datasets/train/law.jsonl, or datasets/eval/law.jsonl
    data/mine.jsonl                        .jsonl .json .csv .parquet, also with .gz, .zst, .xz, .bz2
    data/mine/   data/part-*.jsonl         all files of a folder, or those that a pattern matches
    org/name:config@revision[split]        a data set of the hub; all but org/name may be left out
    a:0.7,b:0.3                            several sets, with weights or without

A weight is a set's share of the samples. No sample is drawn twice, so the smallest set limits how many there are.

`open_rows` reads a set whole. `stream_rows` reads no more than is taken, and `take_rows` keeps that much.
"""

import bisect
import codecs
import csv
import functools
import glob
import importlib
import io
import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from deepseek.files import parse_json, suggest, suggest_path
from utils import ROOT, note

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?(\[(?P<split>.+)\])?")
LINE, ROW = "__line__", "__row__"  # the column of a table whose rows are lines of JSON, or objects of a JSON array
WHERE = "__where__"  # beside ROW: where the row comes from
WINDOW = 10_000  # a stream is shuffled within so many rows
WEIGHTED = re.compile(r"(?P<name>.+):(?P<weight>\d+(\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub."""

    name: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None


class Rows:
    """The rows of a data set, in order. They stay on disk until they are asked for.

    `rows[i]` is (where, row): where names the file and line, or the source and row number, from 1.
    """

    def __init__(self, parts: list[tuple[str, "datasets.Dataset"]], indices: list[int] | None = None):  # noqa: F821
        self.parts = parts
        self.starts = [0, *itertools.accumulate(len(table) for _, table in parts)]
        self.indices = indices
        self.sets = [len(self)]  # the rows of each set, where several were named

    def __len__(self) -> int:
        return self.starts[-1] if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> tuple[str, dict]:
        position = index if self.indices is None else self.indices[index]
        part = bisect.bisect_right(self.starts, position) - 1
        source, table = self.parts[part]
        number = position - self.starts[part]
        return _parse(source, table[number], number + 1)

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        return map(self.__getitem__, range(len(self)))

    def select(self, indices: list[int]) -> "Rows":
        """Return some of the rows, in the order of `indices`."""
        return Rows(self.parts, indices if self.indices is None else [self.indices[i] for i in indices])

    @property
    def fingerprint(self) -> list:
        """What tells these rows from others: it changes with the files."""
        return [[table._fingerprint for _, table in self.parts], self.indices]


def _parse(source: str, row: dict, number: int) -> tuple[str, dict]:
    """Return (where, row) of a table's row, which is JSON where the table was made of a file."""
    where = row.get(WHERE) or (f"{source}:{number}" if LINE in row else f"{source}: row {number}")
    if LINE in row:
        found = parse_json(row[LINE], source, number)
    else:
        found = json.loads(row[ROW]) if ROW in row else _without_none(row)
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(found).__name__}")
    return where, found


def _without_none(value: object) -> object:
    """Drop the None that a table holds for each key that a row lacks."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def open_rows(dataset: str | Path, split: str = "train", seed: int = 0) -> Rows:
    """Open what `dataset` names (see the top of this file). `split` is "train" or "eval"; `seed` draws by weight.

    Raises:
        ValueError: there is no such data set, or it cannot be read; the message names the nearest known one.
    """
    sets = [(Rows(_open(source, split)), weight) for source, weight in resolve(dataset, split)]
    if skipped := _other_files(str(dataset)):
        note(f"{dataset}: not read, as they are not data files: {', '.join(skipped)}")
    parts = list(itertools.chain(*(rows.parts for rows, _ in sets)))
    starts = itertools.accumulate((len(rows) for rows, _ in sets), initial=0)
    kept = [[start + i for i in _not_blank(rows)] for (rows, _), start in zip(sets, starts)]
    weights = [weight for _, weight in sets]
    if any(weight is not None for weight in weights):
        kept = _draw(dataset, kept, [1.0 if weight is None else weight for weight in weights], seed)
    rows = Rows(parts, list(itertools.chain(*kept)))
    rows.sets = list(map(len, kept))
    if not rows:
        raise ValueError(f"cannot read data set {str(dataset)!r}: it has no rows")
    return rows


def take_rows(dataset: str, n_rows: int, split: str = "train", seed: int = 0) -> Rows:
    """Return the first rows of a stream as a table, which a second call opens again."""
    import datasets

    dataset = os.path.abspath(dataset) if os.path.exists(dataset) else dataset  # as a run's note has it
    taken = {"dataset": dataset, "split": split, "seed": seed, "n_rows": n_rows}
    taken["stamps"] = " ".join(map(_stamp, dataset_files(dataset, split)))
    features = datasets.Features({WHERE: datasets.Value("string"), ROW: datasets.Value("string")})
    table = _read(dataset, lambda: datasets.Dataset.from_generator(_taken, features=features, gen_kwargs=taken))
    if len(table) < n_rows:
        note(f"{dataset} has {len(table):,} samples, fewer than {n_rows:,}: all are taken")
    return Rows([(dataset, table)])


def _taken(dataset: str, split: str, seed: int, n_rows: int, stamps: str) -> Iterator[dict]:
    rows = itertools.islice(stream_rows(dataset, split, seed), n_rows)
    yield from tqdm(({WHERE: where, ROW: json.dumps(row)} for where, row in rows), "streaming", n_rows, unit=" samples")


def stream_rows(dataset: str, split: str = "train", seed: int = 0) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) in an order that `seed` draws, and read only as far as rows are taken.

    Rows change places within a window of WINDOW rows, and the files of a set are mixed. Several sets take turns at
    random, by their weights, until one of them is at its end.
    """
    import datasets

    sets = resolve(dataset, split)
    streams = [
        datasets.IterableDataset.from_generator(
            _stream_of_hub if isinstance(source, HubSet) else _stream_of_files,
            gen_kwargs={"source": source, "split": split} if isinstance(source, HubSet) else {"paths": source},
        )
        for source, _ in sets
    ]
    weights = np.array([1.0 if weight is None else weight for _, weight in sets])
    shares = (weights / weights.sum()).tolist()
    stream = datasets.interleave_datasets(streams, shares, seed) if len(streams) > 1 else streams[0]
    for row in stream.shuffle(seed=seed, buffer_size=WINDOW):
        yield row[WHERE], json.loads(row[ROW])


def _stream_of_files(paths: list[Path]) -> Iterator[dict]:
    for path in paths:
        for number, text in enumerate(_texts(str(path), _column(path), ""), 1):
            if ROW in text or text[LINE].strip():
                where, row = _parse(str(path), text, number)
                yield {WHERE: where, ROW: json.dumps(row)}


def _stream_of_hub(source: HubSet, split: str) -> Iterator[dict]:
    for number, row in enumerate(_read(source.name, lambda: _load_from_hub(source, split, streaming=True)), 1):
        yield {WHERE: f"{source.name}: row {number}", ROW: json.dumps(_without_none(row), default=str)}


def resolve(dataset: str | Path, split: str = "train") -> list[tuple[list[Path] | HubSet, float | None]]:
    """Return (files or hub id, weight) of each set that `dataset` names."""
    dataset = str(dataset)
    if source := _local(dataset, split) or _on_hub(dataset):
        return [(source, None)]
    names, found = [name.strip() for name in dataset.split(",")], []
    for name in names:
        match = WEIGHTED.fullmatch(name) if len(names) > 1 else None
        source, weight = _local(name, split), None
        if source is None and match:
            name, weight = match["name"], float(match["weight"])
            source = _local(name, split)
        if not (source := source or _on_hub(name)):
            raise ValueError(_not_found(name, split))
        if weight == 0:
            raise ValueError(f"the weight of data set {name!r} is 0: leave it out")
        found.append((source, weight))
    return found


def dataset_files(dataset: str, split: str = "train") -> list[Path]:
    """Return the local files that a data set is read from."""
    return [path for source, _ in resolve(dataset, split) if isinstance(source, list) for path in source]


def _known(split: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted((ROOT / "datasets" / split).glob("*.jsonl"))}


def is_known(dataset: str, split: str = "train") -> bool:
    """Return whether `dataset` names one in datasets/`split`."""
    return dataset in _known(split)


def _format(path: Path) -> str | None:
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    return suffix if suffix in FORMATS else None


def _local(name: str, split: str) -> list[Path] | None:
    """Return the files that a name stands for, or None. A file that exists is taken as it is named."""
    path = Path(name)
    if name in _known(split):
        return [_known(split)[name]]
    if path.is_file():
        return [path] if _format(path) else None
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file() and _format(file)) or None
    found = map(Path, sorted(glob.glob(name, recursive=True)))
    return [file for file in found if file.is_file() and _format(file)] or None


def _other_files(name: str) -> list[str]:
    """Return the names of the files of a folder that are not read."""
    files = [file for file in Path(name).iterdir() if file.is_file()] if Path(name).is_dir() else []
    return sorted(file.name for file in files if not _format(file) and not file.name.startswith("."))


def _on_hub(name: str) -> HubSet | None:
    match = HUB_ID.fullmatch(name)
    return HubSet(**match.groupdict()) if match and not _format(Path(name)) else None


def _not_found(name: str, split: str) -> str:
    known = _known(split)
    if Path(name).is_file():
        return f"cannot read data set {name!r}: its name does not end in {', '.join(FORMATS)}. Convert or rename it."
    return (
        f"cannot find data set {name!r}{suggest(name, known) or suggest_path(name)}. Give one of those in "
        f"datasets/{split} ({', '.join(known) or 'none there'}), a file ({', '.join(FORMATS)}, also compressed), a "
        "folder of them, or a hub id."
    )


def _open(source: list[Path] | HubSet, split: str) -> list[tuple[str, "datasets.Dataset"]]:  # noqa: F821
    """Return the name and the table of each file, or of the hub's set. Files without rows are left out."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error that it raises says the same
    if isinstance(source, HubSet):
        load = functools.partial(_load_from_hub, source, split)
        return [(source.name, _read(source.name, load))]
    opened = [(str(path), _read(str(path), functools.partial(_load_file, path))) for path in source]
    return [(name, table) for name, table in opened if table is not None]


def _read(name: str, load: Callable) -> object:
    """Call `load` without progress bars. A ValueError names the source."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return load()
    except (datasets.exceptions.DatasetsError, OSError, ValueError, ImportError) as error:
        wrapped = isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__
        reason = str(wrapped or error)
        raise ValueError(reason if reason.startswith(name) else f"cannot read data set {name!r}: {reason}") from error


def _load_from_hub(source: HubSet, split: str, streaming: bool = False) -> "datasets.Dataset":  # noqa: F821
    import datasets

    wanted = {"revision": source.revision, "split": source.split or ("test" if split == "eval" else "train")}
    return datasets.load_dataset(source.name, source.config, streaming=streaming, **wanted)


def _load_file(path: Path) -> "datasets.Dataset | None":  # noqa: F821
    """Return the rows of a file as a table of JSON texts, or None if it has none."""
    import datasets

    column = _column(path)
    read = {"path": str(path), "column": column, "stamp": _stamp(path)}
    features = datasets.Features({column: datasets.Value("string")})
    try:
        return datasets.Dataset.from_generator(_texts, features=features, gen_kwargs=read)
    except ValueError as error:
        if "corresponds to no data" in str(error):
            return None
        raise


def _stamp(path: Path) -> str:
    """Return what tells the library's cache that a file has changed."""
    return f"{path.resolve()} {path.stat().st_mtime_ns}"


def _column(path: Path) -> str:
    return ROW if _format(path) in (".csv", ".parquet") or _is_array(path) else LINE


def _texts(path: str, column: str, stamp: str) -> Iterator[dict]:
    """Yield the rows of a file as JSON."""
    if Path(path).stat().st_size == 0:
        return
    if _format(Path(path)) == ".parquet":
        rows = (row for batch in pq.ParquetFile(path).iter_batches() for row in batch.to_pylist())
        yield from ({column: json.dumps(_without_none(row), ensure_ascii=False, default=str)} for row in rows)
        return
    with _opened(path) as file:
        if column == LINE:  # only \n ends a line: str.splitlines would cut inside a string
            for number, line in enumerate(file, 1):
                yield {column: _decoded(line.removesuffix(b"\n"), f"{path}:{number}")}
            return
        text = _decoded(file.read(), path)
    rows = csv.DictReader(io.StringIO(text)) if _format(Path(path)) == ".csv" else parse_json(text, path, 1)
    yield from ({column: json.dumps(row, ensure_ascii=False)} for row in rows)


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error})") from error


def _opened(path: str | Path) -> BinaryIO:
    openers = {".gz": "gzip", ".xz": "lzma", ".bz2": "bz2", ".zst": "zstandard"}
    module = openers.get(Path(path).suffix)
    if module is None:
        return open(path, "rb")
    return io.BufferedReader(importlib.import_module(module).open(path, "rb"))  # zstandard's own has no lines


def _is_array(path: Path) -> bool:
    if _format(path) != ".json":
        return False
    with _opened(path) as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _not_blank(rows: Rows) -> list[int]:
    """Return the indices of the rows that are not blank lines."""
    kept, start = [], 0
    for _, table in rows.parts:
        if LINE in table.column_names:
            blank = pc.equal(pc.utf8_trim_whitespace(table.data.column(LINE)), "").to_numpy()
            kept += (start + np.flatnonzero(~blank.astype(bool))).tolist()
        else:
            kept += range(start, start + len(table))
        start += len(table)
    return kept


def _draw(dataset: str, kept: list[list[int]], weights: list[float], seed: int) -> list[list[int]]:
    """Draw from each set its share of the samples, without repeating any."""
    scale = min(len(indices) / weight for indices, weight in zip(kept, weights))
    counts = [min(round(scale * weight), len(indices)) for indices, weight in zip(kept, weights)]
    shares = ", ".join(f"{count:,} of {len(indices):,}" for count, indices in zip(counts, kept))
    note(f"{dataset}: samples drawn by weight: {shares}")
    generator = random.Random(seed)
    return [sorted(generator.sample(indices, count)) for indices, count in zip(kept, counts)]
