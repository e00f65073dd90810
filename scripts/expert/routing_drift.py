r"""After training, where do the tokens go? The routing of the base and of the base with an adapter, on the same tokens.

    python scripts/expert/routing_drift.py --base_model_path=results/models/tiny --adapter_dir=results/checkpoints/law \
        --eval_dataset=law --n_sample_tokens=16384 --seq_length=256 --output_dir=results/drift/law

ESFT leaves routers alone, but the layers above a trained expert see other hidden states, and send tokens elsewhere.
Per layer: the total variation distance of the token scores (half the sum of their absolute differences: how much of the
load moved, 0 to 1); the share of routed slots that changed (a token's K experts, as sets: tokens may trade places while
the load stays); and the share of slots on the trained experts, before and after. Up to the first trained layer nothing
changes.

Tokens are sampled and packed as get_expert_scores.py does. --split=eval takes a data set of datasets/eval (general,
say: prompts with their first gold answer). --adapter_dir may also be a LoRA, or a whole fine-tuned model, which have no
trained experts to look at. Writes drift.json and, with matplotlib, drift.png.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.experts import moe_layers
from deepseek.files import check_output, suggest_path, write_json
from deepseek.loading import empty_model, keeps_documents_apart, plan_devices
from esft import ExpertConfig, add_adapter, is_lora, load_base_model, load_tokenizer
from evaluation.expert_scoring import one_by_one
from evaluation.figures import new_figure, save_figure
from evaluation.selection import Drift, name_of, routed, routed_ids
from scripts.expert.get_expert_scores import add_shared_flags, sample_packs
from training.data import Pack, collate, load_samples, read_rows
from utils import command_parser, environment, run_cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--base_model_path", "--model", required=True, metavar="MODEL", help="folder or hub id of the base model")
    add("--adapter_dir", required=True, metavar="DIR", help="adapter, LoRA, or whole fine-tuned model")
    add("--eval_dataset", "--eval_datasets", required=True, metavar="NAME", help="data set whose tokens are routed: a "
        "name in datasets/<split>, a path (.jsonl, .json, .parquet) or a hub id")  # fmt: skip
    add("--split", choices=("train", "eval"), default="train", help="shape of its rows: training data, or prompt and "
        "answers (default: train)")  # fmt: skip
    add("--output_dir", required=True, metavar="DIR", help="folder that gets drift.json and drift.png")
    add_shared_flags(parser)
    return parser.parse_args(argv)


def experts_by_layer(model: nn.Module) -> dict[int, int]:
    """Number of experts of every MoE layer."""
    return {index: layer.num_experts for index, layer in moe_layers(model).items()}


def eval_samples(dataset: str) -> list[dict]:
    """Rows of an evaluation set as conversations: the prompt, and its first gold answer."""
    samples = []
    for where, row in read_rows(dataset, "eval"):
        answers = row.get("raw_answers") or row.get("answers") or []
        if not isinstance(row.get("prompt"), str) or not answers:
            raise ValueError(f'{where}: a row of evaluation data needs "prompt" and "answers"')
        turns = (("user", row["prompt"]), ("assistant", str(answers[0])))
        samples.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    if not samples:
        raise ValueError(f"data set {dataset!r} has no rows")
    return samples


@torch.no_grad()
def routing(model: nn.Module, packs: list[Pack], masks: list[list[bool]]) -> Iterator[dict[int, Tensor]]:
    """{layer: `routed_ids`} of every pack, of the tokens that its mask keeps."""
    layers, decoder, seen = moe_layers(model), model.base_model, {}
    device = model.get_input_embeddings().weight.device

    def note(layer: int):
        def hook(module, args) -> None:
            _, ids_TK, weights_TK, *_ = args
            seen[layer] = routed_ids(ids_TK, weights_TK, module.num_experts)

        return hook

    handles = [layer.module.register_forward_pre_hook(note(index)) for index, layer in layers.items()]
    try:
        for one, mask in zip(packs, masks):
            seen.clear()
            batch = collate([one], pad_token_id=0)
            inputs = {key: batch[key].to(device) for key in ("input_ids", "position_ids")}
            decoder(**inputs, use_cache=False)
            if missing := sorted(layers.keys() - seen.keys()):
                raise ValueError(f"the experts of layer {missing[0]} were never called: their routing cannot be seen")
            yield {layer: seen[layer][torch.tensor(mask)] for layer in layers}
    finally:
        for handle in handles:
            handle.remove()


def measure(base: nn.Module, change, packs: list[Pack], masks: list[list[bool]]) -> dict[int, Drift]:
    """Drift of each layer; `change` makes the model to compare with of `base`, in place or not.

    The base's routing is kept, so that an adapter can be put in place and the model is there once.
    """
    if not keeps_documents_apart(base):
        packs, masks, _ = one_by_one(packs, masks, [0] * len(packs))
    total, before = sum(map(len, packs)), []
    with tqdm(total=2 * total, unit="tok", unit_scale=True, desc="routing") as bar:
        for one, ids_L in zip(packs, routing(base, packs, masks)):
            before.append(ids_L)
            bar.update(len(one))
        num_experts_L = experts_by_layer(base)
        changed, drift_L = change(base), {layer: Drift() for layer in num_experts_L}
        for one, old_L, new_L in zip(packs, before, routing(changed, packs, masks)):
            for layer, drift in drift_L.items():
                drift.add(*(routed(ids_L[layer], num_experts_L[layer]) for ids_L in (old_L, new_L)))
            bar.update(len(one))
    return drift_L


def table(result: dict) -> str:
    """A line per layer, and the mean over layers."""
    lines = [
        f"{'':>5}{'':>9}{'total':>11}{'slots':>10}{'slots on trained experts':>27}",
        f"{'layer':>5}{'trained':>9}{'variation':>11}{'changed':>10}{'before':>14}{'after':>13}",
    ]
    for layer, row in (*result["layers"].items(), ("mean", result["mean"])):
        trained = len(result["trained"][layer]) if layer in result["trained"] else ""
        shares = [row["trained_before"], row["trained_after"]]
        shown = ["-" if share is None else f"{share:.1%}" for share in shares]
        lines.append(
            f"{layer:>5}{trained:>9}{row['total_variation']:>11.3f}{row['changed']:>10.1%}{shown[0]:>14}{shown[1]:>13}"
        )
    return "\n".join(lines)


def draw(result: dict):
    """-> the matplotlib figure: what moved, and the load of the trained experts."""
    figure, (left, right) = new_figure(10.5, 4.2)
    layers = list(result["layers"])
    rows, places = list(result["layers"].values()), range(len(layers))
    step = max(1, len(layers) // 14)
    left.plot(places, [100 * r["changed"] for r in rows], "o-", color="#08519c", label="routed slots that changed")
    left.plot(
        places,
        [100 * r["total_variation"] for r in rows],
        "s--",
        color="#d94801",
        label="load that moved (total var.)",
    )
    left.set(title="what moved", ylabel="%")
    if rows[0]["trained_before"] is None:
        right.text(0.5, 0.5, "no experts of its own", ha="center", va="center", transform=right.transAxes)
    else:
        for number, (key, color) in enumerate((("trained_before", "#9ecae1"), ("trained_after", "#08519c"))):
            heights, at = [100 * r[key] for r in rows], [place + 0.4 * number - 0.2 for place in places]
            right.bar(at, heights, 0.38, color=color, label=key.removeprefix("trained_"))
        right.legend(frameon=False, ncols=2, loc="upper right")
        right.set_ylim(top=1.2 * right.get_ylim()[1])
    right.set(title="slots that go to trained experts", ylabel="%")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.set_xticks(places[::step], layers[::step])
        axes.set_xlabel("decoder layer")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3, axis="y")
    figure.suptitle(
        f"Routing of {result['dataset']}, {result['tokens']:,} tokens, before and after {name_of(result['adapter'])}"
    )
    return figure


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    output, adapter = Path(args.output_dir) / "drift.json", Path(args.adapter_dir)
    check_output(output)
    if not adapter.is_dir():
        raise ValueError(f"--adapter_dir {adapter}: no such folder{suggest_path(adapter)}")
    whole = (adapter / "config.json").is_file()
    config = None if whole or is_lora(adapter) else ExpertConfig.load(adapter)
    (device,) = plan_devices(args.device, 1, args.gpus_per_rank)
    empty, tokenizer = empty_model(args.base_model_path), load_tokenizer(args.base_model_path)
    if config:
        config.check(empty)
    if whole and experts_by_layer(empty_model(adapter)) != experts_by_layer(empty):
        raise ValueError(f"{adapter} is a model with other layers or experts than {args.base_model_path}")
    context = getattr(empty.config.get_text_config(), "max_position_embeddings", None) or args.seq_length
    samples = eval_samples(args.eval_dataset) if args.split == "eval" else load_samples(args.eval_dataset)
    packs, masks = sample_packs(args, tokenizer, min(args.seq_length, context), samples)

    place = {"dtype": args.dtype, "device": device if len(device) > 1 else device[0]}
    base, _ = load_base_model(args.base_model_path, **place)

    def change(model: nn.Module) -> nn.Module:
        if not whole:
            return add_adapter(model, adapter)
        alike = {**place, "dtype": str(model.dtype).removeprefix("torch.")}  # or rounding would look like drift
        return load_base_model(adapter, **alike)[0]

    drift_L = measure(base, change, packs, masks)
    trained = {layer: sorted(config.experts.get(layer, ())) if config else [] for layer in drift_L}
    layers = {layer: drift.report(trained[layer]) for layer, drift in drift_L.items()}
    if config is None:
        layers = {layer: row | {"trained_before": None, "trained_after": None} for layer, row in layers.items()}
    mean = {
        key: None if first is None else sum(row[key] for row in layers.values()) / len(layers)
        for key, first in next(iter(layers.values())).items()
    }
    result = {
        "base_model": args.base_model_path,
        "adapter": args.adapter_dir,
        "dataset": args.eval_dataset,
        "split": args.split,
        "tokens": sum(map(sum, masks)),
        "trained": trained if config else {},
        "layers": layers,
        "mean": mean,
        "settings": vars(args),
        "environment": environment(),
    }
    write_json(output, result)
    print(table(result))
    print(f"written to {output}")
    try:
        figure = draw(result)
    except ValueError as error:
        print(f"note: {error}", file=sys.stderr)
    else:
        save_figure(figure, output.with_suffix(".png"))
        print(f"written to {output.with_suffix('.png')}")
    return result


if __name__ == "__main__":
    run_cli(main)
