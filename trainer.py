"""transformers' Trainer as this project needs it, for one process or plain data parallel.

    L = sum over label tokens of -log p(token) / (label tokens of the global batch)

over all that one optimizer step sees, in fp32; the head runs only at the positions where some row of the batch has a
label. The last stop before an optimizer step is `_get_grad_norm`: there all processes agree to stop at a loss that is
not finite, or after SIGTERM. A checkpoint is written in a staging folder and renamed when it is whole:

    <output_dir>/.staging/checkpoint-20/   adapter.safetensors, optimizer.pt, ..., trainer_state.json last
              -> checkpoint-20/            a run killed at any moment leaves this, or the one before
"""

import contextlib
import json
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

import esft
import utils

MASTERS = Path("state") / "masters.safetensors"  # not beside the adapter, whose *.safetensors are all its own


def collate(packs: list[utils.Pack], pad_token_id: int) -> dict:
    """`utils.collate`, with the rows of the dataset that are in it, so that a bad step can name them."""
    return {**utils.collate(packs, pad_token_id), "rows": [row for pack in packs for row in pack.samples]}


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

    def __init__(self, *args, method: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.adapter, self.lora = method in ("esft", "random"), method == "lora"
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the count of the global batch itself
        self._loss_shifts_labels = True
        self.signalled = self.stopping = False  # SIGTERM came; all processes agreed to stop
        self.evaluated: tuple[int, float] | None = None  # step, loss
        self.step_seconds: list[float] = []
        self._micro_batches: list[tuple[torch.Tensor, list[int]]] = []  # loss, rows of the dataset
        self._start, self._seconds, self._tokens = None, 0.0, 0
        self._staging: Path | None = None
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.progress = Progress()
        self.add_callback(self.progress)

    def train(self, *args, **kwargs):
        """As Trainer's, but SIGTERM ends it after the step at work (`stopping`), with a checkpoint."""
        try:
            before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "signalled", True))
        except ValueError:  # not in the main thread: the signal is someone else's
            before = None
        try:
            return super().train(*args, **kwargs)
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)
            if bar := getattr(self.progress, "bar", None):
                bar.close()

    # ---- the loss: one sum over the batch

    def _loss_sum(self, model, inputs, smoothing: float = 0.0):
        """(sum of the cross entropy over label tokens, model outputs); `model` may be wrapped."""
        inputs = {key: value for key, value in inputs.items() if key != "rows"}
        labels_BT = nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=utils.IGNORE)
        columns = (labels_BT != utils.IGNORE).any(0).nonzero().squeeze(-1)
        outputs = model(**inputs, logits_to_keep=columns, use_cache=False)
        logits, kept = outputs.logits.flatten(0, 1).float(), labels_BT[:, columns].flatten()
        loss = nn.functional.cross_entropy(
            logits, kept, ignore_index=utils.IGNORE, reduction="sum", label_smoothing=smoothing
        )
        return loss, outputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the cross entropy over label tokens / `num_items_in_batch` (default: those of this batch)."""
        loss, outputs = self._loss_sum(model, inputs, self.args.label_smoothing_factor)
        if num_items_in_batch is None:
            loss = loss / (inputs["labels"][:, 1:] != utils.IGNORE).sum()
        else:  # DDP averages gradients over processes, so that the mean of these is the mean of the global batch
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss / num_items_in_batch * processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Mean loss per label token over the whole validation set (not a mean of batch means)."""
        packs = (eval_dataset or self.eval_dataset)[self.args.process_index :: self.args.world_size]
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # loss, label tokens
        self.model.eval()
        for batch in _batches(packs, self.args.eval_batch_size):
            inputs = self._prepare_inputs(self.data_collator(batch))
            with torch.no_grad():
                total[0] += self._loss_sum(self.model, inputs)[0]
            total[1] += (inputs["labels"][:, 1:] != utils.IGNORE).sum()
        total = self.accelerator.reduce(total, "sum")
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1]).item()}
        self.evaluated = (self.state.global_step, metrics[f"{metric_key_prefix}_loss"])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # a step

    def _run_epoch(self, **kwargs):
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:  # resumed from the last checkpoint of all, of which Trainer would make one step more
            self.control.should_training_stop = True

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._start = time.perf_counter()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches.append((loss, inputs["rows"]))
        self._tokens += inputs["input_ids"].numel() * self.args.world_size
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The last stop before the optimizer step: nothing was changed yet."""
        norm = super()._get_grad_norm(model, grad_norm)
        losses = torch.stack([loss for loss, _ in self._micro_batches])
        finite = losses.isfinite().all() & torch.as_tensor(norm, device=losses.device).isfinite()
        flags = torch.stack([~finite, torch.tensor(self.signalled, device=losses.device)])
        broken, self.stopping = (self.accelerator.reduce(flags.float(), "sum") > 0).tolist()
        if broken:
            rows = [row for loss, rows in self._micro_batches if not loss.isfinite() for row in rows]
            rows = gather_object(rows) or gather_object([row for _, rows in self._micro_batches for row in rows])
            shown = ", ".join(map(str, sorted(rows)[:20])) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
            raise ValueError(
                f"step {self.state.global_step + 1}: the loss is {losses.sum().item()} and the gradient norm "
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

    def _save_checkpoint(self, model, trial):
        run_dir, writes = Path(self.args.output_dir), self.args.should_save
        final = run_dir / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
        best, self._staging = self.state.best_model_checkpoint, run_dir / ".staging"
        if writes:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self.state.best_model_checkpoint = best  # Trainer noted the staging folder
            if writes:
                self.state.save_to_json(str(self._staging / final.name / "trainer_state.json"))
                shutil.rmtree(final, ignore_errors=True)
                (self._staging / final.name).rename(final)
                rotate_checkpoints(str(run_dir), self.args.save_total_limit, best)
        finally:
            if writes:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _save(self, output_dir=None, state_dict=None):
        if not self.adapter:
            with _no_bars():
                super()._save(output_dir, state_dict)
        elif self.args.should_save:
            esft.save_adapter(self.model, output_dir or self.args.output_dir)

    def _masters(self) -> dict[str, nn.Parameter]:
        """fp32 parameters whose adapter tensors are rounded: an exact resume needs them whole."""
        if not self.adapter or self.model.dtype == torch.float32:
            return {}
        return {name: param for name, param in self.model.named_parameters() if param.requires_grad}

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if (masters := self._masters()) and self.args.should_save:
            path = Path(output_dir) / MASTERS
            path.parent.mkdir(exist_ok=True)
            save_file({name: param.data.contiguous() for name, param in masters.items()}, path)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.lora:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.adapter:  # Trainer's own way leaves the experts out: their names on disk are not those in memory
            with _no_bars():
                saved, _ = esft.load_base_model(resume_from_checkpoint, dtype=self.model.dtype)
            self.model.load_state_dict(saved.state_dict())
            return None
        esft.add_adapter(self.model, resume_from_checkpoint)
        if (Path(resume_from_checkpoint) / MASTERS).exists():
            saved = load_file(Path(resume_from_checkpoint) / MASTERS)
            with torch.no_grad():
                for name, param in self._masters().items():
                    param.copy_(saved[name])

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)
        self.evaluated = None


@contextlib.contextmanager
def _no_bars():
    """Without transformers' bars of shards read and written, which would tear ours."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _batches(items: list, size: int):
    return (items[start : start + size] for start in range(0, len(items), size))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is there and ends where it should (a crash can truncate what was renamed)."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for path in checkpoint.rglob("*.safetensors"):
            with safe_open(path, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(checkpoint / name) for name in ("optimizer.pt", "scheduler.pt"))
