"""The whole method on one task: score the experts, select some, train them, evaluate, merge; one table at the end.

    python scripts/pipeline.py --base_model_path M --train_dataset D --methods esft-token,full [key=value ...]

Each stage is one of the project's commands, printed before it runs, in a process of its own, so that it can be repeated
by hand and its peak memory is its own. A stage whose command and results are there already is skipped: after an
interruption the same command goes on. Everything goes below --output_dir:

    expert_scores/   expert_configs/   checkpoints/<method>/   completions/<method>.<dataset>.jsonl   merged/
    table.md   table.json   expert_scores.png   losses.png

Training keys come last, `learning_rate=1e-4` for all methods or `full:learning_rate=3e-5` for one.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import ROOT, Parser, check_output, environment, resolve_dataset, run_cli, suggest, write_json, write_text

TRAINING = {  # method -> (score function that selects, train.py's method)
    "esft-token": ("token", "esft"),
    "esft-gate": ("gate", "esft"),
    "random": ("token", "random"),
    "lora": (None, "lora"),
    "full": (None, "full"),
}


class Stages:
    """Runs commands once each; `stages.json` remembers the command of each output that is whole.

    A command that runs makes those stale that were given its output, or the folder of it.
    """

    def __init__(self, folder: Path):
        self.note = folder / "stages.json"
        self.done: dict[str, list[str]] = json.loads(self.note.read_text()) if self.note.is_file() else {}

    def run(self, output: Path, script: str, **flags: object) -> None:
        """`python script --flag=value ...`, skipped where `output` exists and came from the same command.

        A flag that is None or False is left out, True is given without a value, `overrides` (a list) comes last.
        """
        overrides = flags.pop("overrides", [])
        given = {key: value for key, value in flags.items() if value is not None and value is not False}
        command = [script, *(f"--{k}" if v is True else f"--{k}={v}" for k, v in given.items()), *overrides]
        if output.exists() and self.done.get(str(output)) == command:
            print(f"[done] {shlex.join(['python', *command])}", flush=True)
            return
        print(f"\n$ {shlex.join(['python', *command])}", flush=True)
        made = {str(output), str(output.parent)}
        self.done = {k: old for k, old in self.done.items() if not made & {flag.partition("=")[2] for flag in old}}
        if self.note.is_file():
            write_json(self.note, self.done)
        start = time.perf_counter()
        code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
        if code:
            raise SystemExit(code)  # the command has said why
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
        self.done[str(output)] = command
        write_json(self.note, self.done)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--base_model_path", "--model", required=True, help="the base model: a folder or a hub id")
    add("--train_dataset", "--data", required=True, help="a name (file of datasets/train), a path or a hub id")
    add("--eval_dataset", "--eval_datasets", help="by commas (default: those of the training set's name, and general)")
    add("--output_dir", help="default: results/runs/<name of the training set>")
    add("--methods", default="esft-token", help=f"by commas, of {', '.join(TRAINING)} (default: esft-token)")
    add("--train_config", default="configs/base.yaml", help="YAML file of training keys (default: configs/base.yaml)")
    add("--top_p_token", type=float, default=0.2, help="cumulative token score that is trained (default: 0.2)")
    add("--top_p_gate", type=float, default=0.1, help="cumulative gate score that is trained (default: 0.1)")
    add("--n_sample_tokens", type=int, default=131072, help="tokens to score the experts on (default: 131072)")
    add("--seq_length", type=int, default=4096, help="tokens per pack, in scoring and training (default: 4096)")
    add("--template", choices=("chat", "released"), default="chat", help="how messages are rendered (default: chat)")
    add("--max_new_tokens", type=int, default=512, help="longest answer in evaluation, in tokens (default: 512)")
    add("--eval_batch_size", type=int, default=16, help="samples per batch in evaluation (default: 16)")
    add("--n_eval_samples", type=int, help="evaluate on so many samples per data set (default: all)")
    add("--world_size", type=int, default=1, help="processes in scoring and evaluation (default: 1)")
    add("--gpus_per_rank", type=int, default=1, help="GPUs per such process (default: 1)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the weights (default: as stored)")
    add("--seed", type=int, default=0, help="of sampling, selection and training (default: 0)")
    add("--no_merge", action="store_true", help="do not write the merged model of the first ESFT method")
    add("overrides", nargs="*", metavar="[method:]key=value", help="training keys, see train.py --help")
    return parser.parse_intermixed_args(argv)


def eval_datasets(args: argparse.Namespace) -> list[str]:
    """The data sets to evaluate on: those asked for, or those that go by the training set's name and `general`."""
    if args.eval_dataset:
        return [name.strip() for name in args.eval_dataset.split(",") if name.strip()]
    found = []
    for name in (Path(args.train_dataset).stem, "general"):
        try:
            resolve_dataset(name, "eval")
            found.append(name)
        except (ValueError, OSError):
            print(f"note: no datasets/eval/{name}.jsonl; name evaluation sets with --eval_dataset")
    return found


def completions_path(folder: Path, method: str, dataset: str, several: bool) -> Path:
    name = f"{method}.{Path(dataset).stem}.jsonl" if several else f"{method}.jsonl"
    return folder / "completions" / name


def table_rows(folder: Path, methods: list[str], datasets: list[str]) -> list[dict]:
    """One dict per method, the base first: scores by data set, and what training cost (None for the base)."""
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
            cells.append(f"{row['trained_parameters'] / row['parameters']:.1%}")
            cells.append(f"{row['step_seconds']:.2f}")
            cells.append(f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB")
            cells.append(f"{row['saved_bytes'] / 2**20:,.2f} MiB")
        else:
            cells += ["-"] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against_full(rows: list[dict]) -> str:
    """How much of full fine-tuning's gain the others reach on the task, and of its loss on the general skills."""
    by_method = {row["method"]: {name: s["mean"] for name, s in row["scores"].items()} for row in rows}
    names = list(by_method["base"])
    if "full" not in by_method or len(names) < 2 or None in [m for means in by_method.values() for m in means.values()]:
        return ""
    task, general = names[0], names[-1]
    lost = by_method["base"][general] - by_method["full"][general]
    lines = []
    for method, means in by_method.items():
        if method not in ("base", "full"):
            reached = f"{means[task] / max(by_method['full'][task], 1e-9):.0%} of full fine-tuning's {task} score"
            change = means[general] - by_method["base"][general]
            lines.append(f"{method}: {reached}; {general} {change:+.1f} where full fine-tuning has {-lost:+.1f}")
    return "\n".join(lines)


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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    methods = [name.strip() for name in args.methods.split(",") if name.strip()]
    for method in methods:
        if method not in TRAINING:
            raise ValueError(f"--methods: {method!r}{suggest(method, TRAINING)} is none of {', '.join(TRAINING)}")
    overrides: dict[str, list[str]] = {method: [] for method in methods}
    for pair in args.overrides:
        method, colon, rest = pair.partition(":")
        if colon and "=" not in method:
            if method in TRAINING:
                overrides.get(method, []).append(rest)
                continue
            raise ValueError(f"{pair!r}: {method!r} is no method{suggest(method, TRAINING)}")
        for pairs in overrides.values():
            pairs.append(pair)
    resolve_dataset(args.train_dataset, "train")
    folder = Path(args.output_dir or ROOT / "results" / "runs" / Path(args.train_dataset).stem)
    check_output(folder, folder=True)
    stages, datasets, base = Stages(folder), eval_datasets(args), args.base_model_path
    scores, configs = folder / "expert_scores", folder / "expert_configs"
    functions = {TRAINING[method][0] for method in methods} - {None}

    if functions:
        stages.run(
            scores / "summary.json",
            "scripts/expert/get_expert_scores.py",
            eval_dataset=args.train_dataset,
            base_model_path=base,
            output_dir=scores,
            n_sample_tokens=args.n_sample_tokens,
            seq_length=args.seq_length,
            world_size=args.world_size,
            gpus_per_rank=args.gpus_per_rank,
            template=args.template,
            seed=args.seed,
            dtype=args.dtype,
        )
    for function in sorted(functions):
        stages.run(
            configs / f"{function}.json",
            "scripts/expert/generate_expert_config.py",
            eval_dataset=args.train_dataset,
            expert_scores_dir=scores,
            output_path=configs / f"{function}.json",
            score_function=function,
            top_p=args.top_p_token if function == "token" else args.top_p_gate,
        )
    for method in methods:
        function, train_method = TRAINING[method]
        run = folder / "checkpoints" / method
        stages.run(
            run / "trainer_state.json",
            "train.py",
            base_model_path=base,
            train_dataset=args.train_dataset,
            train_config=args.train_config,
            expert_config=configs / f"{function}.json" if function else None,
            output_dir=run,
            overrides=[
                f"method={train_method}",
                f"seq_length={args.seq_length}",
                f"template={args.template}",
                f"seed={args.seed}",
                *([f"dtype={args.dtype}"] if args.dtype != "auto" else []),
                *overrides[method],
            ],
        )
    for method in ["base", *methods] if datasets else []:
        run = folder / "checkpoints" / method
        stages.run(
            completions_path(folder, method, datasets[-1], len(datasets) > 1),
            "eval_multigpu.py",
            eval_dataset=",".join(datasets),
            base_model_path=run if method == "full" else base,
            adapter_dir=None if method in ("base", "full") else run,
            output_path=folder / "completions" / f"{method}.jsonl",
            world_size=args.world_size,
            gpus_per_rank=args.gpus_per_rank,
            template=args.template,
            max_new_tokens=args.max_new_tokens,
            eval_batch_size=args.eval_batch_size,
            n_samples=args.n_eval_samples,
            seed=args.seed,
            dtype=args.dtype,
        )
    first = next((method for method in methods if TRAINING[method][1] == "esft"), None)
    if first and not args.no_merge:
        stages.run(
            folder / "merged" / "config.json",
            "scripts/merge_adapter.py",
            base_model_path=base,
            adapter_dir=folder / "checkpoints" / first,
            output_dir=folder / "merged",
        )
    if functions:
        function = TRAINING[first or "random"][0]
        stages.run(
            folder / "expert_scores.png",
            "scripts/expert/plot_expert_scores.py",
            expert_scores_dir=scores,
            expert_config=configs / f"{function}.json",
            score_function=function,
            output_path=folder / "expert_scores.png",
        )
    plot_losses(folder, methods)
    if datasets:
        rows = table_rows(folder, methods, datasets)
        text = table(rows)
        summary = against_full(rows)
        write_text(folder / "table.md", text + ("\n\n" + summary if summary else "") + "\n")
        write_json(folder / "table.json", {"rows": rows, "arguments": vars(args), "environment": environment()})
        print(f"\n{text}\n\n{summary}\n")
    print(f"All of it is in {folder}")


if __name__ == "__main__":
    run_cli(main)
