"""The runs of paper.py: the settings of a run, the commands that make it, and the files that keep its result.

A Lab runs commands and keeps their results below a folder of its own. A result is made in a hidden folder and kept in
one file, together with digests of what it was made from. It is made again when its data, base or versions change.
frontier_runs.py builds on it.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml
from tqdm import tqdm

from deepseek.files import read_json, read_jsonl, sha256, write_json, write_jsonl
from esft import ExpertConfig, ExpertScores, select_experts
from training.data import conversation
from utils import ROOT, environment, run_command

TINY = "results/models/tiny"
TASKS = ("intent", "summary", "law", "translation")
RATES = {"esft": "2e-3", "random": "2e-3", "lora": "1e-3", "full": "5e-4"}  # chosen by part r
ALL_ELSE_RATE = RATES["full"]  # for runs that train non-expert modules as well
GATE = {"score": "gate", "top_p": 0.1, "learning_rate": "4e-3"}  # the paper pairs gate with 0.1, token with 0.2


@dataclass(frozen=True)
class Run:
    """One training and its evaluation. The method "base" evaluates without training."""

    task: str
    method: str = "esft"
    seed: int = 0
    base: str = TINY
    score: str = "token"
    top_p: float = 0.2
    n_sample_tokens: int = 16384
    learning_rate: str = ""  # default: the method's
    experts: bool = True
    shared: bool = False
    all_else: bool = False

    @property
    def rate(self) -> str:
        return self.learning_rate or (ALL_ELSE_RATE if self.all_else else RATES[self.method])

    @property
    def name(self) -> str:
        parts = [Path(self.base).name, self.task, self.method]
        if self.method in ("esft", "random"):
            parts += [self.score, f"p{self.top_p:g}", f"n{self.n_sample_tokens}"]
            words = {"none": not self.experts, "shared": self.shared, "else": self.all_else}
            parts += [word for word, holds in words.items() if holds]
        if self.method != "base":
            parts.append(f"lr{self.rate}")
        return "-".join([*parts, str(self.seed)])

    @property
    def selects(self) -> bool:
        """Whether it trains experts that a config names."""
        return self.method in ("esft", "random")

    @property
    def keys(self) -> list[str]:
        """The words for train.py that say what is trained."""
        return [f"method={self.method}", f"seed={self.seed}", f"learning_rate={self.rate}"]


class Lab:
    """Runs commands below a folder, and makes each result once."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, Path(args.work_dir).resolve()
        for left in self.folder.glob("*/.*-*"):  # left by a runner that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.found: dict[Path, dict] = {}  # the results that were read or made
        self.used: list[dict] = []  # environments of those that were asked for

    def command(self, *words: object) -> None:
        run_command(words, quiet=True, cwd=ROOT, env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ})

    def base(self, experts: int) -> str:
        """Return the folder of a base with this number of experts per layer. Pretrain it if it is missing."""
        if experts == 64:
            return TINY
        folder = self.folder / f"tiny{experts}-{self.args.pretrain_tokens}"
        if not (folder / "config.json").is_file():
            self.command("scripts/miniature/build_tiny_model.py",
                         f"--tokens={self.args.pretrain_tokens}", f"--experts={experts}",
                         "--threads=1", f"--output_dir={folder}.part")  # fmt: skip
            Path(f"{folder}.part").rename(folder)
        return str(folder)

    def scores(self, base: str, task: str, n_sample_tokens: int = 16384, *more: str) -> Path:
        """Score the experts of a base on a task, with `more` flags, unless it is done, and return the folder."""
        made_of = inputs(base, data_of(task))
        mark = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:8]
        folder = self.folder / "scores" / f"{Path(base).name}-{task}-n{n_sample_tokens}-{mark}"
        if not (folder / "summary.json").is_file():
            what = f"--base_model_path={base}", f"--eval_dataset={self.samples(task)}", f"--output_dir={folder}"
            size = f"--n_sample_tokens={n_sample_tokens}", "--seq_length=256"
            self.command("scripts/expert/get_expert_scores.py", *what, *size, *more)
        return folder

    def samples(self, task: str) -> str:
        """Return a data set to score experts on: the task's training data, or questions and answers of "general"."""
        if task != "general":
            return task
        path = self.folder / "general.jsonl"
        rows = read_jsonl(ROOT / data_of(task))
        write_jsonl(path, (conversation(row["prompt"], row["answers"][0]) for row in rows))
        return str(path)

    def experts(self, run: Run) -> Path:
        """Write the expert config of a run, and return its path."""
        chosen = ExpertConfig({})
        if run.experts:
            scores = ExpertScores.load(self.scores(run.base, run.task, run.n_sample_tokens))
            chosen = select_experts(scores, score_function=run.score, top_p=run.top_p)
        path = self.folder / "configs" / f"{run.name}.json"
        chosen = dataclasses.replace(chosen, shared_experts=run.shared, non_expert_modules=run.all_else)
        write_json(path, chosen.to_dict())
        return path

    def made_of(self, run: Run) -> dict:
        """Return what decides a result besides the code."""
        data = data_of(run.task), f"datasets/eval/{run.task}.jsonl", data_of("general")
        return {"run": dataclasses.asdict(run), "settings": self.settings(), **inputs(run.base, *data)}

    def kept(self, path: Path, run: Run, make: Callable[[Path], dict]) -> dict:
        """Return the result kept in `path`, if it was made from the same; else call `make` with a fresh folder."""
        if path not in self.found:
            made_of, found = self.made_of(run), {}
            with contextlib.suppress(OSError, ValueError):  # an unreadable result is made again
                found = read_json(path, "made_of", "environment")
            if found.get("made_of") != made_of:
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{run.name}-") as folder:
                    found = {**make(Path(folder)), "made_of": made_of, "environment": environment()}
                write_json(path, found)
            self.found[path] = found
        self.used.append(self.found[path]["environment"])
        return self.found[path]

    def settings(self) -> dict:
        """Return the settings that all runs share, without the learning rate, which every run sets itself."""
        settings = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8"))  # without its comments
        return {key: value for key, value in settings.items() if key != "learning_rate"}

    def make(self, runs: Iterable[Run], what: str) -> None:
        """Make the results that are not there yet, several at a time."""
        runs = {run.name: run for run in runs}.values()
        for base, task, tokens in dict.fromkeys((run.base, run.task, run.n_sample_tokens) for run in runs):
            self.scores(base, task, tokens)  # before several runs need them at the same time
        with ThreadPoolExecutor(self.args.jobs) as pool:
            list(tqdm(pool.map(self.result, runs), total=len(runs), unit="run", desc=what))

    def origin(self) -> str:
        """Return the dates, the devices and the versions of the results that were read or made."""
        used = self.used or [environment()]
        dates = sorted({facts["date"][:10] for facts in used})
        kinds = sorted({f"{f['device']}, torch {f['torch']}, transformers {f['transformers']}" for f in used})
        return f"{dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}'}, {'; '.join(kinds)}"

    def environments(self) -> list[dict]:
        """Return the environments of these results, each once and without its date."""
        facts = (tuple(item for item in used.items() if item[0] != "date") for used in self.used)
        return [dict(items) for items in dict.fromkeys(facts)]

    def result(self, run: Run) -> dict:
        """Return the scores in percent by data set, and the results of training, from its file if it was run before."""
        steps = "" if run.method == "base" else f"-{self.args.steps}"
        return self.kept(self.folder / "results" / f"{run.name}{steps}.json", run, functools.partial(self._run, run))

    def _run(self, run: Run, folder: Path) -> dict:
        out, answers, trained = folder / "trained", folder / "answers.jsonl", {}
        model = [f"--base_model_path={out if run.method == 'full' else run.base}"]
        if run.method != "base":
            trained = self.train(run, out, self.args.steps)
            if run.method != "full":
                model.append(f"--adapter_dir={out}")
        self.command("eval_multigpu.py", *model, f"--eval_dataset={run.task},general", "--max_new_tokens=64",
                     "--eval_batch_size=64", f"--output_path={answers}")  # fmt: skip
        summaries = {name: answers.with_suffix(f".{name}.summary.json") for name in (run.task, "general")}
        scores = {name: read_json(path)["mean"] for name, path in summaries.items()}
        return {"scores": scores, "trained": trained}

    def train(self, run: Run, out: Path, steps: int, *more: str) -> dict:
        """Train with `more` keys, and return the results in run.json: seconds of a step, bytes, parameters."""
        keys = ["--train_config=configs/tiny.yaml", f"--train_dataset={run.task}", f"--output_dir={out}", *run.keys,
                f"max_steps={steps}", "save_strategy=no", "load_best_model_at_end=false", "disable_tqdm=true",
                "device=cpu"]  # fmt: skip
        if run.selects:
            keys.append(f"--expert_config={self.experts(run)}")
        self.command("train.py", f"--base_model_path={run.base}", *keys, *more)
        return read_json(out / "run.json")["results"]

    def timed(self, run: Run, number: int, steps: int) -> dict:
        """Return the results of `train`, once for each number."""
        path = self.folder / "timed" / f"{run.name}-{steps}-{number}.json"
        return self.kept(path, run, lambda folder: self.train(run, folder / "trained", steps))


def data_of(task: str) -> str:
    """Return the file of a task's training data, relative to the root; for "general", of its questions."""
    return f"datasets/{'eval' if task == 'general' else 'train'}/{task}.jsonl"


def inputs(base: str, *data: str) -> dict[str, str]:
    """Return digests of a base and of data, and the versions of the libraries that decide a result."""
    files = (*data, f"{base}/model.safetensors")
    digests = {Path(name).name if Path(name).is_absolute() else name: digest(ROOT / name) for name in files}
    return {**digests, **{name: version(name) for name in ("torch", "transformers")}}


digest = functools.cache(sha256)
