"""Take a tiny random model of every family that transformers fuses through the life of an adapter.

    python scripts/experiments/check_families.py --output=results/tables/families
    python scripts/experiments/check_families.py --families=gpt_oss,nemotron_h

A family is a folder of transformers' models that decorates an experts module with `use_experts_implementation`. The
smallest model of the family is built from its own config class. SMALL gives well-known names small numbers. EXCEPTIONS
holds what a config needs beyond that. Then these steps must hold, in fp32 on the CPU:

    layout     The layout flags are true. The library's grouped_mm, which reads them, gives what the family's own loop
               over experts gives. The gate uses the columns that `is_concatenated` says.
    score      Routing is counted as it reaches the experts. It gives scores, and the scores select experts.
    to_esft    The logits keep their bits. The gradients of single experts are those of the reference loop.
    train      Three steps of AdamW with weight decay change every trained expert, and nothing else, by hash.
    unload     Every tensor has the bits of the base again.
    adapter    The base with the saved adapter gives the logits of the trained model, bit for bit.
    merge      So does the merged checkpoint, written by save_pretrained and loaded by the Auto class. It holds the
               adapter's tensors by name.
"""

import argparse
import copy
import dataclasses
import hashlib
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

import esft
from deepseek.experts import FusedExperts, moe_layers
from deepseek.files import check_output, suggest
from deepseek.grouped_gemm import IMPLEMENTATION, REFERENCE
from deepseek.masters import trained_parameter
from deepseek.routing import RouterCounts
from esft import ExpertConfig, ExpertScores, RouterCapture, adapter_views, select_experts
from scripts.experiments.common import publish
from utils import command_parser, markdown_table, run_cli

AUTO_CLASSES = {
    transformers.AutoModelForCausalLM: transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    transformers.AutoModelForImageTextToText: transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    transformers.AutoModelForTokenClassification: transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
}
SMALL_NAMES = {  # a small number -> the names in configs that get it
    0: "pad_token_id",
    1: "bos_token_id first_k_dense_replace num_dense_layers n_group topk_group attn_layer_offset encoder_layers "
       "indexer_kv_heads",
    2: "eos_token_id expert_layer_period num_experts_per_tok top_k_experts moe_topk moe_k num_key_value_heads "
       "swa_num_key_value_heads index_n_heads indexer_n_heads attn_layer_period linear_num_key_heads depth",
    4: "num_hidden_layers num_attention_heads swa_num_attention_heads linear_num_heads linear_num_value_heads "
       "mamba_n_heads mamba_num_heads mamba_dt_rank num_heads encoder_attention_heads indexer_compress_ratio "
       "index_kpool",
    8: "hidden_size_per_layer_input num_experts n_routed_experts num_local_experts moe_num_experts head_dim "
       "swa_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim indexer_head_dim index_topk "
       "indexer_budget linear_head_dim linear_key_head_dim linear_value_head_dim mamba_head_dim mamba_d_state "
       "ssm_state_size patch_size downsample_hidden_size",
    16: "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size moe_hidden_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size router_hidden_size sliding_window "
        "sliding_window_size kv_lora_rank q_lora_rank o_lora_rank mamba_d_head encoder_ffn_dim",
    32: "hidden_size text_hidden_size intermediate_size dense_intermediate_size out_hidden_size image_size "
        "d_model output_dim projector_hidden_size projection_hidden_dim",
    64: "position_embedding_size num_position_embeddings",
    128: "vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    256: "max_position_embeddings",
}  # fmt: skip
SMALL = {name: number for number, names in SMALL_NAMES.items() for name in names.split()}
MEDIA_TOKEN = 127  # the id of every image, video and sound token; no input has it
SPARSE = ["dense", "sparse", "sparse", "sparse"]
EXCEPTIONS: dict[str, dict] = {
    "cohere2_moe": {"num_shared_experts": 1},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": SPARSE}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
                   "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    "ernie4_5_vl_moe": {"text_config": {"hidden_size": 512, "moe_intermediate_size": [16, 16]}},
    "gemma4": {"text_config": {"enable_moe_block": True, "global_head_dim": 8}},
    "diffusion_gemma": {"text_config": {"global_head_dim": 8}},
    "glm4v_moe": {"text_config": {"head_dim": 128}},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "mlp_layer_types": SPARSE}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "muse_spark": {"audio_config": {"hidden_sizes": [8, 8, 8, 8]}},
    "nemotron_h": {"n_groups": 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# --------------------------------------------------------------------------------------------------------------------
# tiny models


def discover() -> dict[str, list[str]]:
    """Return the experts classes that transformers fuses, by family in alphabetical order."""
    found = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if names := re.findall(r"^@use_experts_implementation.*\nclass (\w+)", path.read_text("utf-8"), re.MULTILINE):
            found.setdefault(path.parent.name, []).extend(names)
    return found


def model_class(family: str) -> tuple[type, type]:
    """Return (Auto class, model class) of the family's first model that gives logits over the tokens of a text."""
    configs = [CONFIG_MAPPING[name] for name in CONFIG_MAPPING_NAMES if model_type_to_module_name(name) == family]
    return next((auto, known[config]) for auto, known in AUTO_CLASSES.items() for config in configs if config in known)


def small_config(cls: type[PreTrainedConfig], changes: dict) -> PreTrainedConfig:
    """Return a config with SMALL's values for the names it has, then `changes`, which nest as the configs do."""
    names = {field.name for field in dataclasses.fields(cls)}
    values = {name: value for name, value in SMALL.items() if name in names}
    values |= dict.fromkeys((name for name in names if re.search("(image|video|audio).*token_i", name)), MEDIA_TOKEN)
    if "kv_lora_rank" in names:  # latent attention: the head's size is the sum of its parts
        values.pop("head_dim", None)
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name, sub in cls.sub_configs.items():
        sub = type(getattr(cls(), name)) if sub is transformers.AutoConfig else sub
        values[name] = small_config(sub, changes.get(name, {}))
    return cls(**values | {name: value for name, value in changes.items() if name not in cls.sub_configs})


def make_model(family: str, **changes) -> tuple[type, nn.Module]:
    """Return (Auto class, random model of the family in fp32), with weights large enough that every expert matters.

    Buffers that change the routing are zeros in a new model. They are set as well.
    """
    torch.manual_seed(0)
    auto, cls = model_class(family)
    config = small_config(cls.config_class, {**EXCEPTIONS.get(family, {}), **changes})
    model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        for _, experts in _experts(model):
            for name in experts.tensor_names:
                experts.tensor(name).normal_(std=0.05 if name.endswith("bias") else 0.15)
        for name, param in model.named_parameters():
            if param.ndim == 2 and re.search(r"\b(gate|router)\.(.+\.)?weight$", name):
                param.normal_(std=0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.05)
            elif name.endswith("tid2eid"):  # experts by token id
                buffer.copy_(torch.arange(buffer.numel()).view_as(buffer) % SMALL["n_routed_experts"])
            elif name.endswith("balancing_biases"):  # a new model has -1 for skipping the experts alone
                buffer.fill_(-1)
    return auto, model.eval()


def _experts(model: nn.Module) -> Iterable[tuple[str, FusedExperts]]:
    modules = model.named_modules()
    return ((name, FusedExperts(module)) for name, module in modules if hasattr(module, "has_post_expert_norm"))


# --------------------------------------------------------------------------------------------------------------------
# the life of an adapter


class BrokenLifeError(Exception):
    """A step of the life gave a wrong result."""


def check(holds: bool, sentence: str) -> None:
    if not holds:
        raise BrokenLifeError(sentence)


def near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Return whether two tensors are equal within fp32 rounding, relative to the largest value."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


IDS = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def backward(model: nn.Module) -> None:
    out = model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)
    nn.functional.cross_entropy(out.float(), IDS.flatten() % out.shape[-1]).backward()


def digests(model: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of every tensor of the state dict, and of each expert apart as <tensor>.<expert>."""
    fused = {f"{name}.{tensor}" for name, experts in _experts(model) for tensor in experts.tensor_names}
    parts: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        parts |= {f"{name}.{e}": row for e, row in enumerate(tensor)} if name in fused else {name: tensor}
    as_bytes = {name: part.contiguous().flatten().view(torch.uint8).numpy() for name, part in parts.items()}
    return {name: hashlib.sha256(part).hexdigest() for name, part in as_bytes.items()}


def check_layout(model: nn.Module) -> None:
    """Compare the family's own loop over experts, which ignores the layout flags, with grouped_mm, which reads them."""
    for layer in moe_layers(model).values():
        name, module = layer.name, layer.module
        check(hasattr(module, layer.tensor_names[0]), f"{name}: has_gate is {module.has_gate}, its tensors say no")
        if module.has_gate:
            width = module.down_proj.shape[1 if module.is_transposed else 2]
            h = torch.full((1, 2 * width), 0.5, requires_grad=True)  # (1, 2F); within all limits that families set
            (reads,) = torch.autograd.grad(module._apply_gate(h)[0, 0], h)
            pair = [0, width if module.is_concatenated else 1]
            lie = f"{name}: is_concatenated is {module.is_concatenated}, its gate reads other columns"
            check(reads[0].nonzero().flatten().tolist() == pair, lie)
    by_flags = logits(model)
    model.set_experts_implementation("eager")
    by_loop = logits(model)
    model.set_experts_implementation("grouped_mm")
    check(bool(by_loop.isfinite().all()), "the tiny model's logits are not finite")
    check(near(by_flags, by_loop), "the layout flags are false: grouped_mm does not give what the family's loop gives")


def count(model: nn.Module) -> RouterCounts:
    """Return the counted routing, checked against a plain count. Add router probabilities where the family has them."""
    try:
        capture = RouterCapture(model, prob=True)
    except ValueError:  # not of this family
        capture = RouterCapture(model)
    slots = {}

    def add(module: nn.Module, args: tuple) -> None:
        _, ids_TK, weights_TK = args
        slots[module] = ids_TK[weights_TK != 0].bincount(minlength=module.num_experts)

    handles = [layer.module.register_forward_pre_hook(add) for layer in capture.layers.values()]
    with capture:
        logits(model)
    for handle in handles:
        handle.remove()
    counts = capture.counts()
    reached_LE = torch.stack([slots[capture.layers[index].module] for index in counts.layers])
    told = "the counts are not those of the tokens that reach the experts"
    check(torch.equal(counts.sums["slots"], reached_LE), told)
    told = "there are router probabilities of more than the experts"
    check(all(sums_LE.shape == reached_LE.shape for sums_LE in counts.sums.values()), told)
    return counts


def shared_experts(model: nn.Module) -> list[str]:
    """Return the names of the shared experts' parameters, checked by their names in the MoE layers."""
    found = list(adapter_views(model, ExpertConfig({}, shared_experts=True)))
    layers = tuple(re.match(r".*?\.\d+\.", layer.name)[0] for layer in moe_layers(model).values())
    for name, _ in model.named_parameters():
        if name.startswith(layers) and re.search(r"\.[^.]*shared[^.]*(?<!gate)\.", name):
            check(name in found, f"{name} is not taken for a shared expert's")
    return found


def gradients(model: nn.Module, config: ExpertConfig) -> dict[str, Tensor]:
    """Return the gradients of single experts and of everything else that is trained, by name."""
    model.zero_grad()
    backward(model)
    found = {}
    for layer in moe_layers(model).values():
        if config.experts.get(layer.index):
            for tensor, param in layer.trained.named_parameters():
                rows = zip(layer.trained.expert_ids, param.grad)
                found |= {f"{layer.name}.{tensor}.{e}": grad.clone() for e, grad in rows}
    for name in shared_experts(model):
        found[name] = trained_parameter(model, name).grad.clone()
    return found


def life(model: nn.Module, auto: type, folder: Path) -> None:
    """Run all steps of the module's docstring, with files in the empty `folder`.

    Raises:
        BrokenLifeError: a step gave a wrong result. Other errors come from the model, or are refusals of the project.
    """
    model.set_experts_implementation("grouped_mm")
    check_layout(model)
    untouched, base = logits(model), digests(model)

    config = select_experts(ExpertScores.from_counts(count(model)), top_p=0.4)
    config = dataclasses.replace(config, shared_experts=bool(shared_experts(model)))

    esft.to_esft(model, config)
    check(torch.equal(logits(model), untouched), "to_esft changes the logits")
    wanted = gradients(model, config)
    model.set_experts_implementation(REFERENCE)
    for name, grad in gradients(model, config).items():
        check(near(wanted[name], grad, 1e-4), f"the gradient of {name} is not the reference loop's")
    model.set_experts_implementation(IMPLEMENTATION)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    model.zero_grad()
    model.eval()
    now = digests(model)
    moved = {name for name in base if now[name] != base[name]}
    check(now.keys() == base.keys(), "the state dict has other names while training")
    check(not moved - wanted.keys(), f"training moves {min(moved - wanted.keys(), default='')}, which is frozen")
    check(not wanted.keys() - moved, f"training does not move {min(wanted.keys() - moved, default='')}")

    trained = logits(model)
    check(not near(trained, untouched), "the trained experts do not change the logits")
    esft.save_adapter(model, folder / "adapter")
    esft.unload(model)
    check(digests(model) == base, "unload does not give the base back")
    check(torch.equal(logits(model), untouched), "after unload the logits are not the base's")
    esft.add_adapter(model, folder / "adapter")
    check(torch.equal(logits(model), trained), "the base with the adapter is not the trained model")
    adapter = {name: view.clone() for name, view in adapter_views(model, config).items()}
    esft.merge(model)
    model.save_pretrained(folder / "merged")
    check_names(folder / "merged", adapter)
    reloaded = auto.from_pretrained(folder / "merged", dtype=torch.float32, trust_remote_code=False).eval()
    reloaded.set_experts_implementation("grouped_mm")
    check(digests(reloaded) == digests(model), "the merged checkpoint, loaded again, is not the trained model")
    reloaded = copy.deepcopy(reloaded)  # aligned memory: tensors of the mapped file would round differently
    check(torch.equal(logits(reloaded), trained), "the merged checkpoint gives other logits than the trained model")


def check_names(folder: Path, adapter: dict[str, Tensor]) -> None:
    """Check that a checkpoint's tensors with names of the adapter are the adapter's."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in adapter.keys() & set(file.keys()):
                check(torch.equal(file.get_tensor(name), adapter[name]), f"the checkpoint's {name} is another tensor")


# --------------------------------------------------------------------------------------------------------------------
# table


@dataclass
class Result:
    """A row of the table. `result` is "passes" or the reason against it."""

    model: str = ""
    layout: str = ""
    layers: tuple[int, ...] = ()
    shared: bool = False
    result: str = ""


def describe_layout(model: nn.Module) -> str:
    """Return the layout of a model's experts in words."""
    module = next(experts.module for _, experts in _experts(model))
    words = {
        "gate": module.has_gate,
        "no gate": not module.has_gate,
        "bias": module.has_bias,
        "transposed": module.is_transposed,
        "interleaved": module.has_gate and not module.is_concatenated,
        "post-norm": module.has_post_expert_norm,
    }
    return ", ".join(word for word, holds in words.items() if holds)


def run_family(family: str) -> Result:
    """Take a family's tiny model through its life, and return what happened."""
    found = Result()
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            auto, model = make_model(family)
            found.model, found.layout = type(model).__name__, describe_layout(model)
            found.layers = tuple(moe_layers(model))
            found.shared = bool(shared_experts(model))
            life(model, auto, Path(folder))
        found.result = "passes"
    except BrokenLifeError as error:
        found.result = f"fails: {error}"
    except Exception as error:  # sixty families can raise anything
        refused = isinstance(error, ValueError) and found.model and not found.layers  # by moe_layers
        kind = "refused" if refused else f"fails: {type(error).__name__}"
        found.result = f"{kind}: {' '.join(str(error).split())}"
    return found


def report(results: dict[str, Result], known: int) -> str:
    """Return the page of the results as Markdown: the families by layout, then one line per family."""
    by_layout: dict[str, list[str]] = {}
    for family, r in results.items():
        if r.result == "passes":
            by_layout.setdefault(r.layout, []).append(family)
    layouts = [[layout, ", ".join(names)] for layout, names in sorted(by_layout.items(), key=lambda x: -len(x[1]))]
    layouts += [[f"{family}:", r.result] for family, r in results.items() if r.result != "passes"]
    families = [
        [family, r.model or "-", r.layout or "-", ", ".join(map(str, r.layers)) or "-", "yes" if r.shared else "-",
         r.result]
        for family, r in results.items()
    ]  # fmt: skip
    counts = Counter(r.result.partition(":")[0] for r in results.values())
    words = {"fails": "fail", "passes": "pass", "refused": "refused"}
    parts = [
        "# Every family that transformers fuses",
        "A tiny random model of each, taken through the life of an adapter in fp32 on the CPU: scores, selection, "
        "training, adapter, merged checkpoint (`scripts/experiments/check_families.py` says what has to hold). Layout "
        "is that of the experts' tensors; layers are those of the tiny model.",
        markdown_table(["experts", "families that pass"], layouts),
        markdown_table(["family", "model class", "layout", "MoE layers", "shared experts", "result"], families),
        f"{len(results)} of {known} families: {', '.join(f'{counts[k]} {words[k]}' for k in words if counts[k])}.",
    ]
    return "\n\n".join(parts)


# --------------------------------------------------------------------------------------------------------------------
# command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--families", metavar="NAME[,NAME]", help="the families to check (default: all)")
    parser.add_argument("--output", metavar="PATH", help="write PATH.md and PATH.json (default: print only)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Result]:
    """Check the families and return their results."""
    args, known = parse_args(argv), discover()
    families = args.families.split(",") if args.families else list(known)
    for family in families:
        if family not in known:
            raise ValueError(f"cannot check {family!r}: transformers has no such fused family{suggest(family, known)}")
    if args.output:
        check_output(f"{args.output}.md")
    torch.set_num_threads(1)  # the number of threads can change the bits that are compared
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = {family: run_family(family) for family in tqdm(families, unit="family")}
    rows = {family: asdict(result) for family, result in results.items()}
    publish(args, __file__, argv, report(results, len(known)), families=rows)
    return results


if __name__ == "__main__":
    run_cli(main)
