"""Sections of the page of scripts/report.py on training: at a glance, in a table, losses, experts, commands.

Each takes runs, or what they trained, and returns HTML; `colours` is the number of each model's colour by its label.
"""

import math
import shlex
from collections.abc import Callable

from esft import select_experts
from evaluation.run_folder import Run, Trained, pipeline_command, train_command
from scripts.report_charts import (
    MANY,
    change,
    colour,
    details,
    esc,
    figure,
    heat_map,
    legend,
    loss_chart,
    mib,
    num,
    scale_end,
    table,
)


def overview(runs: list[Run], colours: dict[str, int]) -> str:
    """A card per trained model."""
    cards = [card(run, t, colour(colours[t.label])) for run in runs for t in run.trained]
    if not cards:
        return "<p>Nothing was trained here.</p>"
    note = '<p class="soft">Scores are in percent, before training → after, with the change in points.</p>'
    return f'<div class="cards">{"".join(cards)}</div>{note if any(run.summaries for run in runs) else ""}'


def card(run: Run, t: Trained, edge: str) -> str:
    """Of one model: scores before and after, share, what is saved, memory."""
    key, facts = f"card/{t.label}", []
    for dataset, by_label in run.summaries.items():
        before, after = (by_label.get(label, {}).get("mean") for label in (run.base, t.label))
        if after is not None:
            told = num(f"{key}/{dataset}/after", after, "{:.1f}".format)
            if before is not None:
                was = num(f"{key}/{dataset}/before", before, "{:.1f}".format)
                told = f"{was} → {told} ({change(after - before)})"
            facts.append((esc(dataset), told))
    if not t.results:
        facts.append(("state", "not finished"))
    for name, what, value, text in (
        ("trained", "share", t.share, "{:.1%}".format),
        ("saved", "saved_bytes", t.results.get("saved_bytes"), mib),
        ("peak memory", "peak_memory_bytes", t.results.get("peak_memory_bytes"), mib),
    ):
        if value is not None:
            facts.append((name, num(f"{key}/{what}", value, text)))
    rows = "".join(f"<dt>{name}</dt><dd>{told}</dd>" for name, told in facts)
    return f'<div class="card" style="border-left-color:{edge}"><h3>{esc(t.label)}</h3><dl>{rows}</dl></div>'


def per_layer(t: Trained) -> str:
    """`5 to 7 of 64`: how many experts of a layer are trained, of how many where the scores tell."""
    if t.experts is None:
        return "all" if t.method == "full" else "-"
    counts = [len(ids) for ids in t.experts.experts.values()]
    if not counts:
        return "none"
    low, high = min(counts), max(counts)
    of = {len(row) for row in (t.score_LE or {}).values()}
    return (f"{low}" if low == high else f"{low} to {high}") + (f" of {of.pop()}" if len(of) == 1 else "")


def what_was_trained(trained: list[Trained]) -> str:
    """Properties as rows, trained models as columns."""
    if not trained:
        return "<p>No folder of train.py is here, so only the evaluations follow.</p>"

    def result(key: str, text: Callable[[float], str]) -> Callable[[Trained], str]:
        return lambda t: num(f"{t.label}/{key}", t.results.get(key), text)

    def setting(key: str) -> Callable[[Trained], str]:
        return lambda t: esc(t.settings.get(key))

    def total(t: Trained) -> str:
        took = next((e["train_runtime"] for e in reversed(t.history) if "train_runtime" in e), None)
        return num(f"{t.label}/train_runtime", took, lambda s: f"{s:,.0f} s" if s < 600 else f"{s / 60:,.1f} min")

    def chosen(t: Trained) -> str:
        return str(sum(map(len, t.experts.experts.values()))) if t.experts else "-"

    def also(t: Trained) -> str:
        if t.experts is None:
            return "-"
        flags = {"shared experts": t.experts.shared_experts, "other modules": t.experts.non_expert_modules}
        return ", ".join(name for name, on in flags.items() if on) or "-"

    def proof(t: Trained) -> str:
        if t.method == "full":
            return "-"
        return "proven by hash" if t.results.get("frozen_verified") else "not asked for"

    rows: dict[str, Callable[[Trained], str]] = {
        "method": lambda t: esc(t.method),
        "base model": setting("base_model_path"),
        "training data": setting("train_dataset"),
        "experts per layer": per_layer,
        "experts in all": chosen,
        "trained beside them": also,
        "parameters": result("parameters", "{:,}".format),
        "trained parameters": result("trained_parameters", "{:,}".format),
        "share": lambda t: num(f"{t.label}/share", t.share, "{:.2%}".format),
        "learning rate": lambda t: num(f"{t.label}/learning_rate", t.settings.get("learning_rate"), "{:g}".format),
        "tokens per pack": setting("seq_length"),
        "steps": result("steps", "{:,}".format),
        "best step": result("best_step", "{:,}".format),
        "training loss, mean": result("train_loss", "{:.4g}".format),
        "validation loss": result("eval_loss", "{:.4g}".format),
        "time of a step": result("step_seconds", "{:.3g} s".format),
        "time in all": total,
        "peak memory, measured": result("peak_memory_bytes", mib),
        "peak memory, estimated": result("estimated_peak_bytes", mib),
        "gradients": result("gradient_bytes", mib),
        "optimizer states": result("optimizer_bytes", mib),
        "saved": result("saved_bytes", mib),
        "processes": result("world_size", "{:d}".format),
        "ep_size": result("ep_size", "{:d}".format),
        "frozen kept its bits": proof,
    }
    heads = ["", *(esc(t.label) for t in trained)]
    shown = ([name, *map(cell, trained)] for name, cell in rows.items())
    notes = [f"{esc(t.label)} was not finished: it has no results yet." for t in trained if not t.results]
    if any(str(t.environment.get("device", "")).startswith("cpu") for t in trained):
        notes.append(
            "On the CPU the measured memory is that of the whole process, Python and libraries included; an estimate "
            "is of the model, gradients, states and activations alone."
        )

    def all_keys(caption: str, dicts: list[dict]) -> str:
        keys = dict.fromkeys(key for found in dicts for key in found)
        values = {key: [found.get(key) for found in dicts] for key in keys}
        rows = ([esc(key), *("-" if v is None else esc(v) for v in values[key])] for key in keys)
        return table(caption, heads, rows, False)

    return (
        table("one column per run", heads, [row for row in shown if {*row[1:]} != {"-"}], False)
        + "".join(f'<p class="soft">{note}</p>' for note in notes)
        + details("Versions, git, device", all_keys("what the runs depend on", [t.environment for t in trained]))
        + details("All settings", all_keys("the resolved configuration", [t.settings for t in trained]))
    )


def losses(trained: list[Trained], colours: dict[str, int]) -> str:
    """For each training set a pair of charts, of training and of validation, and a table of the latter."""
    if not trained:
        return "<p>No training was found.</p>"
    note = "Of training, single steps are thin and a running mean is thick. Point at a dot to read it."
    parts = [f'<p class="soft">{note}</p>']
    for data in dict.fromkeys(t.data for t in trained):
        group = [t for t in trained if t.data == data]
        training, validation = (
            {t.label: curve for t in group if (curve := logged(t, key))} for key in ("loss", "eval_loss")
        )
        charts = [
            loss_chart(f"{title} (nats per label token)", curves, colours, dots)
            if curves
            else f"<p>No {title} was logged.</p>"
            for title, curves, dots in (("training loss", training, False), ("validation loss", validation, True))
        ]
        parts.append(f"<h3>on {esc(group[0].settings.get('train_dataset'))}</h3>")
        parts.append(legend({t.label: colours[t.label] for t in group}))
        parts.append(f'<div class="pair">{"".join(charts)}</div>')
        if validation:
            parts.append(details("Validation losses as a table", loss_table(validation)))
    return "".join(parts)


def loss_table(curves: dict[str, list[tuple[float, float]]]) -> str:
    """Validation losses by step; of more than 60 steps some, evenly, with the last one."""
    found = {label: dict(curve) for label, curve in curves.items()}
    steps = sorted({step for curve in found.values() for step in curve})
    rows = [
        [f"{step:g}", *(num(f"{t}/eval_loss@{step}", found[t].get(step), "{:.4g}".format) for t in found)]
        for step in steps[:: -math.ceil(len(steps) / 60)][::-1]
    ]
    return table("validation loss by step", ["step", *map(esc, found)], rows)


def logged(t: Trained, key: str) -> list[tuple[float, float]]:
    """(step, value) of what the Trainer logged, the last of a step, where it is finite."""
    points = {e["step"]: e[key] for e in t.history if isinstance(e.get(key), int | float) and "step" in e}
    return sorted((step, value) for step, value in points.items() if math.isfinite(value))


def expert_maps(trained: list[Trained]) -> str:
    """Two heat maps, by id and by score, for each run that trains experts."""
    parts = [f"<h3>{esc(t.label)}</h3>{expert_map(t)}" for t in trained if t.experts]
    return "".join(parts) or "<p>No run here selects experts.</p>"


def expert_map(t: Trained) -> str:
    """Of one model: a legend, two heat maps and a table; without scores the table alone."""
    score_LE, chosen = t.score_LE, t.experts.experts
    if score_LE is None:
        listed = [[str(layer), ", ".join(map(str, ids))] for layer, ids in chosen.items()]
        told = "<p>No scores are here, so the trained experts are listed only.</p>"
        return told + table("experts trained in each layer", ["layer", "experts"], listed, False)
    if any(set(ids) - score_LE.get(layer, {}).keys() for layer, ids in chosen.items()):
        raise ValueError(f"{t.folder}: it trains experts that have no scores: the scores are of another model")

    taken, of = sum(map(len, chosen.values())), sum(map(len, score_LE.values()))
    top, highest = scale_end(score_LE), max(max(row.values()) for row in score_LE.values())
    shown = f"0 to {top:.2%}" + (f" (highest {highest:.2%})" if highest > top else "")
    source, tokens = esc(t.scores.meta.get("dataset") or "the task"), t.scores.meta.get("tokens")
    if isinstance(tokens, int):
        source += f" of {tokens:,} tokens"
    icon = '<svg viewBox="0 0 {0} 10"{1} aria-hidden="true">{2}</svg>'
    shades = "".join(f'<rect x="{10 * q}" width="10" height="10" fill="var(--q{q})"/>' for q in range(9))
    swatch = icon.format(90, ' style="width:90px"', shades)
    mark = icon.format(26, "", '<rect class="chosen" x="8" y="1" width="10" height="8"/>')
    line = icon.format(26, "", '<path class="cut" d="M13 0v10"/>')

    by_id = {layer: sorted(row) for layer, row in score_LE.items()}
    by_score = {layer: sorted(row, key=lambda e, row=row: (-row[e], e)) for layer, row in score_LE.items()}
    selected = select_experts(t.scores, score_function=t.function, top_p=t.top_p).experts
    cut = {layer: len(ids) for layer, ids in selected.items()}
    about = f"{t.function} scores, {len(score_LE)} layers, {taken:,} of {of:,} experts selected"
    left = heat_map(f"{about}; by id", score_LE, by_id, chosen, None, "expert id")
    right = heat_map(f"{about}; by score", score_LE, by_score, chosen, cut, "rank in its layer, 0 = highest score")
    place = "" if max(map(len, score_LE.values())) > MANY else ' class="pair"'

    rows = []
    for layer, row in score_LE.items():
        best = [e for e in by_score[layer] if e in chosen.get(layer, ())]
        ids = ", ".join(f"{e} ({num(f'{t.label}/score/{layer}/{e}', row[e], '{:.2%}'.format)})" for e in best)
        rows.append([str(layer), f"{len(best)} with {sum(row[e] for e in best):.2%}: {ids}" if best else "-"])
    heads = ["layer", "how many, the sum of their scores, and which, best first"]
    return (
        f'<ul class="legend"><li>{swatch}{shown}, {t.function} score on {source}</li>'
        f"<li>{mark}trained: {taken:,} of {of:,} experts ({taken / of:.1%})</li>"
        f"<li>{line}where the running sum reaches {t.top_p:g}</li></ul>"
        f"<div{place}>{figure(left, 'by expert id')}{figure(right, 'by score in each layer')}</div>"
        + details("Trained experts as a table", table("experts trained in each layer", heads, rows, False))
    )


def commands(runs: list[Run]) -> str:
    """How to do each run again: the pipeline's command and its stages', or that of each training."""
    parts = []
    for run in runs:
        stages = [["python", *command] for command in run.stages] or [train_command(t) for t in run.trained]
        gits = dict.fromkeys(str(t.environment["git"]) for t in run.trained if t.environment.get("git"))
        if len(runs) > 1:
            parts.append(f"<h3>{esc(run.name)}</h3>")
        if gits:
            told = ", ".join(f"<code>{esc(git)}</code>" for git in gits)
            parts.append(f"<p>At git {told}; from the repository's root:</p>")
        blocks = "".join(map(block, stages))
        if run.arguments:
            parts.append(block(pipeline_command(run)))
            blocks = details(f"Its {len(stages)} stages", blocks) if stages else ""
        elif not stages:
            blocks = "<p>No command was recorded (stages.json, table.json).</p>"
        parts.append(blocks)
    return "".join(parts)


def block(command: list[str]) -> str:
    """A command to be pasted, in lines of some 96 characters."""
    lines = [""]
    for word in map(shlex.quote, command):
        if lines[-1] and len(lines[-1]) + len(word) > 96:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    shown = esc(" \\\n".join(lines))
    return f'<pre class="text" tabindex="0">{shown}</pre>'
