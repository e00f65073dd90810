"""base + strength x (tuned - base): in memory and on disk, for adapters, LoRA and whole models."""

import json
import shutil

import pytest
import torch

from deepseek.adapters import is_adapter
from deepseek.fingerprint import checkpoint_note
from deepseek.strength import blend
from esft import (
    ExpertConfig,
    adapter_views,
    add_adapter,
    check_adapter,
    load_base_model,
    load_esft_model,
    merge,
    save_adapter,
    to_esft,
    unload,
)
from scripts import merge_adapter
from tests.helpers import BOTH, assert_same_tensors, make_model, noisy_adapter, refused, tensors_of

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
EXPERTS = {1: (5, 2), 2: (7,)}
KINDS = ["esft", "full", "selected"]


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def noisy(model, seed: int = 3):
    """Every parameter of a model changed, as full fine-tuning does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=generator).to(param.dtype))
    return model


def lora_of(model, folder):
    peft = pytest.importorskip("peft")
    fused = [name for name, _ in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
    fused = [name for name in fused if ".experts." in name]
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], target_parameters=fused, init_lora_weights=False)
    lora = peft.get_peft_model(model, config)
    lora.save_pretrained(folder)
    return folder


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"], scope="module")
def parts(request, tmp_path_factory, tiny_tokenizer):
    """A base, and an adapter, a LoRA adapter of selected experts and a whole model that were made of it."""
    folder = tmp_path_factory.mktemp("parts")
    base = save(make_model(dtype=request.param), tiny_tokenizer, folder / "base")
    made = {name: folder / name for name in KINDS}
    noisy_adapter(load_base_model(base)[0], ExpertConfig(EXPERTS), made["selected"], lora_rank=2)
    noisy_adapter(load_base_model(base)[0], ExpertConfig(EXPERTS, **BOTH), made["esft"])
    save(noisy(load_base_model(base)[0]), tiny_tokenizer, made["full"])
    return base, made


def test_an_adapter_is_told_from_a_whole_model_and_from_other_folders(parts):
    base, made = parts
    assert [is_adapter(made[kind]) for kind in KINDS] == [True, False, True]
    assert not is_adapter(base) and not is_adapter(base.parent) and not is_adapter(base / "nowhere")


def between(base, tuned, strength):
    """What a model at `strength` has to hold, name by name, rounded once."""
    a, b = base.state_dict(), tuned.state_dict()
    return {name: (a[name].float() + strength * (b[name].float() - a[name].float())).to(a[name].dtype) for name in a}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0, 0.7, 1, 1.5])
def test_every_tensor_lies_between_base_and_tuned(kind, strength, parts):
    base, made = parts
    plain, tuned = load_base_model(base)[0], load_esft_model(base, made[kind], dtype="float32")[0]
    model = load_esft_model(base, made[kind], strength=strength)[0]
    wanted = between(plain, tuned, strength)
    if strength == 1:  # bit for bit as without the argument, and as it was trained
        wanted = load_esft_model(base, made[kind])[0].state_dict()
        if kind == "full":
            assert_same_tensors(wanted, load_base_model(made["full"])[0].state_dict())
    assert_same_tensors(model.state_dict(), plain.state_dict() if strength == 0 else wanted)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, plain.state_dict()[name])]
    assert len(changed) > 3 or strength == 0
    if kind != "full":
        assert_same_tensors(unload(model).state_dict(), plain.state_dict())


@pytest.mark.parametrize("strength", [0.7, 1])
def test_the_biases_of_routers_which_are_buffers_move_with_a_whole_model(strength, tmp_path, tiny_tokenizer):
    base, tuned = make_model("deepseek_v3"), noisy(make_model("deepseek_v3"))
    tuned.model.layers[1].mlp.gate.e_score_correction_bias.normal_()
    save(tuned, tiny_tokenizer, tmp_path)
    wanted = between(base, tuned, strength)
    assert_same_tensors(add_adapter(base, tmp_path, strength).state_dict(), wanted)


@pytest.mark.parametrize("kind", ["esft", "full"])
def test_a_merged_model_has_lost_the_name_of_its_base(kind, parts):
    """TRL would read a reference there, which is not this model."""
    base, made = parts
    model = load_base_model(base)[0]
    assert model.config.name_or_path == model.name_or_path == str(base)
    model = load_esft_model(base, made[kind], strength=0.7)[0]
    if kind == "esft":
        assert model.config.name_or_path == str(base)  # until it is merged
        merge(model)
    assert model.config.name_or_path == model.name_or_path == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0, 0.7, 1])
def test_a_merge_on_disk_is_the_one_in_memory(kind, strength, parts, tmp_path):
    base, made = parts
    out = tmp_path / "out"
    flags = [f"--base_model_path={base}", f"--adapter_dir={made[kind]}", f"--output_dir={out}"]
    merge_adapter.main([*flags, f"--strength={strength}"])
    model = load_esft_model(base, made[kind], strength=strength)[0]
    assert_same_tensors(load_base_model(out)[0].state_dict(), model.state_dict())
    assert json.loads((out / "merged_from.json").read_text())["strength"] == strength
    assert (out / "tokenizer.json").is_file()
    if kind != "full":
        merge_adapter.main(["--unmerge", f"--base_model_path={out}", f"--output_dir={tmp_path / 'again'}"])
        assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(base))
    merge_adapter.main([*flags, "--strength=0.3", "--overwrite"])
    at_03 = load_esft_model(base, made[kind], strength=0.3)[0]
    assert_same_tensors(load_base_model(out)[0].state_dict(), at_03.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_at_a_strength_is_so_much_of_its_change(dtype, tmp_path, tiny_tokenizer):
    """It is the adapter whose alpha is so many times as large, as peft merges that."""
    base = save(make_model(dtype=dtype), tiny_tokenizer, tmp_path / "base")
    lora = lora_of(load_base_model(base)[0], tmp_path / "lora")
    plain, tuned = load_base_model(base)[0].state_dict(), load_esft_model(base, lora)[0].state_dict()
    for strength in (0.0, 0.5, 1.0, 2.0):
        model = load_esft_model(base, lora, strength=strength)[0]
        scaled = shutil.copytree(lora, tmp_path / f"{strength}")
        config = json.loads((scaled / "adapter_config.json").read_text())
        config["lora_alpha"] *= strength
        (scaled / "adapter_config.json").write_text(json.dumps(config))
        assert_same_tensors(model.state_dict(), load_esft_model(base, scaled)[0].state_dict())
        for name, value in model.state_dict().items() if dtype == torch.float32 else ():
            wanted = plain[name] + strength * (tuned[name] - plain[name])
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items()) == (strength == 0)
    out = tmp_path / "out"
    merge_adapter.main([f"--base_model_path={base}", f"--adapter_dir={lora}", f"--output_dir={out}", "--strength=2"])
    assert_same_tensors(load_base_model(out)[0].state_dict(), model.state_dict())


def test_two_adapters_have_strengths_of_their_own(tmp_path):
    made = {}
    for name, experts in (("a", {1: (5,)}), ("b", {2: (0,)})):
        noisy_adapter(make_model(), ExpertConfig(experts), tmp_path / name)
        made[name] = (ExpertConfig(experts), make_model())
    model = add_adapter(add_adapter(make_model(), tmp_path / "a", strength=0.5), tmp_path / "b")
    for name, strength in (("a", 0.5), ("b", 1)):
        config, plain = made[name]
        tuned, old = add_adapter(make_model(), tmp_path / name), adapter_views(plain, config)
        for key, view in adapter_views(model, config).items():
            assert torch.equal(view, blend(old[key], adapter_views(tuned, config)[key], strength))
    assert_same_tensors(unload(model).state_dict(), make_model().state_dict())


def test_one_rounding():
    """In bf16 a change that rounds away at each step would be lost; here it is computed in fp32."""
    base, tuned = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.float32)
    assert blend(base, tuned, 2).item() == 1.015625
    assert blend(base, tuned, 1) is tuned and torch.equal(blend(base, tuned, 0).bfloat16(), base)


@pytest.mark.parametrize("strength", [-0.1, 2.1, float("nan"), float("inf")])
def test_a_strength_that_means_nothing_is_refused_first(strength, tmp_path, capsys):
    for call in (lambda: add_adapter(make_model(), tmp_path, strength), lambda: load_esft_model("m", "a", strength)):
        with pytest.raises(ValueError, match=r"cannot use strength .*: it is not from 0 \(the base\) to 2"):
            call()
    flags = ["--base_model_path", tmp_path, "--adapter_dir", tmp_path, "--output_dir", tmp_path / "o"]
    refused(capsys, merge_adapter.main, [*flags, f"--strength={strength}"], "from 0 (the base) to 2")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("strength", ["a", None, [0.5], 1j])
def test_a_strength_that_is_not_a_number_is_refused_in_a_sentence(strength, tmp_path):
    with pytest.raises(ValueError, match=r"cannot use strength .*: it is not from 0 \(the base\) to 2"):
        add_adapter(make_model(), tmp_path, strength)


def test_what_has_no_strength_is_refused(tmp_path, capsys, tiny_tokenizer):
    noisy_adapter(make_model(), ExpertConfig(EXPERTS), tmp_path / "adapter")
    training = to_esft(make_model(), ExpertConfig(EXPERTS))
    with pytest.raises(ValueError, match=r"a model in training takes it at strength 1, not 0\.5"):
        add_adapter(training, tmp_path / "adapter", strength=0.5)
    loaded = add_adapter(make_model(), tmp_path / "adapter")
    base = save(make_model(), tiny_tokenizer, tmp_path / "base")
    full = save(noisy(make_model()), tiny_tokenizer, tmp_path / "full")
    other = save(make_model(moe_intermediate_size=24), tiny_tokenizer, tmp_path / "other")
    for model in (training, loaded):  # `unload` would mix both
        with pytest.raises(ValueError, match="the model is in training, or holds an adapter"):
            add_adapter(model, full, strength=0.5)
    flags = ["--base_model_path", base, "--output_dir", tmp_path / "out", "--strength=0.5", "--adapter_dir"]
    refused(capsys, merge_adapter.main, [*flags, other], "is not in both, or has another shape", "trained from")
    refused(capsys, merge_adapter.main, [*flags, full, tmp_path / "adapter"], "Merge it alone")
    run = {"base": checkpoint_note(other)}
    (full / "run.json").write_text(json.dumps(run))
    refused(capsys, merge_adapter.main, [*flags, full], "it was trained on another base model")
    refused(capsys, merge_adapter.main, ["--unmerge", *flags[:5]], "cannot unmerge with --strength")
    assert not (tmp_path / "out").exists()
    shutil.copytree(other, tmp_path / "third")
    with pytest.raises(ValueError, match="has another shape"):
        check_adapter(make_model(), tmp_path / "third")
    save_adapter(training, tmp_path / "again")
