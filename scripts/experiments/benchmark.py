"""Compare the speed and memory of ways to fine-tune, side by side in one run, on a random DeepSeek-V2 of a named shape.

    python scripts/experiments/benchmark.py --shape 36m --device cpu --threads 2

    full      every parameter, with transformers' own grouped_mm
    experts   all routed experts and nothing else, with transformers' own grouped_mm
    lora      rank 8 on the linear layers and the fused experts, through peft (train.py's method)
    esft      --n_trained experts per layer, drawn with --seed
    floor     no training: the forward, and the backward through all activations down to the input of the first MoE
              block, on ESFT's kernels; no weight gradient, no optimizer
    capture   what RouterCapture adds to a forward without gradient and without the lm_head

A step is forward, backward, optimizer step and zero_grad. Its tokens are new and random, and every token has a label,
so nothing is spent on padding. Every method runs in a process of its own, which gives it a peak memory of its own. The
processes take turns: in every round each does `--steps` steps while the others wait. Noise of the machine then meets
all of them, and a ratio compares turns of one round. Processes that do not fit the device together run one after the
other. The table shows medians over rounds, and the range of each ratio. Memory on a CPU is the resident set, with
Python and libraries.
"""

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoConfig, DeepseekV2Config, DeepseekV2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.experts import moe_layers
from deepseek.files import suggest, write_json
from esft import ExpertConfig, RouterCapture, to_esft
from scripts.experiments.common import LIKE_V2_LITE, TINY
from scripts.experiments.side_by_side import measure
from training.methods import count_trained, prepare_model
from utils import command_parser, environment, positive, run_cli

METHODS = ("full", "experts", "lora", "esft", "floor")
# The heads of 36m have queries and values of one width, which torch's fused attention needs on a CPU.
DIMENSIONS = {
    "vocab_size": {"tiny": 1536, "36m": 2048, "v2-lite": 102400},
    "hidden_size": {"tiny": 128, "36m": 256, "v2-lite": 2048},
    "intermediate_size": {"tiny": 512, "36m": 1024, "v2-lite": 10944},
    "moe_intermediate_size": {"tiny": 48, "36m": 128, "v2-lite": 1408},
    "num_hidden_layers": {"tiny": 5, "36m": 6, "v2-lite": 27},
    "num_attention_heads": {"tiny": 4, "36m": 4, "v2-lite": 16},
    "num_key_value_heads": {"tiny": 4, "36m": 4, "v2-lite": 16},
    "kv_lora_rank": {"tiny": 64, "36m": 64, "v2-lite": 512},
    "qk_nope_head_dim": {"tiny": 32, "36m": 32, "v2-lite": 128},
    "qk_rope_head_dim": {"tiny": 16, "36m": 16, "v2-lite": 64},
    "v_head_dim": {"tiny": 32, "36m": 48, "v2-lite": 128},
}
SHAPES = tuple(DIMENSIONS["vocab_size"])

# --------------------------------------------------------------------------------------------------------------------
# one method


def shape_config(shape: str) -> DeepseekV2Config:
    """Return the configuration of a named shape; for "tiny", that of results/models/tiny."""
    if shape == "tiny":
        return AutoConfig.from_pretrained(TINY)
    return DeepseekV2Config(**LIKE_V2_LITE, **{key: sizes[shape] for key, sizes in DIMENSIONS.items()})


def build_model(args: argparse.Namespace, device: str) -> nn.Module:
    """Return a random model of the shape on `device`, in training mode. It is the same for every method."""
    torch.manual_seed(args.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))  # v2-lite must not pass through fp32
    try:
        with torch.device(device):
            model = DeepseekV2ForCausalLM(shape_config(args.shape))
    finally:
        torch.set_default_dtype(before)
    model.set_experts_implementation("grouped_mm")
    return model.train()


def random_experts(model: nn.Module, args: argparse.Namespace) -> ExpertConfig:
    """Draw `n_trained` experts of every MoE layer."""
    generator = random.Random(args.seed)
    layers = moe_layers(model).items()
    return ExpertConfig({i: tuple(generator.sample(range(layer.num_experts), args.n_trained)) for i, layer in layers})


def prepare(model: nn.Module, method: str, args: argparse.Namespace) -> nn.Module:
    """Return the model with what `method` trains made trainable."""
    if method in ("full", "lora"):
        return prepare_model(model, method)
    if method == "experts":
        model.requires_grad_(False)
        for layer in moe_layers(model).values():
            layer.module.requires_grad_(True)
        return model
    model = to_esft(model, random_experts(model, args), keep_base=False)
    if method == "floor":
        model.requires_grad_(False)
        first = next(iter(moe_layers(model).values())).name
        block = model.get_submodule(first.rpartition(".")[0])
        block.register_forward_pre_hook(lambda _, inputs: (inputs[0].requires_grad_(), *inputs[1:]))
    return model


def batches(args: argparse.Namespace, vocab_size: int) -> Iterator[Tensor]:
    """Yield token ids (batch_size, seq_length) without end, the same for every method."""
    generator = torch.Generator().manual_seed(args.seed)
    while True:
        yield torch.randint(vocab_size, (args.batch_size, args.seq_length), generator=generator).to(args.device)


def routed_share(model: nn.Module, config: ExpertConfig, ids_BT: Tensor) -> float:
    """Return the share of a batch's routed rows that reach the experts of `config`."""
    with torch.no_grad(), RouterCapture(model.base_model) as capture:
        model.base_model(ids_BT, use_cache=False)
    counts = capture.counts()
    slots_LE = dict(zip(counts.layers, counts.sums["slots"].tolist()))
    return sum(slots_LE[i][e] for i, ids in config.experts.items() for e in ids) / sum(map(sum, slots_LE.values()))


def memory_bytes(device: str) -> tuple[int, int]:
    """Return the bytes of this process now and at its peak: allocated on the GPU, or resident on a CPU."""
    if device == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def seconds(fn: Callable[[], object], device: str) -> float:
    """Return the wall time of `fn`, with the GPU's queue empty before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Method:
    """A prepared model with its optimizer and data, as the process of a method holds them."""

    def __init__(self, method: str, args: argparse.Namespace):
        self.args, self.model = args, build_model(args, args.device)
        self.batches = batches(args, self.model.config.vocab_size)
        self.facts: dict = {}
        if method == "esft":
            share = routed_share(self.model, random_experts(self.model, args), next(batches(args, 1 << 10)))
            self.facts["routed_share"] = share
        self.model = prepare(self.model, method, args)
        self.optimizer = None
        if trained := [p for p in self.model.parameters() if p.requires_grad]:
            optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[args.optimizer]
            self.optimizer = optimizer(trained, lr=1e-5, fused=True)
        counts = count_trained(self.model)
        counts["optimizer_bytes"] *= args.optimizer == "adamw"
        counts["trained_share"] = counts["trained_parameters"] / counts["parameters"]
        self.facts |= {**counts, "memory_before_bytes": memory_bytes(args.device)[0]}

    def step(self, ids_BT: Tensor) -> None:
        self.model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def turn(self, steps: int) -> float:
        """Return the seconds that `steps` steps took."""
        data = list(itertools.islice(self.batches, steps))
        return seconds(lambda: [self.step(ids_BT) for ids_BT in data], self.args.device)

    def finish(self, _) -> dict:
        return {**self.facts, "peak_memory_bytes": memory_bytes(self.args.device)[1]}

    def profile(self, _) -> str:
        """Return torch.profiler's table of one step."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if self.args.device == "cuda" else []
        with torch.profiler.profile(activities=kinds) as profiler:
            self.turn(1)
        key = f"self_{self.args.device}_time_total"
        return profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=40)


class Capture:
    """The same forward with and without RouterCapture, in pairs of alternating order."""

    def __init__(self, _method: str, args: argparse.Namespace):
        self.args, self.decoder = args, build_model(args, args.device).base_model.eval()
        self.batches, self.number = batches(args, self.decoder.config.vocab_size), 0

    def turn(self, steps: int) -> list[float]:
        """Return seconds with / seconds without, for each pair."""
        return [self._pair(ids_BT) for ids_BT in itertools.islice(self.batches, steps)]

    @torch.no_grad()
    def _pair(self, ids_BT: Tensor) -> float:
        self.number += 1
        taken = {}
        for counted in (True, False) if self.number % 2 else (False, True):
            with RouterCapture(self.decoder) if counted else nullcontext():
                taken[counted] = seconds(lambda: self.decoder(ids_BT, use_cache=False), self.args.device)
        return taken[True] / taken[False]

    def finish(self, _) -> dict:
        return {}


def make(method: str, args: argparse.Namespace) -> Method | Capture:
    """Return what the process of a method holds."""
    return (Capture if method == "capture" else Method)(method, args)


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
        for other in ("full", "floor"):
            if other in rates:
                result[f"ratio_to_{other}"] = spread([a / b for a, b in zip(rates[method], rates[other])])
    return results


def format_results(results: dict[str, dict]) -> str:
    """Return the comparison as text, one method per line."""
    lines = [
        "method    tokens/s  of full                of floor               "
        " peak MiB  before  gradients  optimizer  trained"
    ]
    for method, r in results.items():
        cells = [f"{method:8}", f"{r['tokens_per_second']['median']:>9,.0f}"]
        for other in ("full", "floor"):
            ratio = r.get(f"ratio_to_{other}")
            cells.append(f" {ratio['median']:5.2f} [{ratio['min']:5.2f}, {ratio['max']:5.2f}] " if ratio else " " * 22)
        for key, width in (("peak_memory", 9), ("memory_before", 7), ("gradient", 10), ("optimizer", 10)):
            cells.append(f"{r[f'{key}_bytes'] / 2**20:>{width},.0f}")
        lines.append(" ".join(cells) + f" {r['trained_share']:8.2%}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# whether it fits


def memory_needed(method: str, args: argparse.Namespace) -> dict[str, int]:
    """Return the bytes that a method holds besides activations, counted on a model without storage."""
    model = build_model(args, "meta")
    parts = {"weights": sum(p.numel() * p.element_size() for p in model.parameters())}
    trained = 0
    if method == "esft":  # the trained rows are fp32
        for layer in moe_layers(model).values():
            trained += sum(4 * p.numel() // layer.num_experts * args.n_trained for p in layer.module.parameters())
        parts["masters"] = 0 if args.dtype == "float32" else trained
    elif method not in ("floor", "capture"):
        trained = count_trained(prepare(model, method, args))["gradient_bytes"]
    return parts | {"gradients": trained, "optimizer": 2 * trained if args.optimizer == "adamw" else 0}


def plan(methods: list[str], args: argparse.Namespace) -> list[list[str]]:
    """Print the memory that each method needs. Return the groups of methods that run side by side: all, or one each.

    Raises:
        ValueError: a method does not fit the device even without activations.
    """
    cuda = args.device == "cuda"
    have = torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().total
    print(f"memory by method in GiB, without activations; the device has {have / 2**30:,.1f}")
    needed: dict[str, int] = {}
    for method in (*methods, "capture"):
        parts = memory_needed(method, args)
        needed[method] = sum(parts.values())
        print(f"  {method:8}", " + ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items()))
    worst = max(needed, key=needed.get)
    if needed[worst] > have:
        raise ValueError(
            f"cannot run method {worst} of --shape {args.shape}: it needs {needed[worst] / 2**30:,.1f} GiB without "
            f"activations, {args.device} has {have / 2**30:,.1f}. Leave it out of --methods, or take a smaller shape."
        )
    return [methods] if sum(needed.values()) < 0.5 * have else [[method] for method in methods]


# --------------------------------------------------------------------------------------------------------------------
# command


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="36m", help="default: %(default)s; v2-lite is DeepSeek-V2-Lite's, 15.7B")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU, if there is one")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: float32 on a CPU, else "
        "bfloat16")  # fmt: skip
    add("--methods", default=",".join(METHODS), help="comma-separated (default: %(default)s)")
    add("--n_trained", type=positive, help="experts per layer that esft trains (default: 10 of 64, as a share)")
    add("--batch_size", type=positive, default=8, help="rows per step (default: %(default)s)")
    add("--seq_length", type=positive, default=256, help="tokens per row (default: %(default)s)")
    add("--steps", type=positive, default=3, help="steps per turn (default: %(default)s)")
    add("--rounds", type=positive, default=7, help="turns of every method (default: %(default)s)")
    add("--warmup", type=int, default=2, help="steps of every method before the first round (default: %(default)s)")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw", help="fused, as in train.py (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of weights, tokens and trained experts (default: %(default)s)")
    add("--threads", type=positive, default=os.cpu_count(), help="CPU threads of each process (default: all cores)")
    add("--output_path", help="the JSON (default: results/benchmarks/<shape>_<device>.json)")
    add("--profile", action="store_true", help="also print torch.profiler's table of a step of each method")
    return parser.parse_args(argv)


def resolve(args: argparse.Namespace) -> list[str]:
    """Fill in the defaults that depend on other flags, and return the methods.

    Raises:
        ValueError: an unknown method, a number out of range, or no GPU.
    """
    methods = args.methods.split(",")
    for method in methods:
        if method not in METHODS:
            known = ", ".join(METHODS)
            raise ValueError(f"cannot run method {method!r}{suggest(method, METHODS)}. Give some of {known}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("cannot use --device cuda: torch finds no GPU. Give --device cpu.")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" or args.shape == "v2-lite" else "float32"
    num_experts = shape_config(args.shape).n_routed_experts
    args.n_trained = max(1, round(num_experts * 10 / 64)) if args.n_trained is None else args.n_trained
    if not 1 <= args.n_trained <= num_experts:
        raise ValueError(f"cannot train {args.n_trained} experts of a layer: it has {num_experts}. Change --n_trained.")
    args.output_path = args.output_path or f"results/benchmarks/{args.shape}_{args.device}.json"
    return methods


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    methods = resolve(args)
    groups = plan(methods, args)
    results: dict[str, dict] = {}
    for group in groups:
        results |= measure(make, group, args)
    results = summarize(results, args)
    capture = spread(list(itertools.chain(*measure(make, ["capture"], args)["capture"]["turns"])))

    tokens = f"{args.batch_size} x {args.seq_length} tokens a step"
    print(f"\n{args.shape} on {args.device}, {args.dtype}, {tokens}, {args.threads} threads, {args.optimizer}")
    print(format_results(results))
    if "esft" in results:
        share = results["esft"]["routed_share"]
        print(f"esft trains {args.n_trained} experts of each layer, which get {share:.1%} of the routed rows")
    low, middle, high = (f"{capture[key] - 1:+.1%}" for key in ("min", "median", "max"))
    print(f"RouterCapture adds {middle} [{low}, {high}] to a forward")
    report = {
        "environment": environment(),
        "seed": args.seed,
        "arguments": vars(args),
        "model": json.loads(shape_config(args.shape).to_json_string()),
        "side_by_side": len(groups) == 1,
        "methods": results,
        "capture_ratio": capture,
    }
    write_json(args.output_path, report)
    print(f"wrote {args.output_path}")


if __name__ == "__main__":
    run_cli(main)
