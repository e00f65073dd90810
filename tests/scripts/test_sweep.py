"""The sweep: its grid, what it prunes, equal tables however often it is broken off, and what it refuses first."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import eval_multigpu
from deepseek.experts import moe_layers
from deepseek.files import read_json, write_json
from deepseek.loading import empty_model
from esft import ExpertConfig
from evaluation.frontier import Point
from scripts import pipeline, sweep
from scripts.sweep import Candidate, survivors
from tests.helpers import ROOT
from training.keys import LORA_SELECTED
from training.methods import budget_of, count_trained, prepare_model
from utils import PYTHON, run_cli

TINY = "results/models/tiny"
FLAGS = [
    "--sweep",
    f"--model={TINY}",
    "--data=law",
    "--train_config=configs/tiny.yaml",
    "--seq_length=256",
    "--methods=esft-token,lora,full",
    "--shares=0.07,0.25",
    "--rates=1,2",
    "--strengths=0.5,1",
    "lora:learning_rate=1e-3",
]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def grid_of(*more: str) -> list[Candidate]:
    args = pipeline.parse_args([*FLAGS, *more])
    return sweep.plan_grid(args, pipeline.plan_training(args, args.methods.split(",")))


def test_the_grid_has_every_method_at_every_share_and_rate():
    grid = grid_of()
    assert [(c.method, c.share, c.rate) for c in grid] == [
        *(("esft-token", share, rate) for share in (0.07, 0.25) for rate in (2e-3, 4e-3)),
        *(("lora", share, rate) for share in (0.07, 0.25) for rate in (1e-3, 2e-3)),
        *(("full", 1.0, rate) for rate in (2e-3, 4e-3)),  # no share
    ]
    model = empty_model(ROOT / TINY)
    assert [c.budget for c in grid[:3:2]] == [budget_of(model, 0.07), budget_of(model, 0.25)]
    assert [c.rank for c in grid] == [0] * 4 + [2, 2, 9, 9] + [0, 0]
    assert len({c.name for c in grid}) == len(grid) and not any("." in c.name for c in grid)
    assert [c.name for c in grid[4:6]] == ["lora-r2-lr0_001", "lora-r2-lr0_002"]


def test_lora_on_selected_experts_trains_the_share_within_a_quarter_of_the_model():
    """A share beyond a quarter has the experts of that share."""
    first, more, most = grid_of("--methods=lora-selected", "--shares=0.02,0.07,0.4", "--rates=1")
    model = empty_model(ROOT / TINY)
    assert first.budget == more.budget == budget_of(model, 0.25) and most.budget == budget_of(model, 0.4)
    assert first.selection == more.selection != most.selection
    assert [c.name for c in (first, more)] == [f"lora-selected-25-r{rank}-lr0_002" for rank in (3, 10)]
    assert more.words == ["learning_rate=0.002", "lora_rank=10", "lora_alpha=20"]
    number = round(more.budget * model.config.n_routed_experts)
    chosen = ExpertConfig({layer: tuple(range(number)) for layer in moe_layers(model)})
    counts = count_trained(prepare_model(model, LORA_SELECTED, chosen, more.rank, 2 * more.rank))
    assert counts["trained_parameters"] / counts["parameters"] == pytest.approx(0.07, rel=0.1)


def test_shares_of_one_rank_are_one_candidate():
    assert [c.rank for c in grid_of("--methods=lora", "--shares=0.02,0.03", "--rates=1")] == [1]


def test_a_candidate_goes_on_if_one_of_its_strengths_is_on_the_frontier():
    base = Point("base", 0, 3, 92)
    good, far, worse, nothing = (Candidate(name, 1e-3, 0.07) for name in ("good", "far", "worse", "nothing"))
    tried = {
        good: [(0.5, 50, 91), (1, 90, 90)],
        far: [(0.5, 91, 80), (1, 80, 20)],
        worse: [(0.5, 49, 91), (1, 90, 89)],
        nothing: [(0.5, 2, 92), (1, 3, 92)],  # no better than the base
    }
    points = {c: [Point(c.name, *values) for values in found] for c, found in tried.items()}
    assert survivors(points, base) == [good, far]
    assert survivors({worse: points[worse], nothing: points[nothing][:1]}, base) == [worse]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--methods=esft-tokn"], "cannot run method 'esft-tokn' (did you mean 'esft-token'?)"),
        (["--shares=0.07,x"], "'0.07,x' is not a list of numbers above 0 and at most 1"),
        (["--shares=0"], "--shares"),
        (["--shares=0.9"], "the routed experts have 81.0% of the parameters. Lower --shares"),
        (["--methods=esft-token-shared", "--shares=0.02"], "the shared experts have more. Raise --shares"),
        (["--strengths=0,1"], "--strengths"),
        (["--eval_dataset=law"], "--sweep takes two data sets: --eval_dataset=TASK,GENERAL"),
        (["--eval_dataset=law,nowhere"], "nowhere"),
        (["--methods=esft-contrast"], "cannot select by esft-contrast: it needs general data"),
        (["max_steps=2"], "cannot train a third of max_steps=2"),
        (["esft-token:top_p=0.3"], "'esft-token:top_p=0.3': --shares says how much is trained"),
        (["--no_merge"], "--no_merge has no effect with --sweep"),
        (["--max_loss=nan"], "--max_loss nan is not a number of points from 0"),
        (["lora:learning_rat=1"], "learning_rat"),
    ],
)
def test_wrong_flags_are_refused_first(flags, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("scripts.stages.run_command", None)
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: pipeline.main([*FLAGS, f"--output_dir={tmp_path / 'out'}", *flags]))
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--shares=0.1", "--max_loss=3"])
def test_a_flag_of_the_sweep_needs_it(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        pipeline.parse_args([f"--model={TINY}", "--data=law", flag])
    assert (
        stop.value.code == 2 and f"{flag.partition('=')[0]} has an effect only with --sweep" in capsys.readouterr().err
    )


def fake(words: list[str], curves: dict[str, list[tuple[float, float]]]) -> None:
    """Write what a stage would. `curves` has (task, general) at each strength of a candidate, by its folder's name."""
    flags = dict(word.removeprefix("--").split("=", 1) for word in words[1:] if "=" in word)
    names = [Path(name).stem for name in flags.get("eval_dataset", "").split(",")]
    if words[0] == "train.py":
        results = {"trained_parameters": 7, "parameters": 100}
        write_json(Path(flags["output_dir"]) / "run.json", {"results": results})
        write_json(Path(flags["output_dir"]) / "trainer_state.json", {})
    elif words[0] == "eval_multigpu.py" and "adapter_dir" in flags:
        eval_multigpu.parse_args(words[1:]).check()
        strengths = [strength for strength in flags["strength"].split(",") if strength != "0"]
        found = zip(strengths, curves[Path(flags["adapter_dir"]).name])
        points = [{"strength": 0.0, "mean": dict(zip(names, (3.0, 92.0)))}]
        points += [{"strength": float(strength), "mean": dict(zip(names, means))} for strength, means in found]
        write_json(Path(flags["output_path"]).with_suffix("") / "curve.json", {"points": points})
    elif words[0] == "eval_multigpu.py":
        for name, mean in zip(names, curves["base"]):
            write_json(Path(flags["output_path"]).with_suffix(f".{name}.summary.json"), {"mean": mean})
    else:
        name = "summary.json" if words[0].endswith("get_expert_scores.py") else ""
        write_json(Path(flags.get("output_path") or flags["output_dir"]) / name, {})


CURVES = {
    "base": (3.0, 92.0),
    "esft-token-7-lr0_002": [(60, 91), (90, 90.5)],
    "esft-token-7-lr0_004": [(59, 91), (89, 88)],  # dominated
    "esft-token-25-lr0_002": [(60, 90), (96, 90.2)],
    "esft-token-25-lr0_004": [(70, 87), (97, 85)],
    "full-lr0_002": [(99, 80), (100, 20)],
    "full-lr0_004": [(99, 70), (100, 10)],  # dominated
}


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """Run a sweep on `fake` stages, and return what was printed. `swept.commands` are those that ran."""

    def run(*more: str, curves: dict = CURVES, after: int = 10**6) -> str:
        left = after

        def run_command(words, **_):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            run.commands.append(list(map(str, words)))
            fake(run.commands[-1], curves)

        monkeypatch.setattr("scripts.stages.run_command", run_command)
        pipeline.main([*FLAGS, "--methods=esft-token,full", f"--output_dir={run.folder}", *more])

    run.commands, run.folder = [], tmp_path / "out"
    return run


def test_what_is_dominated_after_a_third_is_not_trained_on(swept, capsys):
    swept()
    trained = [dict(w.removeprefix("--").partition("=")[::2] for w in words[1:]) for words in swept.commands
               if words[0] == "train.py"]  # fmt: skip
    thirds = [flags for flags in trained if "/thirds/" in flags["output_dir"]]
    assert len(thirds) == 6 and {flags["max_steps"] for flags in thirds} == {"150"}
    done = [flags for flags in trained if "/checkpoints/" in flags["output_dir"]]
    left = [name for name in CURVES if name not in ("base", "esft-token-7-lr0_004", "full-lr0_004")]
    assert [Path(flags["output_dir"]).name for flags in done] == left and not any("max_steps" in f for f in done)
    assert {flags["learning_rate"] for flags in done} == {"0.002", "0.004"}
    selected = [words for words in swept.commands if words[0].endswith("generate_expert_config.py")]
    assert [word[:14] for words in selected for word in words if "budget" in word] == [
        "--budget=0.086",
        "--budget=0.308",
    ]

    out, told = capsys.readouterr(), read_json(swept.folder / "sweep.json")
    assert "4 of 6 candidates go on" in out.out and "[6 of 6] full-lr0_004, a third of the training" in out.out
    assert "the task is judged by 75 samples that training holds out" in out.err
    assert "what is forgotten is judged by datasets/eval/general.jsonl" in out.err
    assert told["recommended"] == {"name": "esft-token-25-lr0_002", "strength": 1.0, "task": 96, "general": 90.2,
                                   "share": 0.07}  # fmt: skip
    text = (swept.folder / "sweep.md").read_text()
    assert "| **esft-token-25-lr0_002** | **7.0%** | **1** | **96.0** | **90.2** | yes |" in text
    assert "| esft-token-25-lr0_002 | 7.0% | 0.5 | 60.0 | 90.0 |  |" in text and text in out.out + "\n"
    assert "| full-lr0_004 | 7.0% | 1 | 100.0 | 10.0 |" in text.partition("Dominated after a third")[2]
    assert (swept.folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    (train,) = [line for line in out.out.splitlines() if line.startswith("train it: ")]
    words = shlex.split(train.removeprefix("train it: "))
    (ran,) = [w for w in swept.commands if f"--output_dir={swept.folder}/checkpoints/esft-token-25-lr0_002" in w]
    assert words[:2] == [PYTHON, "train.py"] and "--output_dir=results/checkpoints/law" in words
    assert {w for w in words if "output_dir" not in w} == {PYTHON, *(w for w in ran if "output_dir" not in w)}
    (merge,) = [line for line in out.out.splitlines() if line.startswith("or merge it: ")]
    assert (
        merge.startswith(f"or merge it: {PYTHON} ")
        and "--strength=1" in merge
        and f"--adapter_dir={swept.folder}/checkpoints/esft-token-25-lr0_002" in merge
    )


def test_a_sweep_that_was_broken_off_goes_on_and_repeats_nothing(swept, capsys):
    swept()
    whole, asked = (swept.folder / "sweep.md").read_text(), swept.commands[:]
    shutil.rmtree(swept.folder)
    swept.commands.clear()
    tries = 0
    while True:
        tries += 1
        try:
            swept(after=5)
            break
        except KeyboardInterrupt:
            continue
    assert tries > 4 and swept.commands == asked and (swept.folder / "sweep.md").read_text() == whole
    swept("--max_loss=100")  # chooses anew, and runs nothing
    assert swept.commands == asked and read_json(swept.folder / "sweep.json")["recommended"]["task"] == 100
    swept("--max_loss=0.5")
    assert read_json(swept.folder / "sweep.json")["recommended"]["name"] == "base"
    assert "Nothing learns and loses at most 0.5 points of general" in capsys.readouterr().out


def test_other_strengths_train_nothing_again(swept):
    swept()
    swept.commands.clear()
    swept("--strengths=0.6,1")
    assert {words[0] for words in swept.commands} == {"eval_multigpu.py"}


def test_one_strength_is_enough(swept):
    swept("--methods=full", "--rates=1", "--strengths=0.5", curves={**CURVES, "full-lr0_002": [(60, 91)]})
    told = read_json(swept.folder / "sweep.json")
    assert [(point["strength"], point["task"]) for point in told["points"]] == [(0.0, 3.0), (0.5, 60)]


def test_a_base_that_knows_nothing_has_nothing_to_forget(swept):
    with pytest.raises(ValueError, match=r"the base scores 2\.0 on general\. Give --eval_dataset=TASK,GENERAL"):
        swept(curves={**CURVES, "base": (3.0, 2.0)})
    assert not any(words[0] == "train.py" for words in swept.commands)


@pytest.mark.parametrize("means", [(None, 92.0), (3.0, None)])
def test_a_base_without_a_score_ends_the_sweep(means, swept):
    with pytest.raises(ValueError, match=r"no answer in .*/base\.(held_out|law|general)\.jsonl has a score"):
        swept(curves={**CURVES, "base": means})


def test_contrast_scores_the_general_data_too(swept):
    names = [f"esft-contrast-7-lr{rate}" for rate in ("0_002", "0_004")]
    curves = {"base": CURVES["base"], **{name: [(50, 90), (90, 90)] for name in names}}
    swept("--methods=esft-contrast", "--shares=0.07", "--contrast_dataset=summary", curves=curves)
    scored = [words for words in swept.commands if words[0].endswith("get_expert_scores.py")]
    assert ["--eval_dataset=law" in scored[0], "--eval_dataset=summary" in scored[1]] == [True, True]
    (select,) = [words for words in swept.commands if words[0].endswith("generate_expert_config.py")]
    assert f"--contrast_scores_dir={swept.folder}/general_scores" in select and "--contrast=difference" in select


def test_scores_and_answers_are_of_the_data_that_are_trained_on(swept):
    kwargs = "template_kwargs={}".format('{"enable_thinking": false}')
    swept("overlong=truncate", kwargs)
    (scored,) = [words for words in swept.commands if words[0].endswith("get_expert_scores.py")]
    assert {"--overlong=truncate", f"--{kwargs}"} <= set(scored)
    asked = [words for words in swept.commands if words[0] == "eval_multigpu.py"]
    assert len(asked) == 1 + 6 + 4 and all(f"--{kwargs}" in words for words in asked)


def test_lora_on_selected_experts_selects_them_once_and_trains_lora_on_them(swept):
    names = [f"lora-selected-25-r{rank}-lr{rate}" for rank in (10, 35) for rate in ("0_002", "0_004")]
    curves = {"base": CURVES["base"], **{name: [(50, 90), (90, 90)] for name in names}}
    swept("--methods=lora-selected", curves=curves)
    (select,) = [words for words in swept.commands if words[0].endswith("generate_expert_config.py")]
    assert "--score_function=token" in select
    trained = [words for words in swept.commands if words[0] == "train.py"]
    config = f"--expert_config={swept.folder}/expert_configs/lora-selected-25.json"
    assert trained and all({config, "method=lora", "lora_experts=selected"} <= set(words) for words in trained)
    assert {word for words in trained for word in words if "lora_rank" in word} == {"lora_rank=10", "lora_rank=35"}


@pytest.mark.slow
def test_a_real_sweep_of_the_tiny_model(tmp_path, capfd):
    flags = [f"--output_dir={tmp_path / 'out'}", "--n_sample_tokens=512", "--n_eval_samples=26", "--max_new_tokens=16"]
    flags += ["--methods=esft-gradient-global,lora,full", "--shares=0.07", "--rates=1", "max_steps=6", "warmup_steps=1"]
    pipeline.main([*FLAGS, *flags])
    out, told = capfd.readouterr().out, read_json(tmp_path / "out" / "sweep.json")
    base, *points = told["points"]
    assert base["name"] == "base" and base["general"] > 80
    assert points and {point["strength"] for point in points} == {0.5, 1.0}
    thirds = {point["name"]: point["share"] for point in told["thirds"]}
    assert thirds["esft-gradient-global-7-lr0_002"] == pytest.approx(0.07, abs=0.002)  # 22 of 256 experts
    assert thirds["lora-r2-lr0_001"] == pytest.approx(0.07, abs=0.015) and thirds["full-lr0_002"] == 1
    steps = {path.parts[-3]: read_json(path)["results"]["steps"] for path in tmp_path.glob("out/*/*/run.json")}
    assert steps == {"thirds": 2, "checkpoints": 6}
    for line in out.splitlines():  # what it says comes next can be done
        if line.startswith("or merge it: "):
            subprocess.run([sys.executable, *shlex.split(line.removeprefix("or merge it: "))[1:]], check=True)
            assert (tmp_path / "out" / "merged" / "config.json").is_file()
    pipeline.main([*FLAGS, *flags])
    again = capfd.readouterr().out
    assert "[done]" in again and "\n$ " not in again
