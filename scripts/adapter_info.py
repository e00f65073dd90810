"""What an adapter holds: layers, experts, size, base and the run that made it; of several, what they share.

    python scripts/adapter_info.py results/checkpoints/law
    python scripts/adapter_info.py law summary translation --base_model_path=M --json

Nothing but the headers of the adapter's files is read, and with --base_model_path the routers of the base, which its
fingerprint is made of. Overlap is the Jaccard index: of the (layer, expert) pairs in either adapter, the share that is
in both. Adapters that share none, and no other parameter, can be loaded and merged together.
"""

import argparse
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.checkpoint_files import open_base
from deepseek.files import suggest_path
from esft import CONFIG_NAME, ExpertConfig, is_lora
from scripts.merge_adapter import by_layer, read_adapter_names
from utils import command_parser, run_cli


def describe(adapter: Path) -> dict:
    """What is in an adapter folder, from the headers of its files; `run` is None where no run.json lies beside them.

    Raises:
        ValueError, FileNotFoundError: no adapter there, a damaged file, an expert of its config that is in no file or
            one in a file that is not in its config.
    """
    if not adapter.is_dir():
        raise FileNotFoundError(f"adapter {adapter}: no such folder{suggest_path(adapter)}")
    if is_lora(adapter):
        raise ValueError(f"adapter {adapter} is a LoRA, which holds no experts; its adapter_config.json describes it")
    config = ExpertConfig.load(adapter)
    note = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8")).get("base")
    shapes, dtypes, files = _headers(adapter)
    experts, others = by_layer(shapes)
    for layer in sorted(experts.keys() | config.experts.keys()):
        wanted, held = set(config.experts.get(layer, ())), set(experts.get(layer, ()))
        if wanted != held:
            which = ", ".join(map(str, sorted(wanted ^ held)))
            where = f"in its {CONFIG_NAME} but in none of its files" if wanted - held else f"not in its {CONFIG_NAME}"
            raise ValueError(f"adapter {adapter}: of layer {layer} it has experts ({which}) that are {where}")
    kinds = {name: name.split(".experts.")[-1].split(".", 1)[-1] for name in shapes if name not in others}
    for name in kinds:  # each expert has every projection
        for kind in sorted(set(kinds.values())):
            sibling = name.removesuffix(kinds[name]) + kind
            if sibling not in shapes:
                raise ValueError(f"adapter {adapter}: {sibling} is missing")
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
        "run": _run(adapter / "run.json"),
    }


def _headers(adapter: Path) -> tuple[dict[str, list[int]], dict[str, int], dict[str, int]]:
    """(shape by name without a leading "model.", number of tensors by dtype, bytes by file) of an adapter folder."""
    shapes, dtypes, files = {}, Counter(), {}
    for path in sorted(adapter.glob("*.safetensors")):
        files[path.name] = path.stat().st_size
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    header = file.get_slice(key)
                    shapes[key.removeprefix("model.")] = header.get_shape()
                    dtypes[header.get_dtype()] += 1
        except (SafetensorError, OSError) as error:
            raise ValueError(f"adapter {adapter}: {path.name} is damaged or truncated ({error})") from error
    if not files:
        raise FileNotFoundError(f"adapter {adapter}: no *.safetensors in it, so it is no adapter")
    return shapes, dict(dtypes), files


def _run(path: Path) -> dict | None:
    """What a run.json of train.py says of the run, in a flat form; None where there is none."""
    if not path.is_file():
        return None
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        config, training = note["config"], note["config"]["training"]
        results, versions = note.get("results") or {}, note.get("environment") or {}
        keys = ("method", "base_model_path", "train_dataset", "expert_config", "seq_length", "global_batch_size")
        told = {key: config.get(key) for key in keys}
        told |= {key: training.get(key) for key in ("learning_rate", "lr_scheduler_type", "seed")}
        told |= {key: results.get(key) for key in ("steps", "best_step", "train_loss", "eval_loss", "parameters")}
        told |= {key: versions.get(key) for key in ("date", "git", "torch", "transformers")}
        return {**told, "finished": bool(results)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a run.json of train.py ({error!r}); move it away") from error


def fits(adapter: Path, model: nn.Module) -> dict:
    """{"fits", "why_not", "base_parameters"} of an adapter for a `model` without weights but its routers'."""
    told = {"fits": True, "why_not": None, "base_parameters": sum(param.numel() for param in model.parameters())}
    try:
        read_adapter_names(model, adapter)
    except ValueError as error:
        told |= {"fits": False, "why_not": str(error)}
    return told


def compare(infos: list[dict]) -> list[dict]:
    """For each pair of described adapters: {"pair", "jaccard", "shared_experts" by layer, "together", "why_not"}."""
    told = []
    for a, b in itertools.combinations(infos, 2):
        of_a, of_b = ({(layer, e) for layer, ids in one["experts"].items() for e in ids} for one in (a, b))
        both = sorted(of_a & of_b)
        reasons = [f"{len(both)} experts are in both"] if both else []
        reasons += [
            f"both hold {what}"
            for key, what in (("shared_experts", "shared experts"), ("non_expert_modules", "non-expert modules"))
            if a[key] and b[key]
        ]
        bases = [one["base"] or {} for one in (a, b)]
        if any(len({base[key] for base in bases if base.get(key)}) > 1 for key in ("model_type", "router")):
            reasons.append("they are for different bases")
        layers: dict[int, list[int]] = {}
        for layer, expert in both:
            layers.setdefault(layer, []).append(expert)
        told.append(
            {
                "pair": [a["adapter"], b["adapter"]],
                "jaccard": len(both) / len(of_a | of_b) if of_a | of_b else 0.0,
                "shared": layers,
                "together": not reasons,
                "why_not": "; ".join(reasons) or None,
            }
        )
    return told


def numbers(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def run_text(run: dict) -> str:
    told = f"{run['method']} on {run['train_dataset']}, learning rate {run['learning_rate'] or 0:g}"
    if not run["finished"]:
        return f"{told}, not finished"
    told += f", {run['steps']} steps"
    for key, what in (("train_loss", "training"), ("eval_loss", "validation")):
        if run[key] is not None:
            told += f", {what} loss {run[key]:.4f}"
    return told


def text(info: dict) -> str:
    """A page about one adapter."""
    base, run = info["base"] or {}, info["run"]
    known = base.get("name") or base.get("model_type") or "unknown"
    fingerprint = f", routers {base['router'][:12]}" if base.get("router") else ", no fingerprint"
    of_layers = f", MoE layers {base['layers'][0]} to {base['layers'][1]}" if base.get("layers") else ""
    per_layer = f" of {base['num_experts']} each" if base.get("num_experts") else ""
    also = [
        what
        for key, what in (("shared_experts", "shared experts"), ("non_expert_modules", "all other modules"))
        if info[key]
    ]
    dtypes = ", ".join(info["dtypes"])
    lines = [
        info["adapter"],
        f"  base        {known}{of_layers}{fingerprint}",
        f"  experts     {info['num_experts']} in {info['num_layers']} layers{per_layer}"
        f"{', and ' + ' and '.join(also) if also else ''}",
        f"  parameters  {info['parameters']:,}" + (f" ({info['share']:.2%} of the base)" if "share" in info else ""),
        f"  on disk     {info['bytes'] / 2**20:,.2f} MiB, {dtypes}, {len(info['files'])} files",
    ]
    if run:
        lines.append(f"  run         {run_text(run)}")
    if "fits" in info:
        lines.append(f"  fits        {'yes' if info['fits'] else 'no: ' + info['why_not']}")
    lines += [f"  layer {layer:<5} {numbers(ids)}" for layer, ids in info["experts"].items()]
    return "\n".join(lines)


def pair_text(pair: dict) -> str:
    verdict = "can be loaded together" if pair["together"] else f"cannot be loaded together: {pair['why_not']}"
    lines = [f"{' and '.join(pair['pair'])}: Jaccard {pair['jaccard']:.3f}, {verdict}"]
    lines += [f"  layer {layer:<5} {numbers(ids)} in both" for layer, ids in pair["shared"].items()]
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("adapters", nargs="+", type=Path, metavar="ADAPTER", help="folders of adapters: expert_cfg.json, "
        "*.safetensors")  # fmt: skip
    add("--base_model_path", "--model", type=Path, metavar="DIR", help="folder of a base: tell the share of its "
        "parameters, and whether they fit it (layers, experts, shapes, fingerprint); it is not loaded")  # fmt: skip
    add("--json", action="store_true", help='print one JSON object: {"adapters": [...], "pairs": [...]}')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    infos = [describe(adapter) for adapter in args.adapters]
    if args.base_model_path:
        model, _ = open_base(args.base_model_path)
        for adapter, info in zip(args.adapters, infos, strict=True):
            info |= fits(adapter, model)
            info["share"] = info["parameters"] / info["base_parameters"]
    pairs = compare(infos)
    if args.json:
        print(json.dumps({"adapters": infos, "pairs": pairs}, indent=2))
    else:
        print("\n\n".join([*map(text, infos), *map(pair_text, pairs)]))


if __name__ == "__main__":
    run_cli(main)
