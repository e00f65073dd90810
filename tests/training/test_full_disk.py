"""A run that cannot write ends in one sentence on all ranks, leaves whole checkpoints, and goes on when it can."""

import contextlib
import functools
import re
import resource
from pathlib import Path

import pytest

from deepseek.files import list_checkpoints
from tests.helpers import same
from tests.rank_helpers import befalls, copy_run, finishes, rank_arguments, steps, told, train_on
from training.checkpoints import find_damage


def cannot_write(rank: int, victim: int, place: str, **when) -> None:
    """From there on the files of this process may have 16 KiB: room for what it prints."""
    befalls(rank, victim, place, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, -1)), **when)


def disk_fills(rank: int, disk: Path, victim: int, place: str, **when) -> None:
    befalls(rank, victim, place, lambda: fill(disk), **when)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@pytest.mark.long
@pytest.mark.parametrize(
    "victim, place", [(0, "esft.save_adapter"), (1, "training.checkpoints.save_states")], ids=["adapter", "states"]
)
def test_a_file_that_cannot_be_written_ends_the_run_in_one_sentence(
    files, unbroken, broken_off, tmp_path, victim, place
):
    fault = functools.partial(cannot_write, victim=victim, place=place)
    ended = train_on(2, rank_arguments(files, broken_off), tmp_path, fault)
    assert [rank.code for rank in ended] == [2, 2]
    (line,) = told(ended)
    at = broken_off / "checkpoint-9"
    assert re.match(rf"error: rank {victim}: cannot write {at}: .*File too large.*saved before is whole", line)
    assert steps(broken_off) == [3, 6] and find_damage(broken_off / "checkpoint-6") is None
    finishes(2, rank_arguments(files, broken_off), tmp_path)
    assert same(unbroken, broken_off)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_full_disk_ends_a_run_of_another_method_in_one_sentence(files, disk, tmp_path, method):
    """Their checkpoints are transformers' own."""
    out = disk / "out"
    argv = rank_arguments(files, out, method=method, expert_config=None, ep_size=1)
    for nth, left in ((2, []), (5, [3])):  # optimizer.pt of the first checkpoint, and of the second
        fault = functools.partial(disk_fills, disk=disk, victim=0, place="torch.save", nth=nth)
        ended = train_on(2, argv, tmp_path, fault)
        assert [rank.code for rank in ended] == [2, 2], ended[0].err
        (line,) = told(ended)
        assert re.match(rf"error: rank 0: cannot write {out}/checkpoint-\d+: .*What was saved before", line), line
        assert steps(out) == left and [find_damage(path) for path in list_checkpoints(out)] == [None] * len(left)
        (disk / "filler").unlink()
    finishes(2, argv, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim, place, nth",
    [
        (0, "train.prepare_folder", 1),
        (0, "training.trainer.ESFTTrainer._save_checkpoint", 1),
        (0, "esft.save_adapter", 1),
        (1, "training.checkpoints.save_states", 1),
        (0, "training.saving.write_json", 1),  # of the scheduler
        (0, "training.checkpoints.write_manifest", 1),
        (0, "training.trainer.ESFTTrainer.save_model", 3),  # checkpoints 9 and 12 came before
        (0, "training.trainer.ESFTTrainer.save_state", 1),
        (0, "training.run_folder.peak_memory_bytes", 1),  # the results are next
    ],
)
def test_a_full_disk_ends_the_run_in_one_sentence(files, unbroken, killed, disk, tmp_path, victim, place, nth):
    out = disk / "out"
    copy_run(killed[0], out)
    fault = functools.partial(disk_fills, disk=disk, victim=victim, place=place, nth=nth)
    ended = train_on(2, rank_arguments(files, out), tmp_path, fault)
    assert (disk / "filler").exists()
    (line,) = told(ended)
    assert re.match(rf"error: rank [01]: cannot write {out}.*: .*No space left on device.* saved before is whole", line)
    assert "Traceback" not in ended[0].err + ended[1].err
    assert all(rank.code == 2 for rank in ended)
    assert [find_damage(path) for path in list_checkpoints(out)] == [None] * len(list_checkpoints(out)) and 6 in steps(
        out
    )
    (disk / "filler").unlink()
    finishes(2, rank_arguments(files, out), tmp_path)
    assert same(unbroken, out)
