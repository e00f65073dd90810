"""Test the first DeepSeekMoE: published checkpoints, the paper's equations, and an adapter from scores to merge."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from deepseek import loading, modeling
from deepseek.experts import moe_layers
from esft import (
    ExpertConfig,
    ExpertScores,
    RouterCapture,
    add_adapter,
    load_base_model,
    merge,
    save_adapter,
    select_experts,
    to_esft,
    unload,
)

# config.json of deepseek-ai/deepseek-moe-16b-base
PUBLISHED = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 102400,
}
SHRUNK = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
VARIANTS = {
    "as published": {},
    "renormalized": {"norm_topk_prob": True},
    "every second layer": {"moe_layer_freq": 2, "num_hidden_layers": 5},
    "renormalized, every second layer": {"norm_topk_prob": True, "moe_layer_freq": 2, "num_hidden_layers": 5},
    "one expert, renormalized": {"norm_topk_prob": True, "num_experts_per_tok": 1},
    "no shared experts": {"n_shared_experts": None},
    "grouped queries": {"num_key_value_heads": 2, "rope_theta": 500},  # GigaChat-20B-A3B has them
    "biases": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "dense": {"n_routed_experts": None, "num_experts_per_tok": None},  # DeepSeek-Prover-V1.5 is
}
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def mixtures(config):
    """Return the indices of the layers with experts, as in the published code."""
    layers = range(config["first_k_dense_replace"], config["num_hidden_layers"])
    return [layer for layer in layers if config["n_routed_experts"] and layer % config["moe_layer_freq"] == 0]


def tensors_of(config, dtype=torch.float32, seed=0):
    """Return random tensors under the published names, large enough that every expert matters."""
    D, heads, kv_heads = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], D)

    def ffn(name, width):
        shapes.update({f"{name}.{part}_proj.weight": (width, D) for part in ("gate", "up")})
        shapes[f"{name}.down_proj.weight"] = (D, width)

    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.{norm}_layernorm.weight": (D,) for norm in ("input", "post_attention")}
        for part, rows in (("q", D), ("k", D * kv_heads // heads), ("v", D * kv_heads // heads), ("o", D)):
            shapes[f"{block}.self_attn.{part}_proj.weight"] = (rows, D)
            if config["attention_bias"]:
                shapes[f"{block}.self_attn.{part}_proj.bias"] = (rows,)
        if layer not in mixtures(config):
            ffn(f"{block}.mlp", config["intermediate_size"])
            continue
        shapes[f"{block}.mlp.gate.weight"] = (config["n_routed_experts"], D)
        for expert in range(config["n_routed_experts"]):
            ffn(f"{block}.mlp.experts.{expert}", config["moe_intermediate_size"])
        if config["n_shared_experts"]:
            ffn(f"{block}.mlp.shared_experts", config["moe_intermediate_size"] * config["n_shared_experts"])
    generator = torch.Generator().manual_seed(seed)
    random = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {n: (1 + 0.2 * t if "norm" in n else 0.2 * t).to(dtype) for n, t in random.items()}


def write_checkpoint(folder, tokenizer, dtype=torch.float32, **changes):
    """Write the files of a published checkpoint: shards, index, code for `auto_map`. Return (config, tensors)."""
    config = PUBLISHED | SHRUNK | {"torch_dtype": str(dtype).removeprefix("torch.")} | changes
    tensors = tensors_of(config, dtype)
    tokenizer.save_pretrained(folder)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(described | {"tokenizer_class": "LlamaTokenizerFast"}))
    (folder / "config.json").write_text(json.dumps(config))
    shard_of = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(shard_of.values()):
        save_file({n: t for n, t in tensors.items() if shard_of[n] == shard}, folder / shard, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (folder / file).write_text("raise RuntimeError('code of the checkpoint was run')\n")
    return config, tensors


def on_disk(folder):
    files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
    return {name: file.get_tensor(name) for file in files for name in file.keys()}  # noqa: SIM118


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]), name


def logits_of(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


@pytest.fixture(scope="module")
def published(tmp_path_factory, tiny_tokenizer):
    """Return (folder, config, tensors) of a small checkpoint in the published form."""
    folder = tmp_path_factory.mktemp("published")
    return folder, *write_checkpoint(folder, tiny_tokenizer)


# ------------------------------------------------------------------------------------------------ the paper's equations


def reference(config, tensors, ids):
    """Return the logits (T, vocabulary) of ids (T,), one token, head and expert after the other, in fp64."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    D, heads, kv_heads = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    width = D // heads

    def norm(x, name):
        return x / (x.pow(2).mean() + config["rms_norm_eps"]).sqrt() * tensors[f"{name}.weight"]

    def linear(x, name):
        return tensors[f"{name}.weight"] @ x + tensors.get(f"{name}.bias", 0)

    def ffn(x, name):
        gate, up = linear(x, f"{name}.gate_proj"), linear(x, f"{name}.up_proj")
        return linear(gate * gate.sigmoid() * up, f"{name}.down_proj")

    def rotated(x, position):
        """Apply RoPE (arXiv 2104.09864) with the pairs (i, i + width / 2), as in Llama."""
        out = x.clone()
        for i in range(width // 2):
            angle = position * config["rope_theta"] ** (-2 * i / width)
            a, b = x[i], x[i + width // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + width // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def attention(us, name):
        q, k, v = ([linear(u, f"{name}.{part}_proj") for u in us] for part in "qkv")
        outs = []
        for t in range(len(us)):
            mixed = []
            for head in range(heads):
                of_q = slice(head * width, (head + 1) * width)
                group = head // (heads // kv_heads)
                of_kv = slice(group * width, (group + 1) * width)
                query = rotated(q[t][of_q], t)
                scores = torch.stack([query @ rotated(k[s][of_kv], s) / math.sqrt(width) for s in range(t + 1)])
                weights = scores.exp() / scores.exp().sum()
                mixed.append(sum(weights[s] * v[s][of_kv] for s in range(t + 1)))
            outs.append(linear(torch.cat(mixed), f"{name}.o_proj"))
        return outs

    def mixture(u, name):
        affinities = linear(u, f"{name}.gate").exp()
        affinities = affinities / affinities.sum()
        best = sorted(range(config["n_routed_experts"]), key=lambda e: -affinities[e])[: config["num_experts_per_tok"]]
        gates = {e: affinities[e] for e in best}
        if config["norm_topk_prob"] and len(best) > 1:
            gates = {e: gate / sum(gates.values()) for e, gate in gates.items()}
        routed = sum(gate * ffn(u, f"{name}.experts.{e}") for e, gate in gates.items())
        return routed + ffn(u, f"{name}.shared_experts") if config["n_shared_experts"] else routed

    hs = [tensors["model.embed_tokens.weight"][token] for token in ids.tolist()]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        heard = attention([norm(h, f"{block}.input_layernorm") for h in hs], f"{block}.self_attn")
        hs = [h + new for h, new in zip(hs, heard)]
        feed = mixture if layer in mixtures(config) else ffn
        hs = [h + feed(norm(h, f"{block}.post_attention_layernorm"), f"{block}.mlp") for h in hs]
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return torch.stack([linear(norm(h, "model.norm"), head) for h in hs])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_is_the_papers(variant, tmp_path, tiny_tokenizer):
    config, tensors = write_checkpoint(tmp_path, tiny_tokenizer, **VARIANTS[variant])
    model, _ = load_base_model(tmp_path)
    wanted = reference(config, tensors, IDS[0])
    assert wanted.std() > 0.5
    for attention, experts in (("sdpa", "grouped_mm"), ("eager", "eager")):
        model.set_attn_implementation(attention)
        model.set_experts_implementation(experts)
        assert (logits_of(model)[0] - wanted).abs().max() < 1e-5
    if config["n_routed_experts"]:
        assert list(moe_layers(model)) == mixtures(config)
    else:
        with pytest.raises(ValueError, match=r"DeepseekForCausalLM .* is a dense model"):
            moe_layers(model)


def test_the_reference_tells_variants_apart(published):
    """The test above would see another normalization, number of experts, or missing shared experts."""
    _, config, tensors = published
    right = reference(config, tensors, IDS[0])
    for change in ({"norm_topk_prob": True}, {"num_experts_per_tok": 2}, {"n_shared_experts": None}):
        assert (reference(config | change, tensors, IDS[0]) - right).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["as published", "every second layer", "tied", "dense"])
def test_a_checkpoint_is_read_and_written_bit_for_bit(variant, dtype, tmp_path, tiny_tokenizer):
    _, tensors = write_checkpoint(tmp_path, tiny_tokenizer, dtype, **VARIANTS[variant])
    model, tokenizer = load_base_model(tmp_path)
    assert type(model) is modeling.DeepseekForCausalLM and not model.training and model.dtype == dtype
    text = "User: what is it?"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    for index, layer in moe_layers(model, dense_ok=variant == "dense").items():
        for name, view in layer.expert_views(5).items():
            assert torch.equal(view, tensors[f"model.layers.{index}.mlp.experts.5.{name}"])
    model.save_pretrained(tmp_path / "again")
    assert_same(on_disk(tmp_path / "again"), tensors)


def test_the_published_size_is_that_of_the_published_weights(tmp_path):
    """The paper says 16.4B parameters. In bf16 the hub lists six shards of 5 GB and one of 2.77 GB."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    model = loading.empty_model(tmp_path)
    parameters = sum(param.numel() for param in model.parameters())
    assert round(parameters / 1e9, 1) == 16.4
    assert round(2 * parameters / 1e9, 1) == 32.8
    assert list(moe_layers(model)) == list(range(1, 28))


def test_code_of_the_checkpoint_is_not_run(published):
    folder, _, tensors = published
    for trust in (None, False, True):
        assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is modeling.DeepseekConfig
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
        assert type(model) is modeling.DeepseekForCausalLM
        assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert type(AutoModel.from_pretrained(folder)) is modeling.DeepseekModel


def test_some_experts_are_read(published):
    """Expert parallelism reads them so."""
    folder, _, tensors = published
    model, _ = load_base_model(folder, experts={1: [6, 0], 2: [3]})
    layers = moe_layers(model)
    assert [len(layer.module.down_proj) for layer in layers.values()] == [2, 1]
    for index, expert in ((1, 0), (1, 6), (2, 3)):
        for name, view in layers[index].expert_views(expert).items():
            assert torch.equal(view, tensors[f"model.layers.{index}.mlp.experts.{expert}.{name}"])


def test_loading_registers():
    assert loading.modeling is modeling


def test_weights_are_drawn_as_the_config_says():
    config = AutoConfig.for_model(**PUBLISHED | SHRUNK | {"initializer_range": 0.5})
    mixture = AutoModelForCausalLM.from_config(config).model.layers[1].mlp
    for param in (mixture.gate.weight, mixture.experts.gate_up_proj, mixture.experts.down_proj):
        assert 0.4 < param.std() < 0.6


@pytest.mark.parametrize(
    "change, text",
    [
        ({"scoring_func": "sigmoid"}, "'scoring_func' expected one of .'softmax',., got sigmoid"),
        ({"kv_lora_rank": 512}, 'DeepSeek-V2 .* "model_type": "deepseek_v2"'),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is not between 1 and the 8"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok None is not between"),
    ],
)
def test_a_config_that_is_not_of_this_model_is_refused(change, text, tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | SHRUNK | change))
    with pytest.raises(ValueError, match=text):
        loading.empty_model(tmp_path)
    with pytest.raises(ValueError, match=text):
        load_base_model(tmp_path)


# ---------------------------------------------------------------------------------------- what transformers' models can


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_with_a_cache_is_that_without(published, attention):
    model, _ = load_base_model(published[0])
    model.set_attn_implementation(attention)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0  # padded on the left
    with_cache, without = (
        model.generate(IDS, attention_mask=mask, use_cache=cache, **options) for cache in (True, False)
    )
    assert with_cache.shape == (2, 24) and torch.equal(with_cache, without)
    assert len(set(with_cache[0, 12:].tolist())) > 3
    alone = model.generate(IDS[1:, 4:], attention_mask=mask[1:, 4:], **options)
    assert torch.equal(alone[0, 8:], with_cache[1, 12:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_of_a_pack_are_apart(published, attention):
    model, _ = load_base_model(published[0])
    model.set_attn_implementation(attention)
    assert loading.keeps_documents_apart(model)
    positions = torch.tensor([[*range(12), *range(12)]])
    packed = logits_of(model, IDS.reshape(1, 24), position_ids=positions).reshape(2, 12, -1)
    assert (packed - logits_of(model)).abs().max() < 1e-5
    assert (logits_of(model, IDS.reshape(1, 24)).reshape(2, 12, -1) - logits_of(model))[1].abs().max() > 1e-2


def test_logits_to_keep_and_router_logits(published):
    folder, config, _ = published
    model, _ = load_base_model(folder)
    whole = logits_of(model)
    assert torch.allclose(logits_of(model, logits_to_keep=1), whole[:, -1:], atol=1e-6)
    assert torch.allclose(logits_of(model, logits_to_keep=torch.tensor([2, 7])), whole[:, [2, 7]], atol=1e-6)
    out = model(IDS, labels=IDS, output_router_logits=True, output_hidden_states=True)
    assert [tuple(layer.shape) for layer in out.router_logits] == [(24, 8)] * 2
    assert len(out.hidden_states) == config["num_hidden_layers"] + 1
    assert torch.equal(out.loss, model(IDS, labels=IDS).loss)  # no auxiliary loss in it


def test_gradient_checkpointing_changes_no_gradient(published):
    model, _ = load_base_model(published[0])
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train().zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({name: param.grad.clone() for name, param in model.named_parameters()})
    assert all(grad.any() for name, grad in grads[0].items() if "down_proj" in name)
    for name in grads[0]:
        assert torch.allclose(grads[0][name], grads[1][name], atol=1e-7), name


# ---------------------------------------------------------------------------------------------------- an adapter's life


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["as published", "renormalized, every second layer"])
def test_scores_training_adapter_and_merge(variant, dtype, tmp_path, tiny_tokenizer):
    config, tensors = write_checkpoint(tmp_path, tiny_tokenizer, dtype, **VARIANTS[variant])
    model, _ = load_base_model(tmp_path)
    base_state, base_logits = {n: t.clone() for n, t in model.state_dict().items()}, logits_of(model)

    with RouterCapture(model, prob=True) as capture:
        logits_of(model)
    counts = capture.counts()
    assert (counts.tokens, counts.top_k, counts.layers) == (24, 3, mixtures(config))
    scores = ExpertScores.from_counts(counts)
    for layer in mixtures(config):
        assert sum(scores["token"][layer].values()) == pytest.approx(1, abs=1e-3)  # scores are rounded
        assert sum(scores["prob"][layer].values()) == pytest.approx(1, abs=1e-3)
        gates = sum(scores["gate"][layer].values())
        assert gates == pytest.approx(1, abs=1e-3) if config["norm_topk_prob"] else 0.3 < gates < 0.95
    chosen = select_experts(scores, score_function="token", top_p=0.2)
    assert isinstance(chosen, ExpertConfig) and all(chosen.experts[layer] for layer in mixtures(config))

    to_esft(model, chosen)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.03, weight_decay=0.1)
    for _ in range(2):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = model.state_dict()
    fused = {f"{layer.name}.{t}": i for i, layer in moe_layers(model).items() for t in layer.tensor_names}
    assert state.keys() == base_state.keys()
    for name in state:
        if name not in fused:
            assert torch.equal(state[name], base_state[name]), name
            continue
        for expert in range(8):
            same = torch.equal(state[name][expert], base_state[name][expert])
            assert same == (expert not in chosen.experts[fused[name]]), (name, expert)
    trained_logits = logits_of(model)
    assert not torch.equal(trained_logits, base_logits)

    save_adapter(model, tmp_path / "adapter")
    names = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer, experts in chosen.experts.items()
        for expert in experts
        for part in ("gate", "up", "down")
    }
    assert on_disk(tmp_path / "adapter").keys() == names < tensors.keys()
    unload(model)
    assert_same(model.state_dict(), base_state)
    assert torch.equal(logits_of(model), base_logits)
    add_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits_of(model), trained_logits)

    merge(model).save_pretrained(tmp_path / "merged")
    merged = on_disk(tmp_path / "merged")
    assert merged.keys() == tensors.keys()
    for name in tensors:
        assert torch.equal(merged[name], tensors[name]) == (name not in names), name
    tiny_tokenizer.save_pretrained(tmp_path / "merged")
    reloaded, _ = load_base_model(tmp_path / "merged")
    reloaded.set_experts_implementation(model.config._experts_implementation)
    assert torch.equal(logits_of(reloaded), logits_of(model))
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert (logits_of(reloaded) - trained_logits).abs().max() < tolerance
