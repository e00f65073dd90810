"""check_families.py: fused families through the life of an adapter, and lives that are broken on purpose."""

import json

import pytest
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import esft
from deepseek.grouped_gemm import reference_experts_forward
from scripts.experiments import check_families
from scripts.experiments.check_families import BrokenLifeError, discover, life, main, make_model, run_family
from utils import ROOT

# plain, shared experts, transposed, biased, interleaved, no gate, post-norm, images and text, and layers with a state
CHOSEN = [
    "mixtral",
    "qwen2_moe",
    "aria",
    "openai_privacy_filter",
    "gpt_oss",
    "nemotron_h",
    "muse_spark",
    "qwen3_vl_moe",
    "jamba",
    "granitemoeshared",
    "deepseek_v4",
    "zaya",
]


@pytest.fixture(autouse=True)
def quiet():
    check_families.transformers.logging.disable_progress_bar()


def test_families_are_discovered():
    found = discover()
    assert len(found) >= 60
    assert found["gpt_oss"] == ["GptOssExperts"] and len(found["qwen3_omni_moe"]) == 2
    assert not {"llama", "llama4", "longcat_flash"} & found.keys()  # dense, and experts that are not fused


@pytest.mark.parametrize("family", CHOSEN)
def test_a_family_lives(family):
    assert run_family(family).result == "passes"


def test_a_layer_with_two_experts_modules_is_refused():
    result = run_family("ernie4_5_vl_moe")
    assert result.result.startswith("refused: layer 1 has two experts modules") and "vision_moe" in result.result


@pytest.mark.parametrize(
    "family, changes, flags, sentence",
    [
        ("nemotron_h", {"moe_intermediate_size": 32}, {"is_transposed": True}, "flags are false"),  # square weights
        ("qwen3_moe", {}, {"has_gate": False}, "has_gate is False"),
        ("nemotron_h", {}, {"has_gate": True}, "has_gate is True"),
        ("gpt_oss", {}, {"has_bias": False}, "flags are false"),
        ("gpt_oss", {}, {"is_concatenated": True}, "is_concatenated is True"),
        ("qwen3_moe", {}, {"is_concatenated": False}, "is_concatenated is False"),
        ("muse_spark", {}, {"has_post_expert_norm": False}, "flags are false"),
    ],
)
def test_a_family_whose_flags_lie_is_caught(family, changes, flags, sentence, tmp_path):
    auto, model = make_model(family, **changes)
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            vars(module).update(flags)
    with pytest.raises(BrokenLifeError, match=sentence):
        life(model, auto, tmp_path)


def test_square_weights_are_no_lie(tmp_path):
    auto, model = make_model("nemotron_h", moe_intermediate_size=32)
    life(model, auto, tmp_path)


def broken(name, after):
    """The step `name` of a life, and then `after`, which spoils it."""
    step = getattr(esft, name)

    def spoiled(model, *args):
        step(model, *args)
        after(model)

    return spoiled


@pytest.mark.parametrize(
    "name, after, sentence",
    [
        (
            "to_esft",
            lambda model: model.lm_head.weight.requires_grad_(),
            "training moves lm_head.weight, which is frozen",
        ),
        ("to_esft", lambda model: model.lm_head.weight.data.mul_(1.1), "to_esft changes the logits"),
        ("unload", lambda model: model.lm_head.weight.data.mul_(1.1), "unload does not give the base back"),
        ("add_adapter", lambda model: model.lm_head.weight.data.mul_(1.1), "is not the trained model"),
        ("merge", lambda model: model.model.layers[0].mlp.experts.down_proj.data.mul_(1.1), "is another tensor"),
        ("merge", lambda model: model.lm_head.weight.data.mul_(1.1), "gives other logits"),
    ],
)
def test_a_broken_step_is_caught(name, after, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(esft, name, broken(name, after))
    auto, model = make_model("qwen3_moe")
    with pytest.raises(BrokenLifeError, match=sentence):
        life(model, auto, tmp_path)


def test_a_gradient_that_is_wrong_is_caught(tmp_path, monkeypatch):
    ALL_EXPERTS_FUNCTIONS.register("esft_twice", lambda *args: 2 * reference_experts_forward(*args))
    monkeypatch.setattr(check_families, "REFERENCE", "esft_twice")
    auto, model = make_model("qwen3_moe")
    with pytest.raises(BrokenLifeError, match="not the reference loop's"):
        life(model, auto, tmp_path)


def test_one_failure_does_not_stop_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(check_families.EXCEPTIONS, "olmoe", {"num_attention_heads": 0})
    results = main(["--families=olmoe,mixtral", f"--output={tmp_path / 'families'}"])
    assert [r.result.split(":")[0] for r in results.values()] == ["fails", "passes"]
    page = (tmp_path / "families.md").read_text()
    assert page in capsys.readouterr().out
    assert "| mixtral | MixtralForCausalLM | gate | 0, 1, 2, 3 | - | passes |" in page
    assert f"2 of {len(discover())} families: 1 fail, 1 pass." in page
    saved = json.loads((tmp_path / "families.json").read_text())
    assert saved["families"]["mixtral"]["result"] == "passes" and saved["environment"]["transformers"]


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"cannot check 'mixtrl'.*mixtral"):
        main(["--families=mixtrl"])


@pytest.mark.slow
def test_the_families_of_the_table_live(tmp_path):
    table = json.loads((ROOT / "results" / "tables" / "families.json").read_text())["families"]
    passing = {family for family, row in table.items() if row["result"] == "passes"}
    found = {family: r.result for family, r in main([f"--output={tmp_path / 'families'}"]).items()}
    assert {family for family, result in found.items() if result == "passes"} == passing, found
    assert len(passing) >= 40
