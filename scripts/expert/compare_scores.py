r"""How certain is a selection of experts, and how much do the selections of several tasks share?

    python scripts/expert/compare_scores.py --expert_scores_dir results/expert_scores/law --output_path=law.png
    python scripts/expert/compare_scores.py --expert_scores_dir results/expert_scores/law results/expert_scores/intent

One folder of scores: packs of tokens are drawn again with replacement (a bootstrap), experts are selected on each
draw, and the sets are compared with that of all tokens. Experts that 5 to 95 % of the draws select are uncertain. How
stability grows with n_sample_tokens is shown by smaller samples: against all tokens (drawn with replacement, as above),
and against as many other tokens, which is what a second sample of the data would have agreed with.

Several (scores, expert configs, adapters): Jaccard (shared / in either) of every two selected sets, beside it what two
uniformly random sets of the same sizes in each layer would share on average, and the correlation of the scores, each
layer's mean taken off. A Jaccard within the random range says that the tasks share no more than chance.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.files import check_output
from esft import CONFIG_NAME, SCORE_FUNCTIONS, ExpertConfig, ExpertScores, select_experts
from evaluation.figures import new_figure, save_figure
from evaluation.selection import UNCERTAIN, PackCounts, correlation, overlap, short_name, stability
from scripts.expert.generate_expert_config import split_list, top_p_of
from utils import command_parser, positive, run_cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--expert_scores_dir", required=True, nargs="+", metavar="DIR", help="one folder that get_expert_scores.py "
        "wrote (or released raw logs); or several of: scores, expert configs (.json), adapters")  # fmt: skip
    add("--score_function", choices=SCORE_FUNCTIONS, default="token", help="by which experts are selected, and whose "
        "correlation is shown (default: token)")  # fmt: skip
    add("--top_p", type=float, metavar="P", help="of the selection, above 0 and up to 1 (default: the paper's, 0.2, "
        "for gate 0.1)")  # fmt: skip
    add("--n_bootstrap", type=positive, default=1000, metavar="N", help="one folder: draws (default: 1000)")
    add("--seed", type=int, default=0, metavar="N", help="one folder: of the draws (default: 0)")
    add("--num_experts", type=positive, metavar="N", help="several: experts of a layer, where neither scores nor "
        "adapters among them tell (no default)")  # fmt: skip
    add("--output_path", metavar="FILE", help="a picture (.png; default: none)")
    add("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    args.expert_scores_dir = [path for text in args.expert_scores_dir for path in split_list(text)]
    return args


# --------------------------------------------------------------------------------------------------------------------
# one: stability


def stability_table(found: dict) -> str:
    """The set, layer by layer, the uncertain experts, and the growth, as text."""
    lines = [
        f"{found['score_function']} score, top_p {found['top_p']:g}: {found['packs']} packs with {found['tokens']:,} "
        f"tokens, {found['draws']} draws",
        f"{'layer':>5}{'selected':>10}{'uncertain':>11}{'Jaccard':>9}  uncertain experts (share of draws)",
    ]
    for layer, ids in found["selected"].items():
        unsure = [(e, share) for la, e, share in found["uncertain"] if la == layer]
        shown = " ".join(f"{e}{'' if e in ids else '*'} ({share:.0%})" for e, share in unsure[:8])
        shown += f" ... ({len(unsure) - 8} more)" if len(unsure) > 8 else ""
        lines.append(f"{layer:>5}{len(ids):>10}{len(unsure):>11}{found['jaccard_by_layer'][layer]:>9.2f}  {shown}")
    low, high = found["jaccard_ci95"]
    selected = sum(map(len, found["selected"].values()))
    unsure_from, unsure_to = UNCERTAIN
    inside = sum(e in found["selected"][layer] for layer, e, _ in found["uncertain"])
    lines += [
        f"  * not in the set of all tokens; uncertain is what {unsure_from:.0%} to {unsure_to:.0%} of the draws select",
        f"bootstrap sets and the set of all tokens: Jaccard {found['jaccard']:.3f} [{low:.3f}, {high:.3f}]; random "
        f"sets of these sizes {found['random_jaccard']:.3f}",
        f"{selected} experts are selected, {selected - inside} of them certain; {len(found['uncertain']) - inside} "
        "others are uncertain",
        "",
        f"{'sample':>8}{'packs':>7}{'tokens':>10}{'with all':>10}{'with as many others':>21}",
    ]
    for row in found["growth"]:
        other = row["jaccard_with_other_packs"]
        share = f"1/{round(1 / row['share'])}" if row["share"] < 1 else "1"
        lines.append(
            f"{share:>8}{row['packs']:>7}{row['tokens']:>10,}{row['jaccard_with_all']:>10.3f}"
            + (f"{other:>21.3f}" if other is not None else f"{'-':>21}")
        )
    return "\n".join(lines)


def draw_stability(found: dict, title: str):
    """-> the matplotlib figure: how often each expert is selected, and stability over tokens."""
    figure, (left, right) = new_figure(11.5, 4.6, width_ratios=(1.6, 1))
    layers = list(found["selected"])
    percent = [[100 * share for share in sorted(found["frequency"][layer], reverse=True)] for layer in layers]
    most = max(sum(share > 0.1 for share in row) for row in percent) + 1
    image = left.imshow(
        [row[:most] for row in percent], cmap="Blues", vmin=0, vmax=100, aspect="auto", interpolation="nearest"
    )
    left.stairs(
        [len(found["selected"][layer]) - 0.5 for layer in layers],
        [row - 0.5 for row in range(len(layers) + 1)],
        orientation="horizontal",
        baseline=None,
        color="black",
        lw=1.8,
    )
    step = max(1, len(layers) // 14)
    left.set_yticks(range(0, len(layers), step), layers[::step])
    left.set(title="how often draws select an expert", ylabel="decoder layer")
    left.set_xticks(range(0, most, max(1, most // 10)), range(1, most + 1, max(1, most // 10)))
    left.set_xlabel("experts, most often selected first; black: size of the selected set")
    figure.colorbar(image, ax=left, label="of the draws (%)", pad=0.01)

    rows = found["growth"]
    others = [row for row in rows if row["jaccard_with_other_packs"] is not None]
    tokens = [row["tokens"] for row in rows]
    right.plot(tokens, [row["jaccard_with_all"] for row in rows], "o-", color="#08519c", label="with all tokens")
    right.plot(
        [row["tokens"] for row in others],
        [row["jaccard_with_other_packs"] for row in others],
        "s--",
        color="#d94801",
        label="with as many other tokens",
    )
    right.axhline(found["random_jaccard"], color="grey", lw=1, ls=":", label="random sets of these sizes")
    right.set_xscale("log", base=2)
    right.set_xticks(tokens, [f"{count:,}" for count in tokens], rotation=30)
    right.minorticks_off()
    right.set(ylim=(0, 1), xlabel="tokens scored", ylabel="Jaccard of the selected sets", title="stability")
    right.grid(alpha=0.3)
    right.legend(frameon=False, loc="center right")
    figure.suptitle(title)
    return figure


# --------------------------------------------------------------------------------------------------------------------
# several: overlap


def read_source(path: str, args: argparse.Namespace) -> tuple[ExpertConfig, ExpertScores | None, int | None]:
    """(selection, scores where there are any, experts per layer where the source tells)."""
    place = Path(path)
    file = place / CONFIG_NAME if place.is_dir() and (place / CONFIG_NAME).is_file() else place
    try:
        data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if isinstance(data, dict) and data.keys() & {"experts", "selected_experts"}:
        base = data.get("base")
        told = base.get("num_experts") if isinstance(base, dict) else None
        return ExpertConfig.load(file), None, told if isinstance(told, int) else None
    scores = ExpertScores.load(place)
    config = select_experts(scores, score_function=args.score_function, top_p=top_p_of(args))
    return config, scores, max(map(len, scores[args.score_function].values()))


def compare(args: argparse.Namespace) -> dict:
    """Overlap and correlation of every two sources. Raises ValueError where they are of different models."""
    paths = args.expert_scores_dir
    sources = [read_source(path, args) for path in paths]
    told = {count: path for path, (_, _, count) in zip(paths, sources) if count}
    if args.num_experts:
        told.setdefault(args.num_experts, "--num_experts")
    if not told:
        raise ValueError("none of these tells how many experts a layer has: give --num_experts, or scores of one task")
    if len(told) > 1:
        (a, where), (b, elsewhere) = list(told.items())[:2]
        raise ValueError(f"{where} has {a} experts per layer, {elsewhere} {b}: they are of different models")
    num_experts = next(iter(told))
    score_LEs = [scores[args.score_function] if scores else None for _, scores, _ in sources]
    known = [(path, score_LE.keys()) for path, score_LE in zip(paths, score_LEs) if score_LE]
    for path, keys in known:
        if keys != known[0][1]:
            raise ValueError(f"{path} and {known[0][0]} have scores of different layers: they are of different models")
    layers = sorted(known[0][1] if known else set().union(*(config.experts for config, *_ in sources)))
    for path, (config, *_) in zip(paths, sources):
        if odd := sorted(config.experts.keys() - set(layers)):
            raise ValueError(f"{path} names layer {odd[0]}, of which others have no scores: it is of another model")
        if max((e for ids in config.experts.values() for e in ids), default=0) >= num_experts:
            raise ValueError(f"{path} names an expert beyond {num_experts - 1}: it is of another model")
    pairs = overlap([config for config, *_ in sources], dict.fromkeys(layers, num_experts))
    correlations = [[correlation(a, b) if a and b else None for b in score_LEs] for a in score_LEs]
    return {
        "names": names_of(paths),
        "paths": paths,
        "score_function": args.score_function,
        "top_p": top_p_of(args),
        "num_experts": num_experts,
        "layers": layers,
        "sizes": [sum(map(len, config.experts.values())) for config, *_ in sources],
        "overlap": pairs,
        "correlation": [[None if x is None or math.isnan(x) else x for x in row] for row in correlations],
    }


def names_of(paths: list[str]) -> list[str]:
    """Short names, or the paths where those would be the same."""
    short = [short_name(path) for path in paths]
    return short if len(set(short)) == len(short) else paths


def overlap_table(found: dict) -> str:
    """The matrices, as text."""
    names, wide = found["names"], max(12, *(len(name) + 2 for name in found["names"]))
    head = f"{'':<{wide}}" + "".join(f"{name:>{max(wide, 16)}}" for name in names)
    lines = [
        f"{found['score_function']} score, top_p {found['top_p']:g}, {len(found['layers'])} layers of "
        f"{found['num_experts']} experts",
        *(f"  {name}: {size} experts, {path}" for name, size, path in zip(names, found["sizes"], found["paths"])),
        "",
        "Jaccard of the selected sets (of two random sets of these sizes)",
        head,
    ]
    for name, row in zip(names, found["overlap"]):
        cells = [f"{cell['jaccard']:.3f} ({cell['random_jaccard']:.3f})" for cell in row]
        lines.append(f"{name:<{wide}}" + "".join(f"{cell:>{max(wide, 16)}}" for cell in cells))
    for i, name in enumerate(names):
        for j in range(i):
            cell = found["overlap"][i][j]
            low, high = cell["random_ci95"]
            if low <= cell["jaccard"] <= high:
                lines.append(f"  {names[j]} and {name}: within chance (95 % of random pairs: {low:.3f} to {high:.3f})")
    if sum(row[i] is not None for i, row in enumerate(found["correlation"])) > 1:
        lines += ["", "correlation of the scores within layers", head]
        for name, row in zip(names, found["correlation"]):
            cells = ["-" if value is None else f"{value:.3f}" for value in row]
            lines.append(f"{name:<{wide}}" + "".join(f"{cell:>{max(wide, 16)}}" for cell in cells))
    return "\n".join(lines)


def draw_overlap(found: dict):
    """-> the matplotlib figure: Jaccard beside its expectation, and correlation."""
    names, n = found["names"], len(found["names"])
    side = max(3.4, 0.9 * n + 1.4)
    figure, (left, right) = new_figure(2 * side + 1.6, side + 0.7)
    jaccards = [[cell["jaccard"] for cell in row] for row in found["overlap"]]
    notes = [[f"{c['jaccard']:.2f}\nrandom {c['random_jaccard']:.2f}" for c in row] for row in found["overlap"]]
    values = [[math.nan if value is None else value for value in row] for row in found["correlation"]]
    told = [["-" if value is None else f"{value:.2f}" for value in row] for row in found["correlation"]]
    for axes, numbers, texts, lowest, cmap, title in (
        (left, jaccards, notes, 0, "Blues", "Jaccard of the selected sets"),
        (right, values, told, -1, "RdBu_r", "correlation of the scores within layers"),
    ):
        image = axes.imshow(numbers, cmap=cmap, vmin=lowest, vmax=1)
        axes.set_xticks(range(n), names, rotation=30, ha="right")
        axes.set_yticks(range(n), names)
        axes.set_title(title)
        for i in range(n):
            for j in range(n):
                dark = not math.isnan(numbers[i][j]) and abs(numbers[i][j]) > 0.6
                axes.text(j, i, texts[i][j], ha="center", va="center", fontsize=8, color="white" if dark else "black")
        figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02)
    figure.suptitle(f"{found['score_function']} score, top_p {found['top_p']:g}")
    return figure


# --------------------------------------------------------------------------------------------------------------------
# the command


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if args.output_path:
        if Path(args.output_path).suffix != ".png":
            raise ValueError(f"--output_path {args.output_path} must end in .png")
        check_output(args.output_path)
        new_figure(1, 1)
    if len(args.expert_scores_dir) == 1:
        folder = Path(args.expert_scores_dir[0])
        packs = PackCounts.load(folder.parent if folder.is_file() else folder)
        kinds = {"token": "slots", "gate": "gates", "prob": "probs"}
        if kinds[args.score_function] not in packs.sums:
            raise ValueError(f"{folder} has no score {args.score_function!r}: get_expert_scores.py --prob adds it")
        found = stability(packs, args.score_function, top_p_of(args), args.n_bootstrap, args.seed)
        text = stability_table(found)
        title = f"Selection by {args.score_function} score, top_p {found['top_p']:g}, {short_name(folder)}"
        figure = draw_stability(found, title) if args.output_path else None
    else:
        found = compare(args)
        text = overlap_table(found)
        figure = draw_overlap(found) if args.output_path else None
    if figure:
        save_figure(figure, args.output_path)
    print(json.dumps(found, indent=2) if args.json else text)
    if args.output_path:
        print(f"written to {args.output_path}", file=sys.stderr if args.json else sys.stdout)
    return found


if __name__ == "__main__":
    run_cli(main)
