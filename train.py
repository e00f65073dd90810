"""One training run: ESFT, full fine-tuning, LoRA or random experts, told apart by one key (`method`).

    python train.py --base_model_path=M --train_dataset=D --train_config=configs/base.yaml \
        --expert_config=results/expert_configs/D.json --output_dir=results/checkpoints/D [key=value ...]

The loss is the mean over the label tokens of the whole batch that an optimizer step sees, whatever the packing,
accumulation and number of processes (trainer.py).

The output folder is itself a loadable adapter (or, for `method: full`, a model), and holds run.json (resolved config,
versions, results), trainer_state.json (all losses) and checkpoint-<step> folders. A checkpoint is written beside and
renamed. The same command again goes on from the last whole one (given --save_opt_states); a finished run is left alone.
SIGTERM ends a run after the step at work, with a checkpoint and exit code 143.
"""

import dataclasses
import functools
import hashlib
import json
import random
import re
import resource
import shutil
import statistics
import sys
import types
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging

import esft
import utils
from deepseek.experts import TrainedExperts, find_experts, fused_names
from deepseek.loading import empty_model, keeps_documents_apart
from trainer import ESFTTrainer, collate, is_whole, step_of

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
}
DEFAULTS = {
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "seed": 0,
    "use_cache": True,  # only what a saved model's config says: training itself never uses the cache
    "logging_nan_inf_filter": False,  # we stop at such a loss
    "ddp_broadcast_buffers": False,
}
COUNTS = (
    "seq_length",
    "lora_rank",
    "lora_alpha",
    "n_train_samples",
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
        }.items():
            value = getattr(self, key)
            if value not in known:
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
        if self.method in ("esft", "random") and not self.expert_config:
            raise ValueError(
                f"method {self.method} needs --expert_config; scripts/expert/generate_expert_config.py makes one"
            )
        if self.verify_frozen and self.method == "full":
            raise ValueError("verify_frozen: method full freezes nothing that could be verified; leave it out")
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


def read_config(path: str | Path | None, given: dict[str, object]) -> TrainConfig:
    """Merge a YAML file and the keys given on the command line, which win.

    Raises:
        ValueError, FileNotFoundError: no such file, no mapping in it, an unknown key (the nearest known is named), a
            key given twice under two names, or a value that does not fit.
    """
    values: dict[str, object] = {}
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--train_config {path}: no such file")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--train_config {path}: not valid YAML ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"--train_config {path}: expected `key: value` lines")
    ours = {f.name for f in dataclasses.fields(TrainConfig)} - {"training"}
    theirs = {f.name for f in dataclasses.fields(TrainingArguments) if f.init} - ours
    merged: dict[str, object] = {}
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
    if merged.get("method") != "full":  # which may hold parameters that no forward uses
        training["ddp_find_unused_parameters"] = False
    training |= {key: value for key, value in merged.items() if key in theirs}
    return TrainConfig(**{key: value for key, value in merged.items() if key in ours}, training=training)


def _number(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """TrainingArguments of a run; under torchrun this joins the process group.

    Raises:
        ValueError: a value that transformers refuses, no GPU for device=cuda, or a tracker that is not installed.
    """
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ValueError("device=cuda: torch sees no GPU here; give device=cpu or mend the installation")
    try:
        args = TrainingArguments(
            **config.training,
            output_dir=config.output_dir,
            use_cpu=config.device == "cpu" or not cuda,
            save_only_model=not config.save_opt_states,
        )
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"the training arguments do not fit: {error}") from error
    for name in set(args.report_to) - set(get_available_reporting_integrations()):
        raise ValueError(f"report_to={name} is not installed here: pip install -e '.[track]' or report_to=none")
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs are torchrun's business; never nn.DataParallel
    return args


# --------------------------------------------------------------------------------------------------------------------
# what is trained


def prepare_model(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Make trainable what `config.method` trains, and nothing else."""
    if config.method == "full":
        if model.dtype != torch.float32:
            warnings.warn("full fine-tuning in bfloat16 rounds small updates away; set dtype=float32", stacklevel=2)
        return model.requires_grad_(True)
    if config.method == "lora":
        return _add_lora(model, config)
    experts = esft.ExpertConfig.load(config.expert_config)
    if config.method == "random":
        experts.check(model)
        experts = dataclasses.replace(experts, experts=_random_experts(model, experts, config.seed))
    return esft.to_esft(model, experts, keep_base=False)


def _random_experts(model: nn.Module, config: esft.ExpertConfig, seed: int) -> dict[int, tuple[int, ...]]:
    generator, layers = random.Random(seed), find_experts(model)
    return {
        layer: tuple(generator.sample(range(layers[layer][1].num_experts), len(ids)))
        for layer, ids in config.experts.items()
    }


def _add_lora(model: nn.Module, config: TrainConfig) -> nn.Module:
    """LoRA on every linear layer but the head, and on the fused experts; routers stay frozen, as in ESFT."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("method lora needs peft: pip install -e '.[lora]'") from error
    layers = find_experts(model).values()
    experts_of_block = {name.rpartition(".")[0]: module.num_experts for name, module in layers}

    def adapted(name: str, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear) or module is model.get_output_embeddings():
            return False
        block = next((block for block in experts_of_block if name.startswith(f"{block}.")), None)
        return block is None or module.out_features != experts_of_block[block]  # a router has a row per expert

    linear = [name for name, module in model.named_modules() if adapted(name, module)]
    # peft takes these names for experts of an older layout wherever they stand, and would leave the modules out
    taken = tuple(f".{name}" for name in ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
    fused = [f"{name}.{tensor}" for name, module in layers for tensor in fused_names(module)[:2]]
    two_in_one = {r".*\.gate_up_proj": 2}  # rank and alpha of two projections
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=[name for name in linear if not name.endswith(taken)],
        target_parameters=fused + [f"{name}.weight" for name in linear if name.endswith(taken)],
        rank_pattern={key: factor * config.lora_rank for key, factor in two_in_one.items()},
        alpha_pattern={key: factor * config.lora_alpha for key, factor in two_in_one.items()},
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # about patterns of its own making, and a property that transformers renamed
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, lora)


def count_trained(model: nn.Module) -> dict:
    """Parameters of the model, those trained, and the bytes of their gradients and AdamW states."""
    trained = [param for param in model.parameters() if param.requires_grad]
    # the trained rows of fused experts are parameters of their own and would count twice; LoRA's come on top
    extra = (".trained.", "lora_")
    added = sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in extra))
    count = sum(param.numel() for param in trained)
    return {
        "parameters": sum(param.numel() for param in model.parameters()) - added,
        "trained_parameters": count,
        "gradient_bytes": sum(param.numel() * param.element_size() for param in trained),
        "optimizer_bytes": sum(2 * param.numel() * param.element_size() for param in trained),
    }


def trained_table(model: nn.Module, config: TrainConfig) -> str:
    """What is trained, as text: layers, experts, parameters, share, bytes of gradient and optimizer state."""
    counts = count_trained(model)
    lines = [f"method {config.method}, weights {model.dtype}".replace("torch.", "")]
    if config.method in ("esft", "random"):
        for layer, (_, module) in find_experts(model).items():
            if hasattr(module, "trained"):
                ids = module.trained.expert_ids
                lines.append(f"  layer {layer:>3}: {len(ids):>3} of {module.num_experts} experts  {ids}")
    share = counts["trained_parameters"] / counts["parameters"]
    lines.append(f"  trained parameters {counts['trained_parameters']:,} of {counts['parameters']:,} ({share:.2%})")
    lines.append(
        f"  gradients {counts['gradient_bytes'] / 2**20:,.1f} MiB, AdamW states "
        f"{counts['optimizer_bytes'] / 2**20:,.1f} MiB"
    )
    return "\n".join(lines)


def frozen_hashes(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every parameter and persistent buffer that is not trained; of fused experts, of the frozen rows."""
    hashes = {}
    for prefix, module in model.named_modules():
        experts = getattr(module, "trained", None)
        buffers = {k: b for k, b in module.named_buffers(recurse=False) if k not in module._non_persistent_buffers_set}
        for name, tensor in {**dict(module.named_parameters(recurse=False)), **buffers}.items():
            if not tensor.requires_grad:
                if isinstance(experts, TrainedExperts) and hasattr(experts, name):
                    tensor = tensor[experts.num_trained :]
                raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                hashes[f"{prefix}.{name}"] = hashlib.sha256(raw.numpy()).hexdigest()
    return hashes


# --------------------------------------------------------------------------------------------------------------------
# a run


def find_run(config: TrainConfig) -> tuple[Path | None, dict | None]:
    """(checkpoint to go on from, results of a finished run): what the output folder holds already.

    Raises:
        ValueError: the folder holds another run, or files that no run of ours made.
    """
    folder = Path(config.output_dir)
    utils.check_output(folder, folder=True)
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return None, None
    try:
        before = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        was = _flat(before)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--output_dir {folder} is not empty and holds no run of ours: give a fresh one") from error
    if config.overwrite:
        return None, None
    now = _flat(json.loads(json.dumps({"config": dataclasses.asdict(config), "inputs": input_hashes(config)})))
    differing = [key for key in sorted(now.keys() | was.keys()) if now.get(key) != was.get(key) and key != "overwrite"]
    if differing:
        raise ValueError(
            f"--output_dir {folder} holds another run (it differs in {', '.join(differing)}): give a fresh "
            "--output_dir, or overwrite=true"
        )
    if before.get("results"):
        return None, before["results"]
    if not config.save_opt_states:
        warnings.warn(f"{folder} holds a run broken off without --save_opt_states: it starts over", stacklevel=2)
        return None, None
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        if is_whole(checkpoint):
            return checkpoint, None
        warnings.warn(f"{checkpoint} is damaged and will be written again", stacklevel=2)
    return None, None


def input_hashes(config: TrainConfig) -> dict[str, str]:
    """SHA-256 of the files that a run reads beside its model: of another content, the run is another."""
    paths = {"train_dataset": utils.resolve_dataset(config.train_dataset)}
    if config.method in ("esft", "random"):
        path = Path(config.expert_config)
        paths["expert_config"] = path / esft.CONFIG_NAME if path.is_dir() else path
    return {
        key: hashlib.sha256(path.read_bytes()).hexdigest()
        for key, path in paths.items()
        if isinstance(path, Path) and path.is_file()
    }


def _flat(note: dict) -> dict:
    """The keys of a run's config, and what the files that it names held."""
    contents = {f"the content of {key}": digest for key, digest in note.get("inputs", {}).items()}
    return {**note["config"], **note["config"]["training"], "training": None, **contents}


def load_data(config: TrainConfig, tokenizer) -> tuple[list[utils.Pack], list[utils.Pack]]:
    """(training packs, validation packs); their `samples` are row numbers of the dataset, from 1."""
    rows = list(enumerate(utils.load_samples(config.train_dataset), 1))
    if config.n_train_samples is not None:
        rows = random.Random(config.seed).sample(rows, min(config.n_train_samples, len(rows)))
    both = []
    for part in utils.split_samples(rows, config.validation_fraction, config.seed):
        encoded = [utils.encode(sample["messages"], tokenizer, config.template) for _, sample in part]
        numbers = [number for number, _ in part]
        both.append(utils.pack(encoded, config.seq_length, config.overlong, config.seed, numbers) if part else [])
    if not both[0]:
        raise ValueError(f"train_dataset {config.train_dataset}: no sample is left to train on; raise seq_length")
    return both[0], both[1]


def peak_memory_bytes() -> int:
    """Of this process so far: of the accelerator where it was used, else resident memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(config: TrainConfig) -> dict:
    """Train, or finish a run that was broken off. Returns its results, which run.json keeps.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with the config, the data, the model or the output folder,
            before anything is written there; later, a non-finite loss or a frozen tensor that changed.
        SystemExit: 143, after SIGTERM.
    """
    args = training_arguments(config)
    first = args.process_index == 0  # it alone prints and writes
    say = print if first else lambda *_: None
    if not first:
        warnings.simplefilter("ignore")
        logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # Trainer has no other name for it yet
    checkpoint, results = find_run(config)
    if results is not None:
        say(f"{config.output_dir} holds this run already, finished: nothing to do")
        return results
    set_seed(config.seed)
    tokenizer = esft.load_tokenizer(config.base_model_path)
    train_packs, eval_packs = load_data(config, tokenizer)
    if args.eval_strategy != "no" and not eval_packs:
        raise ValueError(f"eval_strategy={args.eval_strategy} needs a validation set: raise validation_fraction")
    if config.method in ("esft", "random"):
        experts = esft.ExpertConfig.load(config.expert_config)
        experts.check(empty_model(config.base_model_path))  # a bad one shall not cost the loading of a large model
    model, _ = esft.load_base_model(config.base_model_path, dtype=config.dtype)
    if not keeps_documents_apart(model):
        warnings.warn(
            f"in a {model.config.model_type} the documents of a pack would see each other, so every sample becomes a "
            "pack of its own: batch sizes count samples",
            stacklevel=2,
        )
        train_packs, eval_packs = ([one for p in packs for one in p.documents()] for packs in (train_packs, eval_packs))
    model = prepare_model(model, config)
    say(trained_table(model, config))
    samples, tokens = (sum(len(getattr(p, key)) for p in train_packs) for key in ("samples", "input_ids"))
    say(f"  {samples:,} samples, {tokens:,} tokens in {len(train_packs):,} packs of up to {config.seq_length:,}")
    if torch.cuda.device_count() > args.world_size and not args.use_cpu:
        say(f"  {args.world_size} of {torch.cuda.device_count()} GPUs: torchrun --nproc-per-node=N uses more")

    args.distributed_state.wait_for_everyone()  # all have looked at the folder
    if first:
        _clear(Path(config.output_dir), config.overwrite, checkpoint)
    trainer = ESFTTrainer(
        method=config.method,
        model=model,
        args=args,
        train_dataset=train_packs,
        eval_dataset=eval_packs or None,
        processing_class=tokenizer,
        data_collator=functools.partial(collate, pad_token_id=tokenizer.pad_token_id or 0),
    )
    note = {
        "config": dataclasses.asdict(config),
        "inputs": input_hashes(config),
        "environment": utils.environment(),
    }
    note_path = Path(config.output_dir) / "run.json"
    trainer.add_callback(_Note(note_path, note))
    before = frozen_hashes(model) if config.verify_frozen else None
    if checkpoint:
        say(f"  going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if trainer.stopping and trainer.state.global_step < trainer.state.max_steps:
        goes_on = "the same command goes on from here" if config.save_opt_states else "nothing was kept"
        say(f"  stopped by SIGTERM after step {trainer.state.global_step}: {goes_on}")
        raise SystemExit(143)
    if before is not None:
        after = frozen_hashes(model)
        if changed := [name for name in before if before[name] != after.get(name)]:
            raise ValueError(
                f"verify_frozen: {len(changed)} of {len(before)} frozen tensors changed in training, {changed[0]} the "
                "first: this is a bug, so no adapter was saved"
            )
        say(f"  frozen: all {len(before)} tensors kept their bits")
    if eval_packs and (trainer.evaluated or [None])[0] != trainer.state.global_step:
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    results = {
        **count_trained(model),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "train_loss": statistics.fmean(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
        "eval_loss": trainer.evaluated[1] if eval_packs else None,
        "step_seconds": statistics.median(trainer.step_seconds) if trainer.step_seconds else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "saved_bytes": sum(path.stat().st_size for path in Path(config.output_dir).glob("*.safetensors")),
        "frozen_verified": before is not None,
    }
    if first:
        utils.write_json(note_path, {**note, "results": results})
    return results


class _Note(TrainerCallback):
    """Writes run.json when training begins: what is refused until then leaves nothing behind."""

    def __init__(self, path: Path, note: dict):
        self.path, self.note = path, note

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            utils.write_json(self.path, self.note)


def _clear(folder: Path, overwrite: bool, checkpoint: Path | None) -> None:
    """Remove what an earlier try left and this one does not go on from."""
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    for path in folder.glob("checkpoint-*"):
        if checkpoint is None or step_of(path) > step_of(checkpoint):
            shutil.rmtree(path)


def main(argv: list[str] | None = None) -> dict:
    parser = utils.Parser(__doc__)
    parser.epilog = "configs/base.yaml explains every key; all of transformers' TrainingArguments are accepted, too."
    add = parser.add_argument
    add("--base_model_path", "--model", help="the base model: a folder or a hub id")
    add("--train_dataset", "--data", help="a name in datasets/train, a path (.jsonl, .json, .parquet), or a hub id")
    add("--expert_config", help="the experts to train, from generate_expert_config.py (methods esft and random)")
    add("--output_dir", help="a fresh folder, or that of this very run, which then goes on")
    add("--train_config", help="a YAML file of keys, e.g. configs/base.yaml (default: the keys' defaults)")
    add("--save_opt_states", action="store_true", help="keep optimizer states in checkpoints, for exact resume")
    add("--verify_frozen", action="store_true", help="prove by hash that every other tensor kept its bits")
    add("overrides", nargs="*", metavar="key=value", help="any key, e.g. method=lora learning_rate=1e-4 max_steps=100")
    flags = vars(parser.parse_intermixed_args(argv))
    path, overrides = flags.pop("train_config"), flags.pop("overrides")
    given = {key: value for key, value in flags.items() if value not in (None, False)}
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
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    return run(read_config(path, given))


if __name__ == "__main__":
    utils.run_cli(main)
