"""scripts/adapter_info.py: what it tells is what is in the files, and what it says of a base is what loading does."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepseek.adapters import find_adapter_tensors
from esft import ExpertConfig, add_adapter, merge
from scripts import adapter_info
from tests.helpers import RUN, make_model, noisy_adapter
from utils import run_cli

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and its adapters: a and b disjoint, c shares two experts with a, s and t have shared experts.

    l is LoRA on the experts of a, and m on one of its own and on a layer of attention.
    """
    folder = tmp_path_factory.mktemp("info")
    make_model().save_pretrained(folder / "base")
    configs = {
        "a": ExpertConfig({1: (5, 2), 2: (7,)}),
        "b": ExpertConfig({1: (0,)}),
        "c": ExpertConfig({1: (2, 1), 2: (7,)}),
        "s": ExpertConfig({2: (3,)}, shared_experts=True),
        "t": ExpertConfig({}, shared_experts=True, non_expert_modules=True),
    }
    for name, config in configs.items():
        noisy_adapter(make_model(), config, folder / name)
    for name, config in {"l": configs["a"], "m": ExpertConfig({2: (6,)})}.items():
        noisy_adapter(make_model(), config, folder / name, lora_rank=2)
    path, tensors = folder / "m" / "adapter_model.safetensors", load_file(folder / "m" / "adapter_model.safetensors")
    tensors |= {f"base_model.model.{Q_PROJ}.lora_A.weight": torch.ones(2, 32)}
    tensors |= {f"base_model.model.{Q_PROJ}.lora_B.weight": torch.ones(4 * 16, 2)}
    save_file(tensors, path)
    (folder / "a" / "run.json").write_text(json.dumps(RUN))
    return folder


def told(capsys, *words):
    adapter_info.main([*map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    """What is told of an adapter that does not fit the base: all the same, and then exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run_cli(lambda: adapter_info.main([*map(str, words), "--json"]))
    out, err = capsys.readouterr()
    assert err.startswith(f"error: cannot use {words[0]} with base") and len(err.splitlines()) == 1
    (info,) = json.loads(out)["adapters"]
    assert not info["fits"]
    return info["why_not"]


@pytest.mark.parametrize("name", ["a", "s", "t"])
def test_it_tells_what_is_in_the_files(name, folder, capsys):
    model = make_model()
    tensors, path = load_file(folder / name / "adapter.safetensors"), folder / name / "adapter.safetensors"
    (info,) = told(capsys, folder / name, f"--base_model_path={folder / 'base'}")["adapters"]
    config = ExpertConfig.load(folder / name)
    assert {int(layer): tuple(ids) for layer, ids in info["experts"].items()} == config.experts
    assert info["num_experts"] == sum(map(len, config.experts.values()))
    assert info["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    shared = {key: t for key, t in tensors.items() if ".shared_experts." in key}
    assert info["parameters_of_shared_experts"] == sum(tensor.numel() for tensor in shared.values())
    assert bool(shared) == info["shared_experts"]
    assert info["parameters_of_experts"] == info["num_experts"] * 3 * 16 * 32
    assert info["share"] == info["parameters"] / sum(param.numel() for param in model.parameters())
    assert info["bytes"] == path.stat().st_size and info["dtypes"] == {"F32": len(tensors)}
    assert info["fits"] and info["base"]["model_type"] == "deepseek_v2"


@pytest.mark.parametrize(("name", "others"), [("l", []), ("m", [Q_PROJ])])
def test_it_tells_what_lora_on_selected_experts_changes(name, others, folder, capsys):
    path = folder / name / "adapter_model.safetensors"
    (info,) = told(capsys, folder / name, f"--base_model_path={folder / 'base'}")["adapters"]
    config = ExpertConfig.load(folder / name)
    assert {int(layer): tuple(ids) for layer, ids in info["experts"].items()} == config.experts
    assert info["lora"] == {"rank": 2, "alpha": 16} and info["num_experts"] == sum(map(len, config.experts.values()))
    assert info["other_parameters"] == [f"{layer.removeprefix('model.')}.weight" for layer in others]
    assert info["parameters_of_experts"] == info["num_experts"] * 3 * 2 * (16 + 32)
    assert info["parameters"] == sum(tensor.numel() for tensor in load_file(path).values())
    assert info["bytes"] == path.stat().st_size and list(info["files"]) == [path.name]
    assert info["fits"] and info["base"]["model_type"] == "deepseek_v2"
    adapter_info.main([str(folder / name)])
    page = capsys.readouterr().out
    assert "of 8 each, LoRA of rank 2" in page and ("others      1 parameter" in page) == bool(others)
    make_model(seed=1).save_pretrained(folder / "another")
    assert "routers' weights differ" in refused(capsys, folder / name, f"--base_model_path={folder / 'another'}")


def test_lora_without_a_note_of_its_base(folder, tmp_path, capsys):
    """As peft writes it, where each expert is a Linear layer of its own."""
    shutil.copytree(folder / "l", tmp_path / "l")
    (tmp_path / "l" / "base.json").unlink()
    (info,) = told(capsys, tmp_path / "l", f"--base_model_path={folder / 'base'}")["adapters"]
    assert info["base"] is None and info["fits"]


def test_a_note_of_the_base_that_someone_else_wrote(folder, tmp_path, capsys):
    config = ExpertConfig.load(copied(folder, tmp_path)).to_dict()
    (tmp_path / "expert_cfg.json").write_text(json.dumps(config | {"base": "org/model"}))
    (info,) = told(capsys, tmp_path, f"--base_model_path={folder / 'base'}")["adapters"]
    assert info["base"] == {"name": "org/model"} and info["fits"]


def test_the_run_that_made_it(folder, capsys):
    a, b = told(capsys, folder / "a", folder / "b")["adapters"]
    assert b["run"] is None
    assert (a["run"]["method"], a["run"]["train_dataset"], a["run"]["steps"]) == ("esft", "law", 450)
    assert (a["run"]["learning_rate"], a["run"]["eval_loss"], a["run"]["finished"]) == (0.0025, 0.125, True)
    adapter_info.main([str(folder / "a")])
    page = capsys.readouterr().out
    assert "esft on law, learning rate 0.0025, 450 steps, training loss 0.2000, validation loss 0.1250" in page
    assert "layer 1     5 2" in page


def test_overlap_and_whether_they_go_together(folder, capsys):
    """As add_adapter finds it."""
    names = ["a", "b", "c", "s", "t", "l", "m"]
    pairs = {tuple(path[-1] for path in p["pair"]): p for p in told(capsys, *(folder / n for n in names))["pairs"]}
    assert pairs["a", "b"]["jaccard"] == 0 and pairs["a", "c"]["jaccard"] == 2 / 4
    assert pairs["a", "c"]["shared"] == {"1": [2], "2": [7]} and pairs["a", "l"]["jaccard"] == 1
    assert pairs["t", "m"]["why_not"] == "both hold 1 other parameter, such as layers.0.self_attn.q_proj.weight"
    for (one, other), pair in pairs.items():
        model = add_adapter(make_model(), folder / one)
        try:
            add_adapter(model, folder / other)
            together = True
        except ValueError:
            together = False
        assert pair["together"] == together == (pair["why_not"] is None), pair
    assert {pair["together"] for pair in pairs.values()} == {True, False}
    adapter_info.main([str(folder / "a"), str(folder / "c")])
    assert "Jaccard 0.500, cannot be loaded together: 2 experts are in both" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"seed": 1}, "routers' weights differ"),
        ({"num_hidden_layers": 2}, "layer 2"),
        ({"n_routed_experts": 4}, "expert 5 of layer 1"),
        ({"family": "mixtral"}, "deepseek_v2 model, this one is mixtral"),
    ],
)
def test_a_base_that_it_does_not_fit(changes, why, folder, tmp_path, capsys):
    make_model(**changes).save_pretrained(tmp_path)
    assert why in refused(capsys, folder / "a", f"--base_model_path={tmp_path}")


def noted(folder, name):
    """An adapter of the base of the folder, with a note of its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    noisy_adapter(model, ExpertConfig({1: (5,)}), folder / name)
    return folder / name


def test_a_base_with_the_same_routers_and_other_weights(folder, tmp_path, capsys):
    adapter = noted(folder, "noted")
    assert told(capsys, adapter, f"--base_model_path={folder / 'base'}")["adapters"][0]["fits"]
    merge(add_adapter(make_model(), adapter)).save_pretrained(tmp_path / "merged")
    assert "the weights differ" in refused(capsys, adapter, f"--base_model_path={tmp_path / 'merged'}")
    noisy_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ExpertConfig({1: (0,)}), tmp_path / "next")
    (pair,) = told(capsys, adapter, tmp_path / "next")["pairs"]
    assert pair["why_not"] == "they are for different bases" and pair["jaccard"] == 0


def test_an_adapter_whose_values_are_not_finite_does_not_fit(folder, tmp_path, capsys):
    shutil.copytree(folder / "a", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter.safetensors")
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, tmp_path / "a" / "adapter.safetensors")
    assert "not finite" in refused(capsys, tmp_path / "a", f"--base_model_path={folder / 'base'}")


def copied(folder, tmp_path, change=lambda tensors: None):
    """A copy of the adapter a, in the published style, with its tensors changed."""
    tensors = load_file(folder / "a" / "adapter.safetensors")
    change(tensors)
    bf16 = {key.removeprefix("model."): tensor.bfloat16() for key, tensor in tensors.items()}
    for number, part in enumerate((sorted(bf16)[:4], sorted(bf16)[4:]), 1):
        save_file({key: bf16[key] for key in part}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    config = ExpertConfig.load(folder / "a").to_dict()
    (tmp_path / "expert_cfg.json").write_text(json.dumps(config))
    return tmp_path


def test_a_published_adapter(folder, tmp_path, capsys):
    (info,) = told(capsys, copied(folder, tmp_path), f"--base_model_path={folder / 'base'}")["adapters"]
    assert info["dtypes"] == {"BF16": 9} and len(info["files"]) == 2 and info["base"] is None and info["fits"]
    make_model(moe_intermediate_size=8).save_pretrained(tmp_path / "narrow")
    why_not = refused(capsys, tmp_path, f"--base_model_path={tmp_path / 'narrow'}")
    assert "this model's is (32, 8)" in why_not
    adapter_info.main([str(tmp_path)])
    assert "base        unknown, no fingerprint" in capsys.readouterr().out


UP = "model.layers.1.mlp.experts.5.up_proj.weight"
SPOILED = {
    "an expert too few": (
        lambda t: [t.pop(key) for key in list(t) if ".experts.5." in key],
        "hold 0 tensors of expert 5 of layer 1",
    ),
    "an expert too many": (lambda t: t.update({UP.replace("5", "6"): t[UP]}), "hold 1 tensors of expert 6 of layer 1"),
    "a projection too few": (lambda t: t.pop(UP), "hold 2 tensors of expert 5 .* needs 3"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_adapter_is_refused_by_name(how, folder, tmp_path):
    change, message = SPOILED[how]
    with pytest.raises(ValueError, match=message):
        adapter_info.describe(copied(folder, tmp_path, change))
    shapes = {key: tensor.shape for key, tensor in load_file(folder / "a/adapter.safetensors").items()}
    with pytest.raises(ValueError):  # and so it is by what loads it
        find_adapter_tensors(tmp_path, shapes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model-00002-of-00002.safetensors").write_bytes(b"x"), r"00002.safetensors.* damaged"),
        (lambda f: (f / "expert_cfg.json").unlink(), "no expert_cfg.json"),
        (lambda f: (f / "run.json").write_text("[]"), "run.json: an object is expected"),
        (lambda f: (f / "expert_cfg.json").rename(f / "adapter_config.json"), "holds a LoRA"),
        (lambda f: [path.unlink() for path in f.glob("*.safetensors")], "its files hold 0 tensors"),
    ],
)
def test_a_folder_that_is_none_is_one_sentence_and_exit_code_2(spoil, message, folder, tmp_path, capsys):
    spoil(copied(folder, tmp_path))
    with pytest.raises(SystemExit, match="2"):
        run_cli(lambda: adapter_info.main([str(tmp_path)]))
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        adapter_info.describe(tmp_path)
