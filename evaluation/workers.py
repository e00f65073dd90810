"""The one runner of several processes, each with a whole model.

`work(share, devices)` is a generator. Rank r of N runs it on every N-th item and its devices, and `run_ranks` yields
the messages.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import transformers
from torch.backends.cpu import get_cpu_capability
from tqdm import tqdm

import esft
from deepseek.loading import load_config
from utils import note, one_line, sentence

TIMEOUT = 7200  # seconds
START = "spawn"  # not a fork server: it freezes the environment, and can spoil CUDA
NO_BFLOAT16 = "this CPU has no instructions for bfloat16"
_to_parent: Connection | None = None  # in a rank


def plan_devices(device: str, world_size: int, gpus_per_rank: int) -> list[list[str]]:
    """Return the devices of every rank, e.g. [["cuda:0", "cuda:1"], ["cuda:2", "cuda:3"]] or [["cpu"]].

    Args:
        device: "cpu", "cuda", or "auto" for GPUs where there are any.
        gpus_per_rank: GPUs over which a rank spreads its model. On the CPU it has no effect, and a note says so.

    Raises:
        ValueError: there are fewer than world_size x gpus_per_rank GPUs.
    """
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if not gpus and device != "cuda":
        if gpus_per_rank > 1:
            note("the model runs on the CPU, and is not spread over GPUs")
        return [["cpu"]] * world_size
    if (needed := world_size * gpus_per_rank) > gpus:
        flags = f"--device {device} --world_size {world_size} --gpus_per_rank {gpus_per_rank}"
        raise ValueError(f"cannot run with {flags}: that needs {needed} GPUs and there are {gpus}. Change one of them.")
    return [[f"cuda:{rank * gpus_per_rank + i}" for i in range(gpus_per_rank)] for rank in range(world_size)]


def dtype_on(devices: list[str], path: str | Path, dtype: str) -> str:
    """Return the dtype in which the model `path` is asked on the devices of a rank.

    "auto" is the dtype of the checkpoint, but float32 for bfloat16 on a CPU that has no instructions for it (x86
    without AVX-512), where products in bfloat16 take many times as long.
    """
    slow = devices == ["cpu"] and get_cpu_capability() in ("NO AVX", "AVX2")
    becomes = dtype == "auto" and slow and load_config(path).get_text_config().dtype == torch.bfloat16
    return "float32" if becomes else dtype


def load_on(devices: list[str], path: str | Path, dtype: str = "auto"):
    """Return (model, tokenizer) on the devices of a rank, in `dtype_on`. Raise as `load_base_model`."""
    if (taken := dtype_on(devices, path, dtype)) != dtype:
        warnings.warn(f"{NO_BFLOAT16}, so the model is asked in float32", stacklevel=2)
    return esft.load_base_model(path, dtype=taken, device=devices)


def run_ranks(
    work: Callable[[list, list[str]], Iterator],
    items: list,
    devices: list[list[str]],
    timeout: float = TIMEOUT,
    name: Callable[[object], str] = str,
) -> Iterator:
    """Yield the messages of all ranks as they arrive. One rank runs in this process, several in a process each.

    There is a rank for each entry of `devices`, but no more than items. A message that is not None stands for the next
    item of its rank. All processes end when one fails, or when this generator is closed.

    Args:
        timeout: seconds without a message after which one of several ranks counts as hung.
        name: what an item is called in the error about a rank that hangs.

    Raises:
        ValueError: an error in a rank, in one sentence that names the rank.
        ChildProcessError: a rank that died or hangs.
    """
    shares = [items[rank :: len(devices)] for rank in range(min(len(devices), len(items)))]
    if len(shares) == 1:
        with _one_thread_on_cpu(devices[0]):
            yield from work(shares[0], devices[0])
        torch.cuda.empty_cache()  # the caller may load another model next
        return
    context, processes, ranks, heard = multiprocessing.get_context(START), [], {}, {}
    left = [list(share) for share in shares]
    try:
        for rank, share in enumerate(shares):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run_rank, args=(rank, sender, work, share, devices[rank]))
            process.start()  # not a daemon: those may not have children, and some metrics start processes
            processes.append(process)
            sender.close()  # the rank has the only copy now, so the pipe ends with the rank
            ranks[receiver], heard[receiver] = rank, time.monotonic()
        while ranks:
            ready = wait(list(ranks), timeout)
            heard |= dict.fromkeys(ready, time.monotonic())
            for receiver, rank in ranks.items():
                if time.monotonic() - heard[receiver] >= timeout:
                    raise _hung(rank, timeout, *map(name, left[rank][:1]))
            for receiver in ready:
                try:
                    message, error = receiver.recv()
                except (EOFError, OSError):
                    rank = ranks.pop(receiver)
                    processes[rank].join()
                    if code := processes[rank].exitcode:
                        raise _died(rank, code) from None
                    continue
                if error:
                    raise ValueError(f"rank {ranks[receiver]}: {error}")
                del left[ranks[receiver]][: message is not None]
                yield message
    finally:
        for process in processes:
            process.kill()
            process.join()


def _hung(rank: int, timeout: float, item: str = "its end") -> ChildProcessError:
    return ChildProcessError(
        f"cannot go on: rank {rank} has not answered for {timeout} seconds, at {item}. Run the same command again: it "
        "goes on from what was kept. If it is only slow, give a larger --timeout."
    )


def _died(rank: int, code: int) -> ChildProcessError:
    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return ChildProcessError(
        f"cannot go on: rank {rank} died ({cause}), perhaps of too little memory. Run the same command again, with a "
        "lower --world_size if need be: it goes on from what was kept."
    )


def still_here() -> None:
    """Send None, the message of a rank that is at work on a long item. In a process without a rank, do nothing."""
    if _to_parent is not None:
        _to_parent.send_bytes(pickle.dumps((None, None)))


def _run_rank(rank: int, sender: Connection, work: Callable, share: list, devices: list[str]) -> None:
    """Send (message, None) for each message of `work`, or (None, sentence) for its error."""
    global _to_parent
    _to_parent = sender
    multiprocessing.set_start_method("fork", force=True)  # the system's default, for metrics that start processes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process, and the parent ends this one
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # end when the parent ends
    tqdm.set_lock(threading.RLock())  # a killed process would leak tqdm's own lock
    if rank:
        transformers.logging.disable_progress_bar()
        warnings.filterwarnings("ignore", NO_BFLOAT16)  # rank 0 has said it
    warnings.formatwarning = one_line
    try:
        with _one_thread_on_cpu(devices):
            for message in work(share, devices):
                # pickle copies tensors; `send` would pass shared memory, which is gone when this process ends
                sender.send_bytes(pickle.dumps((message, None)))
    except Exception as error:
        if os.environ.get("ESFT_DEBUG"):
            raise
        sender.send((None, sentence(error)))


@contextlib.contextmanager
def _one_thread_on_cpu(devices: list[str]) -> Iterator[None]:
    """Use one thread on the CPU, because the number of threads changes the last bits of the logits."""
    threads = torch.get_num_threads()
    if devices == ["cpu"]:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
