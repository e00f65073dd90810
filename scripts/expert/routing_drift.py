r"""After training, where do the tokens go? Compare the routing of a base and of the base with an adapter.

    python scripts/expert/routing_drift.py --base_model_path=results/models/tiny --adapter_dir=results/checkpoints/law \
        --eval_dataset=law --n_sample_tokens=16384 --seq_length=256 --output_dir=results/drift/law

ESFT leaves the routers alone, but the layers above a trained expert see other hidden states and route otherwise. On the
same tokens, each layer has:

    total variation   how much of the load moved, 0 to 1: half the sum of |differences| of the token scores
    slots changed     the share of routed slots that changed. Tokens may trade places while the load stays.
    slots on trained  the share of slots on the trained experts, before and after

Nothing changes up to the first trained layer. Tokens are sampled as get_expert_scores.py does it. --split=eval takes a
data set of datasets/eval: prompts with their first gold answer. --adapter_dir may also be a LoRA or a whole model
that was fine-tuned from this base, which have no trained experts. Writes drift.json and, if matplotlib is installed,
drift.png.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import load_rows
from deepseek.experts import MoELayer, moe_layers
from deepseek.files import check_output, write_json
from deepseek.loading import empty_model, keeps_documents_apart
from deepseek.strength import is_whole
from esft import ExpertConfig, add_adapter, check_adapter, is_for_peft, load_tokenizer
from evaluation.expert_scoring import MaskedPack, forward_pack, sample_packs
from evaluation.figures import new_figure, save_figure
from evaluation.selection import drift, moved, routed, short_name
from evaluation.workers import load_on, plan_devices
from scripts.expert.get_expert_scores import add_shared_flags, sample_settings
from training.data import conversation
from utils import command_parser, environment, markdown_table, note, run_cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--base_model_path", "--model", required=True, metavar="MODEL", help="folder or hub id of the base model")
    add("--adapter_dir", required=True, metavar="DIR", help="adapter, LoRA, or whole fine-tuned model")
    add("--eval_dataset", "--eval_datasets", required=True, metavar="NAME", help="data set to route: a "
        "name in datasets/<split>, a path (.jsonl, .json, .parquet) or a hub id")  # fmt: skip
    add("--split", choices=("train", "eval"), default="train", help="training data, or prompts (default: train)")
    add("--output_dir", required=True, metavar="DIR", help="folder for drift.json and drift.png")
    add_shared_flags(parser)
    return parser.parse_args(argv)


def eval_samples(dataset: str) -> list[dict]:
    """Return the rows of an evaluation set as conversations: the prompt and its first gold answer."""
    return [conversation(row["prompt"], row["raw_answers"][0]) for row in load_rows(dataset)]


@torch.no_grad()
def routing(model: nn.Module, packs: list[MaskedPack]) -> Iterator[dict[int, Tensor]]:
    """Yield {layer: `routed`} of the tokens that count in each pack."""
    layers, seen = moe_layers(model), {}

    def see(layer: MoELayer):
        def hook(_module, args) -> None:
            _, ids_TK, weights_TK, *_ = args
            seen[layer.index] = routed(ids_TK, weights_TK, layer.num_experts)

        return hook

    handles = [layer.module.register_forward_pre_hook(see(layer)) for layer in layers.values()]
    try:
        for one in tqdm(packs, desc="routing", unit="pack"):
            forward_pack(model, one.pack)
            yield {layer: seen.pop(layer)[torch.tensor(one.mask)] for layer in layers}
    finally:
        for handle in handles:
            handle.remove()


def measure(base: nn.Module, adapter: Path, packs: list[MaskedPack]) -> dict[int, Tensor]:
    """Return `moved` of each layer, summed over the packs.

    The adapter is put on the base, whose routing is kept: there is one model. A whole model takes the base's dtype. In
    another one, rounding would look like drift.
    """
    if not keeps_documents_apart(base):
        packs = [document for one in packs for document in one.documents()]
    before, moved_L = list(routing(base, packs)), {}
    for old_L, new_L in zip(before, routing(add_adapter(base, adapter), packs)):
        for layer, old_TE in old_L.items():
            moved_L[layer] = moved_L.get(layer, 0) + moved(old_TE, new_L[layer])
    return moved_L


def make_report(moved_L: dict[int, Tensor], config: ExpertConfig | None) -> dict:
    """Return {"trained": ids by layer, "layers": `drift` by layer, "mean": over layers}; shares may be None."""
    trained = {layer: sorted(config.experts.get(layer, ())) for layer in moved_L} if config else {}
    layers = {layer: drift(moved_3E, trained.get(layer)) for layer, moved_3E in moved_L.items()}
    rows = list(layers.values())
    mean = {key: None if rows[0][key] is None else sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    return {"trained": trained, "layers": layers, "mean": mean}


def format_drift(result: dict) -> str:
    """Return a line per layer, and the mean over layers."""
    rows = []
    for layer, row in (*result["layers"].items(), ("mean", result["mean"])):
        trained = len(result["trained"][layer]) if layer in result["trained"] else ""
        shares = [row["trained_before"], row["trained_after"]]
        shown = ["-" if share is None else f"{share:.1%}" for share in shares]
        rows.append([layer, trained, f"{row['total_variation']:.3f}", f"{row['changed']:.1%}", *shown])
    heads = ["layer", "trained", "total variation", "slots changed", "on trained experts before", "after"]
    return markdown_table(heads, rows)


def draw(result: dict):
    """Return a figure of what moved, and of the load of the trained experts."""
    figure, (left, right) = new_figure(10.5, 4.2)
    layers, rows = list(result["layers"]), list(result["layers"].values())
    places, step = range(len(layers)), max(1, len(layers) // 14)
    left.plot(places, [100 * r["changed"] for r in rows], "o-", color="#08519c", label="routed slots that changed")
    moved = [100 * row["total_variation"] for row in rows]
    left.plot(places, moved, "s--", color="#d94801", label="load that moved (total var.)")
    left.set(title="what moved", ylabel="%")
    left.legend(frameon=False)
    if rows[0]["trained_before"] is None:
        right.text(0.5, 0.5, "no experts of its own", ha="center", va="center", transform=right.transAxes)
    else:
        for number, (key, color) in enumerate((("trained_before", "#9ecae1"), ("trained_after", "#08519c"))):
            heights, at = [100 * r[key] for r in rows], [place + 0.4 * number - 0.2 for place in places]
            right.bar(at, heights, 0.38, color=color, label=key.removeprefix("trained_"))
        right.legend(frameon=False, ncols=2, loc="upper right")
        right.set_ylim(top=1.2 * right.get_ylim()[1])
    right.set(title="slots that go to trained experts", ylabel="%")
    for axes in (left, right):
        axes.set_xticks(places[::step], layers[::step])
        axes.set_xlabel("decoder layer")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3, axis="y")
    adapter = short_name(result["adapter"])
    figure.suptitle(f"Routing of {result['dataset']}, {result['tokens']:,} tokens, before and after {adapter}")
    return figure


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    output, adapter = Path(args.output_dir) / "drift.json", Path(args.adapter_dir)
    check_output(output)
    check_output(output.with_suffix(".png"))
    config = None if is_whole(adapter) or is_for_peft(adapter) else ExpertConfig.load(adapter)
    (device,) = plan_devices(args.device, 1, args.gpus_per_rank)
    empty, tokenizer = empty_model(args.base_model_path), load_tokenizer(args.base_model_path)
    check_adapter(empty, adapter)
    samples = eval_samples(args.eval_dataset) if args.split == "eval" else None
    packs = sample_packs(sample_settings(args), tokenizer, empty.config.get_text_config().vocab_size, samples)
    base, _ = load_on(device, args.base_model_path, args.dtype)
    result = make_report(measure(base, adapter, packs), config) | {
        "base_model": args.base_model_path,
        "adapter": args.adapter_dir,
        "dataset": args.eval_dataset,
        "split": args.split,
        "tokens": sum(sum(one.mask) for one in packs),
        "settings": vars(args),
        "environment": environment(),
    }
    write_json(output, result)
    print(format_drift(result))
    print(f"written to {output}")
    try:
        save_figure(draw(result), output.with_suffix(".png"))
        print(f"written to {output.with_suffix('.png')}")
    except ValueError as error:  # matplotlib is missing
        note(str(error))
    return result


if __name__ == "__main__":
    run_cli(main)
