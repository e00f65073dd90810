"""The first DeepSeekMoE (`deepseek-ai/deepseek-moe-16b-base`, `-chat`), built from parts of transformers.

    model type "deepseek"  =  Llama's attention, norms and rotary embedding, the mixture below, DeepSeek-V2's forward

The mixture (DeepSeekMoE, arXiv 2401.06066, equations 9 to 11), for a token's residual h and its norm u:

    s_e = softmax_e(u W_gate^T)                         over all E routed experts
    g_e = s_e where it is among the K highest, else 0   renormalized only if norm_topk_prob is set
    out = h + FFN_shared(u) + sum_e g_e FFN_e(u)        FFN(u) = (silu(u gate_proj^T) * (u up_proj^T)) down_proj^T

The shared experts are one FFN, `n_shared_experts` times as wide as an expert, also in checkpoints. These layers have a
dense FFN: the first `first_k_dense_replace`, those with an index that `moe_layer_freq` does not divide, and all if
`n_routed_experts` is missing.

Importing this file registers the model type with transformers' Auto classes and with its conversion of checkpoints. On
disk there is one tensor per expert and projection (`model.layers.<l>.mlp.experts.<e>.gate_proj.weight`), in memory one
per layer. Code in a checkpoint (`auto_map` in its config.json) is never run, even with `trust_remote_code`.

As in transformers' DeepSeek-V2, there is no auxiliary loss for balance, and the router computes in fp32. The code that
was published with the model computes it in the model's dtype, so near ties can fall differently in bf16.

Legend: T tokens, D hidden, F expert hidden, E experts, K top-k.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, initialization
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations import use_experts_implementation
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.llama import modeling_llama as llama
from transformers.utils.output_capturing import OutputRecorder


@strict
class DeepseekConfig(LlamaConfig):
    """The keys of config.json. A missing key has the default of the published configuration class.

    Raises:
        ValueError: the router is not of this model type, or the model is a DeepSeek-V2 under its first name. A value of
            another type is a StrictDataclassError of huggingface_hub.
    """

    model_type = "deepseek"
    attribute_map = {"num_experts": "n_routed_experts"}  # noqa: RUF012

    vocab_size: int = 102400
    num_hidden_layers: int = 30
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    moe_intermediate_size: int = 1407
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int | None = 1
    first_k_dense_replace: int | None = 0
    norm_topk_prob: bool | None = False
    scoring_func: Literal["softmax"] | None = "softmax"  # routers of this model type know no other
    output_router_logits: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if kwargs.get("kv_lora_rank") is not None:
            raise ValueError(
                "kv_lora_rank means latent attention, so this is DeepSeek-V2 under its first model type: put "
                '"model_type": "deepseek_v2" and "architectures": ["DeepseekV2ForCausalLM"] into its config.json'
            )
        if self.n_routed_experts is not None and not 1 <= (self.num_experts_per_tok or 0) <= self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is not between 1 and the {self.n_routed_experts} of "
                "n_routed_experts"
            )


class DeepseekRouter(nn.Module):
    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.renormalize = bool(config.norm_topk_prob) and self.top_k > 1  # as published: a single weight stays
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits (T, E), and weights and ids (T, K) of each token's experts. All but ids are in fp32."""
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(self.top_k)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK, ids_TK


@use_experts_implementation  # again, because transformers looks for this text in the file of a model
class DeepseekExperts(v2.DeepseekV2Experts):
    """gate_up_proj (E, 2F, D) and down_proj (E, D, F)."""


class DeepseekMoE(nn.Module):
    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.gate = DeepseekRouter(config)
        self.experts = DeepseekExperts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = v2.DeepseekV2MLP(config, intermediate_size=width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., D) to (..., D), without the residual."""
        x_TD = hidden.flatten(0, -2)
        _, weights_TK, ids_TK = self.gate(x_TD)
        out_TD = self.experts(x_TD, ids_TK, weights_TK)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD.view_as(hidden)


class DeepseekDecoderLayer(llama.LlamaDecoderLayer):
    def __init__(self, config: DeepseekConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        dense = config.n_routed_experts is None or layer_idx < config.first_k_dense_replace
        if not dense and layer_idx % config.moe_layer_freq == 0:
            self.mlp = DeepseekMoE(config)


class DeepseekPreTrainedModel(v2.DeepseekV2PreTrainedModel):
    config: DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DeepseekDecoderLayer,
        "attentions": llama.LlamaAttention,
        "router_logits": OutputRecorder(DeepseekRouter, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekRouter):
            initialization.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class DeepseekModel(DeepseekPreTrainedModel, v2.DeepseekV2Model):
    """DeepSeek-V2's forward over the parts that are built here."""

    def __init__(self, config: DeepseekConfig):
        super(v2.DeepseekV2Model, self).__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DeepseekDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = llama.LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, v2.DeepseekV2ForCausalLM):
    """DeepSeek-V2's forward: loss, logits, cache, and router_logits if output_router_logits is set."""

    def __init__(self, config: DeepseekConfig):
        super(v2.DeepseekV2ForCausalLM, self).__init__(config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
# experts have the names of DeepSeek-V2's checkpoints, for which transformers uses the conversion of Qwen2-MoE
conversion = get_checkpoint_conversion_mapping("qwen2_moe")
register_checkpoint_conversion_mapping("deepseek", conversion, overwrite=True)
