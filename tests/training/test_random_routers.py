"""A run of a model that draws random numbers in training says so, and repeats on the same layout only."""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import SMALL, losses, same

DRAWS = "phimoe draws random numbers in training"
ONE_BY_ONE = {"batch_size": 1, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def phimoe(tmp_path_factory, tiny_tokenizer):
    torch.manual_seed(0)
    sizes = {"intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "router_jitter_noise": 0.2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phimoe", **SMALL, **sizes))
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(std=0.5 if "experts" in name else 0.15)
    folder = tmp_path_factory.mktemp("phimoe")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.long
def test_a_run_with_random_routers_repeats_on_the_same_layout_only(start, phimoe):
    for name, changes in {"one": {}, "two": {}, "other": ONE_BY_ONE}.items():
        with pytest.warns(UserWarning, match=DRAWS):
            start(name, base_model_path=phimoe, **changes)
    assert same(start.folder / "one", start.folder / "two")
    one, other = losses(start.folder / "one"), losses(start.folder / "other")
    assert abs(one["loss", 1] - other["loss", 1]) > 1e-4 * one["loss", 1]


def test_a_run_without_is_the_same_on_another_layout(start, whole):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(**ONE_BY_ONE)
    assert losses(start.folder / "out")["loss", 1] == pytest.approx(losses(whole)["loss", 1], rel=1e-6)
