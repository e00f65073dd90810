"""What a rank reads and holds falls with ep_size, as far as it should."""

import pytest

from scripts.experiments import expert_parallel


@pytest.mark.slow
def test_bytes_read_and_peak_memory_fall_with_ep_size():
    whole, half = expert_parallel.main(["--processes=2", "--rounds=1", "--steps=2"])
    assert (whole["ep_size"], whole["replicas"], half["ep_size"], half["replicas"]) == (1, 2, 2, 1)
    experts = 6 * 64 * 3 * 512 * 512 * 4  # layers, experts, matrices, fp32
    assert whole["read_bytes"] - half["read_bytes"] == experts // 2
    assert whole["peak_memory_bytes"] - half["peak_memory_bytes"] > 0.7 * experts / 2
