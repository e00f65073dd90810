"""Compare methods and rules of selection by what they learn and what they forget, on results/models/tiny, as tables.

    python scripts/experiments/frontier.py --parts=a,b,c --output=results/tables/frontier

    a  the paper's rule, gradients over all layers without and with the shared experts, and LoRA, at four shares of the
       parameters, and full fine-tuning
    b  all other rules at 7 %, and random experts
    c  the rows of (a) on the tasks that are not in --tasks, with the first seed
    d  the other rules at the other shares, with the first seed and the rates of 7 %
    e  LoRA on selected experts: those that hold a quarter of the parameters, at a rank that trains the share
    f  what a run can do while it trains, at 7 %: replay, distillation, a pull to the base, other experts, routers, Muon

Every method is taken at the best of three learning rates and of four strengths. They are chosen on questions that are
not the test's, as the note on each page says. Some rows take the rate of another: rules at 15 %, and those of (b) at
every share, that of 7 %; random experts and the rows of (f), but for Muon, that of the paper's rule. LoRA takes the
rank that trains as many parameters. Rows with the shared experts select fewer routed ones: together they are the share.

A finished run has a file in --work_dir. The same command continues, also on another day with more parts or seeds, and
gives the same tables. A run is made again when its settings, data, base or versions change. After a change of the code,
remove the folder. Brackets are 95 % t intervals over seeds.
"""

import argparse
import shlex
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.files import check_output, write_json, write_text
from evaluation.figures import check_picture, save_figure
from evaluation.frontier import Point, draw_frontier
from scripts.experiments.frontier_runs import FrontierLab
from scripts.experiments.frontier_study import NAMES, ON_OTHER_TASKS, PAPER, PARTS, SHARES, Row, Study
from scripts.experiments.paper_results import half_width, interval
from scripts.experiments.paper_runs import TASKS
from utils import command_parser, locked, markdown_table, positive, run_cli, seed_number

# ---- tables: each function returns Markdown, and rows for the JSON ---------------------------------------------------

Table = tuple[str, list[dict]]


def scores_table(study: Study, rows: list[Row]) -> Table:
    """Return a line per row: rate and strengths, the score on each task, the general skills, and what it takes."""
    tasks, seeds = study.tasks, study.seeds
    base = [study.curve(rows[0], task, study.first)[0] for task in tasks]
    cells = [*(f"{point.task:.1f}" for point in base), f"{statistics.fmean(p.task for p in base):.1f}"]
    lines, found = [["base", "-", "-", *cells, f"{base[0].general:.1f}", "-", "-", "-"]], []
    for row in rows:
        points = {task: [study.taken(row, task, seed) for seed in seeds] for task in tasks}
        by_task = {task: [point.task for point in own] for task, own in points.items()}
        average = [statistics.fmean(by_task[task][i] for task in tasks) for i in range(len(seeds))]
        general = [statistics.fmean(points[task][i].general for task in tasks) for i in range(len(seeds))]
        strengths = {task: study.strength(row, task) for task in tasks}
        shown = " ".join(f"{strength:g}" for strength in strengths.values())
        scores = [interval(values) for values in (*by_task.values(), average, general)]
        cost = study.cost(row)
        takes = [f"{cost['trained']:.1%}", f"{cost['held_mib']:.1f} MiB", f"{cost['step_seconds']:.2f}"]
        lines.append([row.label, study.rate_of[row], shown, *scores, *takes])
        curves = {task: [[vars(p) for p in study.curve(row, task, seed)] for seed in seeds] for task in tasks}
        values = {"tasks": by_task, "average": average, "general": general, "strength": strengths, "curves": curves}
        found.append({"name": row.name, "share": row.share, "learning_rate": study.rate_of[row], **values, **cost})
    heads = ["row", "rate", "strength", *tasks, "average", "general", "trained", "gradients, states", "step (s)"]
    return markdown_table(heads, lines), found


def comparison(study: Study, pairs: list[tuple[Row, Row]]) -> Table:
    """Return a line per pair: what one learns and keeps more than the other, and whether it dominates."""
    lines, found = [], []
    for one, other in pairs:
        by = {
            "learns": differences(study.learned(one), study.learned(other)),
            "keeps": differences(study.kept(one), study.kept(other)),
            "learns_at_equal_loss": differences(study.learned_within(one), study.learned_within(other)),
            "keeps_at_equal_learning": study.keeps_at_equal_learning(one, other),
        }
        said = verdict(by["learns"], by["keeps"])
        lines.append([one.label, other.label, *(interval(values, "+.1f") for values in by.values()), said])
        found.append({"one": one.label, "other": other.label, **by, "verdict": said})
    heads = ["learns more by", "keeps more by", "learns more at equal loss by", "keeps more at equal learning by"]
    return markdown_table(["one", "other", *heads, "verdict"], lines), found


def differences(ones: list[float], others: list[float]) -> list[float]:
    return [one - other for one, other in zip(ones, others, strict=True)]


def verdict(learns: list[float], keeps: list[float]) -> str:
    """Return whether the first of a pair dominates: one difference is certainly above 0, and the other not below."""
    if len(learns) < 2:
        return "one seed"
    for sign, word in (1, "dominates"), (-1, "is dominated"):
        means = [sign * statistics.fmean(values) for values in (learns, keeps)]
        certain = [mean > half_width(values) for mean, values in zip(means, (learns, keeps))]
        if any(certain) and min(means) >= 0:
            return word
    return "neither"


def best_rows(study: Study, rows: list[Row]) -> list[Row]:
    """Return the share of each method that learns most on the validation questions. The smaller one of equals."""
    names = dict.fromkeys(row.name for row in rows)
    own = {name: [row for row in rows if row.name == name] for name in names}
    return [max(among, key=lambda row: (study.validated(row), -row.share)) for among in own.values()]


def pairs_of(study: Study, rows: list[Row]) -> list[tuple[Row, Row]]:
    """Return each row with the paper's rule at its share; with several seeds also the methods, at their best shares."""
    same = [(row, Row(PAPER, row.share)) for row in rows if row.share and row.name != PAPER]
    best = best_rows(study, rows) if len(study.seeds) > 1 else []
    among = [(a, b) for i, a in enumerate(best) for b in best[i + 1 :]]
    return list({frozenset(pair): pair for pair in [*among, *same]}.values())


def mean_curve(study: Study, row: Row) -> list[Point]:
    """Return a row's points at all strengths, from the base on, averaged over tasks and seeds."""
    curves = [study.curve(row, task, seed) for task in study.tasks for seed in study.seeds]
    averages = [
        (statistics.fmean(point.task for point in points), statistics.fmean(point.general for point in points))
        for points in zip(*curves)
    ]
    return [Point(row.label, point.strength, *mean, row.share) for point, mean in zip(curves[0], averages)]


NOTE = """Each row is at its best learning rate and strength: those that learn most on validation questions and lose at
most 2 points of the general skills there. Both are found with the first seed, the rate on the tasks of part a together,
and the strength for each task. Rules at 15 %, and those of part b at every share, take the rate of 7 %. Random experts
and runs with one key more, but for Muon, take that of the paper's rule. Scores are those on the test questions;
brackets are 95 % t intervals over seeds. The time of a step is a median, and two runs shared the machine: compare times
by benchmark.py.

The differences are in points, seed by seed, averaged over the tasks. The last two follow both curves over strengths.
There the test questions choose the strength, for both rows. "At equal loss": the most that a row learns where it loses
at most 1 point of the general skills. "At equal learning": what a row keeps where it has learned the most that both
rows reach. One dominates the other if it is certainly better in learning or in keeping (the interval is above 0), and
on average not worse in the other."""


# ---- the command ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--parts", default="a,b,c", metavar="LIST", help="parts, separated by commas (default: %(default)s)")
    add("--tasks", nargs="+", choices=TASKS, default=["law", "summary"], metavar="TASK", help="tasks with all seeds, "
        "on which rates are found (default: law summary)")  # fmt: skip
    add("--seeds", type=seed_number, nargs="+", default=[0, 1, 2], metavar="N", help="the first finds rates and "
        "strengths (default: 0 1 2)")  # fmt: skip
    add("--shares", type=float, nargs="+", choices=SHARES, default=list(SHARES), metavar="S", help="of the parameters "
        f"(default: {' '.join(map(str, SHARES))})")  # fmt: skip
    add("--methods", nargs="+", choices=NAMES, metavar="NAME", help="only these (default: all of "
        f"the parts; {', '.join(NAMES)})")  # fmt: skip
    add("--steps", type=positive, default=450, metavar="N", help="optimizer steps of a run (default: %(default)s)")
    add("--jobs", type=positive, default=2, metavar="N", help="runs at a time, with one thread each (default: 2)")
    add("--work_dir", default="results/runs/frontier", metavar="DIR", help="finished runs (default: %(default)s)")
    add("--output", metavar="STEM", help="write STEM_a.md, .json and .svg, ... (default: print only)")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    if unknown := set(args.parts) - PARTS.keys():
        raise ValueError(f"cannot run part {min(unknown)!r}. Give some of {', '.join(PARTS)} in --parts.")
    return args


def rows_of(part: str, args: argparse.Namespace) -> list[Row]:
    """Return the rows of a part that the flags leave."""
    rows = [row for row in PARTS[part][1] if row.share in (0, *args.shares)]
    return [row for row in rows if row.name in (args.methods or [row.name])]


def main(argv: list[str] | None = None) -> dict[str, str]:
    """Run the parts, and return the tables of each."""
    args = parse_args(argv)
    check_output(args.work_dir, folder=True)
    if args.output:
        check_picture(f"{args.output}_a.svg")
    if empty := [part for part in args.parts if not rows_of(part, args)]:
        raise ValueError(f"cannot run part {empty[0]}: --methods and --shares leave nothing of it.")
    if ON_OTHER_TASKS & set(args.parts) and set(args.tasks) == set(TASKS):
        raise ValueError("cannot run part c: --tasks leaves no other task. Leave one out there, or c in --parts.")
    with locked(args.work_dir):
        study, tables = Study(args, FrontierLab(args)), {}
        rows = {part: rows_of(part, args) for part in args.parts}
        study.run(rows)
        for part in args.parts:
            study.lab.used.clear()
            tables[part] = write_part(study.for_part(part), part, rows[part])
    return tables


def command_of(part: str, decides: dict) -> str:
    """Return the command that makes the tables of a part: its flags that are not at their defaults."""
    words, defaults = ["python", "scripts/experiments/frontier.py", f"--parts={part}"], parse_args([])
    for name, value in decides.items():
        if value != getattr(defaults, name):
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return shlex.join(map(str, words))


def write_part(study: Study, part: str, rows: list[Row]) -> str:
    """Print and write the tables and the picture of a part. Return the tables."""
    text, found = scores_table(study, rows)
    compared, pairs = comparison(study, pairs_of(study, rows))
    text += f"\n\n{compared}"
    print(f"\n{PARTS[part][0]}\n\n{text}")
    args = study.args
    if args.output:
        stem = f"{args.output}_{part}"
        tasks, seeds = study.tasks, study.seeds
        how = f"tasks {' '.join(tasks)}, seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}, {args.steps} steps"
        decides = {name: getattr(args, name) for name in ("tasks", "seeds", "shares", "methods", "steps")}
        source = f"`{command_of(part, decides)}`, {how}; {study.lab.origin()}"
        write_text(f"{stem}.md", f"# {PARTS[part][0]}\n\n{text}\n\n{NOTE}\n\n{source}\n")
        facts = {"made_by": source, "arguments": decides, "environments": study.lab.environments()}
        write_json(f"{stem}.json", {"rows": found, "pairs": pairs, **facts})
        curves = [mean_curve(study, row) for row in rows]
        base, points = curves[0][0], [point for curve in curves for point in curve[1:]]
        labels = f"{PARTS[part][0]}: {', '.join(tasks)}", "general skills (%)", "mean of the tasks (%)"
        save_figure(draw_frontier(points, base, None, *labels), f"{stem}.svg")
    return text


if __name__ == "__main__":
    run_cli(main)
