r"""Show training data as the model will see it: where the loss falls, and what is in the data set.

    python scripts/show_data.py law --base_model_path=results/models/tiny
    python scripts/show_data.py my_task.jsonl --base_model_path=M --n_samples=5 --seq_length=4096

The first documents of each data set are printed as text. What carries loss is green; in a pipe it stands between the
marks ⟦ and ⟧. Of preference data both answers of a pair are shown. Then come counts of turns and tokens, the lengths,
and the fields that training does not use. The data are read and encoded as train.py does it, so what train.py would
refuse is refused here.
"""

import argparse
import itertools
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.loading import vocab_size
from esft import load_tokenizer
from training.data import (
    IGNORE,
    SIDES,
    Documents,
    Encoded,
    Template,
    add_template_flags,
    encode_rows,
    is_pair,
    open_rows,
    read_messages,
    read_pair,
    take_rows,
    template_settings,
)
from utils import command_parser, markdown_table, positive, run_cli

GREEN = ("\033[32m", "\033[0m")
MARKS = ("⟦", "⟧")
QUANTILES = {"shortest": 0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("dataset", metavar="DATA", help="a name in datasets/train, a file, a folder or a hub id (docs/data.md)")
    add("--base_model_path", "--model", required=True, metavar="MODEL", help="the model whose tokenizer encodes it")
    add("--n_samples", type=positive, default=3, metavar="N", help="documents, or pairs, of each set (default: 3)")
    add("--n_rows", type=positive, metavar="N", help="read only N rows, as streaming=true does (default: all)")
    add("--seq_length", type=positive, default=4096, metavar="T", help="count what is longer (default: 4096)")
    add_template_flags(parser)
    return parser.parse_args(argv)


def show(document: Encoded, tokenizer, marks: tuple[str, str]) -> str:
    """Return the text of a document, with `marks` around what carries loss."""
    text = ""
    for learned, run in itertools.groupby(zip(document.input_ids, document.labels), lambda pair: pair[1] != IGNORE):
        part = tokenizer.decode([token for token, _ in run])
        text += f"{marks[0]}{part}{marks[1]}" if learned else part
    return text


def format_counts(turns: Counter, documents: Documents, seq_length: int, together: int = 1) -> str:
    """Return how many turns and tokens there are, and how long the samples are, of `together` documents each."""
    lengths = documents.lengths.reshape(-1, together).sum(1)
    tokens, learned = lengths.sum(), documents.label_counts.sum()
    samples = f"{len(lengths):,} {'pairs' if together == 2 else 'documents'}"
    roles = ", ".join(f"{count:,} {role}" for role, count in turns.most_common())
    quantiles = np.quantile(lengths, list(QUANTILES.values())).round().astype(int)
    return "\n".join(
        [
            f"{samples}, {tokens:,} tokens; {learned:,} of them ({learned / tokens:.1%}) carry loss",
            f"turns: {roles}",
            f"longer than seq_length {seq_length:,}: {(lengths > seq_length).sum():,}",
            "",
            markdown_table(["", *QUANTILES], [["tokens", *(f"{value:,}" for value in quantiles)]]),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rows = take_rows(args.dataset, args.n_rows) if args.n_rows else open_rows(args.dataset)
    model = args.base_model_path
    template = Template(load_tokenizer(model), template_settings(args), vocab_size(model))
    pairs = is_pair(rows[0][1])
    together = 2 if pairs else 1
    documents = encode_rows(rows, template, pairs=pairs)
    starts = np.searchsorted(documents.rows, [0, *itertools.accumulate(rows.sets)]).tolist()
    spans = itertools.pairwise(starts)  # of each set that is named
    for number in [n for start, end in spans for n in range(start, end)[: args.n_samples * together]]:
        where, _ = rows[int(documents.rows[number])]
        side = f", {SIDES[number % 2]}" if pairs else ""
        print(f"--- {where}{side}: {documents.lengths[number]:,} tokens")
        print(show(documents[number], template.tokenizer, GREEN if sys.stdout.isatty() else MARKS), end="\n\n")
    read = (read_pair(row, where) if pairs else [read_messages(row, where)] for where, row in rows)
    turns = Counter(message["role"] for sides in read for messages in sides for message in messages)
    print(format_counts(turns, documents, args.seq_length, together))


if __name__ == "__main__":
    run_cli(main)
