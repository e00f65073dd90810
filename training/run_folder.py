"""The run in an output folder: whether there is one to go on with."""

import dataclasses
import json
import os
import shutil
import warnings
from pathlib import Path

import esft
from deepseek.files import check_output, sha256
from training.checkpoints import find_damage, list_checkpoints, step_of
from training.data import resolve_dataset

LAYOUT = (  # how a run lies on processes: it may change when the run goes on
    "ep_size",
    "placement",
    "expert_scores_dir",
    "shard_dense",
    "global_batch_size",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "ddp_timeout",
    "activation_checkpointing",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "disable_tqdm",
    "logging_steps",
    "report_to",
    "output_dir",  # a folder that was moved is still that run
)


def find_run(config, packs_per_step: int) -> tuple[Path | None, dict | None]:
    """(checkpoint to go on from, results of a finished run): what the output folder holds already.

    Raises:
        ValueError: the folder holds another run, or files that no run of ours made.
    """
    folder = Path(config.output_dir)
    check_output(folder, folder=True)
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return None, None
    try:
        before = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        was = _flat(before)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--output_dir {folder} is not empty and holds no run of ours: give a fresh one") from error
    now = _flat(json.loads(json.dumps(run_note(config, packs_per_step))))
    differing = [key for key in sorted(now.keys() | was.keys()) if now.get(key) != was.get(key) and key != "overwrite"]
    started_again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun: what is here is its own
    if config.overwrite and (differing or before.get("results") or not started_again):
        return None, None
    if differing:
        raise ValueError(
            f"--output_dir {folder} holds another run (it differs in {', '.join(differing)}): give a fresh "
            "--output_dir, or overwrite=true"
        )
    if before.get("results"):
        return None, before["results"]
    if not config.save_opt_states:
        if (kept := list_checkpoints(folder)) and not started_again:
            raise ValueError(
                f"--output_dir {folder} holds a run broken off, whose {kept[-1].name} is a loadable adapter, but "
                "without --save_opt_states nothing to go on from: give a fresh --output_dir, or overwrite=true"
            )
        warnings.warn(f"{folder} holds a run broken off without --save_opt_states: it starts over", stacklevel=2)
        return None, None
    for checkpoint in reversed(list_checkpoints(folder)):
        if (reason := find_damage(checkpoint)) is None:
            return checkpoint, None
        warnings.warn(f"{checkpoint} is damaged ({reason}) and will be written again", stacklevel=2)
    return None, None


def run_note(config, packs_per_step: int) -> dict:
    """What makes a run this run: its config, how much a step sees, SHA-256 of the files it reads beside its model."""
    paths = {"train_dataset": resolve_dataset(config.train_dataset)}
    if config.method in ("esft", "random"):
        path = Path(config.expert_config)
        paths["expert_config"] = path / esft.CONFIG_NAME if path.is_dir() else path
    files = {key: path for key, path in paths.items() if isinstance(path, Path) and path.is_file()}
    return {
        "config": dataclasses.asdict(config),
        "packs_per_step": packs_per_step,
        "inputs": {key: sha256(path) for key, path in files.items()},
    }


def _flat(note: dict) -> dict:
    """The keys of a run that must not change when it goes on: not how it lies on processes."""
    contents = {f"the content of {key}": digest for key, digest in note.get("inputs", {}).items()}
    keys = {**note["config"], **note["config"]["training"], "training": None, **contents}
    keys |= dict.fromkeys(note.get("inputs", {}))  # whatever the path to them
    if os.path.isdir(keys["base_model_path"]):
        keys["base_model_path"] = os.path.realpath(keys["base_model_path"])
    return {key: value for key, value in keys.items() if key not in LAYOUT} | {"packs per step": note["packs_per_step"]}


def remove_stale(folder: Path, overwrite: bool, checkpoint: Path | None) -> None:
    """Remove what an earlier try left and this one does not go on from."""
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    for path in list_checkpoints(folder):
        if checkpoint is None or step_of(path) > step_of(checkpoint):
            shutil.rmtree(path)
    for path in folder.glob(".adapter.safetensors.*"):  # of a save that was killed
        shutil.rmtree(path, ignore_errors=True)
