"""Whatever a file or a flag holds: exit code 0 or 2, one sentence, no traceback, no hang, nothing half-written."""

import random
import shutil
from pathlib import Path

import pytest

from tests.fuzz_inputs import COMMANDS, break_one, copy_world, outcome, world

SEED = 12
EACH = 60  # odd inputs of a command in the slow test
FEW = 2  # in the fast one


@pytest.fixture(scope="session")
def good(tmp_path_factory, tiny_tokenizer) -> Path:
    return world(tmp_path_factory.mktemp("fuzz") / "world", tiny_tokenizer)


def wrong_ends(name: str, numbers: range, good: Path, tmp_path: Path) -> list[str]:
    """Return how a command ended wrongly on the odd inputs of these numbers."""
    found = []
    for number in numbers:
        rng, folder = random.Random(f"{SEED} {name} {number}"), tmp_path / str(number)
        copy_world(good, folder)
        done, argv = break_one(rng, folder, name)
        if wrong := outcome(name, argv, folder):
            found.append(f"{name} {number}: {done}\n{wrong}")
        shutil.rmtree(folder)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_few_odd_inputs(name, good, tmp_path):
    assert not wrong_ends(name, range(FEW), good, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_many_odd_inputs(name, good, tmp_path):
    assert not wrong_ends(name, range(FEW, FEW + EACH), good, tmp_path)
