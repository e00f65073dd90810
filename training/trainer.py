"""transformers' Trainer with our loss, our order of data, reduced gradients, and checkpoints that are written whole.

    L = sum over label tokens of -log p(token) / (label tokens of the global batch)

L runs over all that one optimizer step sees, in fp32. The head runs only at the positions where some row of the batch
has a label (loss.py). The batches of a step are the same for any number of processes: with P of them, process p takes
batches p, p + P, ... of the epoch's order, and an empty one where they end. deepseek/gradient_sync.py reduces the
gradients, not DDP.

`_get_grad_norm` is the last stop before an optimizer step. There all processes agree to stop at a loss that is not
finite, or after SIGTERM or Ctrl-C.
"""

import contextlib
import functools
import logging
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from deepseek.experts import check_own_forward, moe_layers
from deepseek.gradient_sync import GradientReducer
from deepseek.process_groups import Ranks, SharedError
from training import data
from training.batches import Batches, collate
from training.flops import count_flops, peak_flops, work_of
from training.loss import TokenLosses, label_positions
from training.optimizers import keep_experts_apart
from training.routers import TrainedRouters
from training.saving import SavingTrainer

logger = logging.getLogger("esft")


class Progress(TrainerCallback):
    """A progress bar with losses, tokens/s and MFU. In a file it is redrawn rarely, to keep logs short."""

    bar = tqdm(disable=True)

    def on_train_begin(self, args, state, control, **kwargs):
        self.shown: dict[str, str] = {}
        self.bar = tqdm(
            desc="training",
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,
            disable=args.disable_tqdm or not state.is_world_process_zero,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = {"loss": "loss", "eval_loss": "validation", "tokens_per_second": "tokens/s", "mfu": "MFU"}
        names |= {"rewards/accuracies": "accuracy", "distill_loss": "distillation"}
        self.shown |= {names[k]: f"{v:,.0f}" if k[0] == "t" else f"{v:.4f}" for k, v in logs.items() if k in names}
        self.bar.set_postfix(self.shown, refresh=False)


class ESFTTrainer(SavingTrainer):
    """The Trainer of a run.

    Rank 0 calls `before_first_step` when training begins. What is refused until then changes no file. `memory_advice`
    is for a GPU whose memory runs out. `routers` are given if they are trained.
    """

    def __init__(
        self,
        *,
        method: str,
        ranks: Ranks,
        before_first_step: Callable[[], object],
        memory_advice: str,
        documents_apart: bool = True,
        routers: TrainedRouters | None = None,
        **kwargs,
    ):
        pad_token_id = kwargs["processing_class"].pad_token_id or 0
        if pad_token_id >= kwargs["model"].get_input_embeddings().weight.shape[0]:
            pad_token_id = 0
        collator = functools.partial(collate, pad_token_id=pad_token_id, documents_apart=documents_apart)
        folder = Path(kwargs["args"].output_dir)
        was_there = folder.exists()
        super().__init__(method=method, ranks=ranks, data_collator=collator, **kwargs)
        if self.args.should_save and not was_there:  # Trainer has made it, and training may be refused yet
            folder.rmdir()
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the count of the global batch itself
        self._token_losses = TokenLosses(self.model.get_output_embeddings())
        self._token_losses.try_head(self.model)
        check_own_forward(moe_layers(self.model).values())
        self.signalled, self.stopping = 0, False  # the signal that came; all processes agreed to stop
        self.step_seconds: list[float] = []
        self._micro_batches: list[tuple[torch.Tensor, list[int]]] = []  # loss, rows of the dataset
        self._start, self._seconds, self._work = None, 0.0, None
        self._flops = count_flops(self.model, references=method == "dpo")
        self._peak = self._flops and peak_flops(self.args.device, self.model.dtype)
        self.routers, self.means = routers, [routers.means] if routers else []
        self.before_first_step, self.memory_advice, self.progress = before_first_step, memory_advice, Progress()
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(self.progress)

    def train(self, *args, **kwargs):
        """Train to the last step. SIGTERM or Ctrl-C ends it after the step at work. Ctrl-C again ends it at once.

        Where optimizer states are saved, a checkpoint is written first.

        Raises:
            SystemExit: 143 after SIGTERM, 130 after Ctrl-C.
            ValueError: a loss that is not finite.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            super().train(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"cannot go on: the GPU's memory ran out after step {self.state.global_step} "
                f"({str(error).splitlines()[0]}). These settings save memory, the least costly first: "
                f"{self.memory_advice}"
            ) from error
        finally:
            self.progress.bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopping and self.state.global_step < self.state.max_steps:
            number = signal.Signals(self.signalled or signal.SIGTERM)
            kept = "the same command goes on from here"
            if self.args.save_only_model:
                kept = "nothing was kept, as --save_opt_states was not given"
            logger.info(f"  stopped by {number.name} after step {self.state.global_step}: {kept}")
            sys.exit(128 + number)

    def _on_signal(self, number, frame):
        if number == signal.SIGINT and self.signalled:
            signal.default_int_handler(number, frame)
        if number == signal.SIGINT and self.args.should_save:
            tqdm.write("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        self.signalled = number

    # ---- the loss

    def _num_terms(self, inputs) -> torch.Tensor:
        """Return how many terms the loss of a batch has: its label tokens."""
        return (inputs["labels"][:, 1:] != data.IGNORE).sum()

    def _split(self, inputs) -> tuple[torch.Tensor, dict]:
        """Return (labels (B, M), what the model takes, with the M positions of the labels as "logits_to_keep")."""
        labels_BM, kept = label_positions(inputs["labels"], inputs["kept"])
        taken = {key: inputs[key] for key in ("input_ids", "position_ids")}
        return labels_BM, {**taken, "use_cache": False, "logits_to_keep": kept}

    def _losses(self, model, inputs, smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (cross entropy of each label (B, M), the M positions of the labels)."""
        labels_BM, taken = self._split(inputs)
        with self._routing_counted(inputs):
            return self._token_losses(model, taken, labels_BM, smoothing), taken["logits_to_keep"]

    def _loss_sum(self, model, inputs, smoothing: float = 0.0) -> torch.Tensor:
        """Return the sum of the terms of a batch's loss; `model` may be wrapped."""
        return self._losses(model, inputs, smoothing)[0].sum()

    def _routing_counted(self, inputs):
        """Return a context for the forward of a batch, in which its tokens are counted if a run needs that."""
        counts = self.schedule and torch.is_grad_enabled()  # no validation, no reference
        return self.schedule.counting(inputs["labels"]) if counts else contextlib.nullcontext()

    def _watched(self, inputs):
        """Return a context for the forward of a batch, in which routers that are trained are measured."""
        return self.routers.watch(inputs) if self.routers else contextlib.nullcontext()

    def _get_num_items_in_batch(self, batch_samples, device):
        if self.routers:
            self.routers.tokens = self.accelerator.reduce(self.routers.count(batch_samples).to(device), "sum")
        count = sum((self._num_terms(inputs) for inputs in batch_samples), torch.tensor(0))
        return self.accelerator.reduce(count.to(device, non_blocking=True), "sum")

    def _prepare_inputs(self, inputs):
        """Move a batch to the device, from pinned memory. The host does not wait for what the device is doing."""
        moved = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        return {**inputs, **{key: value.to(self.args.device, non_blocking=True) for key, value in moved.items()}}

    def compute_loss(self, model, inputs, num_items_in_batch):
        """Return the summed loss / `num_items_in_batch`, and penalties, times the processes that are averaged over."""
        with self._watched(inputs):
            loss = self._loss_sum(model, inputs, self.args.label_smoothing_factor)
        loss = loss / num_items_in_batch * self.ranks.world_size
        return loss + self.routers.penalty() * self.ranks.world_size if self.routers else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Return the mean loss over the whole validation set, which is not a mean of batch means."""
        packs = eval_dataset or self.eval_dataset
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # loss, its terms
        self.model.eval()
        self.optimizer.eval()
        for indices in Batches(len(packs), self.args.eval_batch_size, self.ranks, 0):
            inputs = self._prepare_inputs(self.data_collator([packs[index] for index in indices]))
            with torch.no_grad(), self._watched(inputs):
                total[0] += self._loss_sum(self.model, inputs)
            total[1] += self._num_terms(inputs)
        total = self.accelerator.reduce(total, "sum")
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1]).item()}
        self.eval_losses[self.state.global_step] = metrics[f"{metric_key_prefix}_loss"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- a step

    def create_optimizer(self, model=None):
        optimizer = self.ranks.run_or_fail_together(functools.partial(super().create_optimizer, model))
        keep_experts_apart(optimizer, self.model)
        if self.routers:
            self.routers.set_rate(optimizer)
        self._reducer = GradientReducer(self.model, self.ranks, lambda: self.accelerator.sync_gradients)
        if self.schedule:
            packs_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.ranks.world_size
            tokens = packs_per_step * statistics.fmean(self.train_dataset.lengths)
            warmup = self.args.get_warmup_steps(self.state.max_steps)
            self.schedule.begin(optimizer, self.state.global_step, warmup, tokens)
            self.schedule.tell_limits(self.state.max_steps)
        return optimizer

    def get_train_dataloader(self):
        args, seed = self.args, self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._batches = Batches(len(self.train_dataset), args.train_batch_size, self.ranks, seed)
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def _run_epoch(self, **kwargs):
        if self.before_first_step:
            self.write_on_first(self.before_first_step)
            self.before_first_step = None
        self._batches.epoch = kwargs["epoch"]
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:  # resumed from the very last checkpoint, where Trainer would take one step more
            self.control.should_training_stop = True

    def _finalize_training(self, *args):
        self.progress.bar.close()  # a warning is a line of its own
        return super()._finalize_training(*args)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._start = time.perf_counter()
        if self.schedule and self.schedule.before_step(self.state):
            self._reducer.close()
            self._reducer = GradientReducer(self.model, self.ranks, lambda: self.accelerator.sync_gradients)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        # dropout depends on the place in the run alone: a resumed run needs no saved generator
        place = (self.args.seed, self.state.global_step, len(self._micro_batches), self.ranks.rank)
        torch.manual_seed(random.Random(str(place)).getrandbits(63))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches.append((loss, inputs["rows"]))
        work = work_of(inputs)
        self._work = work if self._work is None else self._work + work
        return loss

    def _clip_grad_norm(self, model, max_norm=None):
        self._reducer.finish()
        return self._reducer.clip(self.args.max_grad_norm if max_norm is None else max_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        """Return the norm, at the last stop before the optimizer step: nothing was changed yet."""
        norm = self._clip_grad_norm(model, float("inf")) if grad_norm is None else grad_norm
        losses = torch.stack([loss for loss, _ in self._micro_batches])
        finite = losses.isfinite().all() & torch.as_tensor(norm, device=losses.device).isfinite()
        flags = torch.stack([~finite, torch.tensor(self.signalled > 0, device=losses.device)])
        broken, self.stopping = (self.accelerator.reduce(flags.float(), "sum") > 0).tolist()
        if broken:
            self._refuse_step(losses, float(norm))
        self._micro_batches.clear()
        return norm

    def _refuse_step(self, losses: torch.Tensor, norm: float):
        """Raise, on all ranks, and name the rows of the micro batches that are not finite, or all rows of the step."""
        found = [(bool(loss.isfinite()), rows) for loss, rows in self._micro_batches]
        found = [pair for part in self.ranks.gather(found) for pair in part]
        rows = [row for finite, rows in found if not finite for row in rows]
        rows = sorted(set(rows or [row for _, rows in found for row in rows]))
        shown = ", ".join(map(data.sample_name, rows[:20])) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
        loss = sum(self.ranks.gather(losses.sum().item())) / self.ranks.world_size
        raise SharedError(
            f"cannot take step {self.state.global_step + 1}: the loss is {loss} and the gradient norm {norm} on rows "
            f"{shown} of the training data. Look at these rows, or lower learning_rate."
        )

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self._start is not None:  # None at the end of an epoch
            self.step_seconds.append(time.perf_counter() - self._start)
            self._seconds, self._start = self._seconds + self.step_seconds[-1], None
            if self.stopping:
                self.control.should_training_stop = True
                self.control.should_save = not self.args.save_only_model
        # a resumed run knows no loss since the last log, and a last step may come before the first log
        self.control.should_log |= self.control.should_save or self.control.should_training_stop
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs, start_time=None):
        if "loss" in logs and self._seconds:
            logs["tokens_per_second"] = round(self._work[0].item() * self.args.world_size / self._seconds, 1)
            if self._peak:
                logs["mfu"] = round(self._flops.of(self._work) / self._seconds / self._peak, 4)
            self._seconds, self._work = 0.0, None
        for kind in ("", "eval_"):
            for means in self.means if f"{kind}loss" in logs else ():
                logs |= means.take(kind, self.accelerator.reduce)
        super().log(logs, start_time)
