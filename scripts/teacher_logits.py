r"""Write what a teacher says about the documents of a data set, for distill_from=DIR of train.py.

    python scripts/teacher_logits.py --model LARGER --tokenizer MODEL --dataset law --output_dir DIR
    python train.py --model MODEL --data law --output_dir O distill_from=DIR

At every label token the folder keeps the teacher's top_k most likely tokens with their log-probabilities, and the
log-probability of all others together (training/teacher.py). So teacher and student are never in memory at once. A
label takes 6 top_k + 2 bytes on the disk: 386 by default.

Give the student as --tokenizer: its chat template makes the documents. Both models must have the same tokens. Give the
template and seq_length of the run, too. The documents are found by their tokens, so one folder serves runs with any
sample, packing and number of processes, and `--dataset=a,b` serves a run that replays b.

A command that was stopped goes on where it stopped, part by part. The manifest comes last: without it train.py refuses
the folder.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.files import atomic_path, check_output, write_json
from deepseek.fingerprint import checkpoint_note
from deepseek.loading import keeps_documents_apart, vocab_size
from esft import load_tokenizer
from evaluation.workers import dtype_on, load_on, plan_devices
from training.batches import collate
from training.data import (
    IGNORE,
    Pack,
    Template,
    add_template_flags,
    encode_rows,
    pack_rows,
    sample_rows,
    template_settings,
    unpack,
)
from training.loss import TokenLosses, label_positions
from training.teacher import LEAST, MANIFEST, describe, key_of, read_part, top_and_rest
from utils import AUTO_DTYPE, command_parser, counted, locked, positive, run_cli, seed_number, size

ROWS = 256  # label tokens whose log-probabilities exist at once


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="TEACHER", help="folder or hub id of the teacher")
    add("--dataset", required=True, metavar="DATA", help="training data of the run (docs/data.md)")
    add("--output_dir", required=True, metavar="DIR", help="a new folder, or that of the same command, to go on")
    add("--tokenizer", metavar="STUDENT", help="whose tokenizer and chat template make the documents (default: the "
        "teacher's)")  # fmt: skip
    add("--top_k", type=positive, default=64, metavar="K", help="tokens to keep at every label (default: 64)")
    add("--seq_length", type=positive, default=4096, metavar="N", help="as in the run (default: 4096)")
    add("--overlong", choices=("error", "truncate"), default="error", help="as in the run (default: error)")
    add("--n_samples", type=positive, metavar="N", help="take so many samples, by seed, as n_train_samples does")
    add("--streaming", action="store_true", help="read no more of the data set than n_samples")
    add("--seed", type=seed_number, default=0, metavar="N", help="that of the run, with n_samples (default: 0)")
    add_template_flags(parser)
    add("--batch_size", type=positive, default=1, metavar="N", help="packs in a forward (default: 1)")
    add("--packs_per_part", type=positive, default=64, metavar="N", help="packs in a file (default: 64)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the weights "
        f"(default: auto, {AUTO_DTYPE})")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, the GPUs if there are any")
    add("--gpus", type=positive, default=1, metavar="N", help="GPUs that share the teacher (default: 1)")
    return parser.parse_args(argv)


@torch.no_grad()
def ask(model: nn.Module, packs: list[Pack], args: argparse.Namespace, tokens: int) -> dict[str, Tensor]:
    """Return the tensors of a part (training/teacher.py). Only the first `tokens` of the vocabulary are named."""
    device, apart = model.get_input_embeddings().weight.device, keeps_documents_apart(model)
    token_losses = TokenLosses(model.get_output_embeddings())
    token_losses.try_head(model)
    ids, log_probs = [], []
    for start in range(0, len(packs), args.batch_size):
        batch = collate(packs[start : start + args.batch_size], 0, apart)
        labels_BM, kept = label_positions(batch["labels"], batch["kept"])
        taken = {key: batch[key].to(device) for key in ("input_ids", "position_ids")}
        taken |= {"use_cache": False, "logits_to_keep": kept.to(device)}
        logits = token_losses.logits(model, taken, labels_BM)
        for first in range(0, labels_BM.numel(), ROWS):
            rows = slice(first, first + ROWS)
            log_MV = logits(rows).float().log_softmax(-1)
            log_MV = log_MV[(labels_BM.flatten()[rows] != IGNORE).to(log_MV.device)]
            ids_Mk = log_MV[:, :tokens].topk(args.top_k).indices
            ids.append(ids_Mk.int().cpu())
            log_probs.append(top_and_rest(log_MV, ids_Mk).clamp(min=LEAST).half().cpu())
    counts = [sum(label != IGNORE for label in document.labels) for document in unpack(packs)]
    return {
        "keys": torch.tensor([key_of(document) for document in unpack(packs)]),
        "starts": torch.tensor([0, *counts]).cumsum(0),
        "ids": torch.cat(ids),
        "log_probs": torch.cat(log_probs),
    }


def write_logits(args: argparse.Namespace) -> dict:
    """Write the parts that are missing and the manifest, which is returned."""
    folder, student = Path(args.output_dir), args.tokenizer or args.model
    tokenizer = load_tokenizer(student)
    template = Template(tokenizer, template_settings(args), vocab_size(args.model))
    if load_tokenizer(args.model).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"cannot ask {args.model} for {student}: their tokens differ. Give models with the same.")
    described = describe(template)
    tokens = min(described["tokens"], vocab_size(args.model))
    if args.top_k >= tokens:
        raise ValueError(f"cannot keep top_k={args.top_k} of {tokens} tokens: nothing would be left. Lower it.")
    rows, numbers = sample_rows(args.dataset, args.n_samples, args.seed, args.streaming)
    packs = pack_rows(encode_rows(rows, template), range(len(rows)), numbers, args)
    manifest = {"teacher": args.model, "base": checkpoint_note(args.model), **described, "dataset": args.dataset}
    devices = plan_devices(args.device, 1, args.gpus)[0]
    manifest |= {key: getattr(args, key) for key in ("top_k", "seq_length", "packs_per_part")}
    manifest["dtype"] = dtype_on(devices, args.model, args.dtype)
    settings = json.dumps(manifest, sort_keys=True)
    load = functools.cache(lambda: load_on(devices, args.model, args.dtype)[0])
    parts, mass, labels = [], 0.0, 0
    for start in tqdm(range(0, len(packs), args.packs_per_part), "asking the teacher", unit="part"):
        own = [packs[index] for index in range(start, min(start + args.packs_per_part, len(packs)))]
        path = folder / f"logits-{len(parts) + 1:05d}.safetensors"
        if not path.exists():
            said = ask(load(), own, args, tokens)
            with atomic_path(path) as temporary:
                save_file(said, temporary, metadata={"settings": settings})
        noted, keys, log_probs = read_part(path, "keys", "log_probs")
        if noted.get("settings") != settings or keys.tolist() != [key_of(document) for document in unpack(own)]:
            raise ValueError(f"cannot go on in {folder}: {path.name} is of other settings. Give another folder.")
        mass += (1 - np.exp(log_probs[:, -1], dtype=np.float64)).sum().item()
        parts, labels = [*parts, path.name], labels + len(log_probs)
    found = {"labels": labels, "mass": mass / labels, "parts": parts}
    write_json(folder / MANIFEST, manifest | found)
    return manifest | found


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    check_output(args.output_dir, folder=True)
    folder = Path(args.output_dir)
    if folder.exists() and any(folder.iterdir()) and not any(folder.glob("*logits-*")):
        raise ValueError(f"cannot write {folder}: it holds other files. Give another path.")
    with locked(args.output_dir):
        manifest = write_logits(args)
    nbytes = sum((folder / name).stat().st_size for name in manifest["parts"])
    print(f"{counted(manifest['labels'], 'label token')}: the top {args.top_k} hold {manifest['mass']:.1%} of what the "
          f"teacher expects; {size(nbytes)} in {args.output_dir}")  # fmt: skip
    return manifest


if __name__ == "__main__":
    run_cli(main)
