r"""How certain is a selection of experts, and how much do the selections of several tasks share?

    python scripts/expert/compare_scores.py --expert_scores_dir results/expert_scores/law --output_path=law.png
    python scripts/expert/compare_scores.py --expert_scores_dir results/expert_scores/law results/expert_scores/intent

One folder of scores: packs of tokens are drawn again with replacement (a bootstrap), experts are selected on each draw,
and the selections are compared with the one on all tokens. An expert that 5 to 95 % of the draws select is uncertain.
Smaller samples show how stability grows with n_sample_tokens. Each smaller sample is compared with the full sample, and
with another sample of its own size; the second shows how much two independent samples would agree.

Several scores, expert configs or adapters: the Jaccard (shared / in either) of every two selections, beside what two
random selections of the same sizes would share, and the correlation of the scores after subtracting each layer's mean.
If a Jaccard is within the random range, the tasks share no more than chance.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.adapters import is_adapter, read_base_note
from deepseek.files import read_json
from esft import ExpertConfig, ExpertScores, select_experts
from evaluation.figures import check_picture, draw_matrix, heat_map, new_figure, save_figure
from evaluation.selection import UNCERTAIN, PackCounts, correlation, overlap, short_name, stability
from scripts.expert.generate_expert_config import add_score_flags, default_top_p, split_list
from utils import command_parser, markdown_table, note, positive, run_cli, seed_number


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--expert_scores_dir", required=True, nargs="+", metavar="DIR", help="one folder of get_expert_scores.py or of "
        "the released raw logs; or several scores, expert configs (.json) or adapters")  # fmt: skip
    add_score_flags(parser)
    add("--n_bootstrap", type=positive, default=1000, metavar="N", help="one folder: draws (default: 1000)")
    add("--seed", type=seed_number, default=0, metavar="N", help="one folder: seed of the draws (default: 0)")
    add("--num_experts", type=positive, metavar="N", help="several: experts of a layer, if all are expert configs")
    add("--output_path", metavar="FILE", help="a picture to write (.png; default: none)")
    add("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    args.expert_scores_dir = [path for text in args.expert_scores_dir for path in split_list(text)]
    return args


# ------------------------------------------------------------------------------------------------ one: stability


STABILITY = """{score_function} score, top_p {top_p:g}: {packs} packs with {tokens:,} tokens, {draws} draws

{layer_table}

* not selected on all tokens; an expert is uncertain if {bounds[0]:.0%} to {bounds[1]:.0%} of the draws select it
{total} experts are selected, {certain} of them certain; {outside} others are uncertain
draws and all tokens: Jaccard {jaccard:.3f} [{jaccard_ci95[0]:.3f}, {jaccard_ci95[1]:.3f}]
random selections of these sizes: Jaccard {random_jaccard:.3f}

{sample_table}"""


def format_stability(found: dict) -> str:
    """Return the selection layer by layer with its uncertain experts, and the growth of stability."""
    layers, selected = [], found["selected"]
    for layer, ids in selected.items():
        unsure = [(e, share) for la, e, share in found["uncertain"] if la == layer]
        shown = " ".join(f"{e}{'' if e in ids else '*'} ({share:.0%})" for e, share in unsure[:8])
        shown += f" ... ({len(unsure) - 8} more)" if len(unsure) > 8 else ""
        layers.append([layer, len(ids), len(unsure), f"{found['jaccard_by_layer'][layer]:.2f}", shown])
    samples = []
    for row in found["growth"]:
        share = f"1/{round(1 / row['share'])}" if row["share"] < 1 else "1"
        pair = (row["jaccard_with_all"], row["jaccard_with_other_packs"])
        shown = ["-" if jaccard is None else f"{jaccard:.3f}" for jaccard in pair]
        samples.append([share, row["packs"], f"{row['tokens']:,}", *shown])
    total, outside = sum(map(len, selected.values())), sum(e not in selected[la] for la, e, _ in found["uncertain"])
    return STABILITY.format(
        **found,
        layer_table=markdown_table(["layer", "selected", "uncertain", "Jaccard", "uncertain (share of draws)"], layers),
        bounds=UNCERTAIN,
        total=total,
        certain=total - len(found["uncertain"]) + outside,
        outside=outside,
        sample_table=markdown_table(["sample", "packs", "tokens", "with all", "with as many others"], samples),
    )


def draw_stability(found: dict):
    """Return a figure of how often each expert is selected, and of stability over tokens."""
    figure, (left, right) = new_figure(11.5, 4.6, width_ratios=(1.6, 1))
    share_LE = {layer: dict(enumerate(share_E)) for layer, share_E in found["frequency"].items()}
    ranked_LE = {layer: sorted(share_E, key=share_E.get, reverse=True) for layer, share_E in share_LE.items()}
    image = heat_map(left, share_LE, ranked_LE, found["selected"])
    widest = max(sum(share > 0.1 for share in share_E.values()) for share_E in share_LE.values())
    layers, step = list(share_LE), max(1, len(share_LE) // 14)
    left.set_yticks(range(0, len(layers), step), layers[::step])
    left.set(title="how often draws select an expert", xlabel="experts, most often selected first", xlim=(-0.5, widest))
    left.set(ylabel="decoder layer; red: selected on all tokens")
    figure.colorbar(image, ax=left, label="of the draws (%)", pad=0.01)

    rows = found["growth"]
    curves = [("with_all", "o-", "#08519c", "with all tokens")]
    curves += [("with_other_packs", "s--", "#d94801", "with as many other tokens")]
    for key, style, color, label in curves:
        points = [(row["tokens"], row[f"jaccard_{key}"]) for row in rows if row[f"jaccard_{key}"] is not None]
        right.plot(*zip(*points), style, color=color, label=label)
    right.axhline(found["random_jaccard"], color="gray", lw=1, ls=":", label="random selections of these sizes")
    right.set_xscale("log", base=2)
    right.set_xticks([row["tokens"] for row in rows], [f"{row['tokens']:,}" for row in rows], rotation=30)
    right.minorticks_off()
    right.set(ylim=(0, 1), xlabel="tokens scored", ylabel="Jaccard of the selections", title="stability")
    right.grid(alpha=0.3)
    right.legend(frameon=False, loc="center right")
    return figure


# ------------------------------------------------------------------------------------------------ several: overlap


def read_source(path: str, args: argparse.Namespace) -> tuple[ExpertConfig, dict | None, int | None]:
    """Return a selection, its score_LE if there are scores, and the experts per layer if the source has that number."""
    place = Path(path)
    if is_adapter(place) or (place.is_file() and read_json(place).keys() & {"experts", "selected_experts"}):
        return ExpertConfig.load(place), None, read_base_note(place).get("num_experts")
    scores, function = ExpertScores.load(place), args.score_function
    config = select_experts(scores, score_function=function, top_p=default_top_p(args))
    return config, scores[function], max(map(len, scores[function].values()))


def compare(args: argparse.Namespace) -> dict:
    """Return the overlap and correlation of every two sources, which must be of one model."""
    paths = args.expert_scores_dir
    configs, score_LEs, counts = zip(*(read_source(path, args) for path in paths))
    num_experts = next(filter(None, [args.num_experts, *counts]), None)
    if num_experts is None:
        raise ValueError("cannot compare these: the number of experts of a layer is unknown. Give --num_experts.")
    layers = sorted(next(filter(None, score_LEs), None) or set().union(*(config.experts for config in configs)))
    for path, config, score_LE, count in zip(paths, configs, score_LEs, counts):
        same_layers = sorted(score_LE) == layers if score_LE else config.experts.keys() <= set(layers)
        last = max((expert for ids in config.experts.values() for expert in ids), default=0)
        if not same_layers or last >= num_experts or count not in (None, num_experts):
            model = f"a model with {num_experts} experts in layers {layers[0]} to {layers[-1]}"
            raise ValueError(f"cannot compare {path}: it is not of {model}, as the others are")
    correlations = [[correlation(a, b) if a and b else None for b in score_LEs] for a in score_LEs]
    short = [short_name(path) for path in paths]
    return {
        "names": short if len(set(short)) == len(short) else paths,
        "paths": paths,
        "score_function": args.score_function,
        "top_p": default_top_p(args),
        "num_experts": num_experts,
        "layers": layers,
        "sizes": [sum(map(len, config.experts.values())) for config in configs],
        "overlap": overlap(configs, dict.fromkeys(layers, num_experts)),
        "correlation": [[None if x is None or math.isnan(x) else x for x in row] for row in correlations],
    }


def format_overlap(found: dict) -> str:
    """Return the matrices."""
    names, within = found["names"], []
    for i, name in enumerate(names):
        for other, cell in zip(names[:i], found["overlap"][i]):
            low, high = cell["random_ci95"]
            if low <= cell["jaccard"] <= high:
                within.append(f"{other} and {name}: within chance (95 % of random pairs: {low:.3f} to {high:.3f})")

    def matrix(title: str, rows: list[list[str]]) -> str:
        return f"{title}\n\n{markdown_table(['', *names], [[name, *row] for name, row in zip(names, rows)])}"

    lines = [f"{found['score_function']} score, top_p {found['top_p']:g}, {len(found['layers'])} layers of "
             f"{found['num_experts']} experts"]  # fmt: skip
    lines += [f"{name}: {size} experts, {path}" for name, size, path in zip(names, found["sizes"], found["paths"])]
    pairs = [[f"{c['jaccard']:.3f} ({c['random_jaccard']:.3f})" for c in row] for row in found["overlap"]]
    parts = ["\n".join(lines), matrix("Jaccard of the selections (of two random selections of these sizes)", pairs)]
    parts += ["\n".join(within)] if within else []
    if sum(row[i] is not None for i, row in enumerate(found["correlation"])) > 1:
        values = [["-" if value is None else f"{value:.3f}" for value in row] for row in found["correlation"]]
        parts.append(matrix("correlation of the scores within layers", values))
    return "\n\n".join(parts)


def draw_overlap(found: dict):
    """Return a figure of the Jaccard beside its expectation, and of the correlation."""
    names, side = found["names"], max(3.4, 0.9 * len(found["names"]) + 1.4)
    figure, (left, right) = new_figure(2 * side + 1.6, side + 0.7)

    jaccards = [[cell["jaccard"] for cell in row] for row in found["overlap"]]
    notes = [[f"{c['jaccard']:.2f}\nrandom {c['random_jaccard']:.2f}" for c in row] for row in found["overlap"]]
    images = [draw_matrix(left, names, jaccards, notes, "Jaccard of the selections", cmap="Blues", vmin=0)]
    values = [[math.nan if value is None else value for value in row] for row in found["correlation"]]
    notes = [["-" if value is None else f"{value:.2f}" for value in row] for row in found["correlation"]]
    title = "correlation of the scores within layers"
    images.append(draw_matrix(right, names, values, notes, title, cmap="RdBu_r", vmin=-1))
    for image in images:
        figure.colorbar(image, ax=image.axes, fraction=0.045, pad=0.02)
    return figure


# ------------------------------------------------------------------------------------------------ the command


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if args.output_path:
        check_picture(args.output_path)
    sources = args.expert_scores_dir
    if len(sources) == 1:
        folder = Path(sources[0])
        packs = PackCounts.load(folder.parent if folder.is_file() else folder)
        found = stability(packs, args.score_function, default_top_p(args), args.n_bootstrap, args.seed)
        form, draw = format_stability, draw_stability
    else:
        found, form, draw = compare(args), format_overlap, draw_overlap
    print(json.dumps(found, indent=2) if args.json else form(found))
    if args.output_path:
        figure = draw(found)
        figure.suptitle(
            f"{found['score_function']} score, top_p {found['top_p']:g}: {', '.join(map(short_name, sources))}"
        )
        save_figure(figure, args.output_path)
        note(f"written to {args.output_path}")
    return found


if __name__ == "__main__":
    run_cli(main)
