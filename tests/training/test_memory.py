"""The estimate of a training run's memory: against real runs and against what is counted; it moves the right way."""

import dataclasses
import json
import sys
from datetime import timedelta

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek import expert_parallel
from deepseek.experts import moe_layers, train_experts
from deepseek.frozen import freeze_experts, quantize
from deepseek.placement import place_layers
from deepseek.process_groups import join
from esft import ExpertConfig, to_esft
from scripts import estimate_memory
from scripts.experiments import memory as experiment
from tests.helpers import FAMILIES, make_model, run_ranks
from training import memory
from training.dry_run import StorageTracker, record_step
from training.memory import FROZEN_BYTES, Estimator, MemoryEstimate, MemorySettings
from training.methods import count_trained
from training.published_models import open_model, published_models
from utils import run_cli

TRAINED = (0, 5, 3)
ON_CPU = MemorySettings(seq_length=64, batch_size=2, dtype="float32", device="cpu", accumulation=False)


def family_config(family: str, **changes):
    return AutoConfig.for_model(family, **{**FAMILIES[family], **changes})


def empty(family: str = "deepseek_v2", **changes) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(family_config(family, **changes))


def estimator(family: str = "deepseek_v2", ids=TRAINED, **changes) -> Estimator:
    model = empty(family, **changes)
    return Estimator(model, "esft", ExpertConfig(dict.fromkeys(moe_layers(model), ids)))


WIDE = {"hidden_size": 256, "moe_intermediate_size": 128, "vocab_size": 2048, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def wide():
    """A DeepSeek-V2 on which experts, activations and logits all count."""
    return estimator(**WIDE)


# against real runs


def noted(model: nn.Module, settings: MemorySettings) -> int:
    """Peak bytes of a step of a model that has weights, its storages noted in the same way."""
    if settings.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return record_step(model.train(), StorageTracker(model), settings).total()


def real_step(family: str, settings: MemorySettings, ids) -> int:
    model = make_model(family)
    if ids is None:
        model.set_experts_implementation("grouped_mm")
        model.requires_grad_(True)
    else:
        to_esft(model, {"experts": dict.fromkeys(moe_layers(model), ids)}, keep_base=False)
    return noted(model, settings)


def rank_step(rank: int, settings: MemorySettings) -> int:
    timeout = timedelta(seconds=60)
    ranks = join(timeout, "gloo").with_experts(settings.ep_size, timeout)
    model = make_model("deepseek_v2")
    experts = {layer: TRAINED for layer in moe_layers(model)}
    placements = place_layers(dict.fromkeys(experts, 8), experts, settings.ep_size)
    for layer in moe_layers(model).values():
        layer.keep_local(placements[layer.index][rank])
    to_esft(model, {"experts": experts}, keep_base=False)
    expert_parallel.connect_experts(model, placements, experts, ranks)
    return noted(model, settings)


def test_a_rank_without_storage_holds_what_a_real_one_does():
    settings = dataclasses.replace(ON_CPU, world_size=2, ep_size=2, label_share=0.1)
    found = estimator()._moving(settings).total()
    assert max(run_ranks(2, rank_step, settings)) == pytest.approx(found, rel=0.1)
    alone = estimator()._moving(dataclasses.replace(settings, world_size=1, ep_size=1)).total()
    assert found > 1.15 * alone  # what is sent and received


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_without_storage_holds_what_a_real_one_does(family, checkpointing):
    settings = dataclasses.replace(ON_CPU, activation_checkpointing=checkpointing)
    real = real_step(family, settings, TRAINED)
    assert estimator(family)._moving(settings).total() == pytest.approx(real, rel=0.05)
    more = Estimator(empty(family), "full")._moving(settings).total()
    assert more == pytest.approx(real_step(family, settings, None), rel=0.05)
    assert more > 1.2 * real  # so that the two could not be taken for each other


CASE = {"shape": "tiny", "method": "esft", "checkpointing": False, "accumulation": False, "dtype": "float32"}


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the highest resident set is read from /proc")
def test_the_estimate_agrees_with_the_memory_of_a_process():
    measured = experiment.measure(CASE, steps=2)
    assert experiment.estimate(CASE).peak == pytest.approx(measured, rel=0.1)
    for other in ({"method": "full"}, {"checkpointing": True}):
        assert experiment.estimate({**CASE, **other}).peak != pytest.approx(measured, rel=0.3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the highest resident set is read from /proc")
@pytest.mark.parametrize("method", experiment.METHODS)
@pytest.mark.parametrize("shape", ["tiny", "36m", "qwen3_moe", "gpt_oss"])
def test_the_estimate_agrees_with_every_process(shape, method):
    for checkpointing in (False, True):
        case = {**CASE, "shape": shape, "method": method, "checkpointing": checkpointing}
        assert experiment.estimate(case).peak == pytest.approx(experiment.measure(case), rel=0.1)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_frozen_experts_take_what_they_really_do(kind):
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "vocab_size": 512, "n_routed_experts": 24}
    settings = dataclasses.replace(ON_CPU, frozen_dtype=kind, label_share=0.05)
    model, ids = make_model(**sizes).requires_grad_(False), (*TRAINED, 9)
    layers = list(moe_layers(model).values())
    for layer in layers:
        freeze_experts(layer, ids, kind)
        train_experts(layer, ids)
    model.set_experts_implementation("esft")
    stored = sum(layer.frozen.nbytes() for layer in layers)
    shared = sum(param.nbytes for layer in layers for param in layer.trained.parameters())  # the masters
    found = estimator(ids=ids, **sizes).estimate(settings)
    assert found.experts + found.dense == pytest.approx(
        sum(p.nbytes for p in model.parameters()) - shared + stored, rel=0.01
    )
    moving = found.activations + found.logits + found.gradients + found.transient
    assert moving == pytest.approx(noted(model, settings) - stored, rel=0.1)  # which notes what is stored, too
    assert found.experts < 0.5 * estimator(ids=ids, **sizes).estimate(ON_CPU).experts


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("method", ["esft", "full", "lora"])
def test_an_estimate_replaces_no_function(method, device, checkpointing):
    """Training runs in the same process: what it calls must be the same before, during and after an estimate."""
    if method == "lora":
        pytest.importorskip("peft")
    seen = []

    def functions() -> dict:
        owners = (torch, nn.functional, torch._C._nn, torch.Tensor, torch.UntypedStorage, expert_parallel, nn.Module)
        return {(str(owner), name): id(value) for owner in owners for name, value in list(vars(owner).items())}

    class Watched(Estimator):
        def _prepared(self, *args):
            model = super()._prepared(*args)
            model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(functions()))
            model.get_output_embeddings().register_full_backward_hook(lambda *_: seen.append(functions()))
            return model

    experts = ExpertConfig({1: TRAINED, 2: TRAINED}) if method == "esft" else None
    before = functions()
    settings = MemorySettings(32, device=device, activation_checkpointing=checkpointing)
    Watched(empty(), method, experts).estimate(settings)
    assert len(seen) >= 2 and all(during == before for during in seen) and functions() == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", None)
        assert functions() != before


# against what is counted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_held_is_what_a_prepared_model_holds(family, dtype):
    model = make_model(family, getattr(torch, dtype))
    weights = sum(param.nbytes for param in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    to_esft(model, {"experts": dict.fromkeys(moe_layers(model), TRAINED)}, keep_base=False)
    counted = count_trained(model)
    found = estimator(family).estimate(MemorySettings(seq_length=32, dtype=dtype))
    # a router that is kept in fp32 or not, and buffers, are all that may differ
    assert found.experts + found.dense == pytest.approx(weights + buffers, rel=0.01)
    assert found.gradients == counted["gradient_bytes"]
    assert found.optimizer == counted["optimizer_bytes"]
    assert found.masters == counted["gradient_bytes"]


def test_a_small_kind_beside_a_large_one_is_not_0():
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(MemoryEstimate)), 0)
    found = MemoryEstimate(**nothing | {"experts": 3 * 2**30, "gradients": 5 * 2**20}).sizes()
    assert found == {"weights, experts": "3.00 GiB", "gradients": "5.00 MiB", "peak": "3.00 GiB"}


def test_parts_add_up_to_the_peak(wide):
    found = wide.estimate(MemorySettings(seq_length=64, offload_frozen=True))
    parts = {key: size for key, size in vars(found).items() if key != "host"}
    assert all(size >= 0 for size in parts.values()) and found.host > 0
    assert found.peak == sum(parts.values())
    assert found.overhead > memory.CONTEXT_BYTES
    assert wide.estimate(dataclasses.replace(ON_CPU, seq_length=32)).overhead == 0
    assert {"peak", "in host memory"} <= found.sizes().keys() and "logits" in found.sizes()


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_bytes_of_frozen_weights_are_those_that_are_stored(kind):
    weight = torch.randn(2, 256, 128)
    stored = sum(t.nbytes for t in quantize(weight, kind))
    assert stored == int(weight.numel() * FROZEN_BYTES[kind]) < weight.nbytes / 3


@pytest.mark.parametrize("name", list(published_models()))
def test_published_models_have_the_parameters_their_makers_give(name):
    config, billions = published_models()[name]
    with torch.device("meta"):
        count = sum(param.numel() for param in AutoModelForCausalLM.from_config(config).parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


def test_v2_lite_takes_31_gigabytes_of_weights():
    experts = ExpertConfig(dict.fromkeys(range(1, 27), tuple(range(10))))
    found = Estimator(open_model("DeepSeek-V2-Lite"), "esft", experts).estimate(MemorySettings(seq_length=128))
    assert (found.experts + found.dense) / 1e9 == pytest.approx(31.4, abs=0.05)
    assert found.masters == found.gradients == 26 * 10 * 3 * 1408 * 2048 * 4


# the right way


def peak(wide, **changes) -> memory.MemoryEstimate:
    return wide.estimate(MemorySettings(**{"seq_length": 128, "world_size": 4, **changes}))


def test_more_tokens_take_more(wide):
    sizes = [peak(wide, seq_length=length).peak for length in (64, 128, 256, 512)]
    assert sizes == sorted(set(sizes))
    assert peak(wide, batch_size=2).peak > peak(wide).peak
    assert peak(wide, seq_length=512).experts == peak(wide, seq_length=64).experts


def test_the_logits_of_a_large_vocabulary_are_never_all_there():
    rows = [dataclasses.replace(ON_CPU, seq_length=256, batch_size=size) for size in (8, 16)]
    half, whole = (estimator(vocab_size=100_000).estimate(settings).logits for settings in rows)
    assert half == pytest.approx(whole, rel=0.1)
    assert 2**27 < whole < 4 * 2**27 < 4096 * 100_000 * 4


def test_sharing_experts_takes_less_of_them_and_nothing_else(wide):
    one, two, four = (peak(wide, ep_size=size) for size in (1, 2, 4))
    assert one.peak > two.peak > four.peak
    assert (two.experts, four.experts) == (one.experts // 2, one.experts // 4)
    assert one.dense == pytest.approx(two.dense, rel=1e-3) == pytest.approx(four.dense, rel=1e-3)
    assert (one.masters, two.masters, four.masters) == tuple(one.masters * n // 9 for n in (9, 5, 3))  # 3 x 3 trained
    # rows that are sent and received are copies: activations do not fall with ep_size
    assert two.activations + two.transient >= one.activations


def test_less_is_trained_less_is_held(wide):
    whole = Estimator(empty(**WIDE), "full").estimate(MemorySettings(seq_length=128, world_size=4))
    found = peak(wide)
    assert found.peak < whole.peak and found.gradients < whole.gradients and found.optimizer < whole.optimizer


def test_checkpointing_lowers_activations_and_leaves_weights(wide):
    plain, less = peak(wide, label_share=0.1), peak(wide, label_share=0.1, activation_checkpointing=True)
    assert less.activations < 0.4 * plain.activations and less.peak < plain.peak
    assert (less.experts, less.dense) == (plain.experts, plain.dense)


def test_each_other_setting_lowers_what_it_should(wide):
    plain = peak(wide)
    assert peak(wide, label_share=0.25).logits < plain.logits
    assert peak(wide, optim="adamw_bnb_8bit").optimizer < 0.3 * plain.optimizer
    assert peak(wide, shard_dense=True).dense == plain.dense // 4
    halves = [peak(wide, frozen_dtype=kind).experts for kind in (None, "fp8", "nf4")]
    assert halves == sorted(halves, reverse=True) and len(set(halves)) == 3
    away = peak(wide, offload_frozen=True)
    assert away.experts + away.host == plain.experts and away.experts < plain.experts
    once = peak(wide, accumulation=False)
    assert once.peak <= plain.peak


def test_a_mask_between_documents_is_kept_for_the_backward(wide):
    packed, alone = (peak(wide, seq_length=512, packed=on, label_share=0.01).activations for on in (True, False))
    # of the four layers, one is dense and the next has the first trained experts: nothing up to there has a backward
    assert packed - alone == 2 * 512 * 512 * torch.bfloat16.itemsize


def test_an_optimizer_of_unknown_states_is_named(wide):
    with pytest.raises(ValueError, match="optim=adafactor: known are adamw_torch"):
        wide.estimate(MemorySettings(seq_length=64, optim="adafactor"))


# advice


def test_advice_is_what_was_asked_where_it_fits(wide):
    asked = MemorySettings(seq_length=1024)
    need = wide.estimate(asked).peak
    ((settings, found),) = wide.advise(asked, need)
    assert settings == asked and found.peak == need
    assert all(settings != asked for settings, _ in wide.advise(asked, need - 1))


def test_advice_fits_and_comes_in_order_of_cost(wide):
    asked = MemorySettings(seq_length=1024, world_size=4)
    need = wide.estimate(asked).peak
    found = wide.advise(asked, need - 2**20)
    order = [key for key, _ in wide.ladder(asked)]
    changes = [settings.changed_from(asked).split("=")[0] for settings, _ in found]
    assert len(found) > 2 and changes == sorted(changes, key=order.index)
    assert all(memory.peak <= need - 2**20 for _, memory in found)


def test_advice_takes_several_changes_where_no_single_one_does(wide):
    asked = MemorySettings(seq_length=4096, world_size=4)
    least = min(wide.estimate(dataclasses.replace(asked, **dict([step]))).peak for step in wide.ladder(asked))
    ((settings, found),) = wide.advise(asked, least - 2**20)
    assert found.peak < least and len(settings.changed_from(asked).split()) > 1
    for key in (pair.split("=")[0] for pair in settings.changed_from(asked).split()):  # each is needed
        fewer = dataclasses.replace(settings, **{key: getattr(asked, key)})
        assert wide.estimate(fewer).peak > least - 2**20
    kept = wide.advise(asked, least - 2**20, fixed=("seq_length", "activation_checkpointing"))
    assert all((s.seq_length, s.activation_checkpointing) == (4096, False) for s, _ in kept)


def test_no_advice_where_nothing_fits(wide):
    assert wide.advise(MemorySettings(), memory.CONTEXT_BYTES) == []


# the command


@pytest.fixture
def folder(tmp_path):
    family_config("deepseek_v2").save_pretrained(tmp_path)
    return tmp_path


def test_the_command_tells_in_words_and_in_json(folder, capsys):
    argv = [f"--base_model_path={folder}", "--experts_per_layer=2", "--seq_length=64"]
    estimate_memory.main(argv)
    told = capsys.readouterr().out
    assert "optimizer states" in told and "\nfits: " in told and "rule of thumb" in told
    result = estimate_memory.main([*argv, "--json"])
    assert json.loads(capsys.readouterr().out) == result and result["fits"]
    assert result["memory"]["peak"] < result["available"] == 80 * 2**30


def test_the_command_reads_an_expert_config(folder, tmp_path):
    config = tmp_path / "experts.json"
    config.write_text('{"experts": {"1": [3], "2": [0, 7]}, "shared_experts": true, "non_expert_modules": false}')
    shared = estimate_memory.main([f"--model={folder}", f"--expert_config={config}", "--seq_length=64"])
    config.write_text('{"experts": {"1": [3], "2": [0, 7]}, "shared_experts": false, "non_expert_modules": false}')
    routed = estimate_memory.main([f"--model={folder}", f"--expert_config={config}", "--seq_length=64"])
    assert routed["memory"]["gradients"] == 3 * 3 * 16 * 32 * 4
    assert shared["memory"]["gradients"] == routed["memory"]["gradients"] + 2 * 3 * 32 * 32 * 4


def test_lora_is_estimated(folder):
    pytest.importorskip("peft")
    lora = estimate_memory.main([f"--model={folder}", "--method=lora", "--seq_length=64"])
    more = estimate_memory.main([f"--model={folder}", "--method=lora", "--seq_length=64", "--lora_rank=16"])
    assert 2 * lora["memory"]["gradients"] == more["memory"]["gradients"] > 0
    assert lora["memory"]["optimizer"] == 2 * lora["memory"]["gradients"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "method esft needs --expert_config or --experts_per_layer"),
        (["--experts_per_layer=2", "--method=full"], "are for methods esft and dpo, not full"),
        (["--expert_config=a.json", "--experts_per_layer=2"], "not allowed with argument --expert_config"),
        (["--expert_config=a.json"], "cannot read a.json: no such expert config"),
        (["--experts_per_layer=9999999999999"], "is not a whole number above 0 and below 2**31"),
        (["--experts_per_layer=2", "--ep_size=3", "--gpus=4"], "--ep_size 3 does not divide --gpus 4"),
        (["--method=full", "--shard_dense"], "--offload_frozen are for methods esft and dpo"),
        (["--experts_per_layer=2", "--label_share=2"], "--label_share above 0 and at most 1"),
        (["--experts_per_layer=9"], "names expert 8 of layer 1"),
        (["--experts_per_layer=2", "--gpu_gb=0.5"], "cannot fit method esft into 1 GPU of 0.5 GiB"),
    ],
)
def test_wrong_flags_are_told(folder, capsys, flags, told):
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: estimate_memory.main([f"--base_model_path={folder}", *flags]))
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_an_unknown_model_is_told_with_the_nearest_name():
    with pytest.raises(FileNotFoundError, match="did you mean 'DeepSeek-V3'"):
        estimate_memory.main(["--base_model_path=DeepSeek-V4", "--experts_per_layer=2"])
