"""transformers' Trainer as this project needs it, on one process, data parallel or expert parallel.

    L = sum over label tokens of -log p(token) / (label tokens of the global batch)

over all that one optimizer step sees, in fp32; the head runs only at the positions where some row of the batch has a
label. The batches of a step are the same for any number of processes: with P of them, process p takes the batches p,
p + P, ... of the epoch's order, and an empty one where they end. Gradients are reduced by deepseek/gradients.py, never
by DDP.
The last stop before an optimizer step is `_get_grad_norm`: there all processes agree to stop at a loss that is not
finite, or after SIGTERM or Ctrl-C. A checkpoint (checkpoints.py) is written in a staging folder and renamed when whole:

    <output_dir>/.staging/checkpoint-20/   every rank's part; the manifest last
              -> checkpoint-20/            a run killed at any moment leaves this, or the one before
"""

import functools
import json
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

import esft
from deepseek.adapters import BASE_NAME
from deepseek.expert_parallel import gather_to_first
from deepseek.files import set_modes, write_json
from deepseek.gradient_sync import GradientReducer
from deepseek.partial_loading import no_bars
from deepseek.process_groups import Ranks, SharedError, lost_contact
from training import checkpoints, data

SCHEDULER = "scheduler.json"
NOTHING = data.Pack([0, 0], [data.IGNORE] * 2, [0, 1])  # for a rank without a batch, which takes part all the same


def collate(packs: list[data.Pack], pad_token_id: int) -> dict:
    """`data.collate` (of no packs, too), with the rows of the dataset in it, so that a bad step can name them."""
    rows = [row for pack in packs for row in pack.samples]
    return {**data.collate(packs or [NOTHING], pad_token_id), "rows": rows}


class Batches:
    """A batch sampler: the batches of this rank in an epoch's order, which `seed` and the epoch give; as many on every
    rank, empty ones last."""

    def __init__(self, length: int, batch_size: int, ranks: Ranks, seed: int):
        self.length, self.batch_size, self.ranks, self.seed, self.epoch = length, batch_size, ranks, seed, 0

    def __len__(self) -> int:
        return -(-self.length // (self.batch_size * self.ranks.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = random.Random(f"{self.seed} {self.epoch}").sample(range(self.length), self.length)
        batches = list(_batches(order, self.batch_size))[self.ranks.rank :: self.ranks.world_size]
        yield from batches + [[]] * (len(self) - len(batches))


class Progress(TrainerCallback):
    """A bar with time left, loss and tokens/s; off a terminal it is redrawn rarely, to keep logs short."""

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
        names = {"loss": "loss", "eval_loss": "validation", "tokens_per_second": "tokens/s"}
        self.shown |= {names[k]: f"{v:,.0f}" if k[0] == "t" else f"{v:.4f}" for k, v in logs.items() if k in names}
        self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class ESFTTrainer(Trainer):
    """transformers' Trainer with our loss, adapter-sized checkpoints written whole, and a stop on a non-finite loss."""

    def __init__(self, *args, method: str, ranks: Ranks, **kwargs):
        super().__init__(*args, **kwargs)
        self.adapter, self.lora, self.ranks = method in ("esft", "random"), method == "lora", ranks
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the count of the global batch itself
        self._loss_shifts_labels = True
        self.signalled, self.stopping = 0, False  # the signal that came; all processes agreed to stop
        self.evaluated: tuple[int, float] | None = None  # step, loss
        self.step_seconds: list[float] = []
        self._micro_batches: list[tuple[torch.Tensor, list[int]]] = []  # loss, rows of the dataset
        self._start, self._seconds, self._tokens = None, 0.0, 0
        self._staging: Path | None = None
        self._failure: str | None = None  # why this rank could not write
        self._reducer: GradientReducer | None = None
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.progress = Progress()
        self.add_callback(self.progress)

    def train(self, *args, **kwargs):
        """As Trainer's, but SIGTERM or Ctrl-C ends it after the step at work (`stopping`), with a checkpoint; Ctrl-C
        again ends it at once."""
        before = {}
        if threading.current_thread() is threading.main_thread():  # else the signals are someone else's
            before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        self._reducer = GradientReducer(self.model, self.ranks, lambda: self.accelerator.sync_gradients)
        try:
            return super().train(*args, **kwargs)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if bar := getattr(self.progress, "bar", None):
                bar.close()

    def _on_signal(self, number, _frame):
        if number == signal.SIGINT and self.signalled:
            raise KeyboardInterrupt
        if number == signal.SIGINT and self.args.should_save:
            tqdm.write("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        self.signalled = number

    # ---- the loss: one sum over the batch

    def _loss_sum(self, model, inputs, smoothing: float = 0.0):
        """(sum of the cross entropy over label tokens, model outputs); `model` may be wrapped."""
        inputs = {key: value for key, value in inputs.items() if key != "rows"}
        labels_BT = nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=data.IGNORE)
        columns = (labels_BT != data.IGNORE).any(0).nonzero().squeeze(-1)
        outputs = model(**inputs, logits_to_keep=columns, use_cache=False)
        logits, kept = outputs.logits.flatten(0, 1).float(), labels_BT[:, columns].flatten()
        loss = nn.functional.cross_entropy(
            logits, kept, ignore_index=data.IGNORE, reduction="sum", label_smoothing=smoothing
        )
        return loss, outputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the cross entropy over label tokens / `num_items_in_batch` (default: those of this batch)."""
        loss, outputs = self._loss_sum(model, inputs, self.args.label_smoothing_factor)
        if num_items_in_batch is None:
            loss = loss / (inputs["labels"][:, 1:] != data.IGNORE).sum()
        else:  # gradients, and the losses that are shown, are averaged over processes
            loss = loss / num_items_in_batch * self.ranks.world_size
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Mean loss per label token over the whole validation set (not a mean of batch means)."""
        batches = Batches(len(eval_dataset or self.eval_dataset), self.args.eval_batch_size, self.ranks, 0)
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # loss, label tokens
        self.model.eval()
        for indices in batches:
            batch = [(eval_dataset or self.eval_dataset)[index] for index in indices]
            inputs = self._prepare_inputs(self.data_collator(batch))
            with torch.no_grad():
                total[0] += self._loss_sum(self.model, inputs)[0]
            total[1] += (inputs["labels"][:, 1:] != data.IGNORE).sum()
        total = self.accelerator.reduce(total, "sum")
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1]).item()}
        self.evaluated = (self.state.global_step, metrics[f"{metric_key_prefix}_loss"])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # a step

    def create_optimizer(self, model=None):
        return self.ranks.run_or_fail_together(functools.partial(super().create_optimizer, model))

    def create_scheduler(self, num_training_steps, optimizer=None):
        def create():
            try:
                return super(ESFTTrainer, self).create_scheduler(num_training_steps, optimizer)
            except TypeError as error:
                kind = getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)
                raise ValueError(f"lr_scheduler_kwargs do not fit lr_scheduler_type={kind}: {error}") from error

        return self.ranks.run_or_fail_together(create)

    def get_train_dataloader(self):
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._batches = Batches(len(self.train_dataset), self.args.train_batch_size, self.ranks, seed)
        args = self.args
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _run_epoch(self, **kwargs):
        self._batches.epoch = kwargs["epoch"]
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:  # resumed from the last checkpoint of all, of which Trainer would make one step more
            self.control.should_training_stop = True

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._start = time.perf_counter()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        # dropout, where a model has any, goes by the place in the run, so that a resumed run needs no saved generator
        place = (self.args.seed, self.state.global_step, len(self._micro_batches), self.ranks.rank)
        torch.manual_seed(random.Random(str(place)).getrandbits(63))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches.append((loss, inputs["rows"]))
        self._tokens += inputs["input_ids"].numel() * self.args.world_size
        return loss

    def _clip_grad_norm(self, model, max_norm=None):
        self._reducer.finish()
        return self._reducer.clip(self.args.max_grad_norm if max_norm is None else max_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        """The last stop before the optimizer step: nothing was changed yet."""
        norm = self._clip_grad_norm(model, float("inf")) if grad_norm is None else grad_norm
        losses = torch.stack([loss for loss, _ in self._micro_batches])
        finite = losses.isfinite().all() & torch.as_tensor(norm, device=losses.device).isfinite()
        flags = torch.stack([~finite, torch.tensor(self.signalled > 0, device=losses.device)])
        broken, self.stopping = (self.accelerator.reduce(flags.float(), "sum") > 0).tolist()
        if broken:
            found = [(bool(loss.isfinite()), rows) for loss, rows in self._micro_batches]
            found = [pair for part in self.ranks.gather(found) for pair in part]
            rows = [row for finite, rows in found if not finite for row in rows]
            rows = rows or [row for _, rows in found for row in rows]
            shown = ", ".join(map(str, sorted(rows)[:20])) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
            loss = sum(self.ranks.gather(losses.sum().item())) / self.ranks.world_size
            raise SharedError(
                f"step {self.state.global_step + 1}: the loss is {loss} and the gradient norm "
                f"{float(norm)} on rows {shown} of the training data; no weight and no file was changed: look at these "
                "rows, or lower learning_rate"
            )
        self._micro_batches.clear()
        return norm

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
            logs["tokens_per_second"] = round(self._tokens / self._seconds, 1)
            self._seconds, self._tokens = 0.0, 0
        super().log(logs, start_time)

    # checkpoints: written in a staging folder, renamed when whole

    def _get_output_dir(self, trial):
        return str(self._staging or super()._get_output_dir(trial))

    def _writing(self, function: Callable[[], object]) -> None:
        """Call what writes files; a failure waits for `_agree`, since other ranks may wait for this one."""
        try:
            function()
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and lost_contact(error):
                raise
            self._failure = self._failure or str(error)  # torch.save tells a full disk by a RuntimeError

    def write_on_first(self, function: Callable[[], object]) -> None:
        """Rank 0 writes into the run's folder; all ranks call it, and end alike where it fails."""
        if self.args.should_save:
            self._writing(function)
        self._agree(Path(self.args.output_dir))

    def _agree(self, folder: Path) -> None:
        failure, self._failure = self._failure, None
        self.ranks.raise_on_all(
            failure and f"{folder} could not be written ({failure}); what was saved before is whole"
        )

    def _save_checkpoint(self, model, trial):
        run_dir, writes = Path(self.args.output_dir), self.args.should_save
        final = run_dir / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        best, self._staging = self.state.best_model_checkpoint, run_dir / ".staging"
        staged = self._staging / final.name
        try:
            if writes:
                shutil.rmtree(self._staging, ignore_errors=True)
                self._writing(lambda: (staged / checkpoints.STATES).mkdir(parents=True))
            self._agree(final)
            self._writing(lambda: super(ESFTTrainer, self)._save_checkpoint(model, trial))
            self._agree(final)
            self.state.best_model_checkpoint = best  # Trainer noted the staging folder
            if writes:
                self._writing(lambda: self._publish(staged, final))
            self._agree(final)
        finally:
            if writes:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _publish(self, staged: Path, final: Path) -> None:
        self.state.save_to_json(str(staged / "trainer_state.json"))
        checkpoints.write_manifest(staged)
        if final.exists():  # damaged, or of the same step: not gone before the new one is there
            final.rename(self._staging / "replaced")
        staged.rename(final)
        rotate_checkpoints(self.args.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir=None, _internal_call=False):
        """Rank 0 writes the model, or the adapter, whose tensors it gathers from the others first."""
        output_dir = output_dir or self.args.output_dir
        if self.adapter:
            own = esft.adapter_tensors(self.model) if self.ranks.first_replica else {}
            tensors = gather_to_first(own, self.ranks)
            if self.args.should_save:
                self._writing(lambda: esft.save_adapter(self.model, output_dir, tensors))
        elif self.args.should_save:
            with no_bars():
                self._writing(lambda: super(ESFTTrainer, self).save_model(output_dir, _internal_call))
            if self.lora:
                note = self.accelerator.unwrap_model(self.model).base_note
                self._writing(lambda: write_json(Path(output_dir) / BASE_NAME, note))
            set_modes(Path(output_dir))
        if self._staging is None:
            self._agree(Path(output_dir))

    def _save_rng_state(self, output_dir):
        """Nothing: `training_step` seeds the generators."""

    def _load_rng_state(self, checkpoint):
        """Nothing, as nothing was saved."""

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.adapter:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.ranks.first_replica:
            states = Path(output_dir) / checkpoints.STATES
            self._writing(lambda: checkpoints.save_states(self.model, self.optimizer, states, self.ranks.rank))
        if self.args.should_save:
            state = self.lr_scheduler.state_dict()
            self._writing(lambda: write_json(Path(output_dir) / SCHEDULER, state))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if not self.adapter:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            checkpoints.load_states(self.model, self.optimizer, Path(checkpoint) / checkpoints.STATES)
            self.lr_scheduler.load_state_dict(json.loads((Path(checkpoint) / SCHEDULER).read_text()))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.lora:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.adapter:  # Trainer's own way leaves the experts out: their names on disk are not those in memory
            with no_bars():
                saved, _ = esft.load_base_model(resume_from_checkpoint, dtype=self.model.dtype)
            self.model.load_state_dict(saved.state_dict())
            return None
        esft.add_adapter(self.model, resume_from_checkpoint)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)
        self.evaluated = None


def _batches(items: list, size: int):
    return (items[start : start + size] for start in range(0, len(items), size))
