"""Repeat the paper's comparisons and ablations on results/models/tiny, with several seeds, as tables.

    python scripts/experiments/paper.py --parts=r,a,b,c,d,e,f --output=results/tables/paper

    r  learning rates: what each method learns and keeps at each, on law, with the first seed
    a  base, full, LoRA, ESFT-Token, ESFT-Gate and random experts on four tasks and the general skills (table 1)
    b  which parts are trained: selected experts, shared experts, non-expert modules (the ablation of section 6)
    c  how many experts: top_p, and the n_sample_tokens that select them
    d  how fine experts are: bases with 16, 32 and 64 experts of equal total size (pretrained first, 20 minutes each)
    e  memory and storage of the methods in a, and the time of a step, measured in turns
    f  which tasks use the same experts

A run trains and evaluates one method on one task with one seed. The seed draws the order of the data, and random
experts. A finished run has a file in --work_dir. After an interruption the same command continues and gives the same
tables. A run is made again when its data, base or versions change. After a change of the code, remove the folder.

Forgetting depends on the learning rate more than on anything else. Methods are therefore compared at equal forgetting.
Each has one rate for all tasks, the largest in r that costs at most 5 points of the general skills on law. Random
experts have the rate of the selected ones. Brackets are 95 % t intervals of the mean over seeds.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.files import check_output, write_json, write_text
from esft import ExpertScores, select_experts
from evaluation.selection import overlap
from scripts.experiments.paper_results import interval, largest_rate, save_pictures, write_claims
from scripts.experiments.paper_runs import GATE, TASKS, TINY, Lab, Run
from utils import command_parser, locked, markdown_table, note, positive, run_cli

TRIED = ("2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2")  # learning rates of part r
FORGOTTEN = 5.0  # points of general skills that a learning rate may cost on law
ROUNDS, TIMED_STEPS = 5, 40  # of part e

# ---- what is run: the name of a row -> the settings of its runs ------------------------------------------------------

METHODS: dict[str, dict] = {
    "base": {"method": "base", "seed": 0},
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "esft-token": {},
    "esft-gate": GATE,
    "random, as many as token": {"method": "random"},
    "random, as many as gate": {"method": "random", **GATE},
}
VARIANTS: dict[str, dict] = {
    "experts": {},
    "experts, shared": {"shared": True},
    "shared": {"experts": False, "shared": True},
    "shared, all else": {"experts": False, "shared": True, "all_else": True},
    "experts, shared, all else": {"shared": True, "all_else": True},
}
AMOUNTS: dict[str, dict] = {
    **{f"top_p {p:g}": {"top_p": p} for p in (0.05, 0.1, 0.2, 0.35, 0.5, 0.8)},
    **{f"n_sample_tokens {n:,}": {"n_sample_tokens": n} for n in (512, 2048, 16384)},
}


def grains(base: Callable[[int], str]) -> dict[str, dict]:
    return {
        f"{experts} experts: {name}": {**METHODS[name], "base": base(experts)}
        for experts in (16, 32, 64)
        for name in ("base", "full", "esft-token")
    }


def runs_of(rows: dict[str, dict], tasks: list[str], seeds: list[int]) -> dict[tuple, Run]:
    """Return the runs of rows by (name, task, seed)."""
    keys = [(name, task, seed) for task in tasks for seed in seeds for name in rows]
    return {(name, task, seed): Run(task, **{"seed": seed, **rows[name]}) for name, task, seed in keys}


def runs_of_part(part: str, lab: Lab) -> dict[tuple, Run]:
    """Return the runs of a part by (name, task, seed), where the name may be a pair; none for parts without a seed."""
    seeds, tasks = lab.args.seeds, list(TASKS) if part == "a" else lab.args.ablation_tasks
    if part == "r":
        names = [name for name in METHODS if name != "base" and not name.startswith("random")]
        rows = {(name, rate): {**METHODS[name], "learning_rate": rate} for name in names for rate in TRIED}
        return runs_of({"base": METHODS["base"], **rows}, ["law"], seeds[:1])
    if part == "d":
        return runs_of(grains(lab.base), tasks, seeds)
    return runs_of({"a": METHODS, "b": VARIANTS, "c": AMOUNTS}.get(part, {}), tasks, seeds)


# ---- tables: each function returns Markdown, and rows for the JSON ---------------------------------------------------

Table = tuple[str, list[dict]]


def comparison(lab: Lab, runs: dict[tuple, Run]) -> Table:
    """Return one line per name, with the score on each task, their mean, and the general skills.

    The mean over tasks and the general skills are computed per seed first.
    """
    names, tasks, seeds = (list(dict.fromkeys(column)) for column in zip(*runs))
    lines, rows = [], []
    for name in names:
        own = seeds[:1] if runs[name, tasks[0], seeds[0]].method == "base" else seeds
        found = {(task, seed): lab.result(runs[name, task, seed]) for task in tasks for seed in own}
        by_task = {task: [found[task, seed]["scores"][task] for seed in own] for task in tasks}
        average = [statistics.fmean(by_task[task][i] for task in tasks) for i in range(len(own))]
        general = [statistics.fmean(found[task, seed]["scores"]["general"] for task in tasks) for seed in own]
        trained = [r["trained"] for r in found.values() if r["trained"]]
        share = [r["trained_parameters"] / r["parameters"] for r in trained]
        cells = [interval(values) for values in (*by_task.values(), average, general)]
        lines.append([name, *cells, f"{statistics.fmean(share):.1%}" if share else "-"])
        rows.append({"name": name, "tasks": by_task, "average": average, "general": general, "share": share})
    return markdown_table(["trained", *tasks, "average", "general", "share"], lines), rows


def learning_rates(lab: Lab, runs: dict[tuple, Run]) -> Table:
    """Return one line per method and rate. Warn where the rates of the other parts are not those found here."""
    (_, base), *found = [(name, lab.result(run)) for (name, *_), run in runs.items()]
    rows = [
        {"name": name, "learning_rate": rate, "validation_loss": result["trained"]["eval_loss"],
         "average": [result["scores"]["law"]], "general": [result["scores"]["general"]]}
        for (name, rate), result in found
    ]  # fmt: skip
    taken = {name: Run("law", **METHODS[name]).rate for name in dict.fromkeys(row["name"] for row in rows)}
    for name, rate in taken.items():
        if (best := largest_rate(rows, name, base["scores"]["general"] - FORGOTTEN)) != rate:
            note(f"part r says {best} for {name}, and the other parts take {rate}")
    lines = []
    for row in rows:
        rate = row["learning_rate"]
        shown = f"**{rate}**" if rate == taken[row["name"]] else rate
        loss = f"{row['validation_loss']:.4f}"
        lines.append([row["name"], shown, loss, interval(row["average"]), interval(row["general"])])
    return markdown_table(["trained", "learning rate", "validation loss", "law", "general"], lines), rows


def costs(lab: Lab, _runs: dict) -> Table:
    """Time every method in each round, one at a time. A ratio compares two methods of one round."""
    named = {name: Run("law", **{"seed": lab.args.seeds[0], **METHODS[name]}) for name in list(METHODS)[1:]}
    rounds = [
        {name: lab.timed(run, number, TIMED_STEPS) for name, run in named.items()}
        for number in tqdm(range(ROUNDS), unit="round", desc="timing")
    ]
    lines, rows = [], []
    for name in named:
        ratios = [one[name]["step_seconds"] / one["full"]["step_seconds"] for one in rounds]
        peak, saved = rounds[0][name]["peak_memory_bytes"] / 2**20, rounds[0][name]["saved_bytes"] / 2**20
        rows.append({"name": name, "step_to_full": ratios, "peak_mib": peak, "saved_mib": saved})
        step = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        lines.append([name, step, f"{peak:,.0f} MiB", f"{saved:,.2f} MiB"])
    return markdown_table(["trained", "time of a step / full's", "peak memory", "saved"], lines), rows


def shared_experts(lab: Lab, _runs: dict) -> Table:
    names = (*TASKS, "general")
    scores = [ExpertScores.load(lab.scores(TINY, name)) for name in names]
    sizes = {layer: len(experts) for layer, experts in scores[0].by_function["token"].items()}
    shared = overlap([select_experts(one) for one in scores], sizes)
    rows = [{"name": a, **{b: cell["jaccard"] for b, cell in zip(names, row)}} for a, row in zip(names, shared)]
    lines = [[row["name"], *(f"{row[b]:.2f}" for b in names)] for row in rows]
    return markdown_table(["Jaccard index", *names], lines), rows


PARTS: dict[str, tuple[str, Callable[[Lab, dict[tuple, Run]], Table]]] = {  # letter -> title, table
    "r": ("Learning rates on law, one seed; bold: taken in the other tables", learning_rates),
    "a": ("Methods on the tasks, and what is left of the general skills", comparison),
    "b": ("What is trained", comparison),
    "c": ("How much of it, and how many tokens select it", comparison),
    "d": ("Granularity: experts of equal size together", comparison),
    "e": ("Time, memory and storage, in rounds side by side", costs),
    "f": ("Experts that tasks share, of those that either chooses (token score, top_p 0.2)", shared_experts),
}


def made_by(lab: Lab, part: str) -> str:
    """Return the command of a part's table, and the dates and versions of its results."""
    steps = TIMED_STEPS if part == "e" else lab.args.steps
    seeds = " ".join(map(str, lab.args.seeds[: 1 if part in "re" else None]))
    brackets = "; brackets: 95 % t interval of the mean over seeds"
    brackets = {"r": "", "e": "; brackets: shortest and longest of the rounds"}.get(part, brackets)
    tasks = f", tasks {' '.join(lab.args.ablation_tasks)}" if part in "bcd" else ""
    how = "" if part == "f" else f"{tasks}, seed{'s' * (' ' in seeds)} {seeds}, {steps} steps{brackets}"
    return f"`python scripts/experiments/paper.py --parts={part}`{how}; {lab.origin()}"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--parts", default="r,a,b,c,e,f", metavar="LIST", help="parts, separated by commas (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="one run of everything for each "
        "(default: 0 1 2)")  # fmt: skip
    add("--steps", type=positive, default=450, metavar="N", help="optimizer steps of a run (default: %(default)s)")
    add("--ablation_tasks", nargs="+", choices=TASKS, default=["law", "summary"], metavar="TASK", help="tasks of b, c "
        "and d (default: law summary)")  # fmt: skip
    add("--pretrain_tokens", type=positive, default=5_500_000, metavar="N", help="tokens to pretrain the bases of d "
        "(default: %(default)s)")  # fmt: skip
    add("--jobs", type=positive, default=2, metavar="N", help="runs at a time, with one thread each (default: 2)")
    add("--work_dir", default="results/runs/paper", metavar="DIR", help="finished runs (default: %(default)s)")
    add("--output", metavar="STEM", help="write STEM_a.md, STEM_a.json, ..., and from all parts that exist "
        "STEM_claims.md and pictures (default: print only)")  # fmt: skip
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    if unknown := set(args.parts) - PARTS.keys():
        raise ValueError(f"cannot run part {min(unknown)!r}. Give some of {', '.join(PARTS)} in --parts.")
    return args


def main(argv: list[str] | None = None) -> dict[str, str]:
    """Run the parts, and return the table of each."""
    args = parse_args(argv)
    check_output(args.work_dir, folder=True)
    if args.output:
        check_output(f"{args.output}_a.md")
    with locked(args.work_dir):
        lab = Lab(args)
        runs = make_runs(lab)
        tables = {}
        for part in args.parts:
            lab.used.clear()
            title, make_table = PARTS[part]
            tables[part], rows = make_table(lab, runs[part])
            print(f"\n{title}\n\n{tables[part]}")
            if args.output:
                write_part(lab, part, tables[part], rows)
        if args.output:
            print(f"\n{write_claims(args.output)}\n\nwritten to {args.output}_*")
            save_pictures(args.output)
    return tables


def make_runs(lab: Lab) -> dict[str, dict[tuple, Run]]:
    """Make what is not there yet, several runs at a time. Return the runs of each part."""
    if "d" in lab.args.parts:
        with ThreadPoolExecutor(lab.args.jobs) as pool:
            list(tqdm(pool.map(lab.base, (16, 32)), total=2, unit="base", desc="pretraining"))
    parts = {part: runs_of_part(part, lab) for part in lab.args.parts}
    lab.make((run for runs in parts.values() for run in runs.values()), "paper")
    return parts


def write_part(lab: Lab, part: str, table: str, rows: list[dict]) -> None:
    stem, source = f"{lab.args.output}_{part}", made_by(lab, part)
    write_text(f"{stem}.md", f"# {PARTS[part][0]}\n\n{table}\n\n{source}\n")
    decides = {name: getattr(lab.args, name) for name in ("seeds", "steps", "ablation_tasks", "pretrain_tokens")}
    facts = {"made_by": source, "arguments": decides, "environments": lab.environments()}
    write_json(f"{stem}.json", {"rows": rows, **facts})


if __name__ == "__main__":
    run_cli(main)
