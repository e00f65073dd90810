r"""Direct preference optimization (DPO, arXiv 2305.18290, equation 7) of the trained experts.

    L = mean over pairs of -log sigmoid(beta * (r(chosen) - r(rejected)))
    r(answer) = log p(answer | prompt) - log p_base(answer | prompt)       beta * r is the answer's reward

The mean is over the pairs of the whole batch of an optimizer step. With `label_smoothing_factor` e, a pair is taken to
be the wrong way round with probability e: (1 - e) L(chosen, rejected) + e L(rejected, chosen), Mitchell's conservative
DPO.

The reference is the base: the same model with the base's rows put in (esft.ReferenceModel). It sees the same batch as
the policy. So both round alike, and before the first step r is exactly 0. A resumed run needs nothing of it.

Legend: B rows of a batch, M positions with labels, N = B*M, A documents of a batch, padding included, and
empty ones up to the number of its tokens.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import esft
from training.batches import Means, document_numbers, labels_of_documents
from training.trainer import ESFTTrainer

# means over pairs in the log, named as TRL names them
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")


class DPOTrainer(ESFTTrainer):
    """The Trainer of a run of method dpo. Its packs hold pairs: a chosen document, then the rejected one."""

    def __init__(self, *, beta: float, **kwargs):
        super().__init__(**kwargs)
        self.beta, self.reference = beta, esft.ReferenceModel(self.model)
        self.rewards = Means(REWARDS, self.args.device)
        self.means.append(self.rewards)

    def _num_terms(self, inputs) -> Tensor:
        """Return how many terms the loss of a batch has: its pairs."""
        return labels_of_documents(inputs).count_nonzero() // 2

    def _loss_sum(self, model, inputs, smoothing: float = 0.0) -> Tensor:
        """Return the sum of the loss over pairs."""
        is_answer_A = labels_of_documents(inputs) > 0
        with torch.no_grad():
            base_A = self._log_probs(self.reference, inputs)
        policy_A = self._log_probs(model, inputs)
        chosen, rejected = (self.beta * (policy_A - base_A))[is_answer_A].view(-1, 2).unbind(1)
        margin = chosen - rejected
        loss = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
        terms = (chosen, rejected, margin > 0, margin, torch.ones_like(margin))
        self.rewards.add(*(one.double().sum() for one in terms))
        return loss.sum()

    def _log_probs(self, model, inputs) -> Tensor:
        """Return the log-probability of the labels of every document of a batch."""
        losses_BM, positions_M = self._losses(model, inputs)
        # the label of a position is the next token
        document_N = document_numbers(inputs)[:, 1:][:, positions_M].flatten()
        sums = losses_BM.new_zeros(inputs["labels"].numel())
        return sums.index_add(0, document_N, -losses_BM.flatten())
