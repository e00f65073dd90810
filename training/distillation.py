r"""Distillation: a run learns what another model says beside, or in place of, the labels (Hinton et al. 2015, arXiv
1503.02531).

    L(label) = (1 - w)+ CE + w KL(p || q)        w: distill_weight; (1 - w)+ is 0 from w = 1 on
    KL(p || q) = sum_v p_v (log p_v - log q_v)   q: the model

It is so at the labels of documents that are distilled (`distill_on`), at all others it is the cross entropy alone. The
mean is over the label tokens of the global batch, as without distillation. p comes from one of two places:

- `distill_from=base`: the base, over the whole vocabulary. It is the same model with the base's rows put in
  (esft.ReferenceModel), and sees the same batch. So before the first step KL is exactly 0. Batches without a distilled
  document do without its forward.
- `distill_from=DIR`: a teacher's top k tokens and one bucket for all others, from files (teacher.py).

      KL_k(p || q) = sum over the top k of p_v (log p_v - log q_v) + p_rest (log p_rest - log q_rest)

  The mass of the rest stays what it is. KL_k is at most KL: of how the teacher shares out the rest, nothing is learned.

Logits exist for some rows at a time (loss.py), those of the base with those of the model.

Legend: B rows of a batch, M label positions, V vocabulary, k tokens of the teacher.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import kl_div

import esft
from deepseek.loading import vocab_size
from deepseek.process_groups import Ranks
from training.batches import Means
from training.data import IGNORE, Pack, Packs, Template, template_settings, unpack
from training.dpo import DPOTrainer
from training.loss import Terms, label_positions
from training.run_config import RunConfig
from training.teacher import Teacher, top_and_rest
from training.trainer import ESFTTrainer

logger = logging.getLogger("esft")


def choose_trainer(config: RunConfig, tokenizer, packs: Packs, ranks: Ranks) -> Callable[..., ESFTTrainer]:
    """Return what makes the trainer of a run. A teacher is checked against the run's tokens and documents here.

    Raises:
        ValueError, OSError: the teacher's folder is not whole, or does not fit the run.
    """
    if config.method == "dpo":
        return functools.partial(DPOTrainer, beta=config.dpo_beta)
    if not config.distill_from:
        return ESFTTrainer
    teacher = None
    if config.distill_from != "base":
        teacher = ranks.run_or_fail_together(lambda: Teacher(config.distill_from))
        template = Template(tokenizer, template_settings(config))
        wanted = [i for i, members in enumerate(packs.members) if config.distills_all or packs.samples[members[0]] < 0]
        ranks.on_rank_zero(lambda: teacher.check(template, vocab_size(config.base_model_path), packs, wanted))
    where = "every document" if config.distills_all else "replayed documents"
    source = f"{teacher.manifest['teacher']}, top {teacher.manifest['top_k']}" if teacher else "the base"
    logger.info(f"  distillation from {source} on {where}, with weight {config.distillation_weight:g}")
    return functools.partial(
        DistillingTrainer, teacher=teacher, weight=config.distillation_weight, everywhere=config.distills_all
    )


class SoftTerms(Terms):
    """(1 - w)+ CE + w KL at the rows that are `soft_M`, and CE at the others. `divergence_M` is KL at the soft rows.

    teacher_log_probs: gives log p of some rows, up to a constant for each: logits, or what fp16 rounded.
    ids_Mk: of which tokens these are, with the rest as one more; all if not given.
    """

    def __init__(
        self,
        labels_M: Tensor,
        smoothing: float,
        soft_M: Tensor,
        weight: float,
        teacher_log_probs: Callable[[slice], Tensor],
        ids_Mk: Tensor | None = None,
    ):
        super().__init__(labels_M, smoothing)
        self.soft_M, self.weight, self.ids_Mk = soft_M, weight, ids_Mk
        self.teacher_log_probs = teacher_log_probs
        self.divergence_M = torch.zeros(len(soft_M), device=soft_M.device)

    def losses(self, logits_MV: Tensor, rows: slice) -> Tensor:
        soft_M = self.soft_M[rows].float()
        log_q, log_p = logits_MV.log_softmax(-1), self.teacher_log_probs(rows).float().log_softmax(-1)
        if self.ids_Mk is not None:
            log_q = top_and_rest(log_q, self.ids_Mk[rows])
        kl_M = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * soft_M
        self.divergence_M[rows] = kl_M.detach()
        return super().losses(logits_MV, rows) * (1 - min(self.weight, 1.0) * soft_M) + self.weight * kl_M

    def gradient(self, logits_MV: Tensor, rows: slice) -> Tensor:
        with torch.enable_grad():
            logits_MV = logits_MV.detach().requires_grad_()
            return torch.autograd.grad(self.losses(logits_MV, rows).sum(), logits_MV)[0]


def collate_soft(packs: list[Pack], collate: Callable, apart: bool, everywhere: bool, teacher: Teacher | None) -> dict:
    """Make a batch that also holds "soft" (B*M), the labels that are distilled, and what a teacher says about them."""
    packs = packs if apart else unpack(packs)
    batch = collate(packs)
    labels_BM, _ = label_positions(batch["labels"], batch["kept"])
    distilled = [pack for pack in packs if everywhere or pack.replayed]
    soft_B = torch.tensor([everywhere or pack.replayed for pack in packs] or [False])
    soft_M = (soft_B[:, None] & (labels_BM != IGNORE)).flatten()
    batch["soft"] = soft_M
    if teacher and distilled:
        said = [teacher.read(document) for document in unpack(distilled)]
        k = teacher.manifest["top_k"]
        batch["ids"] = torch.zeros(len(soft_M), k, dtype=torch.int64)
        batch["log_probs"] = torch.zeros(len(soft_M), k + 1, dtype=torch.float16)
        for name, parts in zip(("ids", "log_probs"), zip(*said)):
            batch[name][soft_M] = torch.cat(parts).to(batch[name].dtype)
    return batch


class DistillingTrainer(ESFTTrainer):
    """The Trainer of a run that distils. An evaluation gives the cross entropy alone.

    teacher: None for the base.
    weight: w above.
    everywhere: distil on every document, and not on replayed ones alone.
    """

    def __init__(self, *, teacher: Teacher | None, weight: float, everywhere: bool, **kwargs):
        super().__init__(**kwargs)
        self.teacher, self.weight = teacher, weight
        self.soft_collator = functools.partial(
            collate_soft,
            collate=self.data_collator,
            apart=kwargs["documents_apart"],
            everywhere=everywhere,
            teacher=teacher,
        )
        self.reference = None if teacher else esft.ReferenceModel(self.model)
        sharded = any(isinstance(param, DTensor) for param in self.model.parameters())
        together = self.ranks.world_size if sharded else self.ranks.ep_size  # they must run the model equally often
        first = self.ranks.rank // together * together
        self._in_step = slice(first, first + together)
        self.divergence = Means(["distill_loss"], self.args.device)  # over the labels that are distilled
        self.means.append(self.divergence)

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        loader.collate_fn = self.soft_collator
        return loader

    def _get_num_items_in_batch(self, batch_samples, device):
        """Count the terms of a step, and agree on which of its batches are distilled."""
        distilled = [bool(inputs["soft"].any()) for inputs in batch_samples]
        if self.reference:
            distilled = [any(flags) for flags in zip(*self.ranks.gather(distilled)[self._in_step])]
        for inputs, one in zip(batch_samples, distilled):
            inputs["distilled"] = one
        return super()._get_num_items_in_batch(batch_samples, device)

    def _loss_sum(self, model, inputs, smoothing: float = 0.0) -> Tensor:
        """Return the sum of the terms of a batch's loss."""
        if not inputs.get("distilled"):
            return super()._loss_sum(model, inputs, smoothing)
        labels_BM, taken = self._split(inputs)
        if self.reference:
            log_probs = self._token_losses.logits(self.reference, taken, labels_BM)
        else:
            log_probs = inputs["log_probs"].__getitem__
        terms = SoftTerms(labels_BM.flatten(), smoothing, inputs["soft"], self.weight, log_probs, inputs.get("ids"))
        with self._routing_counted(inputs):
            losses_BM = self._token_losses(model, taken, labels_BM, terms=terms)
        self.divergence.add(terms.divergence_M.double().sum(), inputs["soft"].sum())
        return losses_BM.sum()
