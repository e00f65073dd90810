r"""One training run: ESFT, DPO on selected experts, full fine-tuning, LoRA or random experts (key `method`).

    python train.py --model M --data my_task.jsonl --output_dir O        # scores the experts, selects some, trains them
    python train.py --method dpo --model M --data preferences.jsonl --output_dir O      # the same on preference data
    python train.py --base_model_path=M --train_dataset=D --train_config=configs/base.yaml \
        --expert_config=results/expert_configs/D.json --output_dir=results/checkpoints/D [key=value ...]

    torchrun --nproc-per-node=8 train.py ...       # data parallel: every process holds the model (ep_size=1)
    torchrun --nproc-per-node=8 train_ep.py ...    # expert parallel where the model needs it (ep_size=auto)

The loss is the mean over the label tokens of the whole batch of an optimizer step, whatever the packing, accumulation
and number of processes (training/trainer.py). In DPO it is the mean over its pairs (training/dpo.py).

The output folder is itself a loadable adapter (for `method=full`, a model). It also holds run.json (config, versions,
results), trainer_state.json (all losses) and checkpoint-<step> folders. A finished run is not repeated. SIGTERM and
Ctrl-C end a run after the current step, with exit code 143 or 130. With --save_opt_states they write a checkpoint
first, and the same command continues an interrupted run from its last complete checkpoint. While a run is at work in a
folder, a second one there is refused.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import shlex
import sys
from pathlib import Path

import torch.distributed as dist

import esft
import utils
from deepseek.files import check_output, write_json
from deepseek.process_groups import Ranks, SharedError, lost_contact
from training.config import RunConfig, read_config, training_arguments
from training.data import Template, eval_file_of, held_out_questions, load_data, template_settings
from training.distillation import choose_trainer
from training.first_selection import score_and_select, selected_experts
from training.frozen_proof import FrozenProof
from training.keys import LORA_SELECTED
from training.l2_to_base import PullToBase
from training.model import LoadedModel, load_model, log_model
from training.plan import Plan, join_processes, open_empty, plan_run, tell_few_steps
from training.routers import describe_drift
from training.run_folder import find_run, prepare_folder, results_of, run_note
from training.trainer import ESFTTrainer

logger = logging.getLogger("esft")


def run(config: RunConfig) -> dict:
    """Train, or finish a run that was broken off. Return its results, which run.json keeps.

    Under torchrun all processes call this. Until training begins, no file of the output folder is changed.

    Raises:
        ValueError, OSError: something is wrong with the config, the data, the model or the output folder; later, a
            loss that is not finite, or a frozen tensor that changed.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C.
    """
    ranks = join_processes(config)
    with contextlib.ExitStack() as owned:
        ranks.on_rank_zero(lambda: check_output(config.output_dir, folder=True))
        ranks.on_rank_zero(lambda: owned.enter_context(utils.locked(config.output_dir)))
        return run_in_folder(config, ranks)


def run_in_folder(config: RunConfig, ranks: Ranks) -> dict:
    """Call the steps of a run, one after the other, in a folder that belongs to it alone. Return its results."""
    args = ranks.run_or_fail_together(lambda: training_arguments(config))
    to_select = config.kind in ("esft", "dpo", LORA_SELECTED) and not config.expert_config
    if to_select:
        config = dataclasses.replace(config, expert_config=str(selected_experts(config.output_dir)))
    packs_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks.world_size
    checkpoint, results = ranks.on_rank_zero(lambda: find_run(config, packs_per_step))
    if results is not None:
        logger.info(f"{config.output_dir} holds this run already, finished: nothing to do")
        return results

    empty = ranks.run_or_fail_together(lambda: open_empty(config, ranks))
    tokenizer = ranks.run_or_fail_together(lambda: esft.load_tokenizer(config.base_model_path))
    packs, eval_packs = load_data(tokenizer, config, ranks)
    make_trainer = choose_trainer(config, tokenizer, packs, ranks)
    if to_select and not checkpoint:
        ranks.on_rank_zero(lambda: score_and_select(config))

    plan = plan_run(config, args, packs, ranks, empty)
    args.activation_checkpointing = plan.activation_checkpointing
    ranks = ranks.with_experts(plan.ep_size, config.timeout)
    loaded = load_model(config, plan, ranks)
    if not loaded.documents_apart:
        packs, eval_packs = packs.split(), eval_packs.split()
    log_model(loaded.model, config, packs)
    tell_few_steps(args, len(packs), packs_per_step)

    generation = loaded.model.generation_config
    generation.eos_token_id = Template(tokenizer, template_settings(config)).end_tokens(generation)
    note = {**ranks.on_rank_zero(lambda: run_note(config, packs_per_step)), "end_token_ids": generation.eos_token_id}
    note["environment"] = utils.environment()
    trainer = make_trainer(
        method=config.kind,
        schedule=plan.schedule,
        ranks=ranks,
        before_first_step=functools.partial(prepare_folder, config, checkpoint, note),
        memory_advice=plan.memory_advice,
        documents_apart=loaded.documents_apart,
        routers=loaded.routers,
        model=loaded.model,
        args=args,
        train_dataset=packs,
        eval_dataset=eval_packs or None,
        processing_class=tokenizer,
        callbacks=[PullToBase(config.l2_to_base)] if config.l2_to_base else None,
    )
    proof = FrozenProof(loaded.model, ranks, plan.schedule) if config.verify_frozen else None
    if checkpoint:
        logger.info(f"  going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return finish_run(config, trainer, loaded, plan, proof, note)


def finish_run(
    config: RunConfig, trainer: ESFTTrainer, loaded: LoadedModel, plan: Plan, proof: FrozenProof | None, note: dict
) -> dict:
    """Verify the frozen tensors, evaluate and save the model, and write the run's results, which are returned."""
    if proof:
        proof.check(trainer.state.global_step)
    if trainer.eval_dataset and trainer.state.global_step not in trainer.eval_losses:
        trainer.evaluate()
    trainer.save_model()
    trainer.write_on_first(trainer.save_state)
    results = results_of(trainer, loaded, plan, frozen_verified=proof is not None)
    trainer.write_on_first(lambda: write_json(Path(config.output_dir, "run.json"), {**note, "results": results}))
    best = f" at step {results['best_step']}, the best checkpoint" if results["best_step"] else ""
    loss = f"; validation loss {results['eval_loss']:.4f}{best}" if trainer.eval_dataset else ""
    kind = "model" if config.method == "full" else "adapter"
    logger.info(f"{utils.counted(results['steps'], 'step')}{loss}; {kind} in {config.output_dir}")
    if loaded.routers:
        logger.info(f"  {describe_drift(results)}")
    if trainer.ranks.rank == 0 and not os.environ.get("ESFT_STAGE"):  # scripts/pipeline.py evaluates the model itself
        tell_next(note["config"])
    return results


def tell_next(run: dict) -> None:
    """Print the command that evaluates a finished run, if it can run without more flags."""
    script = os.path.relpath(utils.ROOT / "eval_multigpu.py")
    if eval_file_of(run["train_dataset"]) or held_out_questions(run)[0]:
        logger.info("next: " + shlex.join([utils.PYTHON, script, f"--model={run['output_dir']}"]))
    else:
        only = "it asks held-out samples only if they are one question and one answer"
        logger.info(f"to evaluate it, give {script} questions of your own: {only}")


def main(argv: list[str] | None = None, defaults: dict | None = None, description: str | None = __doc__) -> dict:
    """Run the command. `defaults` are keys that neither the config file nor the command line gives."""
    try:
        config = read_config(sys.argv[1:] if argv is None else argv, defaults, description)
    except (ValueError, OSError) as error:  # all processes see the same here
        raise SharedError(utils.reason_of(error)) from error
    try:
        results = run(config)
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        raise ConnectionError(
            f"cannot go on: another process has died (see above), or did not answer for "
            f"{config.timeout.total_seconds():.0f} seconds, the ddp_timeout ({str(error).splitlines()[0]}). The same "
            "command goes on from the last checkpoint."
        ) from error
    if dist.is_initialized():
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    utils.run_cli(main)
