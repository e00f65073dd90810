"""Test how a model is opened: what transformers is asked for, and what is refused before."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek import loading
from deepseek.files import write_json
from tests.helpers import FAMILIES, SMALL, make_model


def test_a_model_is_spread_over_its_ranks_gpus_only(monkeypatch, tiny_model_dir):
    """Check what transformers is asked for. It does the placement itself."""
    asked = {}
    placed = SimpleNamespace(hf_device_map={"model.layers.0": 2, "model.layers.1": 3})
    placed.eval = lambda: placed
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (1000 * gpu, 10_000))

    def from_pretrained(path, output_loading_info, ignore_mismatched_sizes, **kwargs):
        asked.update(kwargs)
        return placed, {"missing_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model, _ = loading.load_base_model(tiny_model_dir, dtype="bfloat16", device=["cuda:2", "cuda:3"])
    assert model is placed
    spread = {"dtype": "bfloat16", "device_map": "auto", "max_memory": {2: 1600, 3: 2400}}
    assert asked == {**spread, "trust_remote_code": False}
    placed.hf_device_map["lm_head"] = "cpu"
    with pytest.raises(ValueError, match="needs more GPUs than cuda:2, cuda:3"):
        loading.load_base_model(tiny_model_dir, device=["cuda:2", "cuda:3"])
    loading.load_base_model(tiny_model_dir, device="cuda:1")
    assert asked["device_map"] == "cuda:1"


def test_an_empty_model_has_the_shapes_of_the_whole(tiny_model_dir):
    whole, _ = loading.load_base_model(tiny_model_dir)
    empty = loading.empty_model(tiny_model_dir)
    assert {name: p.shape for name, p in empty.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    assert all(p.is_meta for p in empty.parameters())


@pytest.mark.parametrize("load", [loading.load_base_model, loading.empty_model, loading.load_tokenizer])
def test_a_folder_without_a_model_is_refused(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"cannot load model 'nobody/missing': no such folder, and it could not"):
        load("nobody/missing")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot load model"):
        load(tmp_path)


@pytest.mark.parametrize(
    "change, text", [({"num_hidden_layers": 4}, "lacks .* tensors"), ({"hidden_size": 64}, "cannot")]
)
def test_a_checkpoint_that_does_not_fill_the_model_is_refused(tiny_model_dir, tmp_path, change, text):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=r"lacks, or holds in another shape, \d+ tensors"):
        loading.load_base_model(folder)


OLD = {"torch_dtype": "bfloat16", "transformers_version": "4.33.1", "moe_layer_freq": 1, "ep_size": 1, "seq_aux": True}
OLD |= {"aux_loss_alpha": 0.001, "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"}}
YARN = {"factor": 4, "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707}
FORMS = {  # of what is written in config.json now: as older versions of transformers and the model's authors wrote it
    "rope": ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rope_theta": 500.0}),
    "yarn": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN}},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "yarn", **YARN}},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_config_in_its_old_form_is_the_same_model(form, tmp_path, tiny_tokenizer):
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    tiny_tokenizer.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    rope, dtype = config.pop("rope_parameters"), config.pop("dtype")
    new, old = FORMS[form]
    logits = {}
    for name, keys in {"plain": {"rope_parameters": rope}, "new": {"dtype": dtype, **new}, "old": OLD | old}.items():
        if name != "plain":
            shutil.copytree(tmp_path / "plain", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | keys))
        (tmp_path / name / "modeling_deepseek.py").write_text("raise SystemExit('remote code was run')")
        model, _ = loading.load_base_model(tmp_path / name)
        assert model.dtype == torch.bfloat16
        logits[name] = model(torch.arange(3, 40)[None]).logits
    assert torch.equal(logits["old"], logits["new"]) and not torch.equal(logits["old"], logits["plain"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family, apart", [("deepseek_v2", True), ("mixtral", True), ("gpt_oss", False)])
def test_whether_documents_are_apart_is_found_out(family, apart, dtype):
    model = make_model(family, dtype)
    assert loading.keeps_documents_apart(model) == apart
    assert all(param.grad is None for param in model.parameters())
    ids_BT = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 8, 9, 10]])
    positions_BT = torch.arange(3).repeat(2)[None].expand(2, -1)
    with torch.no_grad():
        one, other = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits[:, 3:].float()
    assert torch.allclose(one, other, rtol=0.1, atol=0.1) == apart


@pytest.mark.parametrize("opened", ["load_config", "load_tokenizer", "empty_model", "load_base_model"])
def test_code_of_a_model_folder_is_not_run_whatever_is_answered(tmp_path, monkeypatch, opened):
    """transformers asks whether to run the code of a model type that it does not know, unless it is told not to."""
    ran = tmp_path / "ran"
    (tmp_path / "configuration_odd.py").write_text(f"open({str(ran)!r}, 'w')\nclass OddConfig: pass\n")
    code = {"AutoConfig": "configuration_odd.OddConfig", "AutoTokenizer": ["configuration_odd.OddConfig", None]}
    write_json(tmp_path / "config.json", {"model_type": "odd", "auto_map": code})
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "OddTokenizer", "auto_map": code})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=r"cannot load model .*: the code in its folder is never run"):
        getattr(loading, opened)(tmp_path)
    assert not ran.exists()


EIGHT = {**SMALL, "intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("family", "changes", "draws"),
    [
        ("phimoe", EIGHT, True),
        ("phimoe", {**EIGHT, "input_jitter_noise": 0.1}, True),
        ("mixtral", {**EIGHT, "router_jitter_noise": 0.1}, True),
        ("mixtral", EIGHT, False),
        ("minimax_m2", {**FAMILIES["mixtral"], "router_jitter_noise": 0.1}, True),
        ("minimax_m2", FAMILIES["mixtral"], False),
        ("qwen3_moe", {**FAMILIES["qwen3_moe"], "attention_dropout": 0.1}, True),
        *((family, changes, False) for family, changes in FAMILIES.items()),
    ],
)
def test_a_model_that_draws_random_numbers_in_training_is_known(family, changes, draws):
    """It is one that gives other logits with another seed, and the test itself changes nothing."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **changes)).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.3)
    tensors, state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    assert loading.draws_in_training(model) is draws
    assert not model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensors[name], t) for name, t in model.state_dict().items())
    logits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        logits.append(model.train()(torch.arange(3, 40)[None]).logits)
    assert torch.equal(*logits) is not draws
