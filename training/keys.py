"""What a run does with the keys of transformers' TrainingArguments that it does not simply hand on.

docs/settings.md lists every key: handed on, refused, or without effect. tests/training/test_keys.py compares that page
with these tables and with the fields of TrainingArguments.
"""

from deepseek.selection import SETTINGS

ALIASES = {
    "model": "base_model_path",
    "data": "train_dataset",
    "batch_size": "per_device_train_batch_size",
    "per_device_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "accumulation_steps": "gradient_accumulation_steps",
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "evaluation_strategy": "eval_strategy",
    "overwrite_output_dir": "overwrite",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share of all steps
}
SECRETS = {"wandb_api_key": "WANDB_API_KEY", "hub_token": "HF_TOKEN"}  # key -> variable of the environment
LORA_SELECTED = "lora with lora_experts=selected"  # a method of its own beside lora
ON_EXPERTS = ("esft", "random", "dpo", LORA_SELECTED)  # methods that train chosen experts
SCHEDULE_FREE = ("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd")  # values of optim
TORCHAO = ("adamw_torch_4bit", "adamw_torch_8bit")
DEFAULTS = {  # of TrainingArguments, where ours differ
    **{"report_to": "none", "logging_steps": 1, "save_strategy": "no", "seed": 0},
    "use_cache": True,  # only the config of a saved model says so: training itself never uses the cache
    "logging_nan_inf_filter": False,
}

_COMPILE = "a step sets hooks to compute the loss within the head, and torch.compile would compile them at every step"
_SHARDING = "the experts are shared out by ep_size, the other weights by shard_dense"
_LIGER = "it would replace layers of the model"
_AUTOCAST = "autocast would round the routers (dtype=bfloat16 does not, and has fp32 masters)"

REFUSED = {  # key: (the values that work, why no other does)
    "average_tokens_across_devices": ((True,), "the loss is the mean over the label tokens of all processes"),
    **dict.fromkeys(("bf16", "fp16"), ((False,), _AUTOCAST)),
    "auto_find_batch_size": (
        (False,),
        "it would change the batch (global_batch_size with a lower batch_size does not)",
    ),
    "optim_target_modules": ((), "GaLore and APOLLO train Linear layers, and fused experts are not Linear layers"),
    "torch_compile": ((False,), _COMPILE),
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), ((), _COMPILE)),
    "use_liger_kernel": ((False,), _LIGER),
    "liger_kernel_config": ((), _LIGER),
    "metric_for_best_model": (("loss", "eval_loss"), "an evaluation gives the loss alone"),
    "save_on_each_node": ((False,), "all nodes share the output folder"),
    "push_to_hub": ((False,), "upload the folder afterwards, with `hf upload`"),
    "ignore_data_skip": ((False,), "a run goes on with the batch after the checkpoint"),
    "accelerator_config": ((), "the order of the data and the sum of the gradients are those of this project"),
    "parallelism_config": ((), _SHARDING),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed"), (("",), _SHARDING)),
    "dataloader_drop_last": ((False,), "no sample is left out"),
    "dataloader_in_order": ((True,), "the seed gives the order of the data"),
    "train_sampling_strategy": (("random",), "the seed gives the order of the data"),
    "ddp_backend": ((), "it is nccl on GPUs and gloo on CPUs"),
}

_LOSS = "an evaluation during training computes the loss alone"
_OLD = "transformers has it no more"

NO_EFFECT = {  # key: why. It is accepted, reported, and left out
    "bf16_full_eval": "the validation loss is computed in the dtype of the weights",
    "fp16_full_eval": "the validation loss is computed in the dtype of the weights",
    "use_cache": "training never uses the cache, and the saved config is that of the base model",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    **dict.fromkeys(("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"), _LOSS),
    **dict.fromkeys(("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "label_names"), _LOSS),
    "enable_jit_checkpoint": "SIGTERM ends a run with a checkpoint anyway, if save_opt_states is given",
    "restore_callback_states_from_checkpoint": "no callback of a run has a state",
    **dict.fromkeys(
        ("hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        "nothing is pushed to the hub",
    ),
    "remove_unused_columns": "all columns of the data are read, and a column that is not known is reported",
    "length_column_name": "packs are made by the lengths of the samples",
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        "gradients are summed without DistributedDataParallel",
    ),
    "do_train": "this command always trains",
    "do_eval": "eval_strategy says when the validation loss is computed",
    "do_predict": "eval_multigpu.py evaluates a model",
    "local_rank": "torchrun sets it for each process",
    "save_safetensors": f"{_OLD}: all weights are safetensors",
    "logging_dir": f"{_OLD}: set TENSORBOARD_LOGGING_DIR in the environment",
    "n_device": "torchrun --nproc-per-node sets the number of processes",
    "random_concat_ratio": "a pack holds whole samples that do not see each other",
    "include_tokens_per_second": f"{_OLD}: tokens_per_second is always logged",
    "trust_remote_code": "code in a model's folder is never run, so transformers must have a class for the model",
}

ONLY_FOR = {  # key: (another key, its values that this key is for)
    "expert_config": ("method", ON_EXPERTS),
    **dict.fromkeys(SETTINGS, ("method", ("esft", "dpo", LORA_SELECTED))),
    "train_shared_experts": ("method", ("esft", "dpo")),
    "dpo_beta": ("method", ("dpo",)),
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_experts"), ("method", ("lora", LORA_SELECTED))),
    "lora_modules": ("method", (LORA_SELECTED,)),
    **dict.fromkeys(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        ("report_to", ("trackio", "all")),
    ),
}

CHECKPOINTING = {  # what activation_checkpointing_kwargs may hold
    *("every_n_layers", "offload", "use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"),
}
