"""Simulate where experts lie on 2 to 64 ranks: in contiguous blocks, or placed by recorded routing.

    python scripts/experiments/placement.py --expert_scores_dir=results/expert_scores/law \
        --expert_config=results/expert_configs/law.json --output=results/tables/placement

In every MoE layer all ranks wait for the busiest one, forward and backward. A row is a token at one of its experts. The
backward costs a row as much as the forward, for the gradient of its input. It costs the same once more if the expert is
trained, for the weight gradient. With load_P the rows of each rank, and trained_P those at trained experts,

    step = sum over layers of  max_P load + max_P (load + trained),        even = the same with means for the maxima,

and step / even is 1 if no rank waits. Attention, the exchange of tokens and the rest do not depend on the placement and
are left out, so a whole step gains less. An expert lies on one rank. Hence max / mean of the load is at least P times
the share of the layer's busiest expert, under any placement. That is the floor.

Raw routing logs (a line per forward) are cut in two. Experts are placed by the first half of each file's lines and
measured on the second half. A summary has no halves: it is measured on the scores that placed it, which flatters it.

Legend: E experts, L MoE layers, P ranks.
"""

import argparse
import functools
import operator
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.files import check_output
from deepseek.placement import Placement, imbalance, place_layers
from deepseek.routing import RouterCounts, read_logs
from esft import ExpertConfig, ExpertScores
from evaluation.figures import new_figure, save_figure
from scripts.experiments.common import publish
from utils import command_parser, markdown_table, positive, run_cli

LOOKS = {
    "contiguous": {"color": "#969696", "label": "contiguous"},
    "score": {"color": "#08519c", "label": "by score"},
}
Loads = Mapping[int, Mapping[int, float]]  # [layer][expert] -> routed rows, in any unit


@dataclass(frozen=True)
class Recording:
    """The routing that places the experts, and the routing that measures the placement."""

    name: str
    how: str
    place_LE: Loads
    measure_LE: Loads


Found = list[tuple[Recording, list[dict]]]  # the results of each number of ranks


# --------------------------------------------------------------------------------------------------------------------
# recorded routing


def read_recordings(path: Path) -> list[Recording]:
    """Return a folder's logs, in two halves, and its summary.json, as far as they exist, or the scores in a file.

    Raises:
        ValueError, FileNotFoundError: nothing is there, something is damaged, or a log has a single forward.
    """
    folders = sorted(folder for folder in path.glob("rank_*") if folder.is_dir()) or [path]
    logs = [log for folder in folders for log in sorted(folder.glob("expert_weights_*.txt"))[:1]]  # one per rank
    recordings, width = [], 0
    if not logs or (path / "summary.json").is_file():
        score_LE = ExpertScores.load(path)["token"]
        how = "placed by the token scores and measured on the same scores, so flattered"
        recordings.append(Recording("summary", how, score_LE, score_LE))
        width = max(map(len, score_LE.values()))
    if logs:
        recordings.insert(0, read_halves(path, logs, width))
    return recordings


def read_halves(folder: Path, logs: list[Path], width: int) -> Recording:
    """Return the routed rows in each half of each rank's forwards; at least `width` experts per layer."""
    counts, halves = iter(read_logs(folder)), ([], [])
    for log in logs:
        forwards = len(log.read_text(encoding="utf-8").splitlines())
        if forwards < 2:
            raise ValueError(f"cannot halve {log}: it has one forward. Give a file of scores instead.")
        for number in range(forwards):
            halves[number >= forwards // 2].append(next(counts))
    first, second = (functools.reduce(operator.add, half) for half in halves)
    how = (
        f"placed by the first half of each routing log ({first.tokens:,} tokens) and measured on the second "
        f"({second.tokens:,}); layers {', '.join(map(str, first.layers))}; the trained experts were selected on both"
    )
    return Recording("held out", how, rows_by_expert(first, width), rows_by_expert(second, width))


def rows_by_expert(counts: RouterCounts, width: int) -> Loads:
    slots_LE = zip(counts.layers, counts.sums["slots"].tolist())
    return {layer: dict(enumerate(slots_E + [0] * (width - len(slots_E)))) for layer, slots_E in slots_LE}


# --------------------------------------------------------------------------------------------------------------------
# simulation


def step_time(
    placements: Mapping[int, Placement], trained_L: Mapping[int, tuple[int, ...]], load_LE: Loads
) -> dict[str, float]:
    """Return the mean over layers of "step", and of "even", the step if no rank waited; 1 is a rank's mean rows."""
    step = even = 0.0
    for layer, placement in placements.items():
        trained, mean = set(trained_L.get(layer, ())), sum(load_LE[layer].values()) / len(placement)
        load_P = [sum(load_LE[layer][e] for e in ids) / mean for ids in placement]
        trained_P = [sum(load_LE[layer][e] for e in ids if e in trained) / mean for ids in placement]
        step += max(load_P) + max(map(sum, zip(load_P, trained_P)))
        even += 2 + sum(trained_P) / len(placement)
    return {"step": step / len(placements), "even": even / len(placements)}


def simulate(recording: Recording, trained_L: Mapping[int, tuple[int, ...]], ranks: int) -> dict:
    """Return the measures of both placements on this number of ranks."""
    load_LE = recording.measure_LE
    sizes_L = {layer: len(load_E) for layer, load_E in load_LE.items()}
    floors = [max(1, ranks * max(load_E.values()) / sum(load_E.values())) for load_E in load_LE.values()]
    result: dict = {"ranks": ranks, "floor": sum(floors) / len(floors)}
    for kind in LOOKS:
        placements = place_layers(sizes_L, trained_L, ranks, recording.place_LE, contiguous=kind == "contiguous")
        result[kind] = imbalance(placements, trained_L, load_LE) | step_time(placements, trained_L, load_LE)
    return result


def check_config(config: ExpertConfig, recordings: list[Recording]) -> None:
    """Raise ValueError if the config selects no recorded expert, or an unknown expert of a recorded layer."""
    load_LE = recordings[-1].measure_LE  # a summary has all layers, logs may have some
    chosen = [(layer, e) for layer in load_LE for e in config.experts.get(layer, ())]
    if not chosen or not all(e in load_LE[layer] for layer, e in chosen):
        raise ValueError("cannot measure: the expert config names other experts than the scores. Give the model's own.")


# --------------------------------------------------------------------------------------------------------------------
# table and picture


def format_results(results: list[dict]) -> str:
    """Return Markdown with one line per number of ranks."""
    head = ["ranks", "load", "worst layer", "floor", "trained experts", "step / even", "contiguous step / ours"]
    rows = []
    for r in results:
        old, new = (r[kind] for kind in LOOKS)
        pairs = [
            f"{old[key] / old.get(unit, 1):.2f} -> **{new[key] / new.get(unit, 1):.2f}**"
            for key, unit in (("load", ""), ("load_worst", ""), ("trained", ""), ("step", "even"))
        ]
        floor, gain = f"{r['floor']:.2f}", f"{old['step'] / new['step']:.2f}"
        rows.append([r["ranks"], *pairs[:2], floor, *pairs[2:], gain])
    return markdown_table(head, rows)


def report(title: str, config: ExpertConfig, found: Found, skipped: list[int]) -> str:
    """Return the page of the results as Markdown."""
    parts = [
        f"# Placement of experts: {title}",
        "Simulated, contiguous -> **by score**. Load is max / mean over ranks of the routed rows, on average over "
        "layers; floor is the least that any placement could have; trained experts is max / mean of their number, "
        "all layers together; step / even is the simulated time of the experts in a step, 1 where no rank waits for "
        "another (`scripts/experiments/placement.py` has the formula). All else of a step is left out.",
    ]
    for recording, results in found:
        unknown = config.experts.keys() - recording.measure_LE.keys()
        rest = f"; no log of {len(unknown)} more layers of the expert config" if unknown else ""
        parts += [f"**{recording.name.capitalize()}**: {recording.how}{rest}.", format_results(results)]
    if skipped:
        parts.append(f"Left out: {', '.join(map(str, skipped))} ranks, more than a layer has experts.")
    return "\n\n".join(parts)


def draw(title: str, found: Found):
    """Return a figure of load and step over the number of ranks, with a row per recording."""
    figure, panels = new_figure(9, 0.8 + 2.9 * len(found), nrows=len(found), sharex=True, squeeze=False)
    for (recording, results), (left, right) in zip(found, panels):
        ranks = [r["ranks"] for r in results]
        for kind, look in LOOKS.items():
            left.plot(ranks, [r[kind]["load"] for r in results], "o-", **look)
            worst = {**look, "label": f"{look['label']}, worst layer", "lw": 1}
            left.plot(ranks, [r[kind]["load_worst"] for r in results], "--", **worst)
            right.plot(ranks, [r[kind]["step"] / r[kind]["even"] for r in results], "o-", **look)
        left.plot(ranks, [r["floor"] for r in results], ":", color="black", lw=1, label="floor of any placement")
        left.set(title=f"{recording.name}: load of the busiest rank", ylabel="max / mean")
        right.set(title=f"{recording.name}: time of the experts in a step", ylabel="step / even")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ranks, ranks)
            axes.set_ylim(bottom=0.95)
            axes.set_xlabel("ranks that share the experts")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    figure.suptitle(title)
    return figure


# --------------------------------------------------------------------------------------------------------------------
# command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--expert_scores_dir", required=True, metavar="DIR", help="a folder of summary.json, of raw routing logs "
        "(expert_weights_<layer>.txt), or of both; or a file of scores")  # fmt: skip
    add("--expert_config", required=True, metavar="FILE", help="the trained experts: an expert config, or an adapter")
    add("--output", default="results/tables/placement", metavar="PATH", help="write PATH.md, a table, PATH.json, "
        "all results, and PATH.png, a picture (default: %(default)s)")  # fmt: skip
    add("--ranks", type=positive, nargs="+", default=[2, 4, 8, 16, 32, 64], metavar="N", help="values of ep_size, the "
        "ranks that share the experts (default: 2 4 8 16 32 64)")  # fmt: skip
    add("--title", metavar="TEXT", help="name of the recording (default: the name of the scores' folder)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Found:
    """Simulate, write the files, and return the recordings with their results."""
    args = parse_args(argv)
    check_output(f"{args.output}.md")
    source = Path(args.expert_scores_dir).resolve()
    recordings, config = read_recordings(Path(args.expert_scores_dir)), ExpertConfig.load(args.expert_config)
    check_config(config, recordings)
    fewest = min(len(load_E) for recording in recordings for load_E in recording.measure_LE.values())
    taken = [ranks for ranks in args.ranks if ranks <= fewest] or args.ranks  # place_layers refuses too many
    skipped = [ranks for ranks in args.ranks if ranks not in taken]
    found = [(recording, [simulate(recording, config.experts, ranks) for ranks in taken]) for recording in recordings]
    title = args.title or (source if source.is_dir() else source.parent).name
    told = [{"name": recording.name, "how": recording.how, "results": results} for recording, results in found]
    page = report(title, config, found, skipped)
    publish(args, __file__, argv, page, "no chance is involved", title=title, skipped_ranks=skipped, recordings=told)
    save_figure(draw(title, found), f"{args.output}.png")
    return found


if __name__ == "__main__":
    run_cli(main)
