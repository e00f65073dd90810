"""The runner of several processes: its devices; what a rank sends arrives whole, whenever it is read."""

import multiprocessing
import pickle
import re
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from evaluation import workers
from evaluation.workers import load_on, plan_devices, run_ranks, still_here
from tests.helpers import make_model


def send_tensors(share, _devices):
    yield from (torch.full((1000,), number) for number in share)


@pytest.mark.parametrize("start", [pytest.param("spawn", marks=pytest.mark.long), "forkserver"])
def test_tensors_of_a_rank_that_has_ended_arrive(start, monkeypatch):
    """torch would send handles of shared memory, which end with the rank; their reader then takes them for its end."""
    monkeypatch.setattr(workers, "START", start)
    messages = run_ranks(send_tensors, [1, 2, 3, 4], [["cpu"], ["cpu"]])
    found = [int(next(messages)[0])]
    time.sleep(2)  # by now both ranks have sent everything and ended
    found += [int(tensor[0]) for tensor in messages]
    assert sorted(found) == [1, 2, 3, 4]


def test_a_rank_that_cannot_start_is_told():
    with pytest.raises((pickle.PicklingError, AttributeError), match="pickle"):
        list(run_ranks(lambda *_: iter(()), [1, 2], [["cpu"], ["cpu"]]))


def test_ranks_own_their_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert plan_devices("auto", 2, 2) == [["cuda:0", "cuda:1"], ["cuda:2", "cuda:3"]]
    assert plan_devices("cuda", 3, 1) == [["cuda:0"], ["cuda:1"], ["cuda:2"]]
    assert plan_devices("cpu", 2, 1) == [["cpu"], ["cpu"]]
    with pytest.raises(ValueError, match="needs 6 GPUs and there are 4"):
        plan_devices("auto", 3, 2)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512", "DEFAULT"])
def test_bfloat16_becomes_float32_where_it_is_slow(tmp_path, tiny_tokenizer, monkeypatch, stored, capability):
    make_model("olmoe", dtype=stored).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(workers, "get_cpu_capability", lambda: capability)
    slow = stored == torch.bfloat16 and capability == "AVX2"
    with pytest.warns(UserWarning, match="is asked in float32") if slow else nullcontext():
        model, _ = load_on(["cpu"], tmp_path)
    assert model.dtype == (torch.float32 if slow else stored)
    assert load_on(["cpu"], tmp_path, "bfloat16")[0].dtype == torch.bfloat16


def test_no_gpu_where_one_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert plan_devices("auto", 1, 1) == [["cpu"]]
    with pytest.raises(ValueError, match="needs 1 GPUs and there are 0"):
        plan_devices("cuda", 1, 1)
    with pytest.raises(ValueError, match="gpus_per_rank 2: that needs 2 GPUs and there are 0"):
        plan_devices("cuda", 1, 2)
    assert not capsys.readouterr().err
    assert plan_devices("auto", 4, 2) == plan_devices("cpu", 4, 2) == [["cpu"]] * 4
    assert capsys.readouterr().err == "note: the model runs on the CPU, and is not spread over GPUs\n" * 2


def hang_at_three(share, _devices):
    yield None  # as when the model is loaded
    for number in share:
        if number == 3:
            time.sleep(600)
        yield number


def work_long(share, _devices):
    for number in share:
        for _ in range(3):
            still_here()
        yield number


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by a wait in vain: for the last rank, once `over` is set."""

    class Clock:
        now, over = 0.0, False

        def wait(self, receivers: list, timeout: float) -> list:
            if not (self.over and len(receivers) == 1):
                return wait(receivers)
            self.now += timeout
            return []

    clock, wait = Clock(), workers.wait
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(workers, "wait", clock.wait)
    return clock


@pytest.mark.long
def test_a_rank_that_hangs_ends_all_and_is_named_with_its_item(clock):
    found = []
    sentence = "rank 0 has not answered for 5 seconds, at item 3. Run the same command"
    with pytest.raises(ChildProcessError, match=re.escape(sentence)):
        for message in run_ranks(hang_at_three, [1, 2, 3, 4], [["cpu"], ["cpu"]], 5, "item {}".format):
            found.append(message)
            clock.over |= message == 1
    assert sorted(filter(None, found)) == [1, 2, 4] and not multiprocessing.active_children()


@pytest.mark.long
def test_a_rank_that_works_long_says_so():
    messages = list(run_ranks(work_long, [1, 2, 3], [["cpu"], ["cpu"]]))
    assert sorted(filter(None, messages)) == [1, 2, 3] and messages.count(None) == 9
    assert list(run_ranks(work_long, [1], [["cpu"]])) == [1]  # in this process there is nobody to tell
