"""The whole method on one task: score the experts, select some, train them, evaluate, merge; one table at the end.

    python scripts/pipeline.py --base_model_path=MODEL --train_dataset=DATA --methods=esft-token,full [key=value ...]

Each stage is one of the project's commands, printed before it runs, in a process of its own, so that it can be repeated
by hand and its peak memory is its own. A stage whose command and results are there already is skipped, and training
goes on from its last checkpoint (every save_steps): after an interruption the same command goes on. Keys, data and
libraries of all stages are checked before the first one runs. Everything goes below --output_dir:

    expert_scores/   expert_configs/   checkpoints/<method>/   completions/<method>.<dataset>.jsonl   merged/
    table.md   table.json   expert_scores.png   losses.png

Training keys come last, `learning_rate=1e-4` for all methods or `full:learning_rate=3e-5` for one, which wins.
`full:save_opt_states=false` spares the disk the optimizer states of a whole model; that method then starts over.
"""

import argparse
import dataclasses
import json
import shlex
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import get_evaluator, load_rows
from deepseek.files import check_output, suggest, write_json, write_text
from evaluation.run_folder import TRAINING
from scripts.pipeline_results import against_full, completions_path, plot_losses, table, table_rows
from training.data import load_samples, resolve_dataset
from utils import ROOT, command_parser, environment, locked, positive, run_cli, run_command, torchrun

OURS = ("method", "seq_length", "template", "seed", "base_model_path", "train_dataset", "expert_config", "output_dir")
PYTHON = sys.executable.removeprefix(f"{ROOT}/")  # as it is typed in the repository's root


class Stages:
    """Runs commands once each; `stages.json` remembers the command of each output that is whole.

    A command that runs makes those stale that were given its output, or the folder of it.
    """

    def __init__(self, folder: Path, lock: int | None = None):
        self.note, self.lock = folder / "stages.json", lock
        self.done: dict[str, list[str]] = json.loads(self.note.read_text()) if self.note.is_file() else {}

    def run(self, output: Path, script: str, *, processes: int = 1, **flags: object) -> None:
        """`python script --flag=value ...`, skipped where `output` exists and came from the same command.

        A flag that is None or False is left out, True is given without a value, `overrides` (a list) comes last.
        Several processes are started by torchrun, and share the CPU's cores.
        """
        overrides = flags.pop("overrides", [])
        given = {key: value for key, value in flags.items() if value is not None and value is not False}
        words = [script, *(f"--{k}" if v is True else f"--{k}={v}" for k, v in given.items()), *overrides]
        command = [*torchrun(processes), *words]
        if output.exists() and self.done.get(str(output)) == command:
            print(f"[done] {shlex.join([PYTHON, *command])}", flush=True)
            return
        print(f"\n$ {shlex.join([PYTHON, *command])}", flush=True)
        made = {str(output), str(output.parent)}
        self.done = {k: old for k, old in self.done.items() if not made & {flag.partition("=")[2] for flag in old}}
        if self.note.is_file():
            write_json(self.note, self.done)
        start = time.perf_counter()
        run_command(words, processes=processes, lock=self.lock)
        print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
        self.done[str(output)] = command
        write_json(self.note, self.done)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--base_model_path", "--model", required=True, metavar="MODEL", help="the base model: a folder or a hub id")
    add("--train_dataset", "--data", required=True, metavar="DATA", help="a name (file of datasets/train), a path or a "
        "hub id")  # fmt: skip
    add("--eval_dataset", "--eval_datasets", metavar="DATA[,DATA]", help="names (files of datasets/eval), paths or hub "
        "ids (default: the name of the training set, and general)")  # fmt: skip
    add("--output_dir", metavar="DIR", help="default: results/runs/<name of the training set>")
    add("--methods", default="esft-token", metavar="METHOD[,METHOD]", help=f"of {', '.join(TRAINING)} (default: "
        "esft-token)")  # fmt: skip
    add("--train_config", default="configs/base.yaml", metavar="FILE.yaml", help="training keys (default: "
        "configs/base.yaml)")  # fmt: skip
    add("--top_p_token", type=float, default=0.2, metavar="P", help="cumulative token score that is trained (default: "
        "0.2)")  # fmt: skip
    add("--top_p_gate", type=float, default=0.1, metavar="P", help="cumulative gate score that is trained (default: "
        "0.1)")  # fmt: skip
    add("--n_sample_tokens", type=positive, default=131072, metavar="N", help="tokens to score the experts on "
        "(default: 131072)")  # fmt: skip
    add("--seq_length", type=positive, default=4096, metavar="N", help="tokens per pack, in scoring and training "
        "(default: 4096)")  # fmt: skip
    add("--template", choices=("chat", "released"), default="chat", help="how messages are rendered (default: chat)")
    add("--max_new_tokens", type=positive, default=512, metavar="N", help="longest answer in evaluation, in tokens "
        "(default: 512)")  # fmt: skip
    add("--eval_batch_size", type=positive, default=16, metavar="N", help="samples per batch in evaluation (default: "
        "16)")  # fmt: skip
    add("--n_eval_samples", type=positive, metavar="N", help="evaluate on so many samples per data set (default: all)")
    add("--world_size", type=positive, default=1, metavar="N", help="processes in scoring and evaluation (default: 1)")
    add("--nproc_per_node", type=positive, default=1, metavar="N", help="processes in training, by torchrun: ESFT by "
        "train_ep.py, the other methods data parallel (default: 1)")  # fmt: skip
    add("--gpus_per_rank", type=positive, default=1, metavar="N", help="GPUs per such process (default: 1)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the weights (default: as stored)")
    add("--seed", type=int, default=0, metavar="N", help="of sampling, selection and training (default: 0)")
    add("--no_merge", action="store_true", help="do not write the merged model of the first ESFT method")
    add("overrides", nargs="*", metavar="[METHOD:]KEY=VALUE", help="training keys, see train.py --help")
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


def training_keys(args: argparse.Namespace, methods: list[str]) -> dict[str, list[str]]:
    """The overrides for train.py of each method: `key=value` for all methods, or for the one, which wins.

    Raises:
        ValueError, FileNotFoundError: what train.py would refuse of the keys, and those that are flags here.
    """
    from training.config import ALIASES, read_config, training_arguments  # slow, and --help can do without

    for_all: dict[str, str] = {}
    for_one: dict[str, dict[str, str]] = {method: {} for method in TRAINING}
    for pair in args.overrides:
        key, equals, value = pair.partition("=")
        method, colon, rest = key.rpartition(":")
        if not equals:
            raise ValueError(f"{pair!r}: a training key is written key=value")
        if colon and method not in TRAINING:
            raise ValueError(f"{pair!r}: {method!r} is no method{suggest(method, TRAINING)}")
        key, keys = ALIASES.get(rest, rest), for_one[method] if colon else for_all
        if key in keys:
            raise ValueError(f"{pair!r}: {key} is given twice; give it once")
        if key in OURS:
            raise ValueError(f"{pair!r}: the pipeline sets {key} for all its stages; see its own flags (--help)")
        keys[key] = value

    overrides = {}
    for method in methods:
        function, train_method = TRAINING[method]
        keys = {"method": train_method, "seq_length": args.seq_length, "template": args.template, "seed": args.seed}
        keys |= {"dtype": args.dtype} if args.dtype != "auto" else {}
        keys |= {"save_opt_states": "true"} | for_all | for_one[method]
        try:
            given = {key: yaml.safe_load(str(value)) for key, value in keys.items()}
        except yaml.YAMLError as error:
            raise ValueError(f"a value among {', '.join(args.overrides)} is not valid YAML") from error
        given |= {"base_model_path": args.base_model_path, "train_dataset": args.train_dataset, "output_dir": "later"}
        config = read_config(args.train_config, given | ({"expert_config": "later"} if function else {}))
        training_arguments(dataclasses.replace(config, device="cpu"))  # this process is to leave the GPUs alone
        overrides[method] = [f"{key}={value}" for key, value in keys.items()]
    return overrides


def check(args: argparse.Namespace, methods: list[str], datasets: list[str]) -> None:
    """Raise ValueError or FileNotFoundError for what would stop a later stage after hours of earlier ones."""
    for name in ("top_p_token", "top_p_gate"):
        if not 0 < getattr(args, name) <= 1:
            raise ValueError(f"--{name} {getattr(args, name)}: a share of the scores, above 0 and at most 1")
    if "lora" in methods and find_spec("peft") is None:
        raise ValueError(f"method lora needs peft: {PYTHON} -m pip install -c constraints.txt peft")
    load_samples(args.train_dataset)
    names = [Path(dataset).stem for dataset in datasets]
    if len(set(names)) < len(names):
        raise ValueError(f"--eval_dataset {args.eval_dataset}: the data sets must have different names")
    for name, dataset in zip(names, datasets):
        load_rows(dataset)
        get_evaluator(name)  # and the libraries of its metrics


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    methods = [name.strip() for name in args.methods.split(",") if name.strip()]
    for method in methods:
        if method not in TRAINING:
            raise ValueError(f"--methods: {method!r}{suggest(method, TRAINING)} is none of {', '.join(TRAINING)}")
    resolve_dataset(args.train_dataset, "train")
    folder = Path(args.output_dir or ROOT / "results" / "runs" / Path(args.train_dataset).stem)
    check_output(folder, folder=True)
    datasets, overrides = eval_datasets(args), training_keys(args, methods)
    check(args, methods, datasets)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the stage at work is ended, too
    with locked(folder, "pipeline") as lock:
        run_stages(args, Stages(folder, lock), folder, methods, datasets, overrides)


def run_stages(
    args: argparse.Namespace,
    stages: Stages,
    folder: Path,
    methods: list[str],
    datasets: list[str],
    overrides: dict[str, list[str]],
) -> None:
    """Score, select, train (`overrides`: keys of each method), evaluate, merge; the table and the pictures."""
    base = args.base_model_path
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
        function, _ = TRAINING[method]
        run = folder / "checkpoints" / method
        stages.run(
            run / "trainer_state.json",
            "train_ep.py" if function and args.nproc_per_node > 1 else "train.py",
            processes=args.nproc_per_node,
            base_model_path=base,
            train_dataset=args.train_dataset,
            train_config=args.train_config,
            expert_config=configs / f"{function}.json" if function else None,
            output_dir=run,
            overrides=overrides[method],
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
            overwrite=True,
        )
    pictures = find_spec("matplotlib") is not None
    if functions and pictures:
        function = TRAINING[first or "random"][0]
        stages.run(
            folder / "expert_scores.png",
            "scripts/expert/plot_expert_scores.py",
            expert_scores_dir=scores,
            expert_config=configs / f"{function}.json",
            score_function=function,
            output_path=folder / "expert_scores.png",
        )
    if pictures:
        plot_losses(folder, methods)
    else:
        print(f"note: no pictures without matplotlib: {PYTHON} -m pip install -c constraints.txt matplotlib")
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
