"""Find the learning rate of a training: a short sweep over rates that stops the worse ones early.

    python scripts/find_lr.py --model M --data D --output_dir O [--rates=5e-4,1e-3,2e-3] [--steps=100] [key=value ...]

Every rate is trained for a quarter of --steps. It goes on if its validation loss is in the better half, or at most 10 %
above the best. What is left is trained anew with all --steps, and the lowest validation loss is recommended. A rate
whose loss is not finite stops. With --general_dataset, questions of what the model must not lose, a rate that loses
more than --max_loss points of them stops, too. If none is left, those that learned too little are tried after all, the
better ones first. Each training has the whole schedule of its steps.

The other keys are those of train.py, and so is --train_config. Experts are chosen once for all rates. Each stage is a
command of this project, which is printed. After an interruption the same command goes on, and further --rates train
only what is new. The table, all numbers and a picture are in find_lr.md, find_lr.json and find_lr.png.
"""

import argparse
import dataclasses
import math
import signal
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import get_evaluator, load_rows
from deepseek.files import check_output, read_json, write_json, write_text
from deepseek.process_groups import Ranks
from deepseek.selection import SETTINGS
from esft import load_tokenizer
from evaluation.figures import new_figure, save_figure
from scripts.stages import Stages, mean_of, parse_with_keys, training_command
from scripts.sweep import LEAST_KNOWN, numbers
from utils import command_parser, environment, flag_words, locked, markdown_table, note, positive, run_cli

FACTORS = (0.25, 0.5, 1, 2, 4)  # of the run's own rate, where no rates are given
MARGIN = 0.1  # a loss that is no more than this share above the best is not clearly worse
WORSE = "above the best"  # why a rate that learns little in a short time stops
PATHS = ("base_model_path", "train_dataset", "train_config", "output_dir")
TRIAL = ("eval_strategy=no", "save_strategy=no", "load_best_model_at_end=false", "save_opt_states=false")
TRIAL += ("overwrite=true",)  # a trial that was broken off begins again


@dataclass
class Trial:
    """What a training gave. `loss` is the validation loss, and `general` the score in percent, if it was asked."""

    rate: float
    steps: int
    loss: float = math.inf
    general: float | None = None
    stopped: str = ""  # why this rate goes no further


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add, count = parser.add_argument, {"type": positive, "metavar": "N"}
    add("--base_model_path", "--model", required=True, metavar="MODEL", help="the base model: a folder or a hub id")
    add("--train_dataset", "--data", required=True, metavar="DATA", help="a name, a path or a hub id")
    add("--output_dir", required=True, metavar="DIR", help="a folder for the trials and the table")
    add("--train_config", metavar="FILE.yaml", help="training keys")
    add("--rates", type=numbers(1e6), metavar="R[,R]", help="learning rates (default: "
        f"{', '.join(f'{factor:g}' for factor in FACTORS)} times that of the training keys)")  # fmt: skip
    add("--steps", **count, default=100, help="optimizer steps of a whole trial (default: 100)")
    add("--general_dataset", metavar="DATA", help="questions of what the model must not lose, such as general")
    add("--max_loss", type=float, default=2.0, metavar="POINTS", help="what a rate may lose of them (default: 2)")
    add("--max_new_tokens", **count, default=64, help="longest answer to them, in tokens (default: 64)")
    add("--nproc_per_node", **count, default=1, help="processes in training (default: 1)")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="training keys, see train.py --help")
    args = parse_with_keys(parser, argv)
    for flag in ("max_loss", "max_new_tokens"):
        if getattr(args, flag) != parser.get_default(flag) and not args.general_dataset:
            parser.error(f"--{flag} needs --general_dataset")
    if "," in (args.general_dataset or ""):
        parser.error(f"--general_dataset={args.general_dataset} is not one data set")
    if not 0 <= args.max_loss < math.inf:
        parser.error(f"--max_loss {args.max_loss:g} is not a number of points from 0")
    return args


def plan(args: argparse.Namespace) -> tuple["RunConfig", float]:  # noqa: F821
    """Return the config of the trials, and the learning rate that its keys name.

    Raises:
        ValueError, OSError: what train.py refuses, a key that a flag sets, and data without a validation set.
    """
    from training.config import ALIASES, read_config, training_arguments  # slow; --help can do without
    from training.config_parser import take_secret
    from training.data import load_data
    from training.first_selection import selected_experts
    from training.keys import LORA_SELECTED
    from training.plan import open_empty

    args.overrides = [word for word in args.overrides if not take_secret(*word.partition("=")[::2])]
    for word in args.overrides:
        if (key := ALIASES.get(word.partition("=")[0], word.partition("=")[0])) == "learning_rate" and args.rates:
            raise ValueError(f"cannot use {word!r}: --rates sets {key}. Leave one of them out.")
    words = [*flag_words(**{key: getattr(args, key) for key in PATHS}), *args.overrides]
    read_config([*words, f"max_steps={args.steps}", *TRIAL])  # of a trial: refused now and not in each
    config = read_config(words)
    if config.kind in ("esft", "dpo", LORA_SELECTED) and not config.expert_config:
        config = dataclasses.replace(config, expert_config=str(selected_experts(config.output_dir)))
    usual = training_arguments(dataclasses.replace(config, device="cpu")).learning_rate
    open_empty(config, Ranks(world_size=args.nproc_per_node))
    if not load_data(load_tokenizer(args.base_model_path), config, Ranks())[1]:
        raise ValueError("cannot compare rates: no sample is held out for validation. Raise validation_fraction.")
    return config, usual


def prune(trials: list[Trial], base: float | None, max_loss: float) -> list[Trial]:
    """Note why trials stop, and return those that go on. `base` is what the base scores on general questions."""
    ordered = sorted((trial for trial in trials if math.isfinite(trial.loss)), key=lambda trial: trial.loss)
    half = ordered[: (len(trials) + 1) // 2]
    for trial in trials:
        lost = base - trial.general if base is not None and trial.general is not None else 0.0
        if not math.isfinite(trial.loss):
            trial.stopped = "failed, or its loss is not finite"
        elif lost > max_loss:
            trial.stopped = f"loses {lost:.1f} points"
        elif trial not in half and trial.loss > ordered[0].loss * (1 + MARGIN):
            trial.stopped = f"{trial.loss / ordered[0].loss - 1:.0%} {WORSE}"
    return [trial for trial in trials if not trial.stopped]


class RateFinder:
    """Runs the trials in a folder."""

    def __init__(self, args: argparse.Namespace, config: "RunConfig", stages: Stages):  # noqa: F821
        self.args, self.config, self.stages, self.folder = args, config, stages, Path(args.output_dir)
        self.script = "train_ep.py" if config.expert_config and args.nproc_per_node > 1 else "train.py"
        self.paths = {name: getattr(args, name) for name in PATHS[:3]}

    def run(self, rates: list[float]) -> Trial | None:
        """Return the recommended trial, or None if all rates lose too much.

        Raises:
            ValueError: every training failed, or the base knows too little to lose anything.
        """
        experts = self.select()
        base = self.general("base", None) if self.args.general_dataset else None
        if base is not None and base < LEAST_KNOWN:
            knows = f"the base scores {base:.1f} on {self.args.general_dataset}"
            raise ValueError(f"cannot tell what is forgotten: {knows}. Give questions that it knows.")
        short = [self.measure(rate, max(self.args.steps // 4, 1), experts) for rate in rates]
        if not any(math.isfinite(trial.loss) for trial in short):
            raise ValueError("cannot recommend a learning rate: every training failed, see above. Lower --rates.")
        whole = [self.measure(trial.rate, self.args.steps, experts) for trial in prune(short, base, self.args.max_loss)]
        left = prune(whole, base, self.args.max_loss) if whole else []
        waiting = sorted((trial for trial in short if WORSE in trial.stopped), key=lambda trial: trial.loss)
        while waiting and not left:  # all that learn fast forget too much
            whole.append(self.measure(waiting.pop(0).rate, self.args.steps, experts))
            left = prune(whole[-1:], base, self.args.max_loss)
        taken = min(left, key=lambda trial: trial.loss, default=None)
        self.write(base, short, sorted(whole, key=lambda trial: trial.rate), taken)
        return taken

    def select(self) -> list[str]:
        """Choose the experts, if no key names them. Return the keys that give them to every trial."""
        from training.first_selection import selected_experts, selection_stages

        if self.config.expert_config != str(selected_experts(self.config.output_dir)):
            return []
        for output, script, flags in selection_stages(self.config):
            self.stages.run(output, script, **flags)
        usual = {field.name: field.default for field in dataclasses.fields(self.config)}
        given = [key for key in SETTINGS if getattr(self.config, key) != usual[key]]  # no effect on chosen experts
        resets = [f"{key}={'null' if usual[key] is None else usual[key]}" for key in given]
        return [*resets, f"expert_config={self.config.expert_config}"]

    def measure(self, rate: float, steps: int, experts: list[str]) -> Trial:
        """Train at a rate, and ask the general questions."""
        name, trial = f"lr{rate:g}".replace(".", "_"), Trial(rate, steps)
        output = self.folder / f"steps_{steps}" / name
        keys = [*self.args.overrides, *experts, f"learning_rate={rate:g}", f"max_steps={steps}", *TRIAL]
        try:
            options = {"processes": self.args.nproc_per_node, "keys": keys, "output_dir": output}
            self.stages.run(output / "trainer_state.json", self.script, **options, **self.paths)
        except SystemExit as stop:
            if stop.code != 2:
                raise
            note(f"learning rate {rate:g} is left out, as its training failed")
            return trial
        trial.loss = read_json(output / "run.json", "results")["results"]["eval_loss"]
        if self.args.general_dataset and math.isfinite(trial.loss):
            trial.general = self.general(f"{name}-{steps}", output)
        return trial

    def general(self, name: str, model: Path | None) -> float:
        """Return the score of the base, or of a trained model, on the general questions, in percent."""
        from training.first_selection import data_flags

        output = self.folder / "completions" / f"{name}.jsonl"
        flags = {"eval_dataset": self.args.general_dataset, "base_model_path": self.args.base_model_path}
        flags |= {"adapter_dir": model, "output_path": output, "max_new_tokens": self.args.max_new_tokens}
        flags |= {"template": self.config.template, "dtype": self.config.dtype, "seed": self.config.seed}
        flags |= {"template_kwargs": data_flags(self.config)["template_kwargs"]}
        self.stages.run(output.with_suffix(".summary.json"), "eval_multigpu.py", **flags)
        return mean_of(output.with_suffix(".summary.json"))

    def write(self, base: float | None, short: list[Trial], whole: list[Trial], taken: Trial | None) -> None:
        """Write find_lr.md, find_lr.json and find_lr.png, and print the table and the command that comes next."""
        text = format_trials(base, short, whole, taken)
        if taken is None:
            text += "\n\nNo rate is good. Lower --rates, or raise --max_loss."
        else:
            text += (
                f"\n\nRecommended: {taken.rate:g}. After {taken.steps} steps its validation loss is {taken.loss:.4f}."
            )
            if len(short) > 1 and taken.rate in (short[0].rate, short[-1].rate):
                more = "lower" if taken.rate == short[0].rate else "higher"
                text += f" No {more} rate was tried: add one to --rates."
        write_text(self.folder / "find_lr.md", f"{text}\n")
        facts = {"base": base, "recommended": taken and taken.rate, "arguments": vars(self.args)}
        trials = [dataclasses.asdict(trial) for trial in (*short, *whole)]
        write_json(self.folder / "find_lr.json", {"trials": trials, **facts, "environment": environment()})
        print(f"\n{text}\n\nAll of it is in {self.folder}")
        if find_spec("matplotlib"):
            save_figure(draw(base, short, whole, taken), self.folder / "find_lr.png")
        if taken:
            keys = [*self.args.overrides, f"learning_rate={taken.rate:g}"]
            print("train with it:", training_command(self.script, self.args.nproc_per_node, keys, **self.paths))


def format_trials(base: float | None, short: list[Trial], whole: list[Trial], taken: Trial | None) -> str:
    """Return the table: a row per rate, the recommended one bold."""

    def cells(trial: Trial | None) -> list[str]:
        loss = f"{trial.loss:.4f}" if trial and math.isfinite(trial.loss) else "-"
        general = f"{trial.general:.1f}" if trial and trial.general is not None else "-"
        return [loss] if base is None else [loss, general]

    lines = [["base", *["-", f"{base:.1f}"] * 2, ""]] if base is not None else []
    for trial in short:
        last = next((other for other in whole if other.rate == trial.rate), None)
        mark = "**" if taken and trial.rate == taken.rate else ""
        line = [f"{trial.rate:g}", *cells(trial), *cells(last), (last or trial).stopped]
        lines.append([f"{mark}{cell}{mark}" if cell else "" for cell in line])
    heads = [f"loss, {trials[0].steps} steps" for trials in (short, whole or short)]
    heads = heads if base is None else [heads[0], "general", heads[1], "general"]
    return markdown_table(["learning rate", *heads, "why it stopped"], lines)


def draw(base: float | None, short: list[Trial], whole: list[Trial], taken: Trial | None):
    """Return a figure of loss against rate, and of the general score beside it, if there is one."""
    figure, axes = new_figure(5.5 if base is None else 10, 4, ncols=1 if base is None else 2, squeeze=False)
    for ax, key, label in zip(axes[0], ("loss", "general"), ("validation loss (nats per label token)", "general (%)")):
        for trials in filter(None, (short, whole)):
            points = [(t.rate, getattr(t, key)) for t in trials if math.isfinite(t.loss)]
            ax.plot(*zip(*points), "o-", label=f"{trials[0].steps} steps") if points else None
        if key == "general":
            ax.axhline(base, color="gray", ls=":", label="base")
        if taken:
            ax.axvline(taken.rate, color="#e8000b", lw=0.8, label=f"recommended: {taken.rate:g}")
        ax.set(xscale="log", xlabel="learning rate", ylabel=label)
        ax.set_xticks([t.rate for t in short], [f"{t.rate:g}" for t in short])
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_output(args.output_dir, folder=True)
    if args.general_dataset:
        load_rows(args.general_dataset)
        get_evaluator(Path(args.general_dataset).stem)  # and the libraries of its metrics
    config, usual = plan(args)
    rates = args.rates or [float(f"{usual * factor:.6g}") for factor in FACTORS]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the stage at work is ended, too
    with locked(args.output_dir) as lock:
        stages = Stages(Path(args.output_dir), lock, **{key: getattr(args, key) for key in PATHS[:2]})
        RateFinder(args, config, stages).run(rates)


if __name__ == "__main__":
    run_cli(main)
