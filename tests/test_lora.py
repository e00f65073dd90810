"""An adapter of LoRA on selected experts: trained, saved in peft's format, loaded, merged, and taken out again."""

import json
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import esft
from deepseek.adapters import BASE_NAME
from deepseek.experts import moe_layers
from scripts import merge_adapter
from tests.client_helpers import IDS, logits, take_steps, trainable
from tests.helpers import FAMILIES, assert_near, make_model, refused, tensors_of

EXPERTS = {"experts": {"1": [5, 2], "2": [7]}}
DTYPES = [torch.float32, torch.bfloat16]


def experts_of(family: str) -> dict:
    return {"experts": {"2": [7, 1]}} if family == "nemotron_h" else EXPERTS


def lora(model, config=EXPERTS, rank=4, alpha=8, moved=True, **options):
    """A model with factors that are all away from their start."""
    esft.to_esft(model, config, lora_rank=rank, lora_alpha=alpha, **options)
    for number, param in enumerate(trainable(model)) if moved else ():
        param.data += 0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(number))
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_factors_of_selected_experts_learn(family, dtype):
    model, base = make_model(family, dtype), make_model(family, dtype)
    config = experts_of(family)
    esft.to_esft(model, config, lora_rank=4)
    assert torch.equal(logits(model), logits(base))
    params = trainable(model)
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    assert all(".experts.trained." in name and name[-6:-1] == "lora_" for name in names)
    count, layers = sum(map(len, config["experts"].values())), moe_layers(base)
    each = [shape for _, shape in next(iter(layers.values())).expert_shapes().items() if shape.ndim == 2]
    assert sum(p.numel() for p in params) == count * 4 * sum(sum(matrix.shape) for matrix in each)
    losses = take_steps(model)
    assert losses[2] < losses[0]
    state = model.state_dict()
    for name, tensor in base.state_dict().items():  # every weight of the base kept its bits
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_computes_the_same_and_goes_again(family, dtype, tmp_path):
    model = lora(make_model(family, dtype), experts_of(family))
    after = logits(model)
    esft.save_adapter(model, tmp_path)
    loaded = esft.add_adapter(make_model(family, dtype), tmp_path)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert_near("loaded", logits(loaded), after, tolerance)
    with pytest.raises(AssertionError):
        assert_near("base", logits(make_model(family, dtype)), after, tolerance)
    assert torch.equal(logits(esft.merge(model)), logits(loaded))
    with esft.base_values(loaded):
        assert torch.equal(logits(loaded), logits(make_model(family, dtype)))
    assert torch.equal(logits(esft.unload(loaded)), logits(make_model(family, dtype)))


def test_the_files_are_those_of_peft_with_a_key_for_each_expert(tmp_path):
    model = lora(make_model())
    esft.save_adapter(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", BASE_NAME}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    A = tensors["base_model.model.model.layers.1.mlp.experts.5.gate_proj.lora_A.weight"]
    B = tensors["base_model.model.model.layers.1.mlp.experts.5.gate_proj.lora_B.weight"]
    held = model.model.layers[1].mlp.experts.trained
    assert held.expert_ids == [2, 5] and torch.equal(A, held.gate_proj_lora_A[1]) and len(tensors) == 3 * 3 * 2
    assert B.shape == (16, 4) and torch.equal(B, held.gate_proj_lora_B[1])
    read = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert (read.r, read.lora_alpha) == (4, 8)
    assert read.target_modules == {
        f"model.layers.{place}.{name}"
        for place in ("1.mlp.experts.2", "1.mlp.experts.5", "2.mlp.experts.7")
        for name in ("gate_proj", "up_proj", "down_proj")
    }


class Unfused(nn.Module):
    """The experts of a layer as Linear layers of their own, called as the fused ones are."""

    def __init__(self, layer):
        super().__init__()
        for expert in range(layer.num_experts):
            projections = nn.ModuleDict()
            for name, weight in layer.expert_views(expert).items():
                linear = nn.Linear(*weight.shape[::-1], bias=False)
                linear.weight.data.copy_(weight)
                projections[name.removesuffix(".weight")] = linear
            self.add_module(str(expert), projections)

    def forward(self, x_TD, ids_TK, weights_TK):
        out_TD = torch.zeros_like(x_TD)
        for expert in ids_TK.unique().tolist():
            one = self.get_submodule(str(expert))
            token, k = torch.where(ids_TK == expert)
            h = nn.functional.silu(one["gate_proj"](x_TD[token])) * one["up_proj"](x_TD[token])
            out_TD.index_add_(0, token, one["down_proj"](h) * weights_TK[token, k, None])
        return out_TD


class Plain(nn.Module):
    """A model that peft takes for what it is. For one of transformers it takes the names of experts for fused ones."""

    def __init__(self, model):
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head

    def forward(self, ids, use_cache=False):
        return SimpleNamespace(logits=self.lm_head(self.model(ids, use_cache=use_cache).last_hidden_state))


@pytest.fixture
def filled(tmp_path):
    """An adapter, and the same with zeros for the other experts of its layers, as --fill_lora writes it."""
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "filled"
    make_model().save_pretrained(base)
    esft.save_adapter(lora(make_model()), adapter)
    merge_adapter.main([f"--base_model_path={base}", f"--adapter_dir={adapter}", f"--output_dir={out}", "--fill_lora"])
    return adapter, out


def test_filled_up_it_has_a_key_for_every_expert_of_its_layers_and_changes_no_other(filled):
    adapter, out = filled
    before, after = tensors_of(adapter), tensors_of(out)
    wanted = {f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}.lora_{letter}.weight"
              for layer in (1, 2) for expert in range(8) for name in ("gate_proj", "up_proj", "down_proj")
              for letter in "AB"}  # fmt: skip
    assert after.keys() == wanted and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(after[name].any() for name in wanted - before.keys())
    assert {path.name for path in out.iterdir()} == {path.name for path in adapter.iterdir()}
    targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == len(wanted) / 2 and "model.layers.2.mlp.experts.0.up_proj" in targets
    loaded = esft.add_adapter(make_model(), out)
    assert esft.trained_config(loaded).experts == {1: tuple(range(8)), 2: tuple(range(8))}
    assert torch.equal(logits(loaded), logits(esft.add_adapter(make_model(), adapter)))


def test_most_of_a_filled_file_takes_no_room(tmp_path):
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "filled"
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128}
    make_model(**sizes).save_pretrained(base)
    esft.save_adapter(lora(make_model(**sizes), {"experts": {"1": [3]}}, rank=64), adapter)
    merge_adapter.fill_lora(base, adapter, out)
    small, large = ((folder / "adapter_model.safetensors").stat() for folder in (adapter, out))
    assert large.st_size > 7 * small.st_size and 512 * large.st_blocks < 2 * small.st_size


@pytest.mark.parametrize("flag", ["--strength=0.5", "--overwrite", "--no_replaced"])
def test_filling_up_merges_nothing(flag, filled, tmp_path, capsys):
    words = ["--base_model_path", tmp_path / "base", "--output_dir", tmp_path / "new", "--fill_lora"]
    refused(capsys, merge_adapter.main, [*words, "--adapter_dir", filled[0], flag], "nothing is merged. Leave it out")
    esft.save_adapter(esft.to_esft(make_model(), EXPERTS), tmp_path / "whole")
    refused(capsys, merge_adapter.main, [*words, "--adapter_dir", tmp_path / "whole"], "it is not LoRA on selected")
    assert not (tmp_path / "new").exists()


@pytest.mark.clients
@pytest.mark.parametrize("which", [0, 1], ids=["selected", "filled"])
def test_peft_loads_it_where_experts_are_linear_layers_and_gives_the_same_logits(which, filled):
    folder, unfused = filled[which], make_model()
    for layer in moe_layers(unfused).values():
        block, _, name = layer.name.rpartition(".")
        setattr(unfused.get_submodule(block), name, Unfused(layer))
    assert_near("unfused", logits(unfused), logits(make_model()), 1e-5)
    config = peft.LoraConfig.from_pretrained(str(folder))
    config.task_type = None  # that of a model of transformers
    loaded = peft.PeftModel.from_pretrained(Plain(unfused), str(folder), config=config)
    found = loaded.load_adapter(str(folder), "default")
    assert not found.missing_keys and not found.unexpected_keys
    ours = esft.add_adapter(make_model(), filled[0])
    assert_near("peft", logits(loaded), logits(ours), 1e-5)
    assert_near("merged by peft", logits(loaded.merge_and_unload()), logits(ours), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["deepseek_v2", "mixtral", "gpt_oss"])
def test_merged_on_disk_it_has_the_values_of_memory_and_unmerges(family, dtype, tmp_path):
    base, adapter, merged, again = (tmp_path / name for name in ("base", "adapter", "merged", "again"))
    make_model(family, dtype).save_pretrained(base)
    model = make_model(family, dtype)
    model.name_or_path = str(base)
    esft.save_adapter(lora(model), adapter)
    merge_adapter.merge_adapter(base, [adapter], merged)
    before, after = tensors_of(base), tensors_of(merged)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("experts" in name for name in changed)
    esft.merge(model).save_pretrained(tmp_path / "memory")
    wanted = tensors_of(tmp_path / "memory")
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)
    merge_adapter.unmerge(merged, again)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(again).items())


def test_a_step_goes_on_exactly_with_the_loaded_factors(tmp_path):
    model = lora(make_model(), moved=False)
    take_steps(model)
    esft.save_adapter(model, tmp_path)
    other = lora(make_model(), moved=True)
    esft.add_adapter(other, tmp_path)
    assert take_steps(other) == take_steps(model)


def test_a_reference_is_the_base_and_changes_no_gradient():
    model = lora(make_model())
    loss = model(IDS, labels=IDS, use_cache=False).loss
    reference = esft.ReferenceModel(model)(IDS, use_cache=False).logits
    loss.backward()
    twin = lora(make_model())
    twin(IDS, labels=IDS, use_cache=False).loss.backward()
    assert torch.equal(reference, logits(make_model())) and not torch.equal(reference, logits(model))
    assert all(torch.equal(param.grad, other.grad) for param, other in zip(*(trainable(m) for m in (model, twin))))


@pytest.mark.parametrize("frozen", ["int8", "fp8", "nf4"])
def test_with_quantized_frozen_experts_the_selected_ones_keep_their_dtype(frozen, tmp_path):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64}
    model = lora(make_model(dtype=torch.bfloat16, **sizes), frozen_dtype=frozen, moved=False)
    losses = take_steps(model)
    assert losses[2] < losses[0]
    esft.save_adapter(model, tmp_path)
    plain = esft.add_adapter(make_model(dtype=torch.bfloat16, **sizes), tmp_path)
    for index, layer in moe_layers(model).items():
        for expert in esft.trained_config(model).experts[index]:
            base, now = layer.expert_views(expert), moe_layers(plain)[index].expert_views(expert)
            before = moe_layers(make_model(dtype=torch.bfloat16, **sizes))[index].expert_views(expert)
            assert all(
                torch.equal(base[name], before[name]) and not torch.equal(now[name], base[name]) for name in base
            )


def test_activation_checkpointing_changes_no_gradient():
    plain, checkpointed = (lora(make_model()).train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(*(trainable(m) for m in (plain, checkpointed))))


def test_unloading_in_training_gives_the_base_back():
    model = esft.unload(lora(make_model()))
    assert torch.equal(logits(model), logits(make_model())) and all(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == make_model().state_dict().keys()


@pytest.mark.clients
def test_one_adapter_holds_the_experts_and_the_attention_of_peft(tmp_path):
    model = lora(make_model())
    attention = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, attention)
    esft.to_esft(model, EXPERTS, lora_rank=4, lora_alpha=8)  # again, since peft freezes what it finds
    assert len(trainable(model)) == 2 * 6 + 3 * 2 * 2
    losses = take_steps(wrapped)
    assert losses[2] < losses[0]
    esft.save_adapter(wrapped, tmp_path)
    loaded = esft.add_adapter(make_model(), tmp_path)
    assert_near("loaded", logits(loaded), logits(wrapped), 1e-5)
    config = esft.ExpertConfig.load(tmp_path)
    assert config.experts == {1: (2, 5), 2: (7,)}
    assert config.parameters == tuple(
        f"model.layers.{i}.self_attn.{n}.weight" for i in range(3) for n in ("o_proj", "q_proj")
    )
    esft.save_adapter(loaded, tmp_path / "values")  # as values instead of factors
    assert torch.equal(logits(esft.add_adapter(make_model(), tmp_path / "values")), logits(loaded))
    now = loaded.model.layers[0].self_attn.q_proj.weight.data.clone()
    assert torch.equal(logits(esft.unload(loaded)), logits(make_model()))
    base, merged, again = tmp_path / "base", tmp_path / "merged", tmp_path / "again"
    make_model().save_pretrained(base)
    merge_adapter.merge_adapter(base, [tmp_path], merged)
    values = tensors_of(merged)
    assert torch.equal(values["model.layers.0.self_attn.q_proj.weight"], now)
    merge_adapter.unmerge(merged, again)
    assert all(torch.equal(tensors_of(base)[name], tensor) for name, tensor in tensors_of(again).items())
    other = peft.get_peft_model(lora(make_model()), peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj has rank 2 and scale 4, the experts have 4 and 2"):
        esft.save_adapter(other, tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 0}, "rank is 0"),
        ({"lora_rank": 4, "lora_alpha": -1}, "alpha is -1"),
        ({"lora_rank": 4, "config": {**EXPERTS, "shared_experts": True}}, "more than routed experts"),
    ],
)
def test_what_lora_cannot_train_is_refused(changes, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        esft.to_esft(model, **{"config": EXPERTS, **changes})
    assert esft.trained_config(model) is None and all(param.requires_grad for param in model.parameters())


def broken(folder, **config) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    if (drop := config.pop("drop", None)) is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if drop not in name}
    if config.pop("nan", None):
        next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"gate_proj": 2}}, "rank_pattern"),
        ({"r": 8}, r"has shape \(4, 16\) in F32, this model's is \(8, 16\)"),
        ({"drop": "1.mlp.experts.2.up_proj.lora_B"}, "experts.2.up_proj.lora_B.weight is missing"),
        ({"nan": True}, "not finite"),
    ],
)
def test_a_damaged_adapter_is_refused_and_nothing_changes(damage, message, tmp_path):
    esft.save_adapter(lora(make_model()), tmp_path)
    esft.add_adapter(make_model(), tmp_path)  # the negative
    broken(tmp_path, **damage)
    model = make_model()
    with pytest.raises(ValueError, match=message):
        esft.add_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(make_model())) and esft.trained_config(model) is None


def test_an_adapter_of_another_kind_is_refused_in_training(tmp_path):
    esft.save_adapter(lora(make_model()), tmp_path / "lora")
    whole = esft.to_esft(make_model(), EXPERTS)
    esft.save_adapter(whole, tmp_path / "whole")
    with pytest.raises(ValueError, match="Call unload first"):
        esft.add_adapter(whole, tmp_path / "lora")
    with pytest.raises(ValueError, match="it has rank 4 and alpha 8, and this model trains with 4 and 16"):
        esft.add_adapter(lora(make_model(), alpha=16), tmp_path / "lora")
    with pytest.raises(ValueError, match="Call unload first"):
        esft.add_adapter(lora(make_model()), tmp_path / "whole")
