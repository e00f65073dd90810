"""Show what an adapter holds: layers, experts, size, base and the run that made it. Of several, show what they share.

    python scripts/adapter_info.py results/checkpoints/law
    python scripts/adapter_info.py law summary translation --base_model_path=M --json

Only the headers of the adapter's files are read. With --base_model_path the adapter is checked as loading checks it,
and the exit code is 2 if it does not fit that base. The base is not loaded. The Jaccard index of two adapters is the
number of experts in both over the number of experts in either. Adapters that share no expert and no other parameter can
be loaded and merged together.
"""

import argparse
import dataclasses
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from transformers import TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.adapters import EXPERT, experts_by_layer, read_base_note
from deepseek.checkpoint_files import open_base
from deepseek.files import read_json
from deepseek.fingerprint import difference
from deepseek.lora import PREFIX, is_lora, read_lora
from deepseek.shards import stored_tensors
from esft import ExpertConfig, find_adapter
from utils import command_parser, counted, run_cli, size

RUN_KEYS = ("method", "base_model_path", "train_dataset", "expert_config", "seq_length", "global_batch_size")
RUN_KEYS += ("learning_rate", "lr_scheduler_type", "seed", "steps", "best_step", "train_loss", "eval_loss")
RUN_KEYS += ("parameters", "date", "git", "torch", "transformers")


def describe(adapter: Path) -> dict:
    """Return what an adapter folder holds, from the headers of its files. `run` is None without a run.json.

    Of LoRA on selected experts, `lora` is the rank and alpha, and `parameters` count the factors.

    Raises:
        ValueError, FileNotFoundError: no adapter, a damaged file, or files that differ from the config.
    """
    config = ExpertConfig.load(adapter)
    files = {path.name: path.stat().st_size for path in sorted(adapter.glob("*.safetensors"))}
    stored = stored_tensors(adapter, files)
    shapes = {key.removeprefix(PREFIX).removeprefix("model."): one.shape for key, one in stored.items()}
    check_complete(adapter, config, shapes)
    experts, others = experts_by_layer(shapes)
    parameters = {name: math.prod(shape) for name, shape in shapes.items()}
    shared = [name for name in others if "shared" in name.rpartition(".")[0]]
    return {
        "adapter": str(adapter),
        "base": read_base_note(adapter) or None,
        "lora": dataclasses.asdict(read_lora(adapter)) if is_lora(adapter) else None,
        "experts": {layer: list(config.experts[layer]) for layer in experts},
        "num_layers": len(experts),
        "num_experts": sum(map(len, experts.values())),
        "shared_experts": config.shared_experts,
        "non_expert_modules": config.non_expert_modules,
        "routers": config.routers,
        "other_parameters": sorted({re.sub(r"\.lora_[AB]\.", ".", name) for name in others}),
        "parameters": sum(parameters.values()),
        "parameters_of_experts": sum(parameters.values()) - sum(parameters[name] for name in others),
        "parameters_of_shared_experts": sum(parameters[name] for name in shared),
        "dtypes": dict(Counter(one.dtype for one in stored.values())),
        "files": files,
        "bytes": sum(files.values()),
        "run": read_run(adapter / "run.json"),
    }


def check_complete(adapter: Path, config: ExpertConfig, names: Iterable[str]) -> None:
    """Refuse an adapter whose files do not hold as many tensors of each expert of its config, and of no other."""
    held = Counter((int(place["layer"]), int(place["expert"])) for place in map(EXPERT.search, names) if place)
    each = max(held.values(), default=1)
    wanted = Counter({(layer, expert): each for layer, ids in config.experts.items() for expert in ids})
    for layer, expert in sorted(held | wanted):
        found, needed = held[layer, expert], wanted[layer, expert]
        if found != needed:
            raise ValueError(
                f"cannot read adapter {adapter}: its files hold {found} tensors of expert {expert} of layer {layer}, "
                f"and its config needs {needed}. Fetch or save it again."
            )


def read_run(path: Path) -> dict | None:
    """Return what a run.json of train.py says of the run, in a flat form. None where there is no run.json."""
    if not path.is_file():
        return None
    note = read_json(path, "config", "environment")
    results = note.get("results") or {}
    usual = {"learning_rate": TrainingArguments.learning_rate}  # run.json holds what was given
    known = {**usual, **note["config"], **note["config"]["training"], **results, **note["environment"]}
    return {key: known.get(key) for key in RUN_KEYS} | {"finished": bool(results)}


def compare(a: dict, b: dict) -> dict:
    """Return {"pair", "jaccard", "shared" experts by layer, "together", "why_not"} of two described adapters."""
    of_a, of_b = ({(layer, e) for layer, ids in one["experts"].items() for e in ids} for one in (a, b))
    both = sorted(of_a & of_b)
    reasons = [f"{len(both)} experts are in both"] if both else []
    if others := {*a["other_parameters"]} & {*b["other_parameters"]}:
        reasons.append(f"both hold {counted(len(others), 'other parameter')}, such as {min(others)}")
    if difference(*(one["base"] or {} for one in (a, b))):
        reasons.append("they are for different bases")
    return {
        "pair": [a["adapter"], b["adapter"]],
        "jaccard": len(both) / len(of_a | of_b) if of_a | of_b else 0.0,
        "shared": {layer: [e for of, e in both if of == layer] for layer, _ in both},
        "together": not reasons,
        "why_not": "; ".join(reasons) or None,
    }


def format_run(run: dict) -> str:
    text = f"{run['method']} on {run['train_dataset']}, learning rate {run['learning_rate']:g}"
    if not run["finished"]:
        return f"{text}, not finished"
    text += f", {run['steps']} steps"
    for key, what in (("train_loss", "training"), ("eval_loss", "validation")):
        if run[key] is not None:
            text += f", {what} loss {run[key]:.4f}"
    return text


def format_adapter(info: dict) -> str:
    """Return a page about one adapter."""
    base = info["base"] or {}
    known = base.get("name") or base.get("model_type") or "unknown"
    of_layers = f", MoE layers {base['layers'][0]} to {base['layers'][1]}" if base.get("layers") else ""
    fingerprint = f", routers {base['router'][:12]}" if base.get("router") else ", no fingerprint"
    per_layer = f" of {base['num_experts']} each" if base.get("num_experts") else ""
    also = ", and shared experts" * info["shared_experts"] + ", and all other modules" * info["non_expert_modules"]
    also += f", and the routers ({info['routers']})" if info["routers"] else ""
    also += f", LoRA of rank {info['lora']['rank']}" if info["lora"] else ""
    share = f" ({info['share']:.2%} of the base)" if "share" in info else ""
    files = counted(len(info["files"]), "file")
    lines = [
        info["adapter"],
        f"  base        {known}{of_layers}{fingerprint}",
        f"  experts     {info['num_experts']} in {info['num_layers']} layers{per_layer}{also}",
        f"  parameters  {info['parameters']:,}{share}",
        f"  on disk     {size(info['bytes'])}, {', '.join(info['dtypes'])}, {files}",
    ]
    if others := info["other_parameters"]:
        lines.insert(3, f"  others      {counted(len(others), 'parameter')}, as {others[0]}")
    if info["run"]:
        lines.append(f"  run         {format_run(info['run'])}")
    if "fits" in info:
        lines.append(f"  fits        {'yes' if info['fits'] else 'no: ' + info['why_not']}")
    lines += [f"  layer {layer:<5} {' '.join(map(str, ids))}" for layer, ids in info["experts"].items()]
    return "\n".join(lines)


def format_pair(pair: dict) -> str:
    verdict = "can be loaded together" if pair["together"] else f"cannot be loaded together: {pair['why_not']}"
    lines = [f"{' and '.join(pair['pair'])}: Jaccard {pair['jaccard']:.3f}, {verdict}"]
    lines += [f"  layer {layer:<5} {' '.join(map(str, ids))} in both" for layer, ids in pair["shared"].items()]
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("adapters", nargs="+", type=Path, metavar="ADAPTER", help="adapter folders, also of LoRA on selected experts")
    add("--base_model_path", "--model", type=Path, metavar="DIR", help="folder of a base: show the share of its "
        "parameters, and check layers, experts, shapes and fingerprint; the base is not loaded")  # fmt: skip
    add("--json", action="store_true", help='print one JSON object: {"adapters": [...], "pairs": [...]}')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    infos = [describe(adapter) for adapter in args.adapters]
    if args.base_model_path:
        model, _ = open_base(args.base_model_path)
        total = sum(param.numel() for param in model.parameters())
        for adapter, info in zip(args.adapters, infos):
            info |= {"fits": True, "why_not": None, "base_parameters": total, "share": info["parameters"] / total}
            try:
                find_adapter(model, adapter)
            except ValueError as error:
                info |= {"fits": False, "why_not": str(error)}
    pairs = [compare(a, b) for a, b in itertools.combinations(infos, 2)]
    if args.json:
        print(json.dumps({"adapters": infos, "pairs": pairs}, indent=2))
    else:
        print("\n\n".join([*map(format_adapter, infos), *map(format_pair, pairs)]))
    if unfit := [info["adapter"] for info in infos if not info.get("fits", True)]:
        raise ValueError(f"cannot use {', '.join(unfit)} with base {args.base_model_path}: see above why not.")


if __name__ == "__main__":
    run_cli(main)
