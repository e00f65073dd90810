"""Fixtures of the tests of scripts."""

import pytest

from esft import ExpertConfig
from tests.helpers import SHARD, make_model, noisy_adapter


@pytest.fixture
def parts(tmp_path, tiny_tokenizer):
    """(base folder in shards, adapter folder, output folder) of a deepseek_v2."""
    model = make_model()
    model.save_pretrained(tmp_path / "base", max_shard_size=SHARD)
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    noisy_adapter(model, ExpertConfig({1: (5, 2), 2: (7,)}), tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
