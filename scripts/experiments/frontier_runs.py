"""The runs of frontier.py: a training with experts by any rule, judged at several strengths on two sets of questions.

The test questions are those of datasets/eval. What is chosen (learning rate, strength, share) is chosen on others: the
task's samples that training holds out, and questions about the general skills drawn by another seed. The rules that
compare with general data see a third draw.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deepseek.files import read_json, read_jsonl, write_json, write_jsonl
from esft import ExpertScores, select_experts
from evaluation.frontier import RULES, Point
from scripts.experiments.paper_runs import TINY, Lab, Run
from training.data import conversation, held_out_questions
from utils import ROOT

STRENGTHS = (0.5, 0.7, 0.85, 1.0)
MAX_LOSS = 2.0  # points of general skills on the validation questions that a chosen strength may cost
SEEDS_OF_GENERAL = {"validation": 11, "contrast": 12}  # of build_datasets.py, whose own is another
RECIPES = {  # name -> keys of train.py beside those of the paper's rule; "{...}" are what FrontierLab.more puts in
    "replay": ("replay_dataset={general}", "replay_share=0.2"),
    "distill": ("replay_dataset={general}", "replay_share=0.2", "distill_from=base"),
    "l2": ("l2_to_base=30",),
    "expand": ("expand_experts={{to: {budget}, by: {third}, when: 100}}", "expert_scores_dir={scores}"),
    "reselect": ("reselect_steps=100",),
    "router": ("train_router=full",),
    "muon": ("optim=muon",),
}


@dataclass(frozen=True)
class Trial(Run):
    """One training. `row` names what it is in a table: a rule of RULES, "lora", "full" or a variant of one.

    `share` is that of all parameters. The experts are a share `budget` of the routed ones, LoRA has a `rank`. With both
    it is LoRA on these experts.
    """

    row: str = ""
    rule: str = ""
    share: float = 0.0
    budget: float = 0.0
    rank: int = 0
    validated: bool = False  # also judged on the validation questions

    @property
    def name(self) -> str:
        size = [f"{100 * self.share:g}"] if self.share else []
        return "-".join([self.task, self.row, *size, f"lr{self.rate}", str(self.seed), *["validated"] * self.validated])

    @property
    def selects(self) -> bool:
        return bool(self.rule)

    @property
    def first_budget(self) -> float:
        """The share of the routed experts with which a run begins."""
        return self.budget / 3 if self.row == "expand" else self.budget

    @property
    def keys(self) -> list[str]:
        rank = [f"lora_rank={self.rank}", f"lora_alpha={2 * self.rank}"] if self.rank else []
        return [*super().keys, *rank, *(["lora_experts=selected"] if self.rank and self.rule else [])]


class FrontierLab(Lab):
    """A Lab whose results are curves over strengths."""

    def general(self, use: str) -> Path:
        """Return questions about the general skills for a use. None of them is a test question."""
        path = self.folder / use / "general.jsonl"
        if not path.is_file():
            drawn = self.folder / f"datasets-{use}"
            self.command("scripts/miniature/build_datasets.py", f"--seed={SEEDS_OF_GENERAL[use]}",
                         f"--output_dir={drawn}")  # fmt: skip
            test = {row["prompt"] for row in read_jsonl(ROOT / "datasets" / "eval" / "general.jsonl")}
            rows = read_jsonl(drawn / "eval" / "general.jsonl")
            write_jsonl(path, (row for row in rows if row["prompt"] not in test))
        return path

    def samples(self, task: str) -> str:
        """Return a data set to score experts on: the task's training data, or general questions and answers."""
        if task != "general":
            return task
        path = self.folder / "contrast" / "conversations.jsonl"
        rows = read_jsonl(self.general("contrast"))
        write_jsonl(path, (conversation(row["prompt"], row["answers"][0]) for row in rows))
        return str(path)

    def held_out(self, task: str, seed: int) -> Path:
        """Return the samples that training with this seed holds out, as questions."""
        path = self.folder / "validation" / str(seed) / f"{task}.jsonl"
        if not path.is_file():
            run = {**self.settings(), "train_dataset": task, "n_train_samples": None, "training": {"seed": seed}}
            write_jsonl(path, held_out_questions(run)[0])
        return path

    def experts(self, run: Trial) -> Path:
        """Write the expert config of a run, and return its path."""
        rule, scores = RULES[run.rule], ExpertScores.load(self.scores(run.base, run.task))
        general = ExpertScores.load(self.scores(run.base, "general")) if "contrast" in rule else None
        chosen = select_experts(scores, **rule, budget=run.first_budget, general=general, seed=run.seed)
        path = self.folder / "configs" / f"{run.name}.json"
        write_json(path, dataclasses.replace(chosen, shared_experts=run.shared).to_dict())
        return path

    def train(self, run: Trial, out: Path, steps: int, *more: str) -> dict:
        third, scores = run.budget / 3, self.scores(run.base, run.task)
        values = {"general": self.samples("general"), "budget": run.budget, "third": third, "scores": scores}
        return super().train(run, out, steps, *(key.format(**values) for key in RECIPES.get(run.row, ())))

    def make(self, runs: Iterable[Trial], what: str) -> None:
        runs = list(runs)
        for task, seed in dict.fromkeys((run.task, run.seed) for run in runs if run.validated):
            self.held_out(task, seed)  # and the rest, too, before several runs need them at the same time
        self.general("validation")
        self.scores(TINY, "general")
        super().make(runs, what)

    def scores(self, base: str, task: str, n_sample_tokens: int = 16384) -> Path:
        return super().scores(base, task, n_sample_tokens, "--scores=gradient,reap")

    def made_of(self, run: Trial) -> dict:
        return {**super().made_of(run), "strengths": [0.0, *STRENGTHS]}

    def _run(self, run: Trial, folder: Path) -> dict:
        trained = self.train(run, folder / "trained", self.args.steps)
        asked = {"test": [run.task, "general"]}
        if run.validated:
            asked["validation"] = [self.held_out(run.task, run.seed), self.general("validation")]
        curves = {use: self.curve(run, folder, use, data) for use, data in asked.items()}
        return {"curves": curves, "trained": trained}

    def curve(self, run: Trial, folder: Path, use: str, data: list) -> list[dict]:
        """Evaluate the base and each strength on the task and on general skills. Return what is in a Point of each."""
        model = f"--base_model_path={run.base}", f"--adapter_dir={folder / 'trained'}"
        self.command("eval_multigpu.py", *model, f"--strength={','.join(map(str, STRENGTHS))}",
                     f"--eval_dataset={','.join(map(str, data))}", "--max_new_tokens=64", "--eval_batch_size=64",
                     f"--output_path={folder / use}.jsonl")  # fmt: skip
        task, general = (Path(name).stem for name in data)
        points = read_json(folder / use / "curve.json")["points"]
        return [{"strength": p["strength"], "task": p["mean"][task], "general": p["mean"][general]} for p in points]

    def points(self, run: Trial, use: str) -> list[Point]:
        """Return the curve of a run, from the base on."""
        return [Point(run.row, share=run.share, **values) for values in self.result(run)["curves"][use]]
