"""Every test here runs on the CPU among the fast tests, and with `-m gpu` on a GPU. So its body is known to run."""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device(request.param)


@pytest.fixture
def gpu() -> torch.device:
    """The GPU, for what only a GPU can show."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda")
