"""Compare the speed and memory of ways to fine-tune, side by side in one run, on a random model of a named shape.

    python scripts/experiments/benchmark.py --shape 36m --device cpu --threads 2

    full      every parameter, with transformers' own grouped_mm
    experts   all routed experts and nothing else, with transformers' own grouped_mm
    lora      rank 8 on the linear layers and the fused experts, through peft (train.py's method)
    lora_selected   rank 8 on the experts that esft trains, and on nothing else
    esft      --n_trained experts per layer, drawn with --seed
    floor     nothing trained: the forward, and the backward through all activations down to the input of the first
              MoE block, on ESFT's kernels; no weight gradient, no optimizer

It also measures what RouterCapture adds to a forward without gradient and without the lm_head.

A step is forward, backward, AdamW step and zero_grad, in fp32 on a CPU (v2-lite in bf16) and in bf16 on a GPU. Its
tokens are new and random, and every token has a label. Every method has a process, and so a peak memory, of its own.
The processes take turns: in every round each does `--steps` steps while the others wait. So the noise of the machine
meets all of them, and a ratio compares turns of one round. Processes that do not fit the device together run one after
the other. The table shows medians over rounds, and the range of each ratio. Memory on a CPU is the resident set, with
Python and libraries.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, nullcontext
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.experts import IMPLEMENTATION, moe_layers
from deepseek.files import write_json
from esft import ExpertConfig, RouterCapture, to_esft
from scripts.experiments.common import PUBLISHED, SHAPES, draw_experts, shape_config
from training.flops import count_flops, peak_flops
from training.keys import LORA_SELECTED
from training.loss import TokenLosses, label_positions
from training.methods import count_trained, prepare_model
from utils import command_parser, environment, markdown_table, peak_memory_bytes, positive, run_cli

METHODS = ("full", "experts", "lora", "lora_selected", "esft", "floor")
WARMUP = 2  # steps of a method before its first turn
DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)

# --------------------------------------------------------------------------------------------------------------------
# one method


def build_model(args: argparse.Namespace, device: str) -> nn.Module:
    """Return a random model of the shape on `device`, in training mode. It is the same for every method."""
    torch.manual_seed(args.seed)
    dtype = torch.bfloat16 if args.device == "cuda" or args.shape in PUBLISHED else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape_config(args.shape), dtype=dtype, trust_remote_code=False)
    model.set_experts_implementation("grouped_mm")
    if args.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def prepare(model: nn.Module, method: str, args: argparse.Namespace) -> nn.Module:
    """Return the model with what `method` trains made trainable."""
    if method in ("full", "lora"):
        return prepare_model(model, method)
    if method == "lora_selected":
        return prepare_model(model, LORA_SELECTED, random_experts(model, args))
    if method == "experts":
        model.requires_grad_(False)
        for layer in moe_layers(model).values():
            layer.module.requires_grad_(True)
        return model
    if method == "floor":
        model.requires_grad_(False).set_experts_implementation(IMPLEMENTATION)
        first = next(iter(moe_layers(model).values())).name
        block = model.get_submodule(first.rpartition(".")[0])
        block.register_forward_pre_hook(lambda _, inputs: (inputs[0].requires_grad_(), *inputs[1:]))
        return model
    return to_esft(model, random_experts(model, args), keep_base=False)


def random_experts(model: nn.Module, args: argparse.Namespace) -> ExpertConfig:
    return ExpertConfig(draw_experts(moe_layers(model), args.n_trained, args.seed))


def batches(args: argparse.Namespace, vocab_size: int) -> Iterator[Tensor]:
    """Yield token ids (batch_size, seq_length) without end, the same for every method."""
    generator = torch.Generator().manual_seed(args.seed)
    while True:
        yield torch.randint(vocab_size, (args.batch_size, args.seq_length), generator=generator).to(args.device)


def routed_share(model: nn.Module, args: argparse.Namespace) -> float:
    """Return the share of a batch's routed rows that reach the experts which esft trains."""
    with torch.no_grad(), RouterCapture(model.base_model) as capture:
        model.base_model(next(batches(args, model.config.vocab_size)), use_cache=False)
    slots_LE = capture.counts().sums["slots"]
    ids_LS = torch.tensor(list(random_experts(model, args).experts.values()))
    return (slots_LE.gather(1, ids_LS).sum() / slots_LE.sum()).item()


def memory_bytes() -> int:
    """Return the bytes of this process now: allocated on the GPU, or resident on a CPU."""
    return torch.cuda.memory_allocated() or psutil.Process().memory_info().rss


def clock() -> float:
    """Return the time in seconds, after the GPU has done what it was asked."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Method:
    """A prepared model with its optimizer and data, as the process of a method holds them."""

    def __init__(self, method: str, args: argparse.Namespace):
        model, self.facts = build_model(args, args.device), {}
        self.batches = batches(args, model.config.vocab_size)
        if method == "esft":
            self.facts["routed_share"] = routed_share(model, args)
        self.model = prepare(model, method, args)
        self.token_losses = TokenLosses(model.get_output_embeddings())
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None
        counts = count_trained(self.model)
        counts["trained_share"] = counts["trained_parameters"] / counts["parameters"]
        B, T = args.batch_size, args.seq_length
        flops = count_flops(self.model)
        work = torch.tensor([B * T, B * (T - 1), B * T * (T + 1) / 2], dtype=torch.float64)
        self.facts |= {**counts, "memory_before_bytes": memory_bytes(), "flops_per_token": flops.of(work) / (B * T)}
        self.facts["peak_flops"] = peak_flops(torch.device(args.device), model.dtype)

    def turn(self, steps: int) -> float:
        """Return the seconds that `steps` steps took."""
        data, start = list(itertools.islice(self.batches, steps)), clock()
        for ids_BT in data:
            kept = torch.arange(ids_BT.shape[1] - 1, device=ids_BT.device)
            labels_BM, _ = label_positions(ids_BT, kept)
            inputs = {"input_ids": ids_BT, "logits_to_keep": kept, "use_cache": False}
            self.token_losses(self.model, inputs, labels_BM).mean().backward()
            if self.optimizer:
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        return clock() - start


@torch.no_grad()
def capture_ratios(args: argparse.Namespace) -> list[float]:
    """Return the seconds of a forward with RouterCapture / without, for pairs in alternating order."""
    torch.set_num_threads(args.threads)
    decoder = build_model(args, args.device).base_model.eval()
    ratios, pairs = [], WARMUP + args.rounds * args.steps
    for number, ids_BT in enumerate(itertools.islice(batches(args, decoder.config.vocab_size), pairs)):
        taken = {}
        for counted in (False, True) if number % 2 else (True, False):
            with RouterCapture(decoder) if counted else nullcontext():
                start = clock()
                decoder(ids_BT, use_cache=False)
                taken[counted] = clock() - start
        ratios.append(taken[True] / taken[False])
    return ratios[WARMUP:]


# --------------------------------------------------------------------------------------------------------------------
# processes that take turns


def hold(method: str, args: argparse.Namespace) -> None:
    """Prepare a method in its process, for the two functions below."""
    global held
    torch.set_num_threads(args.threads)
    held = Method(method, args)
    held.turn(WARMUP)


def turn(steps: int) -> float:
    return held.turn(steps)


def finish() -> dict:
    return {**held.facts, "peak_memory_bytes": peak_memory_bytes()}


def new_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def measure(methods: list[str], args: argparse.Namespace) -> dict[str, dict]:
    """Return each method's facts and the seconds of its "turns", one per round. The first method changes by round.

    Raises:
        ValueError: a process died. Errors of a method are raised as they are.
    """
    with ExitStack() as stack:
        pool = {}

        def call(method: str, function: Callable, *arguments: object):
            try:
                return pool[method].submit(function, *arguments).result()
            except BrokenProcessPool as error:
                raise ValueError(
                    f"cannot measure {method}: its process died, as it does without memory. Lower --batch_size."
                ) from error

        for method in methods:
            pool[method] = stack.enter_context(new_process())
            call(method, hold, method, args)
        turns: dict[str, list] = {method: [] for method in methods}
        for number in range(args.rounds):
            first = number % len(methods)
            for method in methods[first:] + methods[:first]:
                turns[method].append(call(method, turn, args.steps))
            print(f"  round {number + 1} of {args.rounds} done: {', '.join(methods)}", file=sys.stderr)
        return {method: {**call(method, finish), "turns": turns[method]} for method in methods}


# --------------------------------------------------------------------------------------------------------------------
# comparison


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarize(results: dict[str, dict], args: argparse.Namespace) -> dict[str, dict]:
    """Turn the seconds of each round into tokens per second, and ratios to full and floor within a round."""
    tokens = args.batch_size * args.seq_length * args.steps
    rates = {method: [tokens / taken for taken in result.pop("turns")] for method, result in results.items()}
    for method, result in results.items():
        result["tokens_per_second"] = spread(rates[method])
        result["rounds"] = rates[method]
        if result["peak_flops"] and method != "floor":  # the floor's backward is for no parameter
            result["mfu"] = result["tokens_per_second"]["median"] * result["flops_per_token"] / result["peak_flops"]
        for other in ("full", "floor"):
            if other in rates:
                result[f"ratio_to_{other}"] = spread([a / b for a, b in zip(rates[method], rates[other])])
    return results


def format_results(results: dict[str, dict]) -> str:
    """Return the comparison as Markdown, one method per line."""
    head = [
        "method",
        "tokens/s",
        "MFU",
        "of full",
        "of floor",
        "peak MiB",
        "before",
        "gradients",
        "optimizer",
        "trained",
    ]
    rows = []
    for method, r in results.items():
        ratios = [r.get(f"ratio_to_{other}") for other in ("full", "floor")]
        shown = [f"{x['median']:.2f} [{x['min']:.2f}, {x['max']:.2f}]" if x else "-" for x in ratios]
        sizes = [r[f"{key}_bytes"] / 2**20 for key in ("peak_memory", "memory_before", "gradient", "optimizer")]
        rate, share = f"{r['tokens_per_second']['median']:,.0f}", f"{r['trained_share']:.2%}"
        mfu = f"{r['mfu']:.1%}" if "mfu" in r else "-"
        rows.append([method, rate, mfu, *shown, *(f"{size:,.0f}" for size in sizes), share])
    return markdown_table(head, rows)


def memory_needed(method: str, args: argparse.Namespace) -> int:
    """Return the bytes that a method holds besides activations, counted on a model without storage."""
    model = prepare(build_model(args, "meta"), method, args)
    counts = count_trained(model)
    return sum(p.nbytes for p in model.parameters()) + counts["gradient_bytes"] + counts["optimizer_bytes"]


def plan(args: argparse.Namespace) -> list[list[str]]:
    """Print the memory that each method needs. Return the groups of methods that run side by side: all, or one each.

    Raises:
        ValueError: a method does not fit the device even without activations.
    """
    cuda = args.device == "cuda"
    have = torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().total
    needed = {method: memory_needed(method, args) for method in args.methods}
    told = ", ".join(f"{method} {size / 2**30:.2f}" for method, size in needed.items())
    print(f"GiB needed without activations: {told}; the device has {have / 2**30:,.1f}")
    worst = max(needed, key=needed.get)
    if needed[worst] > have:
        raise ValueError(
            f"cannot run method {worst} of --shape {args.shape}: it needs {needed[worst] / 2**30:,.1f} GiB without "
            f"activations, {args.device} has {have / 2**30:,.1f}. Leave it out of --methods, or take a smaller shape."
        )
    return [args.methods] if sum(needed.values()) < 0.5 * have else [[method] for method in args.methods]


# --------------------------------------------------------------------------------------------------------------------
# command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="36m", help="default: %(default)s; v2-lite is DeepSeek-V2-Lite's, 15.7B")
    add("--device", choices=DEVICES, default=DEVICES[0], help="default: the GPU, if there is one")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="default: all")
    add("--n_trained", type=positive, default=10, help="experts of 64 per layer that esft trains (default: 10)")
    add("--batch_size", type=positive, default=8, help="rows per step (default: %(default)s)")
    add("--seq_length", type=positive, default=256, help="tokens per row (default: %(default)s)")
    add("--steps", type=positive, default=3, help="steps per turn (default: %(default)s)")
    add("--rounds", type=positive, default=7, help="turns of every method (default: %(default)s)")
    add("--activation_checkpointing", action="store_true", help="recompute activations in the backward")
    add("--seed", type=int, default=0, help="seed of weights, tokens and trained experts (default: %(default)s)")
    add("--threads", type=positive, default=os.cpu_count(), help="CPU threads of each process (default: all cores)")
    add("--output_path", help="the JSON (default: results/benchmarks/<shape>_<device>.json)")
    args = parser.parse_args(argv)
    args.methods = list(args.methods)
    args.output_path = args.output_path or f"results/benchmarks/{args.shape}_{args.device}.json"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    groups = plan(args)
    results: dict[str, dict] = {}
    for group in groups:
        results |= measure(group, args)
    results = summarize(results, args)
    with new_process() as process:
        capture = spread(process.submit(capture_ratios, args).result())

    size = f"{args.batch_size} x {args.seq_length} tokens a step"
    print(f"\n{args.shape} on {args.device}, {size}, {args.threads} threads\n\n{format_results(results)}\n")
    if "esft" in results:
        share = results["esft"]["routed_share"]
        print(f"esft trains {args.n_trained} experts of each layer, which get {share:.1%} of the routed rows")
    low, middle, high = (f"{capture[key] - 1:+.1%}" for key in ("min", "median", "max"))
    print(f"RouterCapture adds {middle} [{low}, {high}] to a forward")
    facts = {"environment": environment(), "seed": args.seed, "arguments": vars(args)}
    facts |= {"model": shape_config(args.shape).to_dict(), "side_by_side": len(groups) == 1}
    write_json(args.output_path, {**facts, "methods": results, "capture_ratio": capture})
    print(f"wrote {args.output_path}")


if __name__ == "__main__":
    run_cli(main)
