"""The keys of a run that are this project's own, and what is refused about a run's keys before anything is loaded."""

import argparse
import os
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from deepseek.files import suggest, suggest_path
from deepseek.fp8 import reason_against
from deepseek.selection import OPTIONS, STRATEGIES, check_rule
from training.keys import CHECKPOINTING, DEFAULTS, LORA_SELECTED, ON_EXPERTS, REFUSED, SCHEDULE_FREE, TORCHAO

POSITIVE = (
    *("seq_length", "lora_rank", "lora_alpha", "n_train_samples", "global_batch_size", "max_steps", "num_train_epochs"),
    "reselect_steps",
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "dpo_beta"),
    "distill_weight",
)


def _key(default: object, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig:
    """Our keys of a run; `training` holds the keys that were given of TrainingArguments, and DEFAULTS."""

    _argument_group_name = "keys of this project"

    base_model_path: str = _key(MISSING, "required: the base model: a folder or a hub id; or --model")
    train_dataset: str = _key(MISSING, "required: a name in datasets/train, a file, or a hub id; or --data")
    output_dir: str = _key(MISSING, "required: a new folder, or the folder of the same run, to continue it")
    method: Literal["esft", "dpo", "random", "full", "lora"] = _key(
        "esft", "dpo: esft on preference data; random: as many experts as esft, drawn by seed"
    )
    expert_config: str | None = _key(None, "the experts to train; without it, esft and dpo score and select them first")
    score_function: Literal["token", "gate", "prob", "gradient", "reap"] = _key(
        "token", "the score that selects the experts, without expert_config"
    )
    strategy: str = _key("cumulative", "the rule that selects them: " + ", ".join(STRATEGIES))
    top_p: float | None = _key(None, "select up to this sum of scores; by default 0.2, or 0.1 for gate")
    budget: float | None = _key(None, "share of all routed experts to select, in place of top_p")
    upper_layers: int | None = _key(None, "strategy layers: select in so many uppermost layers; by default half")
    fraction: float | None = _key(None, "strategy fraction: share of each layer's experts")
    top_k: int | None = _key(None, "strategy topk: experts of each layer")
    contrast_scores_dir: str | None = _key(None, "scores on general data, to compare those of the task with")
    contrast: Literal["difference", "ratio"] = _key("difference", "how to compare them")
    train_shared_experts: bool = _key(False, "train the shared experts, too, which every token passes")
    train_router: Literal["full", "bias"] | None = _key(None, "train the routers, too, or the bias that some have")
    router_lr: float | None = _key(None, "with train_router: its learning rate; by default learning_rate")
    router_kl: float = _key(1.0, "with train_router: weight of the penalty on the routers' drift from the base's")
    expand_experts: str | None = _key(None, "add experts while training, as {to: 0.3, by: 0.05, when: plateau}")
    reselect_steps: int | None = _key(None, "exchange experts for those that get more tokens, every so many steps")
    reselect_max: float | None = _key(None, "share of all experts that may ever be trained; by default twice the first")
    l2_to_base: float = _key(0.0, "pull what is trained towards the base after each step: by learning rate x this")
    dpo_beta: float = _key(0.1, "method dpo: how strongly the policy is held to the base")
    template: Literal["chat", "released"] = _key("chat", "the tokenizer's chat template, or the published ESFT one")
    template_kwargs: str | None = _key(None, 'variables of the chat template, as {"enable_thinking": false}')
    loss_on: Literal["all", "last", "each"] = _key("all", "answers to learn; each: every one in a document of its own")
    special_text: Literal["error", "plain", "token"] = _key("error", "what a special token's name in a message becomes")
    append_end: bool = _key(False, "end answers with the tokenizer's end token where the chat template writes no end")
    seq_length: int = _key(4096, "tokens in a pack of whole samples")
    overlong: Literal["error", "truncate"] = _key("error", "what to do with a sample longer than seq_length")
    n_train_samples: int | None = _key(None, "take only this many samples, drawn by seed")
    streaming: bool = _key(False, "read no more of train_dataset than n_train_samples, for sets larger than the disk")
    validation_dataset: str | None = _key(None, "a validation set of its own, in place of validation_fraction")
    validation_fraction: float = _key(0.02, "share of the samples that is kept for validation")
    replay_dataset: str | None = _key(None, "a general data set to learn beside the task, so that less is forgotten")
    replay_share: float = _key(0.1, "share of the label tokens that are replayed ones")
    distill_from: str | None = _key(
        None, "base, or a teacher's folder of scripts/teacher_logits.py: learn what it says"
    )
    distill_on: Literal["replay", "all"] | None = _key(None, "documents to distil on; by default replay for base")
    distill_weight: float | None = _key(None, "of the divergence there; by default 1 on replay, and 0.5 on all")
    dtype: Literal["auto", "float32", "bfloat16"] = _key("auto", "of the weights; auto: as stored")
    device: Literal["auto", "cpu", "cuda"] = _key("auto", "auto: a GPU, if there is one")
    lora_rank: int = _key(8, "method lora: the rank")
    lora_alpha: int = _key(16, "method lora: the scale is alpha / rank")
    lora_experts: Literal["all", "selected"] = _key("all", "method lora: on all layers, or on selected experts alone")
    lora_modules: str | None = _key(None, "lora_experts=selected: other layers, too, as self_attn,shared_experts")
    global_batch_size: int | None = _key(None, "packs in an optimizer step, over all processes and micro batches")
    ep_size: str = _key("1", "processes that share one copy of the experts, or auto: as few as fit on the GPUs")
    placement: Literal["score", "contiguous"] = _key("score", "which process holds which experts: even load, or by id")
    expert_scores_dir: str | None = _key(None, "the scores for placement; by default those beside expert_config")
    shard_dense: bool = _key(False, "share out the frozen weights that are not experts, too (FSDP2)")
    frozen_dtype: Literal["fp8", "int8", "nf4"] | None = _key(None, "quantize the frozen experts to save memory")
    expert_compute: Literal["fp8"] | None = _key(None, "fp8: multiply the experts in fp8, on a GPU that can")
    offload_frozen: bool = _key(False, "keep the frozen experts in host memory")
    activation_checkpointing: Literal["auto", "true", "false"] = _key("auto", "auto: true on a GPU that needs it")
    attn_implementation: str | None = _key(None, "e.g. flash_attention_2; by default transformers chooses")
    save_opt_states: bool = _key(False, "keep optimizer states in checkpoints, to resume exactly")
    verify_frozen: bool = _key(False, "prove by hash that every frozen tensor kept its bits")
    overwrite: bool = _key(False, "remove an earlier run in output_dir and start afresh; other files are refused")
    training: dict = field(default_factory=dict, metadata={"help": argparse.SUPPRESS})

    def __post_init__(self):
        check_rule(self.strategy, **{name: getattr(self, name) for name in OPTIONS})
        if complaint := next(_complaints(self), None):
            raise ValueError(f"cannot start this run: {complaint}")

    @property
    def seed(self) -> int:
        return self.training.get("seed", DEFAULTS["seed"])

    @property
    def kind(self) -> str:
        """The method, where LoRA on selected experts is one of its own."""
        return LORA_SELECTED if (self.method, self.lora_experts) == ("lora", "selected") else self.method

    @property
    def keeps_base(self) -> bool:
        """Whether the base's values of what is trained are needed while it is trained."""
        return self.method == "dpo" or self.l2_to_base > 0 or self.distill_from == "base" or self.changes_experts

    @property
    def distills_all(self) -> bool:
        """Whether a run that distils does so on all documents, and not on replayed ones alone."""
        return (self.distill_on or ("replay" if self.distill_from == "base" else "all")) == "all"

    @property
    def distillation_weight(self) -> float:
        return self.distill_weight or (0.5 if self.distills_all else 1.0)

    @property
    def changes_experts(self) -> bool:
        """Whether other experts are trained from some step on."""
        return bool(self.expand_experts or self.reselect_steps)

    @property
    def learning_rate(self) -> float:
        return self.training.get("learning_rate", TrainingArguments.learning_rate)

    @property
    def router_rate(self) -> float:
        """The learning rate of the routers, where they are trained."""
        return self.learning_rate if self.router_lr is None else self.router_lr

    @property
    def timeout(self) -> timedelta:
        """How long a process waits for the others."""
        return timedelta(seconds=self.training.get("ddp_timeout", TrainingArguments.ddp_timeout))


def _complaints(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with a run's settings, beside the type of each."""
    values = {**vars(config), **config.training}
    for key, value in values.items():
        if isinstance(value, (int, float)) and not abs(value) < 2**32:
            yield f"{key}={value} is not a finite number below 2**32"
    if config.seed < 0:
        yield f"seed={config.seed} is below 0"
    for key in POSITIVE:
        value = values.get(key)
        if value is not None and value <= 0 and (key, value) != ("max_steps", -1):
            yield f"{key}={value} is not above 0"
    for key in ("label_smoothing_factor", "validation_fraction"):
        if not 0 <= values.get(key, 0) <= 1:
            yield f"{key}={values[key]} is not between 0 and 1"
    if config.device == "cuda" and not torch.cuda.is_available():
        yield "torch sees no GPU for device=cuda. Use device=cpu, or install a torch with CUDA"
    reports = values.get("report_to") or []
    for name in [reports] if isinstance(reports, str) else reports:
        if name not in ("none", "all", *get_available_reporting_integrations()):
            yield f"report_to={name} is not installed. Give report_to=none or install it"
    if values.get("eval_strategy", "no") != "no" and not (config.validation_fraction or config.validation_dataset):
        yield f"eval_strategy={values['eval_strategy']} needs a validation set. Raise validation_fraction"
    if config.streaming and not config.n_train_samples:
        yield "streaming needs to know how many samples to take. Give n_train_samples"
    for key in ("expert_scores_dir", "contrast_scores_dir"):
        if values[key] and not Path(values[key]).exists():
            yield f"{key}={values[key]} is not there{suggest_path(values[key])}"
    if config.contrast != "difference" and not config.contrast_scores_dir:
        yield f"contrast={config.contrast} needs scores on general data. Give contrast_scores_dir"
    if config.ep_size != "auto" and not re.fullmatch("0*[1-9][0-9]*", config.ep_size):
        yield f"ep_size={config.ep_size} is neither a number above 0 nor auto"
    if config.global_batch_size and "gradient_accumulation_steps" in config.training:
        yield "global_batch_size sets gradient_accumulation_steps. Give one of them"
    batch = batch_split(config)
    if batch and batch["gradient_accumulation_steps"] % 1:
        size = batch["per_device_train_batch_size"]
        yield f"global_batch_size={config.global_batch_size} cannot be shared out in batches of {size}. Change it"
    if config.kind not in ON_EXPERTS:
        changed = [key for key in ("shard_dense", "frozen_dtype", "offload_frozen", "expert_compute") if values[key]]
        changed += ["ep_size"] * (config.ep_size not in ("1", "auto"))
        if changed:
            others = f"and {LORA_SELECTED}, not {config.method}"
            yield f"{changed[0]} is for methods esft, dpo, random {others}. Leave it out"
    if config.method == "dpo" and config.loss_on != "all":
        yield f"loss_on={config.loss_on} is not for method dpo: the loss is on what differs in a pair. Leave it out"
    if config.train_shared_experts and config.kind == LORA_SELECTED:
        yield f"train_shared_experts is not for {LORA_SELECTED}. Give lora_modules=shared_experts"
    if config.verify_frozen and config.method == "full":
        yield "verify_frozen has nothing to verify, as method full freezes nothing. Leave it out"
    for key, (allowed, why) in REFUSED.items():
        if values.get(key) is not None and values[key] not in allowed:
            yield f"{key}={values[key]} does not work here: {why}. Leave it out"
    yield from _of_replay_and_distillation(config)
    yield from _of_optimizer(config, values)
    yield from _unmet_needs(config, values)
    yield from _wrong_routers(config, values)
    yield from _of_changes(config, values)


def _of_changes(config: RunConfig, values: dict) -> Iterator[str]:
    """Yield what is wrong with the keys that change which experts are trained."""
    keys = [key for key in ("expand_experts", "reselect_steps", "reselect_max") if values[key] is not None]
    if keys and config.kind not in ("esft", "dpo"):
        yield f"{keys[0]} is for methods esft and dpo, not for {config.kind}. Leave it out"
    if config.reselect_max is not None and not (config.reselect_steps and 0 < config.reselect_max <= 1):
        yield f"reselect_max={config.reselect_max} is a share up to 1, and needs reselect_steps"
    expand = config.expand_experts
    if expand is None:
        return
    example = "Give it as {to: 0.3, by: 0.05, when: plateau}"
    if not isinstance(expand, dict) or not {"to", "by", "when"} <= expand.keys() <= {"start", "to", "by", "when"}:
        yield f"expand_experts={expand} must have to, by and when, and may have start. {example}"
        return
    for key in expand.keys() - {"when"}:
        if not (isinstance(expand[key], (int, float)) and 0 < expand[key] <= 1):
            yield f"{key} of expand_experts is {expand[key]}, not a share of all experts up to 1. {example}"
    if expand.get("start", 0) >= expand["to"]:
        yield f"expand_experts begins with {expand['start']} and goes up to {expand['to']}, which is not more. Raise to"
    if expand["when"] != "plateau" and not (type(expand["when"]) is int and expand["when"] > 0):
        yield f"when of expand_experts is {expand['when']}, neither plateau nor a number of steps. {example}"
    if expand["when"] == "plateau" and values.get("eval_strategy", "no") == "no":
        yield "expand_experts with when=plateau needs evaluations. Give eval_steps"
    if (config.reselect_max or 1) < expand["to"]:
        yield f"reselect_max={config.reselect_max} is less than what expand_experts ends with. Raise it"
    if config.strategy not in ("cumulative", "global", "layers"):
        yield f"expand_experts knows no next best under strategy={config.strategy}. Give cumulative, global or layers"
    if "start" in expand and (config.budget or config.top_p):
        yield "start of expand_experts says with how many to begin, as top_p and budget do. Give one of them"


def _of_replay_and_distillation(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the keys of replay and of distillation."""
    if not 0 < config.replay_share < 1:
        yield f"replay_share={config.replay_share} is not between 0 and 1"
    if config.replay_share != RunConfig.replay_share and not config.replay_dataset:
        yield f"replay_share={config.replay_share} needs replay_dataset"
    if config.replay_dataset == config.train_dataset:
        yield f"replay_dataset={config.replay_dataset} is the training data itself. Give data that it must not forget"
    if config.replay_dataset and config.method == "dpo":
        yield "replay_dataset is not for method dpo: a replayed answer has none to compare it with. Leave it out"
    source = config.distill_from
    for key in ("distill_on", "distill_weight") if source is None else ():
        if getattr(config, key) is not None:
            yield f"{key}={getattr(config, key)} needs distill_from"
    if source and config.method == "dpo":
        yield "distill_from is not for method dpo, which holds the model to the base by dpo_beta. Leave it out"
    if source == "base" and config.kind not in ON_EXPERTS:
        yield f"distill_from=base is for methods esft and random and {LORA_SELECTED}, which keep the base. Leave it out"
    if source and not config.distills_all and not config.replay_dataset:
        yield f"distill_from={source} on replayed documents needs some. Give replay_dataset, or distill_on=all"


def _of_optimizer(config: RunConfig, values: dict) -> Iterator[str]:
    """Yield what is wrong with the optimizer, with the pull of `l2_to_base`, and with the products in fp8."""
    if config.expert_compute:
        device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
        if why := reason_against(device):
            yield f"expert_compute=fp8 does not work here: {why}. Leave it out"
        if config.frozen_dtype or config.offload_frozen:
            yield "expert_compute=fp8 multiplies with copies of its own. Leave out frozen_dtype and offload_frozen"
        if config.reselect_steps:
            yield "expert_compute=fp8 would not see the base's values of experts frozen again. Leave out reselect_steps"
    if config.changes_experts and values.get("optim") in (*SCHEDULE_FREE, *TORCHAO):
        yield f"optim={values['optim']} cannot take experts in or out while it runs. Set optim=adamw_torch_fused"
    if str(values.get("optim")).startswith(("lomo", "adalomo", "galore", "apollo")):
        yield f"optim={values['optim']} does not train fused experts. Set optim=adamw_torch_fused"
    if (optim := values.get("optim")) == "muon" and config.method == "lora":
        yield "optim=muon is for matrices of experts, and method lora trains low-rank factors. Leave it out"
    if optim in SCHEDULE_FREE:
        if values.get("lr_scheduler_type", "linear") != "constant":
            yield f"optim={optim} takes the place of a schedule. Give lr_scheduler_type=constant"
        if 0 < values.get("warmup_steps", 0) < 1 or (values.get("warmup_steps") and optim == "schedule_free_radam"):
            other = "has a warmup of its own" if optim == "schedule_free_radam" else "counts steps, not shares"
            yield f"warmup_steps={values['warmup_steps']} is not for optim={optim}, which {other}. Change it"
    pull, rate = config.l2_to_base, max(config.learning_rate, config.router_rate)
    if pull < 0:
        yield f"l2_to_base={pull} is below 0"
    if pull and config.method == "lora":
        yield "l2_to_base is not for method lora, whose weight_decay shrinks the change itself. Give weight_decay"
    if pull and config.method == "full":
        yield "l2_to_base is for methods esft, dpo and random, which keep the base's values. Leave it out"
    if pull and optim in SCHEDULE_FREE:
        yield f"l2_to_base is not for optim={optim}, which trains other values beside the weights. Leave one out"
    if pull * rate >= 1:
        yield f"l2_to_base={pull} at learning rate {rate} would pull past the base. Give less than {1 / rate:g}"


def _unmet_needs(config: RunConfig, values: dict) -> Iterator[str]:
    """Yield which keys miss another that they need."""
    if config.method == "random" and not config.expert_config:
        yield "method random needs --expert_config. scripts/expert/generate_expert_config.py makes one"
    best = "save_strategy=best" if values.get("save_strategy") == "best" else "load_best_model_at_end"
    if best == "save_strategy=best" or values.get(best):
        if values.get("eval_strategy", "no") == "no":
            yield f"{best} needs evaluations. Give eval_steps"
        if 0 < values.get("max_steps", -1) < values.get("eval_delay", 0):
            yield f"{best} needs evaluations, and eval_delay={values['eval_delay']} leaves none. Lower it"
    for key in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if values.get(key) and not values.get("dataloader_num_workers"):
            yield f"{key} needs dataloader_num_workers above 0"
    options = values.get("activation_checkpointing_kwargs") or {}
    if not isinstance(options, dict):
        yield f"activation_checkpointing_kwargs={options} is not a dict"
    if unknown := sorted(options.keys() - CHECKPOINTING):
        yield f"activation_checkpointing_kwargs has no {unknown[0]!r}{suggest(unknown[0], CHECKPOINTING)}"
    if options.get("offload") and (config.device == "cpu" or not torch.cuda.is_available()):
        yield "offload in activation_checkpointing_kwargs needs a GPU. Leave it out"
    if (path := values.get("resume_from_checkpoint")) not in (None, "false"):
        if not config.save_opt_states:
            yield f"resume_from_checkpoint={path} needs --save_opt_states"
        if config.overwrite:
            yield "resume_from_checkpoint goes on with a run, and overwrite removes it. Give one of them"


def _wrong_routers(config: RunConfig, values: dict) -> Iterator[str]:
    """Yield what is wrong with the keys of routers."""
    if config.train_router and config.kind not in ("esft", "dpo", "random"):
        yield f"train_router is for methods esft, dpo and random, not {config.kind}. Leave it out"
    for key, usual in {"router_lr": None, "router_kl": 1.0}.items():
        if values[key] is not None and values[key] < 0:
            yield f"{key}={values[key]} is below 0"
        if values[key] != usual and not config.train_router:
            yield f"{key} is for routers that are trained. Give train_router"
    options = values.get("activation_checkpointing_kwargs") or {}
    if config.train_router and config.router_kl and options.get("use_reentrant"):
        yield "router_kl has no gradient with use_reentrant in activation_checkpointing_kwargs. Leave that out"


def batch_split(config: RunConfig) -> dict[str, float]:
    """Return the keys that `global_batch_size` sets. An uneven split gives a fraction as the accumulation."""
    if config.global_batch_size is None:
        return {}
    share = config.global_batch_size / int(os.environ.get("WORLD_SIZE", 1))
    size = min(config.training.get("per_device_train_batch_size", 8), max(int(share), 1))
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": share / size}
