"""The run in an output folder: is there one to go on with, and what is it?

run.json holds the config, the packs that an optimizer step sees, SHA-256 of the files that the run reads, and the
environment; a finished run adds its results. A run goes on where all of that is the same but LAYOUT, the keys that say
how it lies on its processes.
"""

import dataclasses
import json
import os
import shutil
import statistics
import warnings
from pathlib import Path

import esft
from deepseek.files import check_output, sha256, write_json
from training.checkpoints import find_damage, list_checkpoints, step_of
from training.config import RunConfig
from training.data import resolve_dataset
from training.first_selection import SELECTION_FOLDERS
from training.methods import count_trained
from training.model import LoadedModel
from training.plan import Plan
from training.trainer import ESFTTrainer
from utils import peak_memory_bytes

LAYOUT = {
    *("ep_size", "placement", "expert_scores_dir", "shard_dense", "activation_checkpointing", "ddp_timeout"),
    *("global_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("dataloader_persistent_workers", "disable_tqdm", "logging_steps", "report_to"),
    "output_dir",  # a folder that was moved still holds the same run
}


def find_run(config: RunConfig, packs_per_step: int) -> tuple[Path | None, dict | None]:
    """Return (the checkpoint to go on from, the results of a finished run) of what the output folder holds.

    Raises:
        ValueError: the folder holds another run, or files that no run of ours wrote.
    """
    folder = Path(config.output_dir)
    check_output(folder, folder=True)
    made = [*folder.iterdir()] if folder.exists() else []
    if all(path.name.startswith(".") or path.name in SELECTION_FOLDERS for path in made):
        return None, None
    try:
        before = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        was = _identity(before)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"cannot use --output_dir {folder}: it is not empty and does not hold a run. Give a fresh one."
        ) from error
    now = _identity(json.loads(json.dumps(run_note(config, packs_per_step))))
    differing = [key for key in sorted(now.keys() | was.keys()) if now.get(key) != was.get(key) and key != "overwrite"]
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun: the folder is this run's own
    if config.overwrite and (differing or before.get("results") or not restarted):
        return None, None
    results, checkpoints = before.get("results"), list_checkpoints(folder)
    other = f"another run (it differs in {', '.join(differing)})" if differing else None
    if checkpoints and not (other or results or restarted or config.save_opt_states):
        kept = f"{checkpoints[-1].name} is a loadable adapter"
        other = f"a run that cannot go on, as it had no --save_opt_states ({kept})"
    if other:
        raise ValueError(f"cannot use --output_dir {folder}: it holds {other}. Give a fresh one, or overwrite=true.")
    if results:
        return None, results
    if not config.save_opt_states:
        warnings.warn(f"{folder} holds a run without optimizer states: it starts over", stacklevel=2)
        return None, None
    for checkpoint in reversed(checkpoints):
        if (reason := find_damage(checkpoint)) is None:
            return checkpoint, None
        warnings.warn(f"{checkpoint} is damaged ({reason}) and will be written again", stacklevel=2)
    return None, None


def run_note(config: RunConfig, packs_per_step: int) -> dict:
    """Return what makes a run this run: its config, the packs of a step, SHA-256 of the files it reads."""
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


def _identity(note: dict) -> dict:
    """Return the keys of a run.json that must not change when the run goes on, flat."""
    inputs = note.get("inputs", {})
    keys = {**note["config"], **note["config"]["training"], "training": None}
    keys |= dict.fromkeys(inputs)  # their contents count, not the paths to them
    keys |= {f"the content of {key}": digest for key, digest in inputs.items()}
    if os.path.isdir(keys["base_model_path"]):
        keys["base_model_path"] = os.path.realpath(keys["base_model_path"])
    return {key: value for key, value in keys.items() if key not in LAYOUT} | {"packs per step": note["packs_per_step"]}


def prepare_folder(config: RunConfig, checkpoint: Path | None, note: dict) -> None:
    """Remove what an earlier try left and this one does not go on from, and write run.json."""
    folder = Path(config.output_dir)
    for path in folder.iterdir() if config.overwrite and not checkpoint else ():
        if path.name not in SELECTION_FOLDERS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in list_checkpoints(folder):
        if checkpoint is None or step_of(path) > step_of(checkpoint):
            shutil.rmtree(path)
    for path in folder.glob(".adapter.safetensors.*"):  # half-written
        shutil.rmtree(path, ignore_errors=True)
    write_json(folder / "run.json", note)


def results_of(trainer: ESFTTrainer, loaded: LoadedModel, plan: Plan, frozen_verified: bool) -> dict:
    """Return the results of a run that has saved its model. All ranks call this."""
    ranks, state = trainer.ranks, trainer.state
    return {
        **count_trained(loaded.model),
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "train_loss": statistics.fmean(entry["loss"] for entry in state.log_history if "loss" in entry),
        "eval_loss": trainer.eval_losses.get(state.global_step),
        "step_seconds": statistics.median(trainer.step_seconds) if trainer.step_seconds else None,
        "world_size": ranks.world_size,
        "ep_size": ranks.ep_size,
        "peak_memory_bytes": max(ranks.gather(peak_memory_bytes())),
        "estimated_peak_bytes": plan.memory and plan.memory.peak,
        "read_bytes": max(ranks.gather(loaded.read_bytes or 0)) or None,
        "saved_bytes": sum(path.stat().st_size for path in Path(trainer.args.output_dir).glob("*.safetensors")),
        "frozen_verified": frozen_verified,
    }
