"""Whole runs on several ranks have the losses of one process, in every way of training and after an interruption."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import esft
import train
from deepseek.experts import moe_layers
from deepseek.files import write_json, write_jsonl
from deepseek.process_groups import Ranks, SharedError
from tests.helpers import Killed, at_step, config_of, kill, losses, run_ranks, same, tensors_of
from training import checkpoints
from training.data import load_data
from training.trainer import ESFTTrainer

pytestmark = pytest.mark.long

DENSE = {"shared_experts": True, "non_expert_modules": True}


# ---- whole runs ------------------------------------------------------------------------------------------------------

RUN = {"batch_size": 1, "max_steps": 8, "eval_steps": 5, "save_steps": 4, "save_opt_states": True, "max_grad_norm": 0.3}


@pytest.fixture(scope="module")
def files(bases, tmp_path_factory):
    """A folder as `test_train.config_of` wants it, and scores."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "m32").symlink_to(bases())
    rows = []
    for i in range(32):
        turns = ("user", f"is it {i}?"), ("assistant", " ".join([f"yes {i}"] * (1 + i % 4)))
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    write_jsonl(folder / "data.jsonl", rows)
    chosen = {"experts": {"1": [3, 5], "2": [0, 6, 2]}}
    write_json(folder / "experts.json", chosen)
    write_json(folder / "nemotron.json", {"experts": {"0": [3, 5], "2": [0]}})
    write_json(folder / "all.json", {**chosen, **DENSE})
    score_E = {expert: (1 + expert) / 36 for expert in range(8)}
    (folder / "scores").mkdir()
    esft.ExpertScores({"token": {1: score_E, 2: score_E}}).save(folder / "scores" / "summary.json")
    return folder


def train_runs(rank: int, files: Path, runs: list[tuple[Path, dict, Callable | None]]) -> list:
    """Runs one after another: output folder, keys, what disturbs it. Returns their results, or how they ended."""
    ended = []
    for out, keys, disturb in runs:
        with pytest.MonkeyPatch.context() as patch:
            if disturb:
                disturb(patch, rank)
            try:
                ended.append(train.run(config_of(files, out, **keys)))
            except (Killed, SystemExit, SharedError) as error:
                ended.append(repr(error))
    return ended


def assert_same_run(found: Path, wanted: Path, tolerance: float = 1e-6) -> None:
    """The losses of all steps and of validation, gradient norms, and the adapter, within what rounding makes of them
    (which is more for single weights: AdamW divides a gradient near 0 by its own size)."""
    left, right = losses(found), losses(wanted)
    assert left.keys() == right.keys()
    for key, value in right.items():
        allowed = tolerance * (5 if key[0] == "grad_norm" else 1)
        assert abs(left[key] - value) <= allowed * value, f"{key}: {left[key]}, not {value}"
    left, right = tensors_of(found), tensors_of(wanted)
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        error, size = (left[name] - tensor).float().norm(), tensor.float().norm()
        assert error <= 10 * tolerance * size, f"{name}: off by {error:.1e}, its norm is {size:.1e}"


@pytest.mark.parametrize(
    "world, keys",
    [
        (2, {"max_steps": 20}),
        pytest.param(2, {"max_steps": 50}, marks=pytest.mark.slow),
        pytest.param(4, {"max_steps": 50, "accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param(
            4,
            {
                "max_steps": 50,
                "learning_rate": 1e-3,
                "expert_config": "all.json",
                "load_best_model_at_end": True,
                "save_steps": 5,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_has_the_losses_of_one_process(files, tmp_path, world, keys):
    keys = {**RUN, "verify_frozen": True, **keys}
    keys["expert_config"] = files / keys.get("expert_config", "experts.json")
    accumulated = keys.get("accumulation_steps", 1)
    alone = config_of(files, tmp_path / "one", **{**keys, "accumulation_steps": accumulated * world})
    packs, eval_packs = load_data(esft.load_tokenizer(files / "m32"), alone, Ranks())
    assert len(packs) % (world * accumulated) and len(eval_packs) % world  # where data end, a rank has no batch
    one = train.run(alone)
    scores = files / "scores"
    ep_sizes = [size for size in (2, 4) if size <= world]
    runs = [
        (tmp_path / f"ep {size}", {**keys, "ep_size": size, "expert_scores_dir": scores}, None) for size in ep_sizes
    ]
    for size, *results in zip(ep_sizes, *run_ranks(world, train_runs, files, runs, timeout=500)):
        assert_same_run(tmp_path / f"ep {size}", tmp_path / "one")
        for key in (
            "steps",
            "best_step",
            "parameters",
            "trained_parameters",
            "gradient_bytes",
            "optimizer_bytes",
            "saved_bytes",
        ):
            assert results[0][key] == one[key], key
        assert results[0]["frozen_verified"] and results[0]["ep_size"] == size


WAYS = {
    "full": {"method": "full", "ep_size": "auto", "learning_rate": 1e-3},
    "lora": {"method": "lora", "ep_size": "auto", "learning_rate": 1e-3},
    "random": {"method": "random"},
    "dense weights shared out": {"shard_dense": True},
    "dense weights shared out, replicas": {"shard_dense": True, "ep_size": 1},
    "dense weights shared out, bf16": {"shard_dense": True, "dtype": "bfloat16", "expert_config": "all.json"},
    "activation checkpointing": {"activation_checkpointing": True},
    "one sample a pack": {"base_model_path": "gpt_oss", "adam_epsilon": 1e-6},  # at 1e-8 AdamW makes rounding visible
    "groups of experts": {"base_model_path": "deepseek_v3"},
    "no gate": {"base_model_path": "nemotron_h", "expert_config": "nemotron.json"},
    "routers trained, near the base": {"train_router": "full", "router_lr": 1e-2, "l2_to_base": 20},
    "frozen in fp8": {"frozen_dtype": "fp8"},
    "frozen in int8, elsewhere": {"frozen_dtype": "int8", "offload_frozen": True, "base_model_path": "gpt_oss"},
    "frozen in nf4, bf16": {"frozen_dtype": "nf4", "dtype": "bfloat16", "shard_dense": True},
}
QUICK = ("full", "dense weights shared out", "dense weights shared out, bf16", "one sample a pack", "frozen in fp8")
QUICK += ("routers trained, near the base",)


@pytest.mark.filterwarnings("ignore:in a .* the documents of a pack would see each other")
@pytest.mark.parametrize(
    "names", [QUICK, pytest.param([name for name in WAYS if name not in QUICK], marks=pytest.mark.slow)]
)
def test_every_way_of_training_has_the_losses_of_one_process(files, bases, tmp_path, names):
    pytest.importorskip("peft")
    if any("nf4" in name for name in names):
        pytest.importorskip("bitsandbytes")
    alone, runs = {}, []
    for name in names:
        keys = {**RUN, "max_steps": 4, "ep_size": 2, **WAYS[name]}
        keys["verify_frozen"] = name != "full"
        keys["expert_config"] = files / keys.get("expert_config", "experts.json")
        if "base_model_path" in keys:
            keys["base_model_path"] = bases(keys["base_model_path"])
        runs.append((tmp_path / name / "ranks", keys, None))
        alone = {**keys, "accumulation_steps": 2, "ep_size": 1, "shard_dense": False}
        train.run(config_of(files, tmp_path / name / "one", **alone))
    for ended in run_ranks(2, train_runs, files, runs):
        assert [result["steps"] for result in ended] == [4] * len(names)
    for name in names:
        assert_same_run(tmp_path / name / "ranks", tmp_path / name / "one", 5e-3 if "bf16" in name else 1e-6)


def small_buckets(patch, _rank):
    patch.setattr("deepseek.gradient_sync.BUCKET_BYTES", 1)


def test_gathers_of_dense_weights_and_sums_of_gradients_may_cross(files, bases, tmp_path):
    """Ranks whose trained experts lie in different layers do them in different orders."""
    base, config = bases(num_hidden_layers=6), files / "apart.json"
    write_json(config, {"experts": {"2": [7], "4": [0, 1]}, "shared_experts": True})
    keys = {**RUN, "base_model_path": base, "expert_config": config, "max_steps": 2, "placement": "contiguous"}
    keys |= {"validation_fraction": 0, "eval_steps": None, "ddp_timeout": 30}
    train.run(config_of(files, tmp_path / "one", **keys, accumulation_steps=4))
    runs = [(tmp_path / "ranks", {**keys, "ep_size": 2, "shard_dense": True}, small_buckets)]
    run_ranks(4, train_runs, files, runs)
    assert_same_run(tmp_path / "ranks", tmp_path / "one")


def no_room(patch, _rank):
    patch.setattr("training.plan.memory_of_a_process", lambda device: 1)


def test_auto_keeps_whole_replicas_where_they_fit(files, tmp_path):
    keys = {**RUN, "max_steps": 1, "ep_size": "auto", "verify_frozen": True}
    fits, not_fits = run_ranks(2, train_runs, files, [(tmp_path / "a", keys, None), (tmp_path / "b", keys, no_room)])[0]
    assert (fits["ep_size"], not_fits["ep_size"]) == (1, 2)


def killed(patch, _rank):
    at_step(patch, 6, kill)


LAYOUTS = {
    "as before": {"ep_size": 2},
    "replicas": {"ep_size": 1},
    "placed otherwise": {"ep_size": 2, "placement": "contiguous"},
}


@pytest.mark.parametrize("how", ["fp32", "bf16, all else trained", "8 bits"])
def test_a_run_broken_off_goes_on_in_any_layout(files, bases, tmp_path, how):
    keys, layouts = {**RUN, "ep_size": 2, "expert_scores_dir": files / "scores"}, list(LAYOUTS)
    if how == "8 bits":
        pytest.importorskip("bitsandbytes")
        keys |= {"optim": "adamw_bnb_8bit", "base_model_path": bases(moe_intermediate_size=128), "learning_rate": 1e-3}
    elif how != "fp32":
        keys |= {"dtype": "bfloat16", "expert_config": files / "all.json"}
        layouts.remove("placed otherwise")
    alone = {**keys, "ep_size": 1, "accumulation_steps": 2}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed(patch, 0)
        train.run(config_of(files, tmp_path / "from one", **alone))
    runs = [(tmp_path / "whole", keys, None)]
    runs += [(tmp_path / name, keys, killed) for name in (*layouts, "to one")]
    runs += [(tmp_path / name, {**keys, **LAYOUTS[name]}, None) for name in layouts]
    runs += [(tmp_path / "from one", keys, None)]
    for ended in run_ranks(2, train_runs, files, runs):
        for (out, _, disturbed), end in zip(runs, ended, strict=True):
            assert end == "Killed()" if disturbed else end["steps"] == 8, out
    assert not list((tmp_path / "to one").glob("*.safetensors"))
    train.run(config_of(files, tmp_path / "to one", **alone))
    assert same(tmp_path / "as before", tmp_path / "whole")
    for name in (*layouts, "from one", "to one"):
        assert_same_run(tmp_path / name, tmp_path / "whole", 1e-6 if how == "fp32" else 5e-3)


def nan_on_one_rank(patch, rank):
    original = ESFTTrainer._loss_sum

    def loss_sum(self, model, *args):
        loss = original(self, model, *args)
        return loss * (float("nan") if rank == 1 and model.training and self.state.global_step == 2 else 1)

    patch.setattr(ESFTTrainer, "_loss_sum", loss_sum)


def another_expert_moved(patch, rank):
    def move(trainer):
        if rank == 1:
            moe_layers(trainer.model)[2].module.down_proj.data[-1] += 1

    at_step(patch, 2, move)


def disk_full_on_one_rank(patch, rank):
    def full(*_):
        raise OSError("no space left")

    if rank == 1:
        patch.setattr(checkpoints, "save_states", full)


@pytest.mark.parametrize(
    "way, text",
    [
        (nan_on_one_rank, r"step 3: the loss is nan and the gradient norm nan on rows \d+(, \d+)* of"),
        (another_expert_moved, r"rank 1: cannot save the model: 1 of 41 .*layers\.2\.mlp\.experts\.7"),
        (disk_full_on_one_rank, r"rank 1: .*checkpoint-2: no space left"),
    ],
)
def test_what_goes_wrong_on_one_rank_stops_all_with_one_sentence(files, tmp_path, way, text):
    keys = {**RUN, "max_steps": 4, "ep_size": 2, "save_steps": 2, "verify_frozen": True}
    (one,), (other,) = run_ranks(2, train_runs, files, [(tmp_path / "out", keys, way)])
    assert one == other and re.search(text, one)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert (tmp_path / "out" / "checkpoint-2").is_dir() == (way is not disk_full_on_one_rank)
