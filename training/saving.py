"""A Trainer whose checkpoints are adapter-sized, written whole by all ranks together, and resumed from exactly.

A checkpoint (checkpoints.py says what is in it) is written in a staging folder and renamed:

    <output_dir>/.staging/checkpoint-20/   every rank's part, and the manifest last
              -> checkpoint-20/            a run killed at any moment leaves this, or the one before

A rank that cannot write, since its disk is full, still takes part in what the ranks do together. They agree after each
part, and all end with the error of the one that failed.

The best checkpoint is the one of the lowest validation loss in the run's folder, wherever that was moved to. Trainer
notes a path instead, and the step of an evaluation that may have no checkpoint.
"""

import functools
import json
import math
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

import esft
from deepseek.adapters import BASE_NAME
from deepseek.expert_parallel import gather_to_first
from deepseek.files import list_checkpoints, set_modes, step_of, write_json
from deepseek.partial_loading import no_bars
from deepseek.process_groups import Ranks, lost_contact
from training import checkpoints
from training.expert_schedule import SELECTION, ExpertSchedule
from training.keys import ON_EXPERTS
from training.optimizers import optimizer_class

SCHEDULER = "scheduler.json"


class SavingTrainer(Trainer):
    """transformers' Trainer with checkpoints of a method: an adapter with its states, a LoRA adapter, or a model."""

    def __init__(self, *, method: str, ranks: Ranks, schedule: ExpertSchedule | None = None, **kwargs):
        super().__init__(**kwargs)
        self.schedule = schedule
        if schedule:
            schedule.join(self.model, ranks)
        self.adapter, self.lora, self.ranks = method in ON_EXPERTS, method == "lora", ranks
        self.eval_losses: dict[int, float] = {}  # by step, of the weights at hand
        self._staging: Path | None = None
        self._failure: str | None = None  # why this rank could not write
        self._damaged: dict[Path, str] = {}  # checkpoints that cannot be the best, and why

    def _get_output_dir(self, trial):
        return str(self._staging or super()._get_output_dir(trial))

    def _writing(self, function: Callable[[], object]) -> None:
        """Call what writes files. A failure waits for `_agree`, since other ranks may wait for this one."""
        try:
            function()
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:  # torch.save: RuntimeError, disk full
            if isinstance(error, RuntimeError) and lost_contact(error):
                raise
            self._failure = self._failure or str(error)

    def _agree(self, folder: Path) -> None:
        failure, self._failure = self._failure, None
        if failure:
            failure = f"cannot write {folder}: {failure}. What was saved before is whole."
        self.ranks.raise_on_all(failure)

    def write_on_first(self, function: Callable[[], object]) -> None:
        """Let rank 0 write into the run's folder. All ranks call this, and all end where it fails."""
        if self.args.should_save:
            self._writing(function)
        self._agree(Path(self.args.output_dir))

    def _save_checkpoint(self, model, trial):
        if self.schedule:
            self.schedule.verify()
        run_dir, writes = Path(self.args.output_dir), self.args.should_save
        final = run_dir / f"checkpoint-{self.state.global_step}"
        best = self._note_best(final)
        self._staging = run_dir / ".staging"
        staged = self._staging / final.name
        try:
            if writes:
                shutil.rmtree(self._staging, ignore_errors=True)
                self._writing(lambda: (staged / checkpoints.STATES).mkdir(parents=True))
            self._agree(final)
            self._writing(lambda: super(SavingTrainer, self)._save_checkpoint(model, trial))
            self._agree(final)
            self.state.best_model_checkpoint = None  # a path, which would be wrong after a move
            if writes:
                self._writing(lambda: self._publish(staged, final, best))
            self._agree(final)
        finally:
            if writes:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _publish(self, staged: Path, final: Path, best: Path | None) -> None:
        self.state.save_to_json(str(staged / "trainer_state.json"))
        checkpoints.write_manifest(staged)
        if final.exists():  # damaged, or of the same step: it goes when the new one is there
            final.rename(self._staging / "replaced")
        staged.rename(final)
        rotate_checkpoints(self.args.output_dir, self.args.save_total_limit, best and str(best))

    def _note_best(self, written: Path | None = None, verify: bool = False) -> Path | None:
        """Note in the state of all ranks which checkpoint is the best, and return its path.

        `written` counts, too: it is about to be there. With `verify`, a damaged checkpoint is not taken.
        """
        if self.args.metric_for_best_model is None:
            return None
        best, loss = self.ranks.on_rank_zero(functools.partial(self._find_best, written, verify))
        self.state.best_global_step, self.state.best_metric = best and step_of(best), loss
        return best

    def _find_best(self, written: Path | None, verify: bool) -> tuple[Path, float] | tuple[None, None]:
        history = self.state.log_history
        losses = {entry["step"]: entry["eval_loss"] for entry in history if entry.get("eval_loss", math.nan) < math.inf}
        saved = {*list_checkpoints(Path(self.args.output_dir)), *([written] if written else [])}
        by_step = {step_of(path): path for path in saved - self._damaged.keys()}
        sign = -1 if self.args.greater_is_better else 1
        for _, step in sorted((sign * losses[step], step) for step in by_step.keys() & losses.keys()):
            path = by_step[step]
            if not (reason := checkpoints.find_damage(path) if verify else None):
                return path, losses[step]
            self._damaged[path] = reason
        return None, None

    def check_best(self) -> Path | None:
        """Return the best checkpoint, which is whole. Warn if it takes the place of one that is gone or damaged."""
        was, best = self.state.best_global_step, self._note_best(verify=True)
        if was and was != self.state.best_global_step:
            lost = Path(self.args.output_dir, f"checkpoint-{was}")
            reason = f"is damaged ({self._damaged[lost]})" if lost in self._damaged else "is missing"
            instead = f"{best.name} takes its place" if best else "no other takes its place"
            warnings.warn(f"the best checkpoint, {lost}, {reason}: {instead}", stacklevel=2)
        return best

    def _init_training_state(self, *args):
        where = super()._init_training_state(*args)
        self.check_best()
        return where

    def _finalize_training(self, *args):
        ended = self.state.global_step >= self.state.max_steps
        best = self.check_best() if ended and self.args.load_best_model_at_end else None
        self.state.best_model_checkpoint = best and str(best)
        return super()._finalize_training(*args)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return optimizer_class(args, model)

    def save_model(self, output_dir=None, _internal_call=False):
        """Let rank 0 write the model, or the adapter after it gathered the tensors of the other ranks."""
        output_dir = output_dir or self.args.output_dir
        self.optimizer.eval()  # a schedule-free one gives the weights to evaluate; `training_step` calls its train()
        if self.adapter:
            own = esft.adapter_tensors(self.model) if self.ranks.first_replica else {}
            tensors = gather_to_first(own, self.ranks)
            if self.args.should_save:
                self._writing(lambda: esft.save_adapter(self.model, output_dir, tensors))
        elif self.args.should_save:
            # transformers saves a generation config with flags without effect only if it believes it to be unchanged,
            # and Trainer has set its special tokens
            generation = self.model.generation_config
            generation._original_object_hash = hash(generation)
            with no_bars():
                self._writing(lambda: super(SavingTrainer, self).save_model(output_dir, _internal_call))
            if self.lora:
                note = self.accelerator.unwrap_model(self.model).base_note
                self._writing(lambda: write_json(Path(output_dir) / BASE_NAME, note))
            set_modes(Path(output_dir))
        if self._staging is None:
            self._agree(Path(output_dir))

    def _save_rng_state(self, output_dir):
        """Save nothing: `training_step` seeds the generators."""

    def _load_rng_state(self, checkpoint):
        """Load nothing, as nothing was saved."""

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.adapter:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.ranks.first_replica:
            states = Path(output_dir) / checkpoints.STATES
            self._writing(lambda: checkpoints.save_states(self.model, self.optimizer, states, self.ranks.rank))
        selection = self.schedule.state() if self.schedule else None
        if self.args.should_save:
            state = self.lr_scheduler.state_dict()
            if isinstance(self.lr_scheduler, LambdaLR):  # the rates follow from the settings, and torchao's are tensors
                state = {key: value for key, value in state.items() if key not in ("base_lrs", "_last_lr")}
            self._writing(lambda: write_json(Path(output_dir) / SCHEDULER, state))
            if selection:
                self._writing(lambda: write_json(Path(output_dir) / SELECTION, selection))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if not self.adapter:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            checkpoints.load_states(self.model, self.optimizer.optimizer, Path(checkpoint) / checkpoints.STATES)
            self.lr_scheduler.load_state_dict(json.loads((Path(checkpoint) / SCHEDULER).read_text()))
        schedule = self.lr_scheduler
        if isinstance(schedule, LambdaLR):  # in a run that was made longer it is another than the saved one
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors)]
            for group, rate in zip(self.optimizer.param_groups, schedule._last_lr):
                group["lr"] = rate

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.lora:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self.adapter:
            with self.schedule.restoring(Path(resume_from_checkpoint)) if self.schedule else nullcontext():
                esft.add_adapter(self.model, resume_from_checkpoint)
        else:  # Trainer's own way leaves the experts out: their names on disk are not those in memory
            with no_bars():
                saved, _ = esft.load_base_model(resume_from_checkpoint, dtype=self.model.dtype)
            self.model.load_state_dict(saved.state_dict())

    def _load_best_model(self):
        self.optimizer.eval()  # before the weights are there, as it would change them
        self._load_from_checkpoint(self.state.best_model_checkpoint)
        self.eval_losses.clear()
