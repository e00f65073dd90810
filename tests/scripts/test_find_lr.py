"""The rate finder: which rates go on, what is recommended, equal tables however often it is broken off."""

import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek.files import read_json, write_json
from scripts import find_lr
from scripts.find_lr import Trial, prune
from tests.helpers import ROOT, refused
from training.config import read_config
from utils import PYTHON

FLAGS = ["--model=results/models/tiny", "--data=law", "--train_config=configs/tiny.yaml", "--steps=40"]
LOSSES = {  # rate -> validation loss after 10 steps and after 40 steps, and the general score after 40
    "0.0005": (2.0, 1.0, 92.0),  # clearly worse, and not in the better half
    "0.001": (1.05, 0.7, 91.5),  # not clearly worse
    "0.002": (1.0, 0.5, 91.0),
    "0.004": (0.96, 0.4, 85.0),  # forgets
    "0.008": (math.inf, math.inf, 0.0),  # not finite
}
BASE = 92.0


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def flags_of(words: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in words[1:] if "=" in word)


def fake(words: list[str], losses: dict) -> None:
    """Write what a stage would. A training whose loss is not finite ends with exit code 2."""
    flags = flags_of(words)
    if words[0] == "train.py":
        short, whole, _ = losses[flags["learning_rate"]]
        loss = short if flags["max_steps"] == "10" else whole
        if not math.isfinite(loss):
            sys.exit(2)
        write_json(Path(flags["output_dir"]) / "run.json", {"results": {"eval_loss": loss}})
        write_json(Path(flags["output_dir"]) / "trainer_state.json", {})
    elif words[0] == "eval_multigpu.py":
        mean = BASE
        if "adapter_dir" in flags:
            rate = Path(flags["adapter_dir"]).name.removeprefix("lr").replace("_", ".")
            mean = losses[rate][2] if "steps_40" in flags["adapter_dir"] else BASE
        write_json(Path(flags["output_path"]).with_suffix(".summary.json"), {"mean": mean})
    else:
        name = "summary.json" if words[0].endswith("get_expert_scores.py") else ""
        write_json(Path(flags.get("output_path") or flags["output_dir"]) / name, {})


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Run the command on `fake` stages. `search.commands` are those that ran."""

    def run(*more: str, losses: dict = LOSSES, after: int = 10**6) -> None:
        left = after

        def run_command(words, **_):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            run.commands.append(list(map(str, words)))
            fake(run.commands[-1], losses)

        monkeypatch.setattr("scripts.stages.run_command", run_command)
        find_lr.main([*FLAGS, f"--rates={','.join(losses)}", f"--output_dir={run.folder}", *more])

    run.commands, run.folder = [], tmp_path / "out"
    return run


def trained(search) -> list[tuple[str, str]]:
    flags = [flags_of(words) for words in search.commands if words[0] == "train.py"]
    return [(found["max_steps"], found["learning_rate"]) for found in flags]


# ---- which rates go on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "left"),
    [
        ([3.0, 1.0, 1.09, 1.2], [1, 2]),
        ([3.0, 1.0, 1.3, 1.4], [1, 2]),  # the better half goes on, however far apart
        ([1.0, 1.01, 1.02, 1.03], [0, 1, 2, 3]),
        ([1.3, 1.2, 1.0], [1, 2]),
        ([math.inf, 2.0, math.nan], [1]),
        ([5.0], [0]),
    ],
)
def test_the_better_half_goes_on_and_what_is_not_clearly_worse(losses, left):
    trials = [Trial(rate, 10, loss) for rate, loss in enumerate(losses, 1)]
    assert prune(trials, None, 2.0) == [trials[i] for i in left]
    assert all(bool(trial.stopped) == (i not in left) for i, trial in enumerate(trials))


def test_what_forgets_more_than_max_loss_stops():
    trials = [Trial(rate, 10, 1.0, general) for rate, general in ((1, 90.0), (2, 89.9), (3, 95.0))]
    assert [trial.rate for trial in prune(trials, 92.0, 2.0)] == [1, 3] and trials[1].stopped == "loses 2.1 points"


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_lowest_loss_among_the_rates_that_go_on_is_recommended(search, capsys):
    search()
    assert trained(search) == [
        *(("10", rate) for rate in LOSSES),
        *(("40", rate) for rate in ("0.001", "0.002", "0.004")),
    ]
    out, told = capsys.readouterr(), read_json(search.folder / "find_lr.json")
    assert told["recommended"] == 0.004
    assert [(t["rate"], t["steps"], t["loss"]) for t in told["trials"][5:]] == [
        (0.001, 40, 0.7), (0.002, 40, 0.5), (0.004, 40, 0.4)
    ]  # fmt: skip
    text = (search.folder / "find_lr.md").read_text()
    assert "| 0.0005 | 2.0000 | - | 108% above the best |" in text
    assert "| **0.004** | **0.9600** | **0.4000** |" in text and "| 0.008 | - | - | failed" in text
    assert text in out.out + "\n" and "learning rate 0.008 is left out, as its training failed" in out.err
    assert (search.folder / "find_lr.png").read_bytes().startswith(b"\x89PNG")
    (line,) = [line for line in out.out.splitlines() if line.startswith("train with it: ")]
    words = shlex.split(line.removeprefix("train with it: "))
    assert words[:2] == [PYTHON, "train.py"] and words[-1] == "learning_rate=0.004"
    config = read_config(words[2:])
    assert config.output_dir == "results/checkpoints/law" and config.training["max_steps"] == 450
    assert config.expert_config is None and config.training["learning_rate"] == 0.004


def test_a_rate_that_forgets_is_not_recommended(search, capsys):
    search("--general_dataset=general")
    assert read_json(search.folder / "find_lr.json")["recommended"] == 0.002
    text = (search.folder / "find_lr.md").read_text()
    assert "| base | - | 92.0 | - | 92.0 |  |" in text and "loses 7.0 points" in text
    asked = [flags_of(words) for words in search.commands if words[0] == "eval_multigpu.py"]
    assert "adapter_dir" not in asked[0] and len(asked) == 1 + 4 + 3  # none of what has failed
    search("--general_dataset=general", "--max_loss=10")
    assert read_json(search.folder / "find_lr.json")["recommended"] == 0.004
    search("--general_dataset=general", losses={rate: (*found[:2], 80.0) for rate, found in LOSSES.items()})
    assert read_json(search.folder / "find_lr.json")["recommended"] == 0.002  # nothing was asked again
    shutil.rmtree(search.folder)
    search("--general_dataset=general", losses={rate: (*found[:2], 80.0) for rate, found in LOSSES.items()})
    told = read_json(search.folder / "find_lr.json")
    assert told["recommended"] is None and "No rate is good" in (search.folder / "find_lr.md").read_text()
    assert len(told["trials"]) == 5 + 4  # all but what failed


def test_if_all_that_learn_fast_forget_a_slower_rate_is_tried_after_all(search):
    losses = {
        "0.0005": (4.0, 2.0, 92.0),
        "0.001": (3.0, 1.5, 91.0),  # the best of those that were stopped
        "0.002": (2.0, 1.2, 89.0),
        "0.004": (1.2, 0.6, 70.0),
        "0.008": (1.0, 0.5, 50.0),
        "0.016": (1.05, 0.7, 40.0),
    }
    search("--general_dataset=general", losses=losses)
    assert trained(search)[6:] == [("40", rate) for rate in ("0.004", "0.008", "0.016", "0.002", "0.001")]
    text = (search.folder / "find_lr.md").read_text()
    assert read_json(search.folder / "find_lr.json")["recommended"] == 0.001 and "No lower rate" not in text
    assert "| **0.001** | **3.0000** | **92.0** | **1.5000** | **91.0** |  |" in text
    assert "| 0.0005 | 4.0000 | 92.0 | - | - | 300% above the best |" in text and "loses 3.0 points" in text


def test_experts_are_chosen_once_for_all_rates(search):
    search("top_p=0.1", "score_function=gate")
    names = [Path(words[0]).name for words in search.commands]
    assert names[:2] == ["get_expert_scores.py", "generate_expert_config.py"] and set(names[2:]) == {"train.py"}
    assert "--top_p=0.1" in search.commands[1] and "--score_function=gate" in search.commands[1]
    for words in search.commands[2:]:
        config = read_config([word for word in words[1:] if not word.startswith("--lock")])  # nothing contradicts it
        assert config.expert_config == str(search.folder / "expert_configs" / "selected.json")
        assert config.overwrite and config.training["eval_strategy"] == "no"


def test_a_selection_of_an_earlier_version_is_not_made_again(search):
    """Its commands had all settings, in this order."""
    keys = ["n_train_samples=400", "streaming=true"]
    search(*keys)
    told = read_json(search.folder / "stages.json")
    paths = ["--base_model_path=results/models/tiny", f"--output_dir={search.folder}/expert_scores"]
    told[str(search.folder / "expert_scores" / "summary.json")] = [
        "scripts/expert/get_expert_scores.py", "--seq_length=256", "--overlong=error", "--dtype=float32",
        "--device=auto", "--seed=0", "--template=chat", "--loss_on=all", "--special_text=error", "--scores=token",
        "--n_train_samples=400", "--validation_fraction=0.05", "--streaming=true", *paths, "--eval_dataset=law",
    ]  # fmt: skip
    write_json(search.folder / "stages.json", told)
    search.commands.clear()
    search(*keys, losses={rate: LOSSES[rate] for rate in ("0.001", "0.002")})
    assert not search.commands


def test_the_base_and_the_trials_are_asked_alike(search):
    search("--general_dataset=general", 'template_kwargs={"enable_thinking": false}')
    asked = [flags_of(words) for words in search.commands if words[0] == "eval_multigpu.py"]
    assert {flags["template_kwargs"] for flags in asked} == {'{"enable_thinking": false}'} and len(asked) > 2
    search.commands.clear()
    shutil.rmtree(search.folder)
    search("--general_dataset=general")
    assert not any("template_kwargs" in word for words in search.commands for word in words)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_methods_without_experts_choose_none(search, method):
    search(f"method={method}")
    assert {words[0] for words in search.commands} == {"train.py"}


@pytest.mark.parametrize(("method", "script"), [("esft", "train_ep.py"), ("full", "train.py")])
def test_several_processes_train_experts_in_parallel(method, script, search, monkeypatch, capsys):
    ran = []

    def run_command(words, processes=1, **_):
        ran.append((words[0], processes))
        fake(["train.py", *words[1:]] if words[0].startswith("train") else words, LOSSES)

    monkeypatch.setattr("scripts.stages.run_command", run_command)
    argv = [*FLAGS, f"--output_dir={search.folder}", "--nproc_per_node=2", "--rates=0.002", f"method={method}"]
    find_lr.main(argv)
    assert [found for found in ran if found[0].startswith("train")] == [(script, 2)] * 2
    assert f"{PYTHON} -m torch.distributed.run --standalone --nproc-per-node=2 {script}" in capsys.readouterr().out


def test_a_search_that_was_broken_off_goes_on_and_repeats_nothing(search):
    losses = {rate: found for rate, found in LOSSES.items() if rate != "0.008"}  # what has failed is tried again
    search("--general_dataset=general", losses=losses)
    whole, asked = (search.folder / "find_lr.md").read_text(), search.commands[:]
    shutil.rmtree(search.folder)
    search.commands.clear()
    tries = 0
    while True:
        tries += 1
        try:
            search("--general_dataset=general", losses=losses, after=4)
            break
        except KeyboardInterrupt:
            continue
    assert tries > 3 and search.commands == asked and (search.folder / "find_lr.md").read_text() == whole


def test_more_rates_train_only_what_is_new(search):
    few = {rate: LOSSES[rate] for rate in ("0.001", "0.002")}
    search(losses=few)
    assert "No higher rate was tried" in (search.folder / "find_lr.md").read_text()
    search.commands.clear()
    search(losses={**few, "0.003": (1.01, 0.6, 92.0)})
    assert trained(search) == [("10", "0.003"), ("40", "0.003")]
    text = (search.folder / "find_lr.md").read_text()
    assert read_json(search.folder / "find_lr.json")["recommended"] == 0.002 and "was tried" not in text


def test_without_rates_those_around_the_run_s_own_are_tried(search, monkeypatch):
    monkeypatch.setattr(find_lr.RateFinder, "run", lambda self, rates: search.commands.append(rates))
    find_lr.main([*FLAGS, f"--output_dir={search.folder}"])
    find_lr.main([*FLAGS[:2], f"--output_dir={search.folder}", "lr=1e-4", "seq_length=256"])
    assert search.commands == [[5e-4, 1e-3, 2e-3, 4e-3, 8e-3], [2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4]]


def test_a_signal_to_a_training_ends_the_search(search, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(find_lr.Stages, "run", lambda *_, **__: sys.exit(143))
        with pytest.raises(SystemExit) as stop:
            search()
    assert stop.value.code == 143 and not (search.folder / "find_lr.json").exists()


def test_if_every_training_fails_there_is_nothing_to_recommend(search):
    with pytest.raises(ValueError, match="every training failed, see above"):
        search(losses={rate: (math.inf, math.inf, 0.0) for rate in LOSSES})


def test_a_base_that_knows_nothing_has_nothing_to_forget(search, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "BASE", 3.0)
    with pytest.raises(ValueError, match=r"the base scores 3\.0 on general"):
        search("--general_dataset=general")
    assert not trained(search)


@pytest.mark.parametrize("what", ["base", "trial"])
def test_answers_without_a_score_end_the_search(what, search, monkeypatch):
    if what == "base":
        monkeypatch.setattr(sys.modules[__name__], "BASE", None)
    with pytest.raises(ValueError, match=rf"no answer in .*/{'base' if what == 'base' else 'lr0_001-40'}\.jsonl has"):
        search("--general_dataset=general", losses={**LOSSES, "0.001": (1.05, 0.7, None)})


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rates=0,1"], "--rates"),
        (["--max_loss=1"], "--max_loss needs --general_dataset"),
        (["--general_dataset=general,law"], "general,law is not one data set"),
        (["--general_dataset=genera"], "cannot find data set 'genera' (did you mean 'general'?)"),
        (["--general_dataset=general", "--max_loss=nan"], "--max_loss nan is not a number of points from 0"),
        (["lr=1e-3", "--rates=1e-3"], "cannot use 'lr=1e-3': --rates sets learning_rate. Leave one of them out."),
        (["learning_rat=1"], "learning_rat"),
        (["--learning_rat=1"], "did you mean 'learning_rate'"),
        (["--lr=1e-3", "--rates=1e-3"], "cannot use 'lr=1e-3': --rates sets learning_rate. Leave one of them out."),
        (["validation_fraction=0", "eval_strategy=no", "load_best_model_at_end=false"], "no sample is held out"),
        (["--data=lw"], "did you mean 'law'?"),
        (["save_strategy=best", "method=fll"], "method"),
    ],
)
def test_wrong_flags_are_refused_first(flags, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("scripts.stages.run_command", None)
    refused(capsys, find_lr.main, [*FLAGS, f"--output_dir={tmp_path / 'out'}", *flags], sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_real_search_on_the_tiny_model(tmp_path, capfd):
    argv = [*FLAGS[:3], "--steps=12", "--rates=1e-5,2e-3,1e3", f"--output_dir={tmp_path / 'out'}", "warmup_steps=1"]
    find_lr.main(argv)
    out, told = capfd.readouterr().out, read_json(tmp_path / "out" / "find_lr.json")
    assert told["recommended"] == 2e-3 and [trial["steps"] for trial in told["trials"]][:3] == [3, 3, 3]
    losses = {(trial["rate"], trial["steps"]): trial["loss"] for trial in told["trials"]}
    assert losses[2e-3, 12] < losses[2e-3, 3] < losses[1e-5, 3]
    find_lr.main(argv)
    assert "\n$ " not in capfd.readouterr().out.partition("1000")[0]
    (line,) = [line for line in out.splitlines() if line.startswith("train with it: ")]
    words = shlex.split(line.removeprefix("train with it: "))[1:]
    words = [f"--output_dir={tmp_path / 'run'}" if "output_dir" in word else word for word in words]
    subprocess.run([sys.executable, *words, "max_steps=12", "warmup_steps=1", "eval_strategy=no", "save_strategy=no",
                    "load_best_model_at_end=false"], check=True)  # fmt: skip
    found = read_json(tmp_path / "run" / "run.json")["results"]["eval_loss"]
    assert found == pytest.approx(losses[2e-3, 12], rel=1e-6)  # the same run
