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
import random
import re
import resource
import signal
import statistics
import sys
import types
import warnings
from dataclasses import MISSING, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging

import checkpoints
import data
import esft
import utils
from deepseek.frozen import DTYPES as FROZEN_DTYPES
from deepseek.ranks import SharedError, join, lost_contact
from methods import count_trained, frozen_hashes, trained_table
from sharding import load_model
from trainer import ESFTTrainer, collate

METHODS = ("esft", "random", "full", "lora")
ALIASES = {
    "batch_size": "per_device_train_batch_size",
    "per_device_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "accumulation_steps": "gradient_accumulation_steps",
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "gradient_checkpointing": "activation_checkpointing",
}
DEFAULTS = {
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "seed": 0,
    "use_cache": True,  # only what a saved model's config says: training itself never uses the cache
    "logging_nan_inf_filter": False,  # we stop at such a loss
}
NEEDED = {  # keys of transformers that would break the loss, the order of the data, or the checkpoints
    "average_tokens_across_devices": True,
    "save_on_each_node": False,
    "auto_find_batch_size": False,
    "dataloader_drop_last": False,
    "ignore_data_skip": False,
    "train_sampling_strategy": "random",
    "fsdp": None,
    "deepspeed": None,
    "ddp_backend": None,
}
COUNTS = (
    "seq_length",
    "lora_rank",
    "lora_alpha",
    "n_train_samples",
    "global_batch_size",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}

# --------------------------------------------------------------------------------------------------------------------
# configuration


@dataclass(frozen=True)
class TrainConfig:
    """The keys of a run that are ours; `training` holds those of transformers' TrainingArguments."""

    base_model_path: str
    train_dataset: str
    output_dir: str
    method: str = "esft"
    expert_config: str | None = None
    template: str = "chat"
    seq_length: int = 4096
    overlong: str = "error"
    n_train_samples: int | None = None
    validation_fraction: float = 0.02
    dtype: str = "auto"
    device: str = "auto"
    lora_rank: int = 8
    lora_alpha: int = 16
    global_batch_size: int | None = None
    ep_size: int | str = 1
    placement: str = "score"
    expert_scores_dir: str | None = None
    shard_dense: bool = False
    frozen_dtype: str | None = None
    offload_frozen: bool = False
    activation_checkpointing: bool | str | None = "auto"
    attn_implementation: str | None = None
    save_opt_states: bool = False
    verify_frozen: bool = False
    overwrite: bool = False
    training: dict = field(default_factory=dict)

    def __post_init__(self):
        _check_kinds(TrainConfig, vars(self))
        _check_kinds(TrainingArguments, self.training)
        for key, known in {
            "method": METHODS,
            "template": ("chat", "released"),
            "overlong": ("error", "truncate"),
            "dtype": ("auto", "float32", "bfloat16"),
            "device": ("auto", "cpu", "cuda"),
            "placement": ("score", "contiguous"),
            "frozen_dtype": (None, *FROZEN_DTYPES),
        }.items():
            value = getattr(self, key)
            if value not in known:
                known = [one for one in known if one]
                raise ValueError(f"{key}={value}: it is one of {', '.join(known)}{utils.suggest(value, known)}")
        values = {**vars(self), **self.training}
        for key in COUNTS:
            if (value := values.get(key)) is not None and value < 1:
                raise ValueError(f"{key}={value}: expected a whole number above 0")
        if (steps := values.get("max_steps", -1)) < 1 and steps != -1:
            raise ValueError(f"max_steps={steps}: expected a whole number above 0, or -1 to go by num_train_epochs")
        if (epochs := values.get("num_train_epochs", 1)) <= 0:
            raise ValueError(f"num_train_epochs={epochs}: expected a number above 0")
        if not 0 <= (smoothing := values.get("label_smoothing_factor", 0)) <= 1:
            raise ValueError(f"label_smoothing_factor={smoothing}: expected a number from 0 to 1")
        if self.activation_checkpointing not in (True, False, None, "auto"):
            raise ValueError(f"activation_checkpointing={self.activation_checkpointing}: it is true, false or auto")
        if self.ep_size != "auto" and (isinstance(self.ep_size, str) or self.ep_size < 1):
            raise ValueError(f"ep_size={self.ep_size}: expected a whole number above 0, or auto")
        if self.global_batch_size is not None and "gradient_accumulation_steps" in self.training:
            raise ValueError("global_batch_size sets gradient_accumulation_steps: give one of them")
        if self.method not in ("esft", "random"):
            if self.ep_size not in (1, "auto") or self.shard_dense:
                raise ValueError(
                    f"method {self.method} trains what ep_size and shard_dense would split: leave them out"
                )
            if self.frozen_dtype or self.offload_frozen:
                raise ValueError(f"frozen_dtype and offload_frozen are for methods esft and random, not {self.method}")
        if self.method in ("esft", "random") and not self.expert_config:
            raise ValueError(
                f"method {self.method} needs --expert_config; scripts/expert/generate_expert_config.py makes one"
            )
        if self.verify_frozen and self.method == "full":
            raise ValueError("verify_frozen: method full freezes nothing that could be verified; leave it out")
        for key, needed in NEEDED.items():
            if self.training.get(key, needed) != needed:
                raise ValueError(f"{key}={self.training[key]}: this trainer needs {needed or 'none'}; leave it out")
        if self.training.get("fp16") or self.training.get("bf16"):
            raise ValueError("bf16 and fp16 (autocast) would round the routers: set dtype=bfloat16, with fp32 masters")

    @property
    def seed(self) -> int:
        return self.training.get("seed", DEFAULTS["seed"])


def _check_kinds(owner: type, values: dict[str, object]) -> None:
    """Refuse a value that is not of the plain type its dataclass field has (others are left to the field's owner)."""
    for f in dataclasses.fields(owner):
        kinds = set(f.type.__args__) if isinstance(f.type, types.UnionType) else {f.type}
        kind = type(values.get(f.name))
        fits = kind in kinds or (kind is int and float in kinds)
        if f.name in values and kinds <= {*KINDS, type(None)} and not fits:
            expected = " or ".join(text for known, text in KINDS.items() if known in kinds)
            raise ValueError(f"{f.name}={values[f.name]!r}: expected {expected}")


def read_config(path: str | Path | None, given: dict[str, object], defaults: dict | None = None) -> TrainConfig:
    """Merge `defaults`, a YAML file and the keys given on the command line; the last named wins.

    Raises:
        ValueError, FileNotFoundError: no such file, no mapping in it, an unknown key (the nearest known is named), a
            key given twice under two names, or a value that does not fit.
    """
    values: dict[str, object] = {}
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--train_config {path}: no such file{utils.suggest_path(path)}")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--train_config {path}: not valid YAML ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"--train_config {path}: expected `key: value` lines")
    ours = {f.name for f in dataclasses.fields(TrainConfig)} - {"training"}
    theirs = {f.name for f in dataclasses.fields(TrainingArguments) if f.init} - ours
    merged: dict[str, object] = dict(defaults or {})
    for source, pairs in ((str(path), values), ("command line", given)):
        seen: dict[str, str] = {}
        for written, value in pairs.items():
            key = ALIASES.get(written, written)
            if key not in ours | theirs:
                known = ours | theirs | ALIASES.keys()
                raise ValueError(f"{source}: unknown key {written!r}{utils.suggest(written, known)}")
            if key in seen:
                raise ValueError(f"{source}: {seen[key]!r} and {written!r} are two names of one key; give one")
            seen[key] = written
            # YAML 1.1 reads 1e-5 as text and no as false; a person means the number and the word
            merged[key] = "no" if value is False and key.endswith("_strategy") else _number(value)
    for key in ("base_model_path", "train_dataset", "output_dir"):
        if not merged.get(key):
            raise ValueError(f"--{key} is missing")
    if merged.pop("use_cpu", False):
        merged["device"] = "cpu"
    if "save_only_model" in merged:
        merged.setdefault("save_opt_states", not merged.pop("save_only_model"))
    training = dict(DEFAULTS)
    for what in ("save", "eval"):  # transformers would take no notice of the steps without the strategy
        if merged.get(f"{what}_steps") or (what == "save" and merged.get("save_opt_states")):
            training[f"{what}_strategy"] = "steps"
    if "per_device_train_batch_size" in merged:
        training["per_device_eval_batch_size"] = merged["per_device_train_batch_size"]
    training |= {key: value for key, value in merged.items() if key in theirs}
    return TrainConfig(**{key: value for key, value in merged.items() if key in ours}, training=training)


def _number(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value


def _batch_split(config: TrainConfig) -> dict[str, int]:
    """What `global_batch_size` (packs per optimizer step) makes of the batch of a process and of the accumulation."""
    if config.global_batch_size is None:
        return {}
    processes = int(os.environ.get("WORLD_SIZE", 1))
    share = config.global_batch_size / processes
    size = min(config.training.get("per_device_train_batch_size", 8), max(int(share), 1))
    if share % size:
        raise ValueError(
            f"global_batch_size={config.global_batch_size} cannot be shared out evenly to {processes} processes in "
            f"batches of {size}: change it, per_device_train_batch_size or the number of processes"
        )
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": int(share) // size}


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """TrainingArguments of a run; under torchrun this joins the process group.

    Raises:
        ValueError: a value that transformers refuses, no GPU for device=cuda, or a tracker that is not installed.
    """
    cuda = torch.cuda.is_available()
    saved, evaluated = (config.training.get(key) for key in ("save_steps", "eval_steps"))
    whole = type(saved) is int and type(evaluated) is int
    if config.training.get("load_best_model_at_end") and whole and saved % evaluated:
        raise ValueError(
            f"save_steps={saved} is no multiple of eval_steps={evaluated}, so that the best model may not be among "
            "those saved: change one of them, or give load_best_model_at_end=false"
        )
    if config.device == "cuda" and not cuda:
        raise ValueError("device=cuda: torch sees no GPU here; give device=cpu or mend the installation")
    try:
        args = TrainingArguments(
            **{**config.training, **_batch_split(config)},
            output_dir=config.output_dir,
            use_cpu=config.device == "cpu" or not cuda,
            save_only_model=not config.save_opt_states,
        )
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"the training arguments do not fit: {error}") from error
    for name in args.report_to:
        if name in get_available_reporting_integrations():  # imports them all: not without need
            continue
        raise ValueError(
            f"report_to={name} is not installed here: give report_to=none, or install it with -c constraints.txt"
        )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs are torchrun's business; never nn.DataParallel
    return args


# --------------------------------------------------------------------------------------------------------------------
# a run


def load_data(config: TrainConfig, tokenizer) -> tuple[list[data.Pack], list[data.Pack]]:
    """(training packs, validation packs); their `samples` are row numbers of the dataset, from 1."""
    rows = list(enumerate(data.load_samples(config.train_dataset), 1))
    if config.n_train_samples is not None:
        rows = random.Random(config.seed).sample(rows, min(config.n_train_samples, len(rows)))
    both = []
    for part in data.split_samples(rows, config.validation_fraction, config.seed):
        encoded = [data.encode(sample["messages"], tokenizer, config.template) for _, sample in part]
        numbers = [number for number, _ in part]
        both.append(data.pack(encoded, config.seq_length, config.overlong, config.seed, numbers) if part else [])
    if not both[0]:
        raise ValueError(f"train_dataset {config.train_dataset}: no sample is left to train on; raise seq_length")
    return both[0], both[1]


def peak_memory_bytes() -> int:
    """Of this process so far: of the accelerator where it was used, else resident memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(config: TrainConfig) -> dict:
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
    args = ranks.together(lambda: training_arguments(config))
    first = ranks.rank == 0  # it alone prints and writes
    say = print if first else lambda *_: None
    if not first:
        warnings.simplefilter("ignore")
        logging.disable_progress_bar()
    packs_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks.world_size
    checkpoint, results = ranks.on_first(lambda: checkpoints.find_run(config, packs_per_step))
    if results is not None:
        say(f"{config.output_dir} holds this run already, finished: nothing to do")
        return results
    set_seed(config.seed)
    tokenizer = ranks.together(lambda: esft.load_tokenizer(config.base_model_path))
    train_packs, eval_packs = ranks.on_first(lambda: load_data(config, tokenizer))
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
    note = {**checkpoints.run_note(config, packs_per_step), "environment": utils.environment()}
    note_path = Path(config.output_dir) / "run.json"
    clear = functools.partial(
        checkpoints.clear, Path(config.output_dir), config.overwrite and not checkpoint, checkpoint
    )
    trainer.add_callback(_Begin(trainer, lambda: (clear(), utils.write_json(note_path, note))))
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
        ranks.agree(
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
    trainer.write_on_first(lambda: utils.write_json(note_path, {**note, "results": results}))
    say(_conclusion(config, results))
    return results


def _conclusion(config: TrainConfig, results: dict) -> str:
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
    parser = utils.Parser(description)
    ours = [f for f in dataclasses.fields(TrainConfig) if f.default is not MISSING and f.name != "expert_config"]
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


def _without_dashes(word: str, parser: utils.Parser) -> str:
    """`--max_steps=5`, as transformers' own scripts have it, is `max_steps=5`."""
    key = word.partition("=")[0].removeprefix("--")
    known = {f.name for cls in (TrainConfig, TrainingArguments) for f in dataclasses.fields(cls)} | ALIASES.keys()
    is_key = word.startswith("--") and "=" in word and key in known and not parser.has_flag(f"--{key}")
    return word.removeprefix("--") if is_key else word


if __name__ == "__main__":
    utils.run_cli(main)
