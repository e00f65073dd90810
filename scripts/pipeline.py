"""The whole method on one task: score the experts, select some, train them, evaluate, merge; one table at the end.

    python scripts/pipeline.py --base_model_path=MODEL --train_dataset=DATA --methods=esft-token,full [key=value ...]

Each stage is one of the project's commands, in a process of its own. It is printed before it runs, and you can run it
by hand. After an interruption the same command goes on: a stage that is done is skipped, and training resumes from its
last checkpoint (every save_steps). Keys, data and libraries are checked before the first stage. In --output_dir are:

    expert_scores/   expert_configs/   checkpoints/<method>/   completions/<method>.<dataset>.jsonl   merged/
    table.md   table.json   expert_scores.png   losses.png

A method is a rule that selects experts, lora-selected (LoRA on those of esft-token), lora or full. Keys of train.py
come last: `learning_rate=1e-4` for all methods, `full:learning_rate=3e-5` for one, which wins. `top_p`, `budget` and
`upper_layers` say how much the rules select: `esft-token:top_p=0.3` (docs/selection.md).
`full:save_opt_states=false` saves the disk space of a whole model's optimizer states; that method cannot resume.

    python scripts/pipeline.py --sweep --base_model_path=MODEL --train_dataset=DATA --eval_dataset=TASK,GENERAL [...]

--sweep looks for the best point between learning and forgetting. It trains a grid: each of --methods with each of
--shares at each of --rates. After a third of the steps it drops what is dominated, where others learn more and keep
more. It trains the rest, and evaluates all of it at each of --strengths. The table, the picture and the recommended
point are in sweep.md, sweep.json and sweep.png. TASK and GENERAL are data sets to choose by, so they should not be your
test set. The default is what training holds out of DATA, and the simple questions of datasets/eval/general.jsonl.
"""

import argparse
import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import get_evaluator, load_rows
from deepseek.files import check_output, suggest, write_json, write_text
from deepseek.process_groups import Ranks
from esft import ExpertConfig, load_tokenizer
from evaluation.figures import colors_of, cut_of, draw_experts, new_figure, plot_losses, save_figure
from evaluation.frontier import METHODS, SELECTS
from evaluation.run_folder import Run, read_run
from evaluation.runner import check_prompts
from evaluation.workers import plan_devices
from scripts.merge_adapter import check_free
from scripts.stages import Commands, Plan, Stages, data_config, flags, parse_with_keys
from scripts.sweep import GENERAL, Sweep, add_sweep_flags, check_sweep_flags, plan_grid, questions
from training.data import load_data, template_settings
from utils import (
    PYTHON,
    ROOT,
    command_parser,
    environment,
    flag_words,
    locked,
    markdown_table,
    note,
    positive,
    run_cli,
    seed_number,
    size,
    split_names,
)

OURS = ("method", "seq_length", "template", "seed", "base_model_path", "train_dataset", "expert_config", "output_dir")
HOW_MUCH = {"top_p", "budget"}  # keys of which a rule takes one
AMOUNTS = {*HOW_MUCH, "upper_layers"}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    count = {"type": positive, "metavar": "N"}
    methods, presets = ", ".join(METHODS), os.path.relpath(ROOT / "configs" / "base.yaml")
    train_help = "a name (file of datasets/train), a path or a hub id"
    eval_help = "names (files of datasets/eval), paths or hub ids (default: the name of the training set, and general)"
    add("--base_model_path", "--model", required=True, metavar="MODEL", help="the base model: a folder or a hub id")
    add("--train_dataset", "--data", required=True, metavar="DATA", help=train_help)
    add("--eval_dataset", "--eval_datasets", metavar="DATA[,DATA]", help=eval_help)
    add("--output_dir", metavar="DIR", help="default: results/runs/<name of the training set>")
    add("--methods", metavar="METHOD[,METHOD]", help=f"of {methods} (default: esft-token)")
    add("--train_config", default=presets, metavar="FILE.yaml", help="training keys (default: %(default)s)")
    add("--contrast_dataset", metavar="DATA", help="general training data, for methods that compare the task with it: "
        f"{', '.join(name for name, rule in SELECTS.items() if 'contrast' in rule)}")  # fmt: skip
    add("--n_sample_tokens", **count, default=131072, help="tokens to score the experts on (default: %(default)s)")
    add("--seq_length", **count, default=4096, help="tokens per pack, in scoring and training (default: %(default)s)")
    add("--template", choices=("chat", "released"), default="chat", help="how messages are rendered (default: chat)")
    add("--max_new_tokens", **count, default=512, help="longest answer, in tokens (default: %(default)s)")
    add("--eval_batch_size", **count, default=16, help="samples per batch in evaluation (default: %(default)s)")
    add("--n_eval_samples", **count, help="evaluate on so many samples per data set (default: all)")
    add("--world_size", **count, default=1, help="processes in scoring and evaluation (default: 1)")
    nproc_help = "processes in training: ESFT by train_ep.py, the other methods data parallel (default: 1)"
    add("--nproc_per_node", **count, default=1, help=nproc_help)
    add("--gpus_per_rank", **count, default=1, help="GPUs per process of scoring and evaluation (default: 1)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the weights "
        "(default: auto, as stored; on a CPU without instructions for bfloat16, scoring and evaluation take "
        "float32)")  # fmt: skip
    add("--seed", type=seed_number, default=0, metavar="N", help="of sampling, selection and training (default: 0)")
    add("--no_merge", action="store_true", help="do not write the merged model of the first ESFT method")
    add_sweep_flags(parser)
    add("overrides", nargs="*", metavar="[METHOD:]KEY=VALUE", help="training keys, see train.py --help")
    args = parse_with_keys(parser, argv)
    check_sweep_flags(parser, args)
    return args


def known_method(name: str) -> str:
    """Return a name of METHODS. Raise ValueError for any other."""
    if name not in METHODS:
        raise ValueError(f"cannot run method {name!r}{suggest(name, METHODS)}. Choose of {', '.join(METHODS)}.")
    return name


def eval_datasets(args: argparse.Namespace) -> list[str]:
    """Return the data sets to evaluate on. The default is the one named as the training set, and `general`."""
    if args.eval_dataset:
        return split_names(args.eval_dataset)
    folder = ROOT / "datasets" / "eval"
    names = [name for name in (Path(args.train_dataset).stem, "general") if (folder / f"{name}.jsonl").is_file()]
    if len(names) < 2:
        asked = f"evaluated on {' and '.join(names) or 'nothing'}"
        note(f"no questions go with {args.train_dataset}: {asked}. --eval_dataset=FILE names some")
    return names


def keys_by_method(args: argparse.Namespace, methods: list[str]) -> dict[str, dict[str, str]]:
    """Return the keys that are given for each method, and for all under "". Secrets go to the environment."""
    from training.config import ALIASES  # slow; --help can do without
    from training.config_parser import take_secret
    from training.first_selection import DATA_KEYS

    named = [(*word.partition("=")[::2], word) for word in args.overrides]
    args.overrides = [word for key, value, word in named if not take_secret(key.rpartition(":")[2], value)]
    given: dict[str, dict[str, str]] = {method: {} for method in ("", *METHODS)}
    for word in args.overrides:
        name, _, value = word.partition("=")
        method, _, key = name.rpartition(":")
        method, key, cause = method and known_method(method), ALIASES.get(key, key), ""
        if key in OURS:
            cause = f"a flag sets {key} for all commands. See --help"
        elif method and key in DATA_KEYS:
            cause = f"experts are scored, and the base is asked, once for all methods. Give {key}={value}"
        elif key in AMOUNTS and args.sweep:
            cause = "--shares says how much is trained. Leave it out"
        elif key in AMOUNTS and not SELECTS.keys() & ({method} if method else set(methods)):
            cause = "no experts are selected there. Leave it out"
        if cause:
            raise ValueError(f"cannot use {word!r}: {cause}.")
        given[method][key] = value
    named = ((word, word.partition("=")[0].rpartition(":")[0]) for word in args.overrides)
    if unused := [word for word, method in named if method and method not in methods]:
        note(f"without effect, as their methods are not in --methods: {' '.join(unused)}")
    return given


def plan_training(args: argparse.Namespace, methods: list[str]) -> dict[str, Plan]:
    """Return what each of `methods` trains.

    Raises:
        ValueError, OSError: an unknown method, a key that a flag sets, or what train.py refuses.
    """
    from training.config import read_config, training_arguments  # slow; --help can do without
    from training.first_selection import selected_experts
    from training.plan import open_empty

    given, plans = keys_by_method(args, methods), {}
    for method in methods:
        rule, train_method = dict(SELECTS.get(method, {})), METHODS[method]
        keys = {"method": train_method, **flags(args, "seq_length template seed")}
        keys |= {"lora_experts": "selected"} if rule and train_method == "lora" else {}
        keys |= {"dtype": args.dtype} if args.dtype != "auto" else {}
        replaced = HOW_MUCH if given[method].keys() & HOW_MUCH else ()
        usual = {key: value for key, value in given[""].items() if key not in replaced}
        keys |= {"save_opt_states": "true"} | usual | given[method]
        amounts = {key: keys.pop(key) for key in sorted(AMOUNTS & keys.keys())}
        words = [f"{key}={value}" for key, value in keys.items()]
        start = flag_words(**flags(args, "base_model_path train_dataset train_config"), output_dir="later")
        processes = Ranks(world_size=args.nproc_per_node)
        if "contrast" in rule and not args.contrast_dataset:
            raise ValueError(f"cannot select by {method}: it needs general data. Give --contrast_dataset.")
        rule |= amounts if rule else {}
        config = read_config([*start, *words, *(f"{key}={value}" for key, value in rule.items() if key != "contrast")])
        open_empty(config, processes)
        if rule:
            config = read_config([*start, f"--expert_config={selected_experts('later')}", *words])
        arguments = training_arguments(dataclasses.replace(config, device="cpu"))  # this process leaves the GPUs alone
        plans[method] = Plan(words, config, arguments, rule)
        load_data(load_tokenizer(args.base_model_path), config, Ranks())  # the stages find them encoded
    if args.contrast_dataset and not any("contrast" in plan.rule for plan in plans.values()):
        raise ValueError("cannot use --contrast_dataset: no method compares the task with it. Leave it out.")
    return plans


def check(args: argparse.Namespace, datasets: list[str]) -> list[dict]:
    """Return the first question of each data set. Raise ValueError or OSError for what would stop a later stage."""
    plan_devices("auto", args.world_size, args.gpus_per_rank)
    names = [Path(dataset).stem for dataset in datasets]
    if len(set(names)) < len(names):
        raise ValueError(f"cannot use --eval_dataset {args.eval_dataset}: two have one name. Rename one.")
    for name in names:
        get_evaluator(name)  # and the libraries of its metrics
    return [load_rows(dataset)[0] for dataset in datasets]


def run_stages(
    args: argparse.Namespace, stages: Stages, folder: Path, plans: dict[str, Plan], datasets: list[str]
) -> None:
    """Score, select, train all methods, evaluate them and the base, merge the first ESFT adapter."""
    configs = {method: folder / "expert_configs" / f"{method}.json" for method, plan in plans.items() if plan.rule}
    rules, runs = {configs[method]: plans[method].rule for method in configs}, folder / "checkpoints"
    commands = Commands(args, stages, folder, data_config(plans))
    commands.score_and_select(rules)

    for method, plan in plans.items():
        config, output = configs.get(method), runs / method
        script, options = commands.training(plan.words, config)
        stages.run(output / "trainer_state.json", script, **options, output_dir=output)

    for method in ["base", *plans] if datasets else []:
        output = last = folder / "completions" / f"{method}.jsonl"
        if len(datasets) > 1:
            last = output.with_suffix(f".{Path(datasets[-1]).stem}.jsonl")
        model = {} if method == "base" else {"base_model_path" if method == "full" else "adapter_dir": runs / method}
        commands.evaluate(last, output, datasets, **model)

    if (adapter := first_adapter(plans)) and not args.no_merge:
        paths = {"adapter_dir": runs / adapter, "output_dir": folder / "merged", "overwrite": True}
        stages.run(
            folder / "merged" / "config.json", "scripts/merge_adapter.py", **flags(args, "base_model_path"), **paths
        )


def first_adapter(methods: Iterable[str]) -> str | None:
    """Return the first of `methods` that is ESFT."""
    return next((method for method in methods if METHODS[method] == "esft"), None)


def table_rows(run: Run, methods: list[str], datasets: list[str]) -> list[dict]:
    """Return a dict per method, the base first: scores by data set, and (but for the base) what training cost."""
    trained, rows = {model.label: model for model in run.trained}, []
    for method in ["base", *methods]:
        summaries = {name: run.evaluations[name][method].summary for name in datasets}
        scores = {name: {key: s[key] for key in ("mean", "ci95", "n", "primary")} for name, s in summaries.items()}
        rows.append({"method": method, "scores": scores})
        if method in trained:
            rows[-1] |= trained[method].results | {"learning_rate": trained[method].settings.get("learning_rate")}
    return rows


def format_table(rows: list[dict]) -> str:
    """Return the rows in Markdown: scores with 95 % intervals, trained share, step time, peak memory, size on disk."""
    lines = []
    for row in rows:
        cells, cost = [row["method"]], ["-"] * 4
        for score in row["scores"].values():
            shown = "-" if score["mean"] is None else f"{score['mean']:.1f}"
            cells.append(f"{shown} [{score['ci95'][0]:.1f}, {score['ci95'][1]:.1f}]" if score["ci95"] else shown)
        if "steps" in row:
            cost = [
                f"{row['trained_parameters'] / row['parameters']:.1%}",
                f"{row['step_seconds']:.2f}",
                size(row["peak_memory_bytes"]),
                size(row["saved_bytes"]),
            ]
        lines.append([*cells, *cost])
    return markdown_table(["method", *rows[0]["scores"], "trained", "step (s)", "peak memory", "saved"], lines)


def against_full(rows: list[dict]) -> str:
    """Compare each method with full fine-tuning: its score on the task, and what it forgot. "" without these scores.

    The task is the first data set, and the general skills are the last one.
    """
    by_method = {row["method"]: [score["mean"] for score in row["scores"].values()] for row in rows}
    full = next((row for row in rows if row["method"] == "full"), None)
    if full is None or len(rows[0]["scores"]) < 2 or None in [mean for means in by_method.values() for mean in means]:
        return ""
    task, *_, general = rows[0]["scores"]
    base, of_full = by_method.pop("base"), by_method.pop("full")
    rate = f"learning rate {full['learning_rate']:g}, " if full["learning_rate"] else ""
    return "\n".join(
        f"{method}: {means[0] / max(of_full[0], 1e-9):.0%} of full fine-tuning's {task} score; {general} "
        f"{means[-1] - base[-1]:+.1f} where full fine-tuning ({rate}{full['steps']} steps) has "
        f"{of_full[-1] - base[-1]:+.1f}"
        for method, means in by_method.items()
    )


def write_results(args: argparse.Namespace, folder: Path, plans: dict[str, Plan], datasets: list[str]) -> None:
    """Draw the losses, and the experts of the first ESFT method, and print and write the table."""
    run, methods = read_run(folder), list(plans)
    if find_spec("matplotlib"):
        figure, axes = new_figure(11, 4)
        for ax, key, title in zip(axes, ("loss", "eval_loss"), ("training loss", "validation loss")):
            curves = {model.label: model.curve(key) for model in run.trained if model.label in methods}
            plot_losses(ax, curves, title, colors_of(methods))
        save_figure(figure, folder / "losses.png")
        if first := first_adapter(plans) or next((method for method, plan in plans.items() if plan.rule), None):
            model = next(model for model in run.trained if model.label == first)
            selected = ExpertConfig.load(folder / "expert_configs" / f"{first}.json")
            top_p = cut_of(model.scores, selected, model.function, model.top_p)
            title = f"Expert scores ({model.function}) on {Path(args.train_dataset).stem}"
            figure = draw_experts(model.scores, selected, model.function, top_p, title)
            save_figure(figure, folder / "expert_scores.png")
    else:
        note(f"no pictures without matplotlib: {PYTHON} -m pip install -c constraints.txt matplotlib")
    if datasets:
        rows = table_rows(run, methods, [Path(dataset).stem for dataset in datasets])
        text = "\n\n".join(filter(None, [format_table(rows), against_full(rows)]))
        write_text(folder / "table.md", f"{text}\n")
        facts = {"cwd": "" if Path.cwd() == ROOT else os.getcwd(), "environment": environment()}
        write_json(folder / "table.json", {"rows": rows, "arguments": vars(args), **facts})
        print(f"\n{text}\n")
    script = os.path.relpath(ROOT / "scripts" / "report.py")
    print(f"All of it is in {folder}\nnext: {shlex.join([PYTHON, script, str(folder)])} makes a page of it")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    methods = [known_method(name) for name in split_names(args.methods)]
    folder = Path(args.output_dir or ROOT / "results" / "runs" / Path(args.train_dataset).stem)
    check_output(folder, folder=True)
    datasets = split_names(args.eval_dataset or GENERAL) if args.sweep else eval_datasets(args)
    asked = check(args, datasets)
    if not args.sweep and not args.no_merge and first_adapter(methods):
        check_free(folder / "merged", overwrite=True)
    plans = plan_training(args, methods)
    check_prompts(args.base_model_path, template_settings(data_config(plans)), asked)
    grid = plan_grid(args, plans) if args.sweep else []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the stage at work is ended, too
    with locked(folder) as lock:
        stages = Stages(folder, lock, **flags(args, "base_model_path train_dataset"))
        if args.sweep:
            Sweep(args, folder, stages, plans, questions(args, folder, plans)).run(grid)
            return
        run_stages(args, stages, folder, plans, datasets)
        write_results(args, folder, plans, datasets)


if __name__ == "__main__":
    run_cli(main)
