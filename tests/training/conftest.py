"""Runs of train.py on a tiny model: unbroken ones, one that was killed, and those that a test starts itself."""

import functools
import shutil
import signal
import subprocess

import pytest

import train
from deepseek.files import write_json
from tests.helpers import Killed, arguments, at_step, kill, same
from tests.rank_helpers import STEP, copy_run, finishes, gets, rank_arguments, train_on


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The folder of an unbroken run with KEYS."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    train.main(arguments(files, folder))
    return folder


@pytest.fixture
def start(files, tmp_path):
    """Run the command in this process with KEYS, changed by keywords; `out` is relative to the test's folder."""

    def start(out: str = "out", **changes) -> dict:
        return train.main(arguments(files, tmp_path / out, **changes))

    start.folder = tmp_path
    return start


@pytest.fixture
def killed_and_repeated(start, monkeypatch):
    """Run a command whole, and once more with a kill in step `at` and a second start, which end alike to the bit.

    The results of both are returned.
    """

    def run(at: int = 5, **keys) -> tuple[dict, dict]:
        keys = {"save_opt_states": True, **keys}
        whole = start("whole", **keys)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            at_step(patch, at, kill)
            start(**keys)
        again = start(**keys)
        assert same(start.folder / "whole", start.folder / "out")
        return whole, again

    return run


@pytest.fixture(scope="module")
def unbroken(files, tmp_path_factory):
    """The folder of an unbroken run on two processes."""
    folder = tmp_path_factory.mktemp("unbroken")
    finishes(2, rank_arguments(files, folder / "out"), folder)
    return folder / "out"


@pytest.fixture(scope="module")
def killed(files, tmp_path_factory):
    """(folder of a run on two processes, rank 1 of which was killed in step 8; how its ranks ended)."""
    folder = tmp_path_factory.mktemp("killed")
    fault = functools.partial(gets, sent=signal.SIGKILL, victim=1, place=STEP, nth=8)
    return folder / "out", train_on(2, rank_arguments(files, folder / "out"), folder, fault)


@pytest.fixture
def broken_off(killed, tmp_path):
    """A run that was killed after checkpoint-6, for one test alone."""
    return copy_run(killed[0], tmp_path / "out")


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MiB, as a folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be made here ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def broken(files, tmp_path_factory):
    """{name: changes of a command that cannot be run}."""
    folder = tmp_path_factory.mktemp("broken")
    folder.joinpath("data.jsonl").write_bytes((files / "data.jsonl").read_bytes() + b"{oops\n")
    write_json(folder / "experts.json", {"experts": {"1": [8]}})
    for name, file in (("weights", "model.safetensors"), ("config", "config.json"), ("tokenizer", "tokenizer.json")):
        path = shutil.copytree(files / "m32", folder / name) / file
        path.write_bytes(path.read_bytes()[:-20])
    return {
        "data": {"train_dataset": folder / "data.jsonl"},
        "experts": {"expert_config": folder / "experts.json"},
        "no experts": {"expert_config": folder / "none.json"},
        "weights": {"base_model_path": folder / "weights"},
        "config": {"base_model_path": folder / "config"},
        "tokenizer": {"base_model_path": folder / "tokenizer"},
        "argument": {"warmup_steps": -1},
        "batch": {"global_batch_size": 3},
        "optimizer": {"optim": "lomo"},
    }
