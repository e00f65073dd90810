"""Measure several methods side by side: each in a process of its own, taking turns round by round.

scripts/experiments/benchmark.py measures with `measure(make, methods, args)`; this file is not a command.
`make(method, args)`, a function of a module's top level, builds in the process what is measured. It has the methods
`turn(steps)`, whose results are collected, `finish(None)` -> dict, and `profile(None)` -> str. Of `args` are read:

    threads   of torch in each process      rounds    in which each method has one turn
    warmup    steps before the first        steps     of a turn
    profile   true: print each method's `profile` in the end (but that of "capture")
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import command_parser, run_cli


def work(connection: Connection, make: Callable, method: str, args: argparse.Namespace) -> None:
    """A method's process: prepare, then answer (name of a verb, its argument) until there are no more."""
    torch.set_num_threads(args.threads)
    try:
        bench = make(method, args)
        connection.send((True, None))
        while call := connection.recv():
            connection.send((True, getattr(bench, call[0])(call[1])))
    except torch.OutOfMemoryError:
        connection.send((False, "the GPU's memory ran out: lower --batch_size or leave this method out of --methods"))
    except (ValueError, OSError) as error:
        connection.send((False, str(error)))


class Worker:
    """The parent's end of a method's process."""

    def __init__(self, make: Callable, method: str, args: argparse.Namespace):
        self.method = method
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=work, args=(theirs, make, method, args), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self):
        try:
            well, value = self.connection.recv()
        except EOFError:
            self.process.join()
            raise ValueError(
                f"the process of method {self.method} died (exit code {self.process.exitcode}); -9 is want of memory: "
                "lower --batch_size"
            ) from None
        if not well:
            raise ValueError(f"method {self.method}: {value}")
        return value

    def call(self, verb: str, argument: object = None):
        self.connection.send((verb, argument))
        return self.answer()


@contextmanager
def workers(make: Callable, methods: list[str], args: argparse.Namespace) -> Iterator[dict[str, Worker]]:
    """A prepared and warmed-up process for each method, one made after the other."""
    running: dict[str, Worker] = {}
    try:
        for method in methods:
            running[method] = Worker(make, method, args)
            running[method].answer()
            running[method].call("turn", args.warmup)
        yield running
    finally:
        for worker in running.values():
            worker.process.terminate()
            worker.process.join()


def measure(make: Callable, methods: list[str], args: argparse.Namespace) -> dict[str, dict]:
    """Rounds in which every method takes its turn; the first of a round is another one every time."""
    taken: dict[str, list] = {method: [] for method in methods}
    with workers(make, methods, args) as running:
        for number in range(args.rounds):
            first = number % len(methods)
            for method in methods[first:] + methods[:first]:
                taken[method].append(running[method].call("turn", args.steps))
            print(f"  round {number + 1} of {args.rounds} done: {', '.join(methods)}", file=sys.stderr)
        results = {method: {**running[method].call("finish"), "turns": taken[method]} for method in methods}
        for method in methods:
            if args.profile and method != "capture":
                print(f"\n{method}, one step\n{running[method].call('profile')}")
    return results


def main(argv: list[str] | None = None) -> None:
    command_parser(__doc__).parse_args(argv)
    raise ValueError("side_by_side.py measures nothing by itself: run scripts/experiments/benchmark.py")


if __name__ == "__main__":
    run_cli(main)
