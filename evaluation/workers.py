"""The one runner of several processes."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait

import torch
from tqdm import tqdm

from utils import sentence


@contextlib.contextmanager
def _one_thread(devices: list[str]) -> Iterator[None]:
    """On the CPU the number of threads changes the last bits of the logits."""
    threads = torch.get_num_threads()
    if devices == ["cpu"]:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _spawned(rank: int, sender: Connection, work: Callable, share: list, devices: list[str]) -> None:
    """A process of its own: sends what `work` yields, or a sentence that tells what is wrong."""
    multiprocessing.set_start_method("fork", force=True)  # the system's own, for a metric that starts processes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the parent ends this one
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # however the parent ends
    tqdm.set_lock(threading.RLock())  # its own, made for several processes, would outlive one that is killed
    if rank:
        logging.disable_progress_bar()
    try:
        with _one_thread(devices):
            for part in work(share, devices):
                sender.send(part)
    except Exception as error:
        if os.environ.get("ESFT_DEBUG"):
            raise
        sender.send(sentence(error))


def run_ranks(work: Callable[[list, list[str]], Iterator], shares: list[list], devices: list[list[str]]) -> Iterator:
    """What `work(share, devices)` yields for each share, as it comes: of one share here, of several each in a process
    of its own, on the CPU with one thread.

    Raises what a process raised as a ValueError, and ChildProcessError where one died; the others are ended with it,
    and when the generator is closed. They are no daemons, which may have no children: some metrics have.
    """
    if len(shares) == 1:
        with _one_thread(devices[0]):
            yield from work(shares[0], devices[0])
        torch.cuda.empty_cache()  # for a process that loads a model next; nothing without a GPU
        return
    context, processes, working = multiprocessing.get_context("spawn"), [], {}
    try:
        for rank, share in enumerate(shares):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_spawned, args=(rank, sender, work, share, devices[rank]))
            processes.append(process)
            process.start()
            sender.close()  # so that the rank's own copy is the last one, and its end the pipe's
            working[receiver] = rank
        while working:
            for receiver in wait(list(working)):
                rank = working[receiver]
                try:
                    message = receiver.recv()
                except (EOFError, OSError):
                    del working[receiver]
                    processes[rank].join()
                    if code := processes[rank].exitcode:
                        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                        raise ChildProcessError(
                            f"rank {rank} died ({cause}), perhaps of too little memory: the same command goes on from "
                            "the answers to data sets that are there, a lower --world_size takes less memory"
                        ) from None
                    continue
                if isinstance(message, str):
                    raise ValueError(f"rank {rank}: {message}")
                yield message
    finally:
        for process in processes:
            process.kill()
            process.join()
