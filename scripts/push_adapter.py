"""Publish an adapter on the model hub, with a model card: what was trained on what, and how to use it.

    python scripts/push_adapter.py --adapter_dir=results/checkpoints/law --repo_id=you/ESFT-law --private
    python scripts/push_adapter.py --adapter_dir=results/checkpoints/law --repo_id=you/ESFT-law --dry_run

One commit holds the adapter's config and *.safetensors, run.json and README.md, the card. Checkpoints and optimizer
states stay here. In the JSON files and the card, a path is cut to its last part, the home folder is written ~, and keys
that may hold a secret are left out. A README.md in the adapter's folder is pushed as the card. A base or a data set
that is a hub id is linked; --base_id names the base if the run had it in a folder. You need a token that may write:
`hf auth login`, or HF_TOKEN in the environment.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path, PurePosixPath, PureWindowsPath

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HTTPError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.adapters import BASE_NAME
from deepseek.files import read_json, write_json
from deepseek.lora import LORA_CONFIG_NAME
from esft import CONFIG_NAME
from scripts.adapter_info import describe
from utils import ROOT, command_parser, counted, run_cli, size

JSON_FILES = [CONFIG_NAME, LORA_CONFIG_NAME, BASE_NAME, "run.json"]  # of an adapter, those that are there
PUSHED = [*JSON_FILES, "*.safetensors", "README.md"]
SECRET = re.compile(r"(^|_)(token|secret|password|api_?key)(_|$)", re.IGNORECASE)
PATH = re.compile(r"(?:file://|(?<![\w.:/]))(?:~|\.\.)?(?:/[\w.@+-]+)+/([\w.@+-]+)")  # in a text, at least two deep
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def public(value):
    """Return a JSON value without what is private: paths cut to their last part, the home folder as ~, no secrets."""
    if isinstance(value, dict):
        return {key: public(part) for key, part in value.items() if not SECRET.search(key)}
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
    """Return `name` if it is a hub id (owner/name), and neither a path that is there nor a data file."""
    if not name or not HUB_ID.fullmatch(name) or Path(name).exists() or (ROOT / name).exists():
        return None
    return None if Path(name).suffix in (".json", ".jsonl", ".parquet") else name


def make_card(info: dict, repo_id: str, base_id: str | None = None, license: str | None = None) -> ModelCard:
    """Return the model card of an adapter, from what `adapter_info.describe` says of it."""
    run, base = info["run"] or {}, info["base"] or {}
    base_id, data_id = base_id or hub_id(run.get("base_model_path")), hub_id(run.get("train_dataset"))
    base_name = base_id or public(run.get("base_model_path") or base.get("name"))
    tags = ["esft", "expert-specialized-fine-tuning", "mixture-of-experts"]
    data = ModelCardData(base_model=base_id, datasets=data_id and [data_id], license=license, tags=tags)
    if base_id:
        data.base_model_relation = "adapter"
    told = {"name": repo_id.rpartition("/")[2], "repo_id": repo_id, "base_id": base_id, "base_name": base_name}
    template = str(ROOT / "scripts" / "model_card.md.j2")
    return ModelCard.from_template(data, template, **told, info=info, base=base, run=public(run))


def stage(adapter: Path, folder: Path, repo_id: str, base_id: str | None, license: str | None) -> None:
    """Put what is pushed into `folder`: the weights as links, the rest without what is private."""
    info = describe(adapter)
    for name in info["files"]:
        (folder / name).symlink_to((adapter / name).resolve())
    for name in JSON_FILES:
        if (adapter / name).is_file():
            write_json(folder / name, public(read_json(adapter / name)))
    if (adapter / "README.md").is_file():
        (folder / "README.md").write_bytes((adapter / "README.md").read_bytes())
    else:
        make_card(info, repo_id, base_id, license).save(folder / "README.md")


def push(folder: Path, repo_id: str, private: bool, api: HfApi) -> str:
    """Make the repository if it is not there, and push the files of `folder` in one commit. Return its address."""
    if not get_token():
        raise ValueError("cannot push: there is no token of the hub. Run `hf auth login`, or set HF_TOKEN.")
    try:
        url = str(api.create_repo(repo_id, private=private or None, exist_ok=True))
        if private and not api.repo_info(repo_id).private:
            raise ValueError(f"cannot push to {repo_id}: it is there already and is public. Give another --repo_id.")
        message = f"Adapter {folder.name}"
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=PUSHED, commit_message=message)
    except (OSError, HTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot push to {repo_id}: {reason}. Check the network and your token's rights.") from error
    return url


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--adapter_dir", type=Path, required=True, metavar="DIR", help="folder of the adapter")
    add("--repo_id", required=True, metavar="OWNER/NAME", help="where it goes; made if it is not there")
    add("--base_id", metavar="OWNER/NAME", help="hub id of the base (default: that of the run, if it is one)")
    add("--license", metavar="NAME", help="license of the adapter, for the card, e.g. mit; mind the base's")
    add("--private", action="store_true", help="make the repository private; refused if it is public already")
    add("--dry_run", action="store_true", help="print the card and the files, without the network")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for name in (args.repo_id, args.base_id):
        if name is not None and not HUB_ID.fullmatch(name):
            raise ValueError(f"cannot use {name!r}: it is not a hub id. Give owner/name.")
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder, args.repo_id.rpartition("/")[2])
        staged.mkdir()
        stage(args.adapter_dir, staged, args.repo_id, args.base_id, args.license)
        files = sorted(staged.iterdir())
        if args.dry_run:
            print((staged / "README.md").read_text(encoding="utf-8"))
            print(f"would be pushed to {args.repo_id}:")
            print("\n".join(f"  {file.name}  {size(file.stat().st_size)}" for file in files))
        else:
            print(f"{counted(len(files), 'file')} pushed: {push(staged, args.repo_id, args.private, HfApi())}")


if __name__ == "__main__":
    run_cli(main)
