"""Show what an adapter holds: layers, experts, size, base and the run that made it. Of several, show what they share.

    python scripts/adapter_info.py results/checkpoints/law
    python scripts/adapter_info.py law summary translation --base_model_path=M --json

Only the headers of the adapter's files are read, and with --base_model_path the routers of the base, for the
fingerprint. The exit code is 2 if an adapter does not fit that base. The Jaccard index of two adapters is the number of
experts in both over the number of experts in either. Adapters that share no expert and no other parameter can be loaded
and merged together.
"""

import argparse
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.adapters import experts_by_layer
from deepseek.checkpoint_files import Shard, open_base
from deepseek.files import suggest_path
from esft import CONFIG_NAME, ExpertConfig, is_lora
from scripts.merge_adapter import read_adapter_names
from utils import command_parser, run_cli


def describe(adapter: Path) -> dict:
    """Return what an adapter folder holds, from the headers of its files. `run` is None without a run.json.

    Raises:
        ValueError, FileNotFoundError: no adapter, a damaged file, or files that differ from the config.
    """
    if not adapter.is_dir():
        raise FileNotFoundError(f"cannot read adapter {adapter}: no such folder{suggest_path(adapter)}")
    if is_lora(adapter):
        raise ValueError(f"cannot describe adapter {adapter}: it is a LoRA. See its adapter_config.json.")
    config = ExpertConfig.load(adapter)
    note = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8")).get("base")
    shapes, dtypes, files = read_headers(adapter)
    experts, others = experts_by_layer(shapes)
    check_complete(adapter, config, shapes, experts, others)
    parameters = {name: math.prod(shape) for name, shape in shapes.items()}
    shared = [name for name in others if "shared" in name.rpartition(".")[0]]
    return {
        "adapter": str(adapter),
        "base": note if isinstance(note, dict) else {"name": note} if note else None,
        "experts": {layer: list(config.experts[layer]) for layer in experts},
        "num_layers": len(experts),
        "num_experts": sum(map(len, experts.values())),
        "shared_experts": config.shared_experts,
        "non_expert_modules": config.non_expert_modules,
        "parameters": sum(parameters.values()),
        "parameters_of_experts": sum(parameters.values()) - sum(parameters[name] for name in others),
        "parameters_of_shared_experts": sum(parameters[name] for name in shared),
        "dtypes": dtypes,
        "files": files,
        "bytes": sum(files.values()),
        "run": read_run(adapter / "run.json"),
    }


def read_headers(adapter: Path) -> tuple[dict[str, list[int]], dict[str, int], dict[str, int]]:
    """Return the shapes by name without a leading "model.", the number of tensors by dtype, and the bytes by file."""
    shapes, dtypes, files = {}, Counter(), {}
    for path in sorted(adapter.glob("*.safetensors")):
        files[path.name] = path.stat().st_size
        with Shard(path) as shard:
            for key, entry in shard.header.items():
                shapes[key.removeprefix("model.")] = entry["shape"]
                dtypes[entry["dtype"]] += 1
    if not files:
        raise FileNotFoundError(f"cannot read adapter {adapter}: no *.safetensors in it")
    return shapes, dict(dtypes), files


def check_complete(adapter: Path, config: ExpertConfig, shapes: dict, experts: dict, others: list[str]) -> None:
    """Refuse an adapter whose files do not hold every projection of exactly the experts of its config."""
    for layer in sorted(experts.keys() | config.experts.keys()):
        wanted, held = set(config.experts.get(layer, ())), set(experts.get(layer, ()))
        if wanted != held:
            ids = ", ".join(map(str, sorted(wanted ^ held)))
            where = f"in its {CONFIG_NAME} but in none of its files" if wanted - held else f"not in its {CONFIG_NAME}"
            raise ValueError(f"cannot read adapter {adapter}: layer {layer} has experts ({ids}) that are {where}")
    projections = {name: name.split(".experts.")[-1].split(".", 1)[-1] for name in shapes.keys() - set(others)}
    for name, own in sorted(projections.items()):
        for projection in set(projections.values()):
            if (sibling := name.removesuffix(own) + projection) not in shapes:
                raise ValueError(f"cannot read adapter {adapter}: {sibling} is missing")


def read_run(path: Path) -> dict | None:
    """Return what a run.json of train.py says of the run, in a flat form. None where there is no run.json."""
    if not path.is_file():
        return None
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        config, training = note["config"], note["config"]["training"]
        results, versions = note.get("results") or {}, note.get("environment") or {}
        keys = ("method", "base_model_path", "train_dataset", "expert_config", "seq_length", "global_batch_size")
        run = {key: config.get(key) for key in keys}
        run |= {key: training.get(key) for key in ("learning_rate", "lr_scheduler_type", "seed")}
        run |= {key: results.get(key) for key in ("steps", "best_step", "train_loss", "eval_loss", "parameters")}
        run |= {key: versions.get(key) for key in ("date", "git", "torch", "transformers")}
        return {**run, "finished": bool(results)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read {path}: it is not a run.json of train.py ({error!r}). Move it away.") from error


def check_fit(adapter: Path, model: nn.Module) -> dict:
    """Return {"fits", "why_not", "base_parameters"} for a `model` of which only the routers need weights."""
    base_parameters = sum(param.numel() for param in model.parameters())
    try:
        read_adapter_names(model, adapter)
        return {"fits": True, "why_not": None, "base_parameters": base_parameters}
    except ValueError as error:
        return {"fits": False, "why_not": str(error), "base_parameters": base_parameters}


def compare(a: dict, b: dict) -> dict:
    """Return {"pair", "jaccard", "shared" experts by layer, "together", "why_not"} of two described adapters."""
    of_a, of_b = ({(layer, e) for layer, ids in one["experts"].items() for e in ids} for one in (a, b))
    both = sorted(of_a & of_b)
    reasons = [f"{len(both)} experts are in both"] if both else []
    for key in ("shared_experts", "non_expert_modules"):
        if a[key] and b[key]:
            reasons.append(f"both hold {key.replace('_', ' ')}")
    bases = [one["base"] or {} for one in (a, b)]
    if any(len({base[key] for base in bases if base.get(key)}) > 1 for key in ("model_type", "router")):
        reasons.append("they are for different bases")
    return {
        "pair": [a["adapter"], b["adapter"]],
        "jaccard": len(both) / len(of_a | of_b) if of_a | of_b else 0.0,
        "shared": {layer: [e for of, e in both if of == layer] for layer, _ in both},
        "together": not reasons,
        "why_not": "; ".join(reasons) or None,
    }


def format_run(run: dict) -> str:
    text = f"{run['method']} on {run['train_dataset']}, learning rate {run['learning_rate'] or 0:g}"
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
    share = f" ({info['share']:.2%} of the base)" if "share" in info else ""
    lines = [
        info["adapter"],
        f"  base        {known}{of_layers}{fingerprint}",
        f"  experts     {info['num_experts']} in {info['num_layers']} layers{per_layer}{also}",
        f"  parameters  {info['parameters']:,}{share}",
        f"  on disk     {info['bytes'] / 2**20:,.2f} MiB, {', '.join(info['dtypes'])}, {len(info['files'])} files",
    ]
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
    add("adapters", nargs="+", type=Path, metavar="ADAPTER", help="adapter folders: expert_cfg.json, *.safetensors")
    add("--base_model_path", "--model", type=Path, metavar="DIR", help="folder of a base: show the share of its "
        "parameters, and check layers, experts, shapes and fingerprint; the base is not loaded")  # fmt: skip
    add("--json", action="store_true", help='print one JSON object: {"adapters": [...], "pairs": [...]}')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    infos = [describe(adapter) for adapter in args.adapters]
    if args.base_model_path:
        model, _ = open_base(args.base_model_path)
        for adapter, info in zip(args.adapters, infos, strict=True):
            info |= check_fit(adapter, model)
            info["share"] = info["parameters"] / info["base_parameters"]
    pairs = [compare(a, b) for a, b in itertools.combinations(infos, 2)]
    if args.json:
        print(json.dumps({"adapters": infos, "pairs": pairs}, indent=2))
    else:
        print("\n\n".join([*map(format_adapter, infos), *map(format_pair, pairs)]))
    if unfit := [info["adapter"] for info in infos if not info.get("fits", True)]:
        raise ValueError(f"{', '.join(unfit)} cannot be used with base {args.base_model_path}")


if __name__ == "__main__":
    run_cli(main)
