"""Publish an adapter on the model hub, with a model card that says what was trained on what, and how it is used.

    python scripts/push_adapter.py --adapter_dir=results/checkpoints/law --repo_id=you/ESFT-law --private
    python scripts/push_adapter.py --adapter_dir=results/checkpoints/law --repo_id=you/ESFT-law --dry_run

What goes there: expert_cfg.json, the *.safetensors of the adapter, run.json of train.py and README.md, the card, in one
commit; no checkpoints and no optimizer states. In the JSON files and the card, absolute paths are cut to their last
part, the home folder is written ~, and keys that may hold a secret are left out. A README.md in the adapter's folder is
taken for the card as it is. Base and data are linked where they are hub ids; --base_id names the base where the run had
it in a folder. You need a token that may write: `hf auth login`, or HF_TOKEN in the environment.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path, PurePosixPath, PureWindowsPath

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.files import write_json, write_text
from esft import CONFIG_NAME
from scripts.adapter_info import describe, numbers
from utils import ROOT, command_parser, run_cli

PUSHED = (CONFIG_NAME, "*.safetensors", "run.json", "README.md")
SECRET = re.compile(r"(^|_)(token|secret|password|api_?key)(_|$)", re.IGNORECASE)
PATH = re.compile(r"(?:file://|(?<![\w.:/]))(?:~|\.\.)?(?:/[\w.@+-]+)+/([\w.@+-]+)")  # in a text, at least two deep
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def public(value):
    """A JSON value without what is private: paths cut to their last part, the home folder as ~, no secrets."""
    if isinstance(value, dict):
        return {key: public(part) for key, part in value.items() if not SECRET.search(str(key))}
    if isinstance(value, list):
        return [public(part) for part in value]
    if not isinstance(value, str):
        return value
    windows = PureWindowsPath(value)
    if windows.drive or "\\" in value:
        return windows.name
    if value.startswith(("/", "~", "..")):
        return PurePosixPath(value).name
    return PATH.sub(r"\1", value.replace(str(Path.home()), "~"))


def hub_id(name: str | None) -> str | None:
    """`name` where it is a hub id (owner/name), and not a path that is there or a file's."""
    if not name or not HUB_ID.fullmatch(name) or Path(name).exists() or (ROOT / name).exists():
        return None
    return None if Path(name).suffix in (".json", ".jsonl", ".parquet") else name


def card(info: dict, repo_id: str, base_id: str | None = None, license: str | None = None) -> ModelCard:
    """The model card of an adapter that `adapter_info.describe` described, with its metadata in front."""
    run, base = info["run"] or {}, info["base"] or {}
    base_hub, data_hub = base_id or hub_id(run.get("base_model_path")), hub_id(run.get("train_dataset"))
    base_name = base_hub or public(run.get("base_model_path") or base.get("name") or "not known")
    data = ModelCardData(
        base_model=base_hub,
        datasets=data_hub and [data_hub],
        license=license,
        tags=["esft", "expert-specialized-fine-tuning", "mixture-of-experts"],
        **({"base_model_relation": "adapter"} if base_hub else {}),
    )
    name = repo_id.rpartition("/")[2]
    switches = {"shared_experts": "the shared experts", "non_expert_modules": "all modules outside the experts"}
    also = [what for key, what in switches.items() if info[key]]
    share = f", {info['parameters'] / run['parameters']:.2%} of the base" if run.get("parameters") else ""
    kind = f" (model type {base['model_type']})" if base.get("model_type") else ""
    facts = {
        "base": f"{base_name}{kind}",
        "data": public(run.get("train_dataset")),
        "method": run.get("method"),
        "trained": " and ".join([f"{info['num_experts']} routed experts in {info['num_layers']} layers", *also]),
        "parameters": f"{info['parameters']:,}{share}",
        "size": f"{info['bytes'] / 2**20:,.1f} MiB, {', '.join(info['dtypes'])}",
        "steps": run.get("steps"),
        "learning rate": run.get("learning_rate")
        and f"{run['learning_rate']:g}, {run['lr_scheduler_type'] or 'linear'}",
        "batch": run.get("global_batch_size") and f"{run['global_batch_size']} packs of {run['seq_length']} tokens",
        "training loss": run.get("train_loss") and f"{run['train_loss']:.4f}",
        "validation loss": run.get("eval_loss")
        and f"{run['eval_loss']:.4f}, after step {run['best_step'] or run['steps']}",
        "seed": run.get("seed"),
        "date": run.get("date"),
        "versions": run.get("torch") and f"torch {run['torch']}, transformers {run['transformers']}",
        "routers of the base": base.get("router") and f"SHA-256 {base['router']}",
    }
    rows = [f"| {key} | {value} |" for key, value in facts.items() if value is not None and value != ""]
    experts = [f"| {layer} | {len(ids)} | {numbers(ids)} |" for layer, ids in info["experts"].items()]
    of_layers = f"Best first, of {base['num_experts']} in each layer." if base.get("num_experts") else "Best first."
    body = f"""
# {name}

Experts of {base_name}, trained by Expert-Specialized Fine-Tuning ([paper](https://arxiv.org/abs/2407.01906)): the
tokens of a task gather on a few experts of a mixture of experts, and only those were trained. All else is the base's.

| | |
|---|---|
{chr(10).join(rows)}

## Load it

With the ESFT code that made it, from its root:

```python
from esft import load_esft_model

# hf download {repo_id} --local-dir {name}
model, tokenizer = load_esft_model("{base_name}", "{name}")
```

A base that is not the one it was trained on is refused. `unload(model)` gives the base back, `add_adapter` the next.

## Serve it

vLLM, SGLang and others take it merged into a plain checkpoint, which has the base's names and shapes:

```bash
hf download {repo_id} --local-dir {name}
hf download {base_hub or "BASE"} --local-dir base
python scripts/merge_adapter.py --base_model_path=base --adapter_dir={name} --output_dir={name}-merged
vllm serve {name}-merged
```

## Experts

{of_layers}

| layer | experts | ids |
|---|---|---|
{chr(10).join(experts)}
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def stage(adapter: Path, folder: Path, repo_id: str, base_id: str | None, license: str | None) -> list[str]:
    """Put what is pushed into `folder`, the weights as links; returns the names of its files."""
    info = describe(adapter)
    for name in (CONFIG_NAME, "run.json"):
        if (adapter / name).is_file():
            write_json(folder / name, public(json.loads((adapter / name).read_text(encoding="utf-8"))))
    for name in info["files"]:
        (folder / name).symlink_to((adapter / name).resolve())
    if (adapter / "README.md").is_file():
        text = (adapter / "README.md").read_text(encoding="utf-8")
    else:
        text = str(card(info, repo_id, base_id, license))
    write_text(folder / "README.md", text)
    return sorted(path.name for path in folder.iterdir())


def push(folder: Path, repo_id: str, private: bool, api: HfApi) -> str:
    """Make the repository where it is not there, and put the files of `folder` in it, in one commit; its address.

    Raises:
        ValueError: no token, no network, no right to write there, or a public repository where a private one was asked.
    """
    if not get_token():
        raise ValueError(
            "there is no token of the hub: `hf auth login`, or set HF_TOKEN, and give it the right to write"
        )
    try:
        url = str(api.create_repo(repo_id, private=private or None, exist_ok=True))
        if private and not api.repo_info(repo_id).private:
            raise ValueError(
                f"--private: {repo_id} is there already and is public; make it private or give another one"
            )
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(PUSHED), commit_message=f"Adapter {folder.name}"
        )
    except (OSError, HTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{repo_id} could not be written ({type(error).__name__}: {reason}): is there a network, and may your "
            "token write there?"
        ) from error
    return url


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--adapter_dir", type=Path, required=True, metavar="DIR", help="folder of the adapter: expert_cfg.json, "
        "*.safetensors and, from train.py, run.json")  # fmt: skip
    add("--repo_id", required=True, metavar="OWNER/NAME", help="where it goes; made where it is not there")
    add("--base_id", metavar="OWNER/NAME", help="hub id of the base (default: that of the run, where it is one)")
    add("--license", metavar="NAME", help="license of the adapter, for the card, e.g. mit; mind the base's")
    add("--private", action="store_true", help="the repository is to be private; refused where it is public already")
    add("--dry_run", action="store_true", help="print the card and what would be pushed, without the network")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for flag, name in (("--repo_id", args.repo_id), ("--base_id", args.base_id)):
        try:
            if name is not None:
                validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"{flag} {name!r} is no hub id ({error})") from error
        if name is not None and "/" not in name:
            raise ValueError(f"{flag} {name!r} has no owner: give owner/name")
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder, args.repo_id.rpartition("/")[2])
        staged.mkdir()
        names = stage(args.adapter_dir, staged, args.repo_id, args.base_id, args.license)
        if args.dry_run:
            print((staged / "README.md").read_text(encoding="utf-8"))
            print(f"would be pushed to {args.repo_id}:")
            print("\n".join(f"  {name}  {(staged / name).stat().st_size / 2**20:,.2f} MiB" for name in names))
            return
        url = push(staged, args.repo_id, args.private, HfApi())
    print(f"{len(names)} files pushed: {url}")


if __name__ == "__main__":
    run_cli(main)
