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
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek.files import check_output, suggest, write_json, write_text
from esft import ExpertScores, select_experts
from evaluation.selection import overlap
from scripts.experiments import paper_results
from scripts.experiments.paper_results import interval
from scripts.experiments.paper_runs import GATE, TASKS, TINY, Lab, Run
from utils import command_parser, environment, locked, markdown_table, note, positive, run_cli

PARTS = "rabcdef"
TRIED = ("2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2")  # learning rates of part r
FORGOTTEN = 5.0  # points of general skills that a learning rate may cost on law
ROUNDS, TIMED_STEPS = 5, 40  # of part e

# ---- the parts: what is run, and the tables of it --------------------------------------------------------------------


def methods_of(task: str, seed: int) -> dict[str, Run]:
    return {
        "base": Run(task, "base"),
        "full": Run(task, "full", seed),
        "lora": Run(task, "lora", seed),
        "esft-token": Run(task, "esft", seed),
        "esft-gate": Run(task, "esft", seed, **GATE),
        "random, as many as token": Run(task, "random", seed),
        "random, as many as gate": Run(task, "random", seed, **GATE),
    }


def variants_of(task: str, seed: int) -> dict[str, Run]:
    one = Run(task, "esft", seed)
    return {
        "experts": one,
        "experts, shared": dataclasses.replace(one, shared=True),
        "shared": dataclasses.replace(one, experts=False, shared=True),
        "shared, all else": dataclasses.replace(one, experts=False, shared=True, all_else=True),
        "experts, shared, all else": dataclasses.replace(one, shared=True, all_else=True),
    }


def amounts_of(task: str, seed: int) -> dict[str, Run]:
    one = Run(task, "esft", seed)
    by_p = {f"top_p {p:g}": dataclasses.replace(one, top_p=p) for p in (0.05, 0.1, 0.2, 0.35, 0.5, 0.8)}
    by_n = {f"n_sample_tokens {n:,}": dataclasses.replace(one, n_sample_tokens=n) for n in (512, 2048, 16384)}
    return by_p | by_n


def grains_of(base: Callable[[int], str], task: str, seed: int) -> dict[str, Run]:
    methods = {name: run for name, run in methods_of(task, seed).items() if name in ("base", "full", "esft-token")}
    return {
        f"{experts} experts: {name}": dataclasses.replace(run, base=base(experts))
        for experts in (16, 32, 64)
        for name, run in methods.items()
    }


def comparison(lab: Lab, named: Callable[[str, int], dict[str, Run]], tasks: Iterable[str], seeds: list[int]) -> tuple:
    """Return runs and their table: one line per name, with the score on each task, their mean and general skills.

    The mean over tasks and the general skills are computed per seed first.
    """
    tasks = list(tasks)
    runs = {(name, task, seed): run for task in tasks for seed in seeds for name, run in named(task, seed).items()}

    def table() -> tuple[str, list[dict]]:
        lines, rows = [], []
        for name in dict.fromkeys(name for name, *_ in runs):
            own = seeds[:1] if runs[name, tasks[0], seeds[0]].method == "base" else seeds
            found = {(task, seed): lab.result(runs[name, task, seed]) for task in tasks for seed in own}
            by_task = {task: [found[task, seed]["scores"][task] for seed in own] for task in tasks}
            average = [statistics.fmean(by_task[task][i] for task in tasks) for i in range(len(own))]
            general = [statistics.fmean(found[task, seed]["scores"]["general"] for task in tasks) for seed in own]
            trained = [r["trained"] for r in found.values() if r["trained"]]
            share = [r["trained_parameters"] / r["parameters"] for r in trained]
            shown = f"{statistics.fmean(share):.1%}" if share else "-"
            lines.append(
                [name, *(interval(by_task[task]) for task in tasks), interval(average), interval(general), shown]
            )
            rows.append({"name": name, "tasks": by_task, "average": average, "general": general, "share": share})
        return markdown_table(["trained", *tasks, "average", "general", "share"], lines), rows

    return list(runs.values()), table


def part_r(lab: Lab):
    methods = {name: run for name, run in methods_of("law", lab.args.seeds[0]).items() if run.method != "random"}
    base = methods.pop("base")
    runs = {
        (name, rate): dataclasses.replace(run, learning_rate=rate) for name, run in methods.items() for rate in TRIED
    }

    def table() -> tuple[str, list[dict]]:
        found = {key: lab.result(run) for key, run in runs.items()}
        rows = [
            {"name": name, "learning_rate": rate, "validation_loss": result["trained"]["eval_loss"],
             "average": [result["scores"]["law"]], "general": [result["scores"]["general"]]}
            for (name, rate), result in found.items()
        ]  # fmt: skip
        kept = lab.result(base)["scores"]["general"] - FORGOTTEN
        for name, run in methods.items():
            if (rate := paper_results.largest_rate(rows, name, kept)) != run.rate:
                note(f"part r says {rate} for {name}, and the other parts take {run.rate}")
        lines = []
        for row in rows:
            taken = row["learning_rate"] == methods[row["name"]].rate
            rate = f"**{row['learning_rate']}**" if taken else row["learning_rate"]
            loss = f"{row['validation_loss']:.4f}"
            lines.append([row["name"], rate, loss, interval(row["average"]), interval(row["general"])])
        return markdown_table(["trained", "learning rate", "validation loss", "law", "general"], lines), rows

    return [base, *runs.values()], table


def part_a(lab: Lab):
    return comparison(lab, methods_of, TASKS, lab.args.seeds)


def part_b(lab: Lab):
    return comparison(lab, variants_of, lab.args.ablation_tasks, lab.args.seeds)


def part_c(lab: Lab):
    return comparison(lab, amounts_of, lab.args.ablation_tasks, lab.args.seeds)


def part_d(lab: Lab):
    return comparison(lab, functools.partial(grains_of, lab.base), lab.args.ablation_tasks, lab.args.seeds)


def part_e(lab: Lab):
    named = {name: run for name, run in methods_of("law", lab.args.seeds[0]).items() if name != "base"}

    def table() -> tuple[str, list[dict]]:
        """Time every method in each round, one at a time. A ratio compares two methods of one round."""
        rounds = [
            {name: lab.timed(run, number, TIMED_STEPS) for name, run in named.items()}
            for number in tqdm(range(ROUNDS), unit="round", desc="timing")
        ]
        lines, rows = [], []
        for name in named:
            ratios = [one[name]["step_seconds"] / one["full"]["step_seconds"] for one in rounds]
            peak, saved = rounds[0][name]["peak_memory_bytes"] / 2**20, rounds[0][name]["saved_bytes"] / 2**20
            row = {"name": name, "step_to_full": ratios, "peak_mib": peak, "saved_mib": saved}
            step = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
            lines.append([name, step, f"{peak:,.0f} MiB", f"{saved:,.2f} MiB"])
            rows.append(row)
        return markdown_table(["trained", "time of a step / full's", "peak memory", "saved"], lines), rows

    return [], table


def part_f(lab: Lab):
    names = (*TASKS, "general")

    def table() -> tuple[str, list[dict]]:
        scores = [ExpertScores.load(lab.scores(TINY, name)) for name in names]
        sizes = {layer: len(experts) for layer, experts in scores[0].by_function["token"].items()}
        shared = overlap([select_experts(one) for one in scores], sizes)
        rows = [{"name": a, **{b: cell["jaccard"] for b, cell in zip(names, row)}} for a, row in zip(names, shared)]
        lines = [[row["name"], *(f"{row[b]:.2f}" for b in names)] for row in rows]
        return markdown_table(["Jaccard index", *names], lines), rows

    return [], table


TITLES = {
    "r": "Learning rates on law, one seed; bold: taken in the other tables",
    "a": "Methods on the tasks, and what is left of the general skills",
    "b": "What is trained",
    "c": "How much of it, and how many tokens select it",
    "d": "Granularity: experts of equal size together",
    "e": "Time, memory and storage, in rounds side by side",
    "f": "Experts that tasks share, of those that either chooses (token score, top_p 0.2)",
}


def made_by(lab: Lab, part: str) -> str:
    """Return the command of a part's table, and the dates and versions of its results."""
    used = lab.used or [environment()]
    dates = sorted({facts["date"][:10] for facts in used})
    kinds = sorted({f"{f['device']}, torch {f['torch']}, transformers {f['transformers']}" for f in used})
    steps = TIMED_STEPS if part == "e" else lab.args.steps
    seeds = " ".join(map(str, lab.args.seeds[: 1 if part in "re" else None]))
    brackets = "; brackets: 95 % t interval of the mean over seeds"
    brackets = {"r": "", "e": "; brackets: shortest and longest of the rounds"}.get(part, brackets)
    tasks = f", tasks {' '.join(lab.args.ablation_tasks)}" if part in "bcd" else ""
    how = "" if part == "f" else f"{tasks}, seed{'s' * (' ' in seeds)} {seeds}, {steps} steps{brackets}"
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"`python scripts/experiments/paper.py --parts={part}`{how}; {days}, {'; '.join(kinds)}"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--parts", default="r,a,b,c,e,f", metavar="LIST", help="parts, separated by commas (default: %(default)s)")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="one run of everything for each (default: 0 1 2)",
    )
    add("--steps", type=positive, default=450, metavar="N", help="optimizer steps of a run (default: %(default)s)")
    add("--ablation_tasks", nargs="+", default=["law", "summary"], metavar="TASK", help="tasks of b, c and d "
        "(default: law summary)")  # fmt: skip
    add(
        "--pretrain_tokens",
        type=positive,
        default=5_500_000,
        metavar="N",
        help="tokens to pretrain the bases of d (default: %(default)s)",
    )
    add("--jobs", type=positive, default=2, metavar="N", help="runs at a time, with one thread each (default: 2)")
    add("--work_dir", default="results/runs/paper", metavar="DIR", help="finished runs (default: %(default)s)")
    add("--output", metavar="STEM", help="write STEM_a.md, STEM_a.json, ..., and from all parts that exist "
        "STEM_claims.md and pictures (default: print only)")  # fmt: skip
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    for part in args.parts:
        if part not in PARTS or len(part) != 1:
            raise ValueError(f"cannot run part {part!r}. Give some of {', '.join(PARTS)} in --parts.")
    for name in ("seeds", "ablation_tasks"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise ValueError(f"cannot use --{name}: a value is given twice. Give it once.")
    if min(args.seeds) < 0:
        raise ValueError(f"cannot use seed {min(args.seeds)}: it is below 0. Change --seeds.")
    for task in args.ablation_tasks:
        if task not in TASKS:
            raise ValueError(f"cannot run task {task!r}{suggest(task, TASKS)}. Give some of {', '.join(TASKS)}.")
    return args


def main(argv: list[str] | None = None) -> dict[str, str]:
    """Run the parts, and return the table of each."""
    args = parse_args(argv)
    check_output(args.work_dir, folder=True)
    if args.output:
        check_output(f"{args.output}_a.md")
    with locked(Path(args.work_dir), "paper.py"):
        return run_parts(Lab(args))


def run_parts(lab: Lab) -> dict[str, str]:
    args = lab.args
    if "d" in args.parts:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(tqdm(pool.map(lab.base, (16, 32)), total=2, unit="base", desc="pretraining"))
    parts = {part: globals()[f"part_{part}"](lab) for part in args.parts}
    runs = {run.name: run for runs, _ in parts.values() for run in runs}.values()
    for base, task, tokens in dict.fromkeys((run.base, run.task, run.n_sample_tokens) for run in runs):
        lab.scores(base, task, tokens)  # before several runs need them at the same time
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(runs), unit="run", desc="paper") as bar:
        waiting = [pool.submit(lab.result, run) for run in runs]
        try:
            for done in as_completed(waiting):
                done.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    tables = {}
    for part, (_, table) in parts.items():
        lab.used.clear()
        tables[part], rows = table()
        print(f"\n{TITLES[part]}\n\n{tables[part]}")
        if args.output:
            source = made_by(lab, part)
            write_text(f"{args.output}_{part}.md", f"# {TITLES[part]}\n\n{tables[part]}\n\n{source}\n")
            decides = {name: getattr(args, name) for name in ("seeds", "steps", "ablation_tasks", "pretrain_tokens")}
            facts = {"rows": rows, "made_by": source, "arguments": decides, "environments": lab.used}
            write_json(f"{args.output}_{part}.json", facts)
    if args.output:
        print(f"\n{paper_results.conclude(args.output)}\n\nwritten to {args.output}_*")
    return tables


if __name__ == "__main__":
    run_cli(main)
