"""The run in an output folder: is there one to go on with, and what is it?

run.json holds the config, the packs that an optimizer step sees, SHA-256 of the files that the run reads, the note of
its base (deepseek/fingerprint.py), and the environment; a finished run adds its results. A run goes on where all of
that is the same but LAYOUT, the keys that say how it lies on its processes and what it shows. A run with optimizer
states can also be made longer (LENGTH), even when it is finished.
"""

import dataclasses
import fnmatch
import json
import os
import re
import shutil
import statistics
import warnings
from pathlib import Path

import esft
from deepseek.adapters import BASE_NAME, is_lora
from deepseek.files import list_checkpoints, read_json, sha256, step_of, write_json
from deepseek.fingerprint import checkpoint_note, difference
from deepseek.lora import LORA_CONFIG_NAME, LORA_WEIGHTS_NAME
from training.checkpoints import find_damage
from training.config import RunConfig
from training.data import dataset_files, is_known
from training.first_selection import SELECTION_FOLDERS, find_scores
from training.keys import ON_EXPERTS
from training.methods import count_trained
from training.model import LoadedModel
from training.plan import Plan
from training.routers import drift_of
from training.teacher import MANIFEST
from training.trainer import ESFTTrainer
from utils import note, peak_memory_bytes

LAYOUT = {
    *("ep_size", "placement", "expert_scores_dir", "shard_dense", "activation_checkpointing", "ddp_timeout"),
    *("global_batch_size", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("dataloader_persistent_workers", "dataloader_multiprocessing_context", "torch_empty_cache_steps"),
    *("disable_tqdm", "logging_steps", "report_to", "run_name", "project", "log_level", "log_level_replica"),
    "resume_from_checkpoint",
    "output_dir",  # a folder that was moved still holds the same run
}
WRITTEN = (  # what a run or its evaluation writes, in its folder or in a checkpoint; `overwrite` removes nothing else
    *("run.json", "trainer_state.json", "training_args.bin", "manifest.json", "selection.json"),
    *("states/*", "optimizer.*", "scheduler.*"),
    *("adapter*.safetensors", LORA_CONFIG_NAME, esft.CONFIG_NAME, BASE_NAME, "config.json"),
    *("model*.safetensors", "model.safetensors.index.json", "generation_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "runs/*", "held_out.jsonl", "report.html", ".*.lock", ".staging/*"),
    *("completions/*.jsonl", "completions/*.json", "completions/.*.partial", "completions/.*.lock"),
    *("completions/strength/*", "held_out/*"),
    *(".*.json.*/*", ".*.safetensors.*/*"),  # half-written
    *(f"{folder}/*" for folder in SELECTION_FOLDERS),
)
PATHS = (
    "base_model_path",
    "train_dataset",
    "validation_dataset",
    "replay_dataset",
    "expert_config",
    "expert_scores_dir",
    "contrast_scores_dir",
)
LENGTH = {"max_steps", "num_train_epochs"}
OF_ANY_LENGTH = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")  # schedules


def find_run(config: RunConfig, packs_per_step: int) -> tuple[Path | None, dict | None]:
    """Return (the checkpoint to go on from, the results of a finished run) of what the output folder holds.

    Raises:
        ValueError: the folder holds another run, or files that no run of ours wrote.
    """
    folder, asked = Path(config.output_dir), config.training.get("resume_from_checkpoint")
    made = [*folder.iterdir()] if folder.exists() else []
    if all(path.name.startswith(".") or path.name in SELECTION_FOLDERS for path in made):
        if asked not in (None, "false"):
            raise ValueError(
                f"cannot resume from {asked}: {folder} holds no run. Give that run's folder as output_dir."
            )
        return None, None
    try:
        before = read_json(folder / "run.json")
        was = _identity(before)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"cannot use --output_dir {folder}: it is not empty and does not hold a run. Give a fresh one."
        ) from error
    note_now = json.loads(json.dumps(run_note(config, packs_per_step)))
    now = _identity(note_now)
    differing = [key for key in sorted(now.keys() | was.keys()) if now.get(key) != was.get(key) and key != "overwrite"]
    differing += [f"base_model_path: {how}"] if (how := _other_base(note_now, before)) else []
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun: the folder is this run's own
    if config.overwrite and (differing or before.get("results") or not restarted):
        check_removable(folder)
        return None, None
    results, checkpoints = before.get("results"), list_checkpoints(folder)
    longer = bool(checkpoints) and config.save_opt_states and _is_longer(differing, now, was, step_of(checkpoints[-1]))
    other = f"another run (it differs in {', '.join(differing)})" if differing and not longer else None
    if checkpoints and not (other or results or restarted or config.save_opt_states):
        kept = f"{checkpoints[-1].name} is a loadable adapter"
        other = f"a run that cannot go on, as it had no --save_opt_states ({kept})"
    if other:
        raise ValueError(f"cannot use --output_dir {folder}: it holds {other}. Give a fresh one, or overwrite=true.")
    if results and not longer and asked in (None, "false"):
        return None, results
    if not config.save_opt_states:
        warnings.warn(f"{folder} holds a run without optimizer states: it starts over", stacklevel=2)
        return None, None
    checkpoint = _choose_checkpoint(checkpoints, None if restarted else asked)
    if longer and not checkpoint:
        raise ValueError(f"cannot make the run in {folder} longer: no checkpoint is whole. Give a fresh --output_dir.")
    if longer:
        note(f"the run in {folder} is made longer, from step {step_of(checkpoint)} on" + _what_changes(now))
    return checkpoint, None


def _other_base(now: dict, was: dict) -> str | None:
    """Say how the base that is at its path now differs from that of the run. A note before these were kept has none."""
    here, there = now["base"], was.get("base", {})
    stored = "it is stored in another dtype" if here.get("dtypes") != there.get("dtypes", here.get("dtypes")) else None
    return difference(here, there) or stored


def _is_longer(differing: list[str], now: dict, was: dict, steps_done: int) -> bool:
    """Return whether a run differs from the one in the folder in nothing but a greater length."""
    if not differing or not set(differing) <= LENGTH:
        return False
    steps, steps_before = (values.get("max_steps", -1) for values in (now, was))
    if steps > 0:
        return steps > max(steps_done, steps_before)
    return steps_before <= 0 and now.get("num_train_epochs", 3) > was.get("num_train_epochs", 3)


def _what_changes(now: dict) -> str:
    """Return what a run that was made longer does otherwise than one that had this length from the start."""
    schedule = now.get("lr_scheduler_type", "linear")
    if schedule in OF_ANY_LENGTH and not 0 < now.get("warmup_steps", 0) < 1:
        return ""
    return (
        f". Its learning rate follows the {schedule} schedule of the new length from here, and that of the shorter run "
        "before. A run of this length from the start gives other weights"
    )


def _choose_checkpoint(checkpoints: list[Path], asked: str | None) -> Path | None:
    """Return the checkpoint to go on from: the one that was asked for, or the last that is whole.

    Raises:
        ValueError: the checkpoint that was asked for is not one of these, or is damaged.
    """
    if asked == "false" and checkpoints:
        raise ValueError(
            f"cannot start afresh with resume_from_checkpoint=false: {checkpoints[-1].parent} holds "
            f"{checkpoints[-1].name} of this run. Leave the key out to go on, or give overwrite=true."
        )
    if asked not in (None, "false"):
        found = [path for path in checkpoints if path.resolve() == Path(asked).resolve() or path.name == asked]
        reason = find_damage(found[0]) if found else "it is not a checkpoint of the run in output_dir"
        if reason:
            held = ", ".join(path.name for path in checkpoints) or "no checkpoint"
            raise ValueError(f"cannot resume from {asked}: {reason}. That folder holds {held}.")
        return found[0]
    for checkpoint in reversed(checkpoints):
        if (reason := find_damage(checkpoint)) is None:
            return checkpoint
        warnings.warn(f"{checkpoint} is damaged ({reason}) and will be written again", stacklevel=2)
    return None


def run_note(config: RunConfig, packs_per_step: int) -> dict:
    """Return what makes a run this run: its config, the packs of a step, SHA-256 of the files it reads."""
    paths = {} if config.streaming else {"train_dataset": dataset_files(config.train_dataset)}
    for key in ("validation_dataset", "replay_dataset"):
        if getattr(config, key):
            paths[key] = dataset_files(getattr(config, key))
    if config.distill_from not in (None, "base"):
        paths["distill_from"] = [Path(config.distill_from, MANIFEST)]
    if config.kind in ON_EXPERTS:
        path = Path(config.expert_config)
        name = LORA_WEIGHTS_NAME if is_lora(path) else esft.CONFIG_NAME
        paths["expert_config"] = [path / name if path.is_dir() else path]
    if config.expand_experts and (scores := find_scores(config)):
        paths["expert_scores"] = [scores] if scores.is_file() else [scores / name for name in esft.SCORE_FILES[:1]]
    settings = dataclasses.asdict(config)
    for key in PATHS:  # a path must work from anywhere; the name of a data set stays one
        if settings[key] and Path(settings[key]).exists() and not is_known(settings[key]):
            settings[key] = os.path.abspath(settings[key])
    return {
        "config": settings,
        "packs_per_step": packs_per_step,
        "base": checkpoint_note(config.base_model_path),
        "inputs": {key: sha256(*files) for key, files in paths.items() if files and all(map(Path.is_file, files))},
    }


def _identity(note: dict) -> dict:
    """Return the keys of a run.json that must not change when the run goes on, flat."""
    inputs = note.get("inputs", {})
    keys = {**note["config"], **note["config"]["training"], "training": None}
    keys |= dict.fromkeys(inputs)  # their contents count, not the paths to them
    keys |= {f"the content of {key}": digest for key, digest in inputs.items()}
    if os.path.isdir(keys["base_model_path"]):
        keys["base_model_path"] = os.path.realpath(keys["base_model_path"])
    # an older run.json does not name newer keys
    kept = {key: value for key, value in keys.items() if key not in LAYOUT and value != getattr(RunConfig, key, ...)}
    return kept | {"packs per step": note["packs_per_step"]}


def check_removable(folder: Path) -> None:
    """Raise ValueError if a run's folder holds a file that neither a run nor an evaluation of it writes."""
    patterns = [*WRITTEN, *(["README.md"] if esft.is_lora(folder) else [])]  # peft's card
    for path in sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()):
        name = re.sub(r"^checkpoint-\d+/", "", path.relative_to(folder).as_posix())
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            raise ValueError(
                f"cannot overwrite {folder}: no run wrote {path.relative_to(folder)} in it. Move that away, or give a "
                "fresh --output_dir."
            )


def prepare_folder(config: RunConfig, checkpoint: Path | None, note: dict) -> None:
    """Remove what an earlier try left and this one does not go on from, and write run.json.

    The note of a run that was made longer also gets the steps at which that happened.
    """
    folder = Path(config.output_dir)
    if remove := config.overwrite and not checkpoint:
        check_removable(folder)
    for path in list(folder.glob("*")) if remove else ():
        if path.name not in SELECTION_FOLDERS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in list_checkpoints(folder):
        if checkpoint is None or step_of(path) > step_of(checkpoint):
            shutil.rmtree(path)
    for path in folder.glob(".adapter.safetensors.*"):  # half-written
        shutil.rmtree(path, ignore_errors=True)
    if checkpoint:
        before = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        old, new = ({key: part["config"]["training"].get(key) for key in LENGTH} for part in (before, note))
        if steps := before.get("made_longer_at", []) + [step_of(checkpoint)] * (old != new):
            note["made_longer_at"] = steps
    write_json(folder / "run.json", note)


def results_of(trainer: ESFTTrainer, loaded: LoadedModel, plan: Plan, frozen_verified: bool) -> dict:
    """Return the results of a run that has saved its model. All ranks call this."""
    ranks, state = trainer.ranks, trainer.state
    evaluated = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), {})
    return {
        **count_trained(loaded.model),
        "steps": state.global_step,
        "best_step": state.best_global_step if trainer.args.load_best_model_at_end else None,
        "train_loss": statistics.fmean(entry["loss"] for entry in state.log_history if "loss" in entry),
        "eval_loss": trainer.eval_losses.get(state.global_step),
        **{key: value for key, value in evaluated.items() if key.startswith("eval_rewards/")},
        **drift_of(state.log_history),
        "step_seconds": statistics.median(trainer.step_seconds) if trainer.step_seconds else None,
        "world_size": ranks.world_size,
        "ep_size": ranks.ep_size,
        "peak_memory_bytes": max(ranks.gather(peak_memory_bytes())),
        "estimated_peak_bytes": plan.memory and plan.memory.peak,
        "read_bytes": max(ranks.gather(loaded.read_bytes or 0)) or None,
        "saved_bytes": sum(path.stat().st_size for path in Path(trainer.args.output_dir).glob("*.safetensors")),
        "frozen_verified": frozen_verified,
        **({"expert_changes": trainer.schedule.changes} if trainer.schedule else {}),
    }
