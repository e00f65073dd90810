"""Curate training data: remove what is there twice, too long, in another language, in the evaluation, or of little use.

    python scripts/curate.py --data law --output results/runs/law_kept.jsonl --near_duplicates=0.8 --eval_dataset=law
    python scripts/curate.py --data D --output kept.jsonl --most_useful=1000 --base_model_path=M --adapter_dir=A

It reads whatever train.py reads, and writes the rows that it keeps, unchanged and in their order, as JSON lines that
train.py reads. Equal rows are always kept once. Each flag adds a reason to remove a row, and the first one counts:

    length          --min_tokens, --max_tokens, by the tokenizer of --base_model_path
    language        --language=en,de: another language is more likely than all others together
    overlap         --eval_dataset: the row holds a question of the evaluation
    duplicate       the same messages as a row before, but for blanks
    near_duplicate  --near_duplicates=0.8: at least so similar to a row before
    less_useful     --most_useful=N: N rows are those whose loss --adapter_dir lowers most

Beside <output>.jsonl are <output>.report.md, <output>.report.json, and <output>.removed.jsonl with every row that was
removed, and why. They are written first. --dry_run prints the report and writes nothing.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.files import check_output, read_json, write_json, write_jsonl, write_text
from deepseek.loading import empty_model, keeps_documents_apart, vocab_size
from esft import add_adapter, check_adapter, load_tokenizer
from evaluation.expert_scoring import document_losses
from evaluation.workers import load_on, plan_devices
from scripts.curation import Duplicates, Overlap, Sample, language_check
from training.data import (
    Documents,
    Rows,
    Template,
    add_template_flags,
    best_fit,
    dataset_files,
    encode_rows,
    is_pair,
    open_rows,
    pack_of,
    rows_of_run,
    template_settings,
)
from utils import (
    command_parser,
    counted,
    environment,
    locked,
    markdown_table,
    note,
    positive,
    reason_of,
    run_cli,
    split_names,
)

EXAMPLES = 5  # of each reason, in the report
PACK = 1024  # tokens that go through a model at once
TEMPLATE_FLAGS = ("template", "template_kwargs", "loss_on", "special_text", "append_end")
NEEDS = {  # flag -> what it has no effect without
    **dict.fromkeys((*TEMPLATE_FLAGS, "min_tokens", "max_tokens", "most_useful"), "base_model_path"),
    **{"overlap": "eval_dataset", "adapter_dir": "most_useful", "gpus_per_rank": "most_useful"},
}
QUANTILES = {"shortest": 0, "median": 0.5, "longest": 1}


def share(text: str) -> float:
    """Convert a flag to a number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a share above 0 and at most 1")
    return value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--data", "--train_dataset", required=True, metavar="DATA", help="a name, a path or a hub id (docs/data.md)")
    add("--output", required=True, type=Path, metavar="FILE.jsonl", help="the rows that are kept")
    add("--dry_run", action="store_true", help="print the report and write nothing")
    add("--near_duplicates", type=share, metavar="S", help="keep one of several rows that share at least so much of "
        "their runs of three words")  # fmt: skip
    add("--eval_dataset", metavar="DATA[,DATA]", help="questions that training must not see")
    add("--overlap", type=share, default=0.5, metavar="S", help="share of a question's words that a row has to hold, "
        "in runs of 13 (default: 0.5)")  # fmt: skip
    add("--language", metavar="CODE[,CODE]", help="the languages to keep, as en,de")
    add("--base_model_path", "--model", metavar="MODEL", help="the model whose tokenizer counts tokens")
    add("--min_tokens", type=positive, metavar="N", help="the fewest tokens of a row")
    add("--max_tokens", type=positive, metavar="N", help="the most tokens of a row, as seq_length")
    add("--most_useful", type=positive, metavar="N", help="keep the N rows whose loss falls most from the base to "
        "--adapter_dir")  # fmt: skip
    add("--adapter_dir", metavar="DIR", help="what a short training on a part of the data left")
    add("--gpus_per_rank", type=positive, default=1, metavar="N", help="GPUs to spread the model over (default: 1)")
    add_template_flags(parser)
    args = parser.parse_args(argv)
    for flag, other in (*NEEDS.items(), ("most_useful", "adapter_dir")):
        if getattr(args, flag) != parser.get_default(flag) and not getattr(args, other):
            parser.error(f"--{flag} needs --{other}")
    if args.min_tokens and args.max_tokens and args.min_tokens > args.max_tokens:
        parser.error(f"--min_tokens={args.min_tokens} is more than --max_tokens={args.max_tokens}")
    if args.output.suffix != ".jsonl":
        parser.error(f"--output={args.output} does not end in .jsonl, and rows are written as JSON lines")
    return args


def outputs(path: Path) -> dict[str, Path]:
    """Return the files that are written for an output, the output last."""
    named = {name: path.with_suffix(f".{name}") for name in ("removed.jsonl", "report.json", "report.md")}
    return {**named, "kept": path}


def check_paths(args: argparse.Namespace) -> None:
    """Raise ValueError or OSError for files that cannot be written, and for those that are read, too."""
    read = {path.resolve() for path in dataset_files(args.data)}
    read |= {path.resolve() for name in split_names(args.eval_dataset or "") for path in dataset_files(name, "eval")}
    for path in outputs(args.output).values():
        check_output(path)
        if path.resolve() in read:
            raise ValueError(f"cannot write {path}: it is read, too. Give another path.")


# ---- what is judged by a model --------------------------------------------------------------------------------------


def length_check(tokens: np.ndarray, least: int | None, most: int | None) -> Callable[[Sample], dict | None]:
    """Return a check of the tokens of each row."""

    def check(sample: Sample) -> dict | None:
        found = int(tokens[sample.number - 1])
        if (least or 0) <= found <= (most or found):
            return None
        return {"reason": "length", "why": counted(found, "token"), "tokens": found}

    return check


@torch.no_grad()
def loss_per_row(model, documents: Documents, packs: list[list[int]]) -> np.ndarray:
    """Return the mean loss of the label tokens of each row, in nats; NaN for rows without a document in `packs`."""
    apart, sums = keeps_documents_apart(model), np.zeros((2, documents.rows.max() + 1))
    for numbers in tqdm(packs, "losses", unit=" packs", disable=None):
        one = pack_of(documents, numbers, documents.lengths, documents.rows)
        means = [document_losses(model, part) for part in ([one] if apart else one.documents())]
        losses, labels = np.concatenate([part.cpu().numpy() for part in means]), documents.label_counts[numbers]
        np.add.at(sums, (slice(None), documents.rows[numbers]), np.stack([losses * labels, labels]))
    with np.errstate(invalid="ignore"):
        return sums[0] / sums[1]


def rank(args: argparse.Namespace, documents: Documents, rows: list[int]) -> list[dict]:
    """Return the loss of each row by the base and by the tuned model, and the gap, in the order of `rows` (from 0)."""
    chosen = np.flatnonzero(np.isin(documents.rows, rows))
    members = best_fit(documents.lengths[chosen].tolist(), max(PACK, documents.lengths[chosen].max()))
    packs = [chosen[pack].tolist() for pack in members]
    model, _ = load_on(plan_devices("auto", 1, args.gpus_per_rank)[0], args.base_model_path)
    base = loss_per_row(model, documents, packs)
    tuned = loss_per_row(add_adapter(model, args.adapter_dir), documents, packs)
    return [{"row": i + 1, "base_loss": float(base[i]), "tuned_loss": float(tuned[i]), "gap": float(base[i] - tuned[i])}
            for i in rows]  # fmt: skip


def trained_on(adapter: str) -> set[bytes] | None:
    """Return the keys of the rows that an adapter was trained on, or None if its folder does not tell."""
    path = Path(adapter, "run.json")
    if not path.is_file():
        return None
    run = read_json(path, "config")["config"]
    try:
        rows = rows_of_run(run, held_out=False)
    except (ValueError, OSError) as error:
        note(f"it is not known which rows {adapter} was trained on: {reason_of(error)}")
        return None
    return {Sample(0, where, row).key for where, row in rows}


# ---- the report -----------------------------------------------------------------------------------------------------


def quantiles(values: np.ndarray) -> dict:
    found = np.quantile(values, list(QUANTILES.values())).tolist() if len(values) else [None] * len(QUANTILES)
    return {"rows": len(values), **dict(zip(QUANTILES, found))}


def format_report(report: dict, removed: list[dict], texts: Callable[[int], str]) -> str:
    """Return the report in Markdown. `texts` gives the text of a row by its number."""
    counts = [*report["removed"].items(), ("kept", report["kept"]), ("all", report["rows"])]
    parts = [f"# What was removed from {report['data']}", markdown_table(["", "rows"], counts)]
    if "tokens" in report:
        shown = {
            name: ("-" if n is None else f"{n:g}" for n in part.values()) for name, part in report["tokens"].items()
        }
        lines = [[name, *numbers] for name, numbers in shown.items()]
        parts.append(markdown_table(["tokens of", "rows", *QUANTILES], lines))
    if "gaps" in report:
        gone = {found["row"] for found in removed if found["reason"] == "less_useful"}
        lines = []
        for name, rows in (("kept", [g for g in report["gaps"] if g["row"] not in gone]),
                           ("less useful", [g for g in report["gaps"] if g["row"] in gone])):  # fmt: skip
            means = (f"{np.mean([row[key] for row in rows]):.3f}" for key in ("base_loss", "tuned_loss", "gap"))
            lines.append([name, len(rows), *(means if rows else "---")])
        parts.append(markdown_table(["mean loss of", "rows", "base", "tuned", "gap"], lines))
        if report["seen_by_tuned"]:
            parts.append(f"The tuned model was trained on {report['seen_by_tuned']} of the {len(report['gaps'])} rows "
                         "that it judges. Their gap may be larger for that.")  # fmt: skip
    for reason in report["removed"]:
        examples = [found for found in removed if found["reason"] == reason][:EXAMPLES]
        shown = (f"- {found['where']}: {found['why']}. `{texts(found['row']):.80}`" for found in examples)
        parts.append("\n".join([f"**{reason}**, for example", "", *shown]))
    return "\n\n".join(parts) + "\n"


# ---- the command ----------------------------------------------------------------------------------------------------


def curate(args: argparse.Namespace, rows: Rows, documents: Documents | None) -> tuple[list[dict], dict]:
    """Return what is removed, in the order of the rows, and the report."""
    checks: list[Callable[[Sample], dict | None]] = []
    tokens = None
    if documents is not None:
        pairs, tokens = is_pair(rows[0][1]), np.zeros(len(rows), int)
        (np.add if pairs else np.maximum).at(tokens, documents.rows, documents.lengths)
        checks.append(length_check(tokens, args.min_tokens, args.max_tokens))
    if args.language:
        checks.append(language_check(split_names(args.language)))
    if args.eval_dataset:
        samples = (Sample(number, *found) for number, found in enumerate(rows, 1))
        checks.append(Overlap(split_names(args.eval_dataset), args.overlap, samples))
    checks.append(Duplicates(lambda number: Sample(number, *rows[number - 1]), args.near_duplicates))

    removed, kept, keys = [], [], []
    for number, (where, row) in enumerate(tqdm(rows, "curating", unit=" rows", disable=None), 1):
        sample = Sample(number, where, row)
        found = next(filter(None, (check(sample) for check in checks)), None)
        if found:
            removed.append({"row": number, "where": where, **found})
        else:
            kept.append(number - 1)
            keys.append(sample.key)

    report: dict = {"data": args.data, "rows": len(rows)}
    if args.most_useful and kept:
        seen = trained_on(args.adapter_dir)
        gaps = rank(args, documents, kept)
        report |= {"gaps": gaps, "seen_by_tuned": seen and sum(key in seen for key in keys)}
        best = sorted(gaps, key=lambda gap: -gap["gap"])
        for gap in best[args.most_useful :]:
            why = f"its loss falls by {gap['gap']:.3f}, from {gap['base_loss']:.3f}"
            removed.append({"where": rows[gap["row"] - 1][0], "reason": "less_useful", "why": why, **gap})
        removed.sort(key=lambda found: found["row"])
    gone = {found["row"] - 1 for found in removed}
    kept = [index for index in kept if index not in gone]
    report |= {"kept": len(kept), "removed": dict(Counter(found["reason"] for found in removed).most_common())}
    if tokens is not None:
        report["tokens"] = {"all": quantiles(tokens), "kept": quantiles(tokens[kept])}
    return removed, report


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_paths(args)
    if args.most_useful:
        check_adapter(empty_model(args.base_model_path), args.adapter_dir)
    rows, documents = open_rows(args.data), None
    pairs = is_pair(rows[0][1])
    if pairs and args.most_useful:
        raise ValueError(f"cannot rank preference data by its loss: {args.data} has pairs. Leave out --most_useful.")
    if args.most_useful and args.most_useful >= len(rows):
        raise ValueError(
            f"cannot choose {args.most_useful} of {counted(len(rows), 'row')}: all stay. Lower --most_useful."
        )
    if model := args.base_model_path:
        template = Template(load_tokenizer(model), template_settings(args), vocab_size(model))
        documents = encode_rows(rows, template, pairs=pairs)
    removed, report = curate(args, rows, documents)
    text = format_report(report, removed, lambda number: Sample(number, *rows[number - 1]).text.replace("\n", " "))
    print(text)
    if args.dry_run:
        return
    if not report["kept"]:
        raise ValueError(
            f"cannot write {args.output}: no row of {args.data} is left. Loosen what removes them (see above)."
        )
    files = outputs(args.output)
    with locked(args.output):
        write_jsonl(files["removed.jsonl"], ({**found, "sample": rows[found["row"] - 1][1]} for found in removed))
        settings = {key: str(value) for key, value in vars(args).items() if value is not None}
        write_json(files["report.json"], {**report, "arguments": settings, "environment": environment()})
        write_text(files["report.md"], text)
        gone = {found["row"] - 1 for found in removed}
        write_jsonl(files["kept"], (rows[index][1] for index in range(len(rows)) if index not in gone))
    print(f"{counted(report['kept'], 'row')} in {args.output}; what was removed is in {files['removed.jsonl']}")


if __name__ == "__main__":
    run_cli(main)
