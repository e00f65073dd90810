r"""One training run: ESFT, full fine-tuning, LoRA or random experts, told apart by one key (`method`).

    python train.py --base_model_path=M --train_dataset=D --train_config=configs/base.yaml \
        --expert_config=results/expert_configs/D.json --output_dir=results/checkpoints/D [key=value ...]

    torchrun --nproc-per-node=8 train.py ...       # data parallel: every process holds the model (ep_size=1)
    torchrun --nproc-per-node=8 train_ep.py ...    # expert parallel where the model needs it (ep_size=auto)

The loss is the mean over the label tokens of the whole batch that an optimizer step sees, whatever the packing,
accumulation and number of processes (trainer.py).

The output folder is itself a loadable adapter (or, for `method: full`, a model), and holds run.json (resolved config,
versions, results), trainer_state.json (all losses) and checkpoint-<step> folders. A checkpoint is written beside and
renamed. The same command again goes on from the last whole one (given --save_opt_states); a finished run is left alone.
SIGTERM and Ctrl-C end a run after the step at work, with a checkpoint and exit code 143 or 130.
"""

import dataclasses
import functools
import os
import resource
import signal
import statistics
import sys
import warnings
from dataclasses import MISSING
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

import esft
import utils
from deepseek.files import write_json
from deepseek.process_groups import SharedError, join, lost_contact
from training import run_folder
from training.config import RunConfig, _without_dashes, read_config, training_arguments
from training.data import load_data
from training.methods import count_trained, frozen_hashes, trained_table
from training.model import load_model
from training.trainer import ESFTTrainer, collate

# --------------------------------------------------------------------------------------------------------------------
# configuration


# --------------------------------------------------------------------------------------------------------------------
# a run


def peak_memory_bytes() -> int:
    """Of this process so far: of the accelerator where it was used, else resident memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(config: RunConfig) -> dict:
    """Train, or finish a run that was broken off. Returns its results, which run.json keeps.

    Under torchrun all processes call it. What rank 0 alone can know (the output folder, the data) it shares.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with the config, the data, the model or the output folder,
            before anything is written there; later, a non-finite loss or a frozen tensor that changed.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C.
    """
    timeout = timedelta(seconds=config.training.get("ddp_timeout", TrainingArguments.ddp_timeout))
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if on_gpu and processes > torch.cuda.device_count():
        raise SharedError(
            f"{processes} processes on a node that has {torch.cuda.device_count()} GPUs: lower --nproc-per-node, or "
            "give device=cpu"
        )
    ranks = join(timeout, "cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    args = ranks.run_or_fail_together(lambda: training_arguments(config))
    first = ranks.rank == 0  # it alone prints and writes
    say = print if first else lambda *_: None
    if not first:
        warnings.simplefilter("ignore")
        logging.disable_progress_bar()
    packs_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks.world_size
    checkpoint, results = ranks.on_rank_zero(lambda: run_folder.find_run(config, packs_per_step))
    if results is not None:
        say(f"{config.output_dir} holds this run already, finished: nothing to do")
        return results
    set_seed(config.seed)
    tokenizer = ranks.run_or_fail_together(lambda: esft.load_tokenizer(config.base_model_path))
    train_packs, eval_packs = ranks.on_rank_zero(lambda: load_data(config, tokenizer))
    if args.eval_strategy != "no" and not eval_packs:
        raise SharedError(f"eval_strategy={args.eval_strategy} needs a validation set: raise validation_fraction")
    model, apart, ranks, plan = load_model(config, args, train_packs, ranks, timeout, say)
    args.activation_checkpointing = plan.activation_checkpointing
    if not apart:
        warnings.warn(
            f"in a {model.config.model_type} the documents of a pack would see each other, so every sample becomes a "
            "pack of its own: batch sizes count samples",
            stacklevel=2,
        )
        train_packs, eval_packs = ([one for p in packs for one in p.documents()] for packs in (train_packs, eval_packs))
    say(trained_table(model, config))
    samples, tokens = (sum(len(getattr(p, key)) for p in train_packs) for key in ("samples", "input_ids"))
    say(f"  {samples:,} samples, {tokens:,} tokens in {len(train_packs):,} packs of up to {config.seq_length:,}")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(max(pack.position_ids) for pack in train_packs) + 1
    if context and longest > context:
        warnings.warn(
            f"the longest sample has {longest} tokens, more than the model's context of {context}: set "
            f"seq_length={context}, and overlong=truncate or shorter samples",
            stacklevel=2,
        )
    if torch.cuda.device_count() > ranks.world_size and not args.use_cpu:
        say(f"  {ranks.world_size} of {torch.cuda.device_count()} GPUs: torchrun --nproc-per-node=N uses more")

    trainer = ESFTTrainer(
        method=config.method,
        ranks=ranks,
        model=model,
        args=args,
        train_dataset=train_packs,
        eval_dataset=eval_packs or None,
        processing_class=tokenizer,
        data_collator=functools.partial(collate, pad_token_id=tokenizer.pad_token_id or 0),
    )
    note = {**run_folder.run_note(config, packs_per_step), "environment": utils.environment()}
    note_path = Path(config.output_dir) / "run.json"
    clear = functools.partial(
        run_folder.remove_stale, Path(config.output_dir), config.overwrite and not checkpoint, checkpoint
    )
    trainer.add_callback(_Begin(trainer, lambda: (clear(), write_json(note_path, note))))
    before = frozen_hashes(model) if config.verify_frozen else None
    if checkpoint:
        say(f"  going on from {checkpoint}")
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the GPU's memory ran out after step {trainer.state.global_step} ({str(error).splitlines()[0]}); what "
            f"saves some, the least costly first: {plan.saving or 'activation_checkpointing=true'}"
        ) from error
    if trainer.stopping and trainer.state.global_step < trainer.state.max_steps:
        goes_on = (
            "the same command goes on from here"
            if config.save_opt_states
            else "nothing was kept, as --save_opt_states was not given"
        )
        number = signal.Signals(trainer.signalled or signal.SIGTERM)
        say(f"  stopped by {number.name} after step {trainer.state.global_step}: {goes_on}")
        raise SystemExit(128 + number)
    if before is not None:
        after = frozen_hashes(model)
        changed = [name for name in before if before[name] != after.get(name)]
        ranks.raise_on_all(
            f"verify_frozen: {len(changed)} of {len(before)} frozen tensors changed in training, {changed[0]} the "
            "first: this is a bug, so no adapter was saved"
            if changed
            else None
        )
        say(f"  frozen: all {len(before)} tensors kept their bits" + (" on every rank" if ranks.world_size > 1 else ""))
    if eval_packs and (trainer.evaluated or [None])[0] != trainer.state.global_step:
        trainer.evaluate()
    trainer.save_model()
    trainer.write_on_first(trainer.save_state)
    results = {
        **count_trained(model),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "train_loss": statistics.fmean(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
        "eval_loss": trainer.evaluated[1] if eval_packs else None,
        "step_seconds": statistics.median(trainer.step_seconds) if trainer.step_seconds else None,
        "world_size": ranks.world_size,
        "ep_size": ranks.ep_size,
        "peak_memory_bytes": max(ranks.gather(peak_memory_bytes())),
        "estimated_peak_bytes": plan.memory and plan.memory.peak,
        "read_bytes": max(ranks.gather(getattr(model, "read_bytes", None) or 0)) or None,
        "saved_bytes": sum(path.stat().st_size for path in Path(config.output_dir).glob("*.safetensors")),
        "frozen_verified": before is not None,
    }
    trainer.write_on_first(lambda: write_json(note_path, {**note, "results": results}))
    say(_conclusion(config, results))
    return results


def _conclusion(config: RunConfig, results: dict) -> str:
    best = f" at step {results['best_step']}, the best" if config.training.get("load_best_model_at_end") else ""
    loss = "" if results["eval_loss"] is None else f"; validation loss {results['eval_loss']:.4f}{best}"
    kind, flag = ("model", "--base_model_path") if config.method == "full" else ("adapter", "--adapter_dir")
    return f"{results['steps']} steps{loss}; {kind} in {config.output_dir}: eval_multigpu.py {flag}={config.output_dir}"


class _Begin(TrainerCallback):
    """Clears the folder and writes run.json when training begins: what is refused until then changes nothing."""

    def __init__(self, trainer: ESFTTrainer, function):
        self.trainer, self.function = trainer, function

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.write_on_first(self.function)


def main(argv: list[str] | None = None, defaults: dict | None = None, description: str | None = __doc__) -> dict:
    """`defaults` are keys that neither the config file nor the command line gives."""
    parser = utils.command_parser(description)
    ours = [f for f in dataclasses.fields(RunConfig) if f.default is not MISSING and f.name != "expert_config"]
    keys = ", ".join(f"{f.name}={(defaults or {}).get(f.name, f.default)}" for f in ours)
    parser.epilog = (
        f"Our keys and their defaults: {keys}. All keys of transformers' TrainingArguments are accepted, too; "
        "configs/base.yaml explains what each is for, with its unit."
    )
    add = parser.add_argument
    add("--base_model_path", "--model", metavar="MODEL", help="the base model: a folder or a hub id (required)")
    add("--train_dataset", "--data", metavar="NAME", help="a name in datasets/train, a path (.jsonl, .json, .parquet) "
        "or a hub id (required)")  # fmt: skip
    add("--expert_config", metavar="FILE", help="the experts to train, from generate_expert_config.py (required by "
        "methods esft and random)")  # fmt: skip
    add("--output_dir", metavar="DIR", help="a fresh folder, or that of this very run, which then goes on (required)")
    add(
        "--train_config",
        metavar="FILE",
        help="a YAML file of keys, e.g. configs/base.yaml (default: the keys' defaults)",
    )
    add("--save_opt_states", action="store_true", help="keep optimizer states in checkpoints, for exact resume")
    add("--verify_frozen", action="store_true", help="prove by hash that every other tensor kept its bits")
    add("overrides", nargs="*", metavar="key=value", help="any key, e.g. method=lora learning_rate=1e-4 max_steps=100")
    argv = [_without_dashes(word, parser) for word in (sys.argv[1:] if argv is None else argv)]
    flags = vars(parser.parse_intermixed_args(argv))
    path, overrides = flags.pop("train_config"), flags.pop("overrides")
    given = {key: value for key, value in flags.items() if value not in (None, False)}
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:  # all processes see the same here
        for pair in overrides:
            key, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"{pair!r}: an override is written key=value")
            if key in given:
                raise ValueError(f"{key} is given twice on the command line; give it once")
            try:
                given[key] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ValueError(f"{pair!r}: the value is not valid YAML") from error
        config = read_config(path, given, defaults)
        owners = {"expert_config": ("esft", "random"), "lora_rank": ("lora",), "lora_alpha": ("lora",)}
        for key, methods in owners.items():
            if key in given and config.method not in methods and os.environ.get("RANK", "0") == "0":
                utils.note(f"{key} is left aside: it is for method {' and '.join(methods)}, this is {config.method}")
    except (ValueError, OSError) as error:
        raise SharedError(str(error)) from error
    try:
        results = run(config)
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        seconds = config.training.get("ddp_timeout", TrainingArguments.ddp_timeout)
        raise ConnectionError(
            f"another process has died, or did not answer for {seconds} seconds (ddp_timeout); what it said comes "
            f"first. The same command goes on from the last checkpoint ({str(error).splitlines()[0]})"
        ) from error
    if dist.is_initialized():
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    utils.run_cli(main)
