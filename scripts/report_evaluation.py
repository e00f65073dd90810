"""Sections of the page of scripts/report.py on evaluation: scores, what was gained and forgotten, answers side by side.

Each takes runs and returns HTML.
"""

import random

from evaluation.results import compare
from evaluation.run_folder import Run
from scripts.report_charts import change, details, esc, figure, num, table, whiskers

SHOWN = 3000  # characters of a prompt or an answer


def scores(runs: list[Run], colours: dict[str, int]) -> str:
    """A plot for each data set, the table of means and intervals, and what was gained and forgotten."""
    notes = [
        f"{run.name} has no evaluation: eval_multigpu.py --adapter_dir={run.folder} --with_base makes one."
        for run in runs
        if not run.summaries
    ]
    notes += [note for run in runs for note in run.notes]
    parts = [f"<p>{esc(note)}</p>" for note in notes]
    datasets = list(dict.fromkeys(d for run in runs for d in run.summaries))
    if not datasets:
        return "".join(parts)
    plots = []
    for dataset in datasets:
        by_label = {label: s for run in runs for label, s in run.summaries.get(dataset, {}).items()}
        rows = [(label, colours.get(label, -1), s) for label, s in by_label.items() if s["mean"] is not None]
        if rows:
            bases = {run.summaries.get(dataset, {}).get(run.base, {}).get("mean") for run in runs}
            base = bases.pop() if len(bases) == 1 else None
            metric = ", ".join(sorted({str(s["primary"]) for s in by_label.values()}))
            told = f"{esc(dataset)}: {esc(metric)} {unit(rows[0][2])}{'' if base is None else '; dashed: the base'}"
            plots.append(figure(whiskers(f"{dataset}, {metric}", rows, base), told))
    parts.append(f'<div class="pair">{"".join(plots)}</div>')

    summaries = {
        (label, d): s for run in runs for d, by_label in run.summaries.items() for label, s in by_label.items()
    }

    def cell(label: str, dataset: str) -> str:
        s, key = summaries.get((label, dataset), {}), f"{label}/{dataset}"
        if s.get("mean") is None:
            return "-"
        mean, low, high = (
            num(f"{key}/{what}", value, "{:.1f}".format)
            for what, value in zip(("mean", "low", "high"), (s["mean"], *(s["ci95"] or (None, None))))
        )
        failed = f"; {esc(s['failed'])} failed" if s.get("failed") else ""
        size = f'<span class="soft">n={num(f"{key}/n", s["n"], "{:d}".format)}{failed}</span>'
        return f"{mean} [{low}, {high}] {size}" if s["ci95"] else f"{mean} {size}"

    rows = [
        [esc(label), *(cell(label, d) for d in datasets)] for label in dict.fromkeys(label for label, _ in summaries)
    ]
    units = {d: unit(s) for (_, d), s in summaries.items()}
    heads = [esc(d) if units[d] == "in percent" else f"{esc(d)} ({units[d]})" for d in datasets]
    caption = "means in percent, where no other unit is named, 95 % intervals over the questions, number of questions"
    parts.append(table(caption, ["", *heads], rows))
    parts.append(gained_and_forgotten([(run, d) for run in runs for d in datasets], several=len(runs) > 1))
    return "".join(parts)


def unit(summary: dict) -> str:
    """Of a mean; what is not in percent says, too, which way is better."""
    if summary.get("unit", "percent") == "percent":
        return "in percent"
    return f"in its own unit, {'more' if summary.get('higher_is_better', True) else 'less'} is better"


def gained_and_forgotten(evaluations: list[tuple[Run, str]], several: bool) -> str:
    """Changes against the base of the same run: means, questions, skills; each evaluation is a run and a data set.

    The evaluation's own comparison where it made one; else that of the answers, unless they are a suite's, whose tasks
    have weights of their own.
    """
    rows, skills = [], []
    for run, dataset in evaluations:
        by_label = run.summaries.get(dataset, {})
        base = by_label.get(run.base)
        if not base or base["mean"] is None:
            continue
        for label, s in by_label.items():
            if label == run.base or s["mean"] is None:
                continue
            was, now = (run.answers.get(dataset, {}).get(name, []) for name in (run.base, label))
            pairs = list(zip(was, now)) if same_questions(was, now) else []
            c = s.get("against_base")
            if not c and pairs and "unit" not in s:
                c = compare(*([{"score": None, **line} for line in lines] for lines in zip(*pairs)))
            c = c or {"difference": s["mean"] - base["mean"], "ci95": None}
            better = 1 if s.get("higher_is_better", True) else -1
            rows.append([f"{esc(label)}, {esc(dataset)}", *changed(c, better), *turned(pairs)])
        title = f"{esc(dataset)} by skill" + (f", {esc(run.name)}" if several else "")
        if skill_table := by_skill(by_label, run.base):
            skills.append(details(title, skill_table))
    if not rows:
        return "<p>No base was evaluated beside a trained model, so there is no change to show.</p>"
    heads = ["", "change", "95 % interval", "verdict", "newly right", "no longer right"]
    note = (
        "Change and interval are of pairs, question by question, those that both answered; gained or forgotten where "
        "the interval excludes 0 and at least six questions changed. Right is an answer with the full score; the last "
        "columns count questions that the base and the trained model answer differently."
    )
    against_base = table("against the base", heads, rows)
    return f'<h3>Gained and forgotten</h3><p class="soft">{note}</p>{against_base}{"".join(skills)}'


def changed(c: dict, better: int) -> list[str]:
    """A comparison as change, interval, verdict; `better` is -1 where less is better."""
    if c["difference"] is None:
        return ["-"] * 3
    told = change(c["difference"], better)
    if not c["ci95"]:
        return [told, "-", "-"]
    verdict = "uncertain" if not c["certain"] else "gained" if better * c["difference"] > 0 else "forgotten"
    low, high = (change(bound, better) for bound in c["ci95"])
    return [told, f"[{low}, {high}]", verdict]


def turned(pairs: list[tuple[dict, dict]]) -> list[str]:
    """How many of the questions that base and trained model have scores for are newly right, and no longer right."""
    scored = [pair for pair in pairs if all(line.get("score") is not None for line in pair)]
    right = [(is_right(was), is_right(now)) for was, now in scored]
    return [str(right.count((False, True))), str(right.count((True, False)))] if right else ["-", "-"]


def by_skill(by_label: dict[str, dict], base: str) -> str:
    """Means of each skill by model, with the change against the base; "" where the summaries have no skills."""

    def cell(label: str, skill: str) -> str:
        was, now = (by_label[name]["groups"].get(skill, {}).get("mean") for name in (base, label))
        if now is None:
            return "-"
        return f"{now:.0f}" + (f" ({change(now - was)})" if label != base and was is not None else "")

    skills = sorted({skill for s in by_label.values() for skill in s["groups"]})
    rows = [[esc(skill), *(cell(label, skill) for label in by_label)] for skill in skills]
    return table("means in percent, change against the base", ["skill", *map(esc, by_label)], rows) if rows else ""


def is_right(line: dict) -> bool:
    return line.get("score") is not None and line["score"] > 1 - 1e-9


def same_questions(a: list[dict], b: list[dict]) -> bool:
    """Whether two files answer the same questions in the same order."""
    return bool(a) and [x["example"]["prompt"] for x in a] == [x["example"]["prompt"] for x in b]


def pick(answers: dict[str, list[dict]], base: str, count: int, seed: int) -> dict[int, str]:
    """{index of a question: why it is shown}: the `count` with the highest and with the lowest mean gain over the base
    (mean score, where there is no base), and as many drawn with `seed`. None is shown twice."""

    def mean(i: int, files: list[list[dict]]) -> float:
        return sum(lines[i].get("score") or 0.0 for lines in files) / len(files)

    trained = [lines for label, lines in answers.items() if label != base] or list(answers.values())
    before = answers.get(base) if len(answers) > 1 else None
    size = len(trained[0])
    gain = [mean(i, trained) - (mean(i, [before]) if before else 0) for i in range(size)]
    order = sorted(range(size), key=lambda i: (-gain[i], i))
    best, worst = ("most gained", "least gained, or lost") if before else ("best", "worst")
    found = dict.fromkeys(order[:count], best)
    found |= {i: worst for i in reversed(order[-count:]) if i not in found}
    rest = [i for i in range(size) if i not in found]
    return found | dict.fromkeys(sorted(random.Random(seed).sample(rest, min(count, len(rest)))), "drawn at random")


def samples(runs: list[Run], count: int, seed: int) -> str:
    """For each data set some questions, with every model's answer beside the gold one."""
    parts = []
    for run in runs:
        for dataset, answers in run.answers.items():
            parts.append(f"<h3>{f'{esc(run.name)}, ' if len(runs) > 1 else ''}{esc(dataset)}</h3>")
            first = next(iter(answers.values()))
            same = {label: lines for label, lines in answers.items() if same_questions(first, lines)}
            if len(same) < len(answers):
                left_out = ", ".join(label for label in answers if label not in same)
                parts.append(f"<p>{esc(left_out)}: left out, since they answer other questions.</p>")
            for i, why in pick(same, run.base, count, seed).items():
                parts.append(sample(f"Question {i + 1}", why, {label: lines[i] for label, lines in same.items()}))
    if not parts:
        return "<p>No answers are here (completions/*.jsonl).</p>"
    note = (
        f"By their mean change against the base, the {count} best and worst of each data set, and {count} drawn with "
        f"seed {seed}. White space around an answer is not shown."
    )
    return f'<p class="soft">{note}</p>{"".join(parts)}'


def sample(title: str, why: str, answers: dict[str, dict]) -> str:
    """One question, why it is shown, and the line of each model that answers it."""
    first = next(iter(answers.values()))
    skill = f", {esc(first['skill'])}" if first.get("skill") else ""
    gold = " / ".join(map(str, first["example"].get("raw_answers") or [])) or "(none)"
    blocks = (
        text_block(esc(label), line.get("error", line["example"].get("raw_prediction")), chip(line))
        for label, line in answers.items()
    )
    return (
        f'<article class="sample"><h4>{title}{skill} <span class="soft">{why}</span></h4><div class="pair">'
        f"{text_block('prompt', first['example']['prompt'])}{text_block('gold answer', gold)}</div>"
        f'<div class="answers">{"".join(blocks)}</div></article>'
    )


def text_block(label: str, text: object, chip: str = "") -> str:
    shown = "(no answer)" if text is None else str(text).strip() or "(empty)"
    more = len(shown) - SHOWN
    shown = esc(shown[:SHOWN]) + (f"\n… ({more:,} characters more)" if more > 0 else "")
    return (
        f'<div><span class="label">{label} {chip}</span><div class="text" dir="auto" tabindex="0">{shown}</div></div>'
    )


def chip(line: dict) -> str:
    """The verdict on an answer."""
    score = line.get("score")
    if "error" in line:
        kind, told = "wrong", "failed"
    elif score is None:
        kind, told = "partly", "not scored"
    elif is_right(line):
        kind, told = "right", "correct"
    elif score <= 0:
        kind, told = "wrong", "incorrect"
    else:
        kind, told = "partly", f"scores {100 * score:.0f} of 100"
    cut = ", cut off" if line.get("truncated") else ""
    return f'<span class="chip {kind}">{told}{cut}</span>'
