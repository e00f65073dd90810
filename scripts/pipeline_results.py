"""What a pipeline's folder tells when all stages are done: a table of the methods, and a picture of their losses.

scripts/pipeline.py says what lies in the folder, and where.
"""

import json
from pathlib import Path


def completions_path(folder: Path, method: str, dataset: str, several: bool) -> Path:
    name = f"{method}.{Path(dataset).stem}.jsonl" if several else f"{method}.jsonl"
    return folder / "completions" / name


def table_rows(folder: Path, methods: list[str], datasets: list[str]) -> list[dict]:
    """One dict per method, the base first: scores by data set, and (but for the base) what training cost."""
    rows = []
    for method in ["base", *methods]:
        row: dict = {"method": method, "scores": {}}
        for dataset in datasets:
            path = completions_path(folder, method, dataset, len(datasets) > 1).with_suffix(".summary.json")
            summary = json.loads(path.read_text(encoding="utf-8"))
            row["scores"][Path(dataset).stem] = {key: summary[key] for key in ("mean", "ci95", "n", "primary")}
        if method != "base":
            run = json.loads((folder / "checkpoints" / method / "run.json").read_text(encoding="utf-8"))
            row |= run["results"] | {"learning_rate": run["config"]["training"].get("learning_rate")}
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: scores with 95 % intervals, trained share, step time, peak memory, size of what is saved."""
    names = list(rows[0]["scores"])
    head = ["method", *names, "trained", "step (s)", "peak memory", "saved"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [row["method"]]
        for name in names:
            score = row["scores"][name]
            shown = "-" if score["mean"] is None else f"{score['mean']:.1f}"
            cells.append(f"{shown} [{score['ci95'][0]:.1f}, {score['ci95'][1]:.1f}]" if score["ci95"] else shown)
        if "steps" in row:
            cells += [
                f"{row['trained_parameters'] / row['parameters']:.1%}",
                f"{row['step_seconds']:.2f}",
                f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
                f"{row['saved_bytes'] / 2**20:,.2f} MiB",
            ]
        else:
            cells += ["-"] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against_full(rows: list[dict]) -> str:
    """How much of full fine-tuning's score the others reach on the task (the first data set), and what both changed in
    the general skills (the last); "" where there is no such comparison."""
    by_method = {row["method"]: {name: s["mean"] for name, s in row["scores"].items()} for row in rows}
    names = list(by_method["base"])
    if "full" not in by_method or len(names) < 2 or None in [m for means in by_method.values() for m in means.values()]:
        return ""
    task, general = names[0], names[-1]
    base, full = by_method.pop("base"), by_method.pop("full")
    run = next(row for row in rows if row["method"] == "full")
    rate = f"learning rate {run['learning_rate']:g}, " if run["learning_rate"] else ""
    return "\n".join(
        f"{method}: {means[task] / max(full[task], 1e-9):.0%} of full fine-tuning's {task} score; {general} "
        f"{means[general] - base[general]:+.1f} where full fine-tuning ({rate}{run['steps']} steps) has "
        f"{full[general] - base[general]:+.1f}"
        for method, means in by_method.items()
    )


def plot_losses(folder: Path, methods: list[str]) -> None:
    """losses.png: training loss per step and validation loss of every method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, method in enumerate(methods):
        history = json.loads((folder / "checkpoints" / method / "trainer_state.json").read_text())["log_history"]
        for key, style, label in (("loss", "-", method), ("eval_loss", "o--", None)):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            alpha = 0.5 if key == "loss" else 1
            if points:
                axes.plot(*zip(*points), style, color=f"C{number}", label=label, alpha=alpha, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss per label token (nats)", yscale="log")
    axes.set_title("training (line) and validation loss (dots)", fontsize=10)
    axes.legend()
    figure.savefig(folder / "losses.png", dpi=130)
