"""The study of the frontier: what is chosen by which questions, verdicts, and equal tables if it is broken off."""

import statistics
from pathlib import Path

import pytest

from deepseek.adapters import adapter_views
from deepseek.files import read_json, read_jsonl, write_json, write_jsonl
from deepseek.loading import empty_model
from esft import ExpertConfig
from evaluation.frontier import RULES, Point
from scripts.experiments import frontier, frontier_runs, frontier_study
from scripts.experiments.frontier import verdict
from scripts.experiments.frontier_study import ADAPTED, OTHERS, PAPER, PARTS, SHARED, SHARES, Row, Study
from scripts.experiments.paper_runs import TINY
from tests.experiment_helpers import Commands, number
from tests.helpers import ROOT
from training.config import read_config
from training.methods import budget_of
from utils import locked, run_cli

LAYERS, EXPERTS = (1, 2, 3, 4), 64  # of results/models/tiny


def evaluate(flags: dict[str, str]) -> None:
    """Write the curve of a model."""
    results, points = read_json(Path(flags["adapter_dir"]) / "run.json")["results"], []
    for strength in [0.0, *map(float, flags["strength"].split(","))]:
        rate, means = 500 * results["rate"] * strength, {}
        for name in map(Path, flags["eval_dataset"].split(",")):
            mean = 92 - rate**2 if name.stem == "general" else 3 + 96 * rate / (1 + rate)
            means[name.stem] = mean + strength * results["luck"] + number(name.suffix) / 9
        points.append({"strength": strength, "mean": means})
    write_json(Path(flags["output_path"]).with_suffix("") / "curve.json", {"points": points})


def fake(words: list[str]) -> None:
    """Write what the commands would, decided by what they are asked. A higher rate learns more and forgets more."""
    flags = dict(word.removeprefix("--").split("=", 1) for word in words[1:])
    if words[0] == "train.py":
        assert not Path(flags["output_dir"]).exists()
        chosen = Path(flags["expert_config"]).read_text() if "expert_config" in flags else flags.get("lora_rank", "")
        results = {"rate": float(flags["learning_rate"]), "luck": number(chosen, flags["seed"], flags["train_dataset"])}
        results |= {"parameters": 400, "trained_parameters": 28, "gradient_bytes": 2**20, "optimizer_bytes": 2**21}
        results["step_seconds"] = 0.25
        write_json(Path(flags["output_dir"]) / "run.json", {"results": results})
    elif words[0] == "eval_multigpu.py":
        evaluate(flags)
    elif words[0] == "scripts/miniature/build_datasets.py":
        test = read_jsonl(ROOT / "datasets" / "eval" / "general.jsonl")[:2]
        rows = [*test, *({"prompt": f"{flags['seed']} {i}", "answers": ["a"], "skill": "s"} for i in range(3))]
        write_jsonl(Path(flags["output_dir"]) / "eval" / "general.jsonl", rows)
    else:
        assert words[0] == "scripts/expert/get_expert_scores.py" and flags["scores"] == "gradient,reap"
        what = Path(flags["eval_dataset"]).stem
        scores = {}
        for function in ("token_scores", "gate_scores", "gradient_scores", "reap_scores"):
            drawn = {la: [number(what, function, la, e) for e in range(EXPERTS)] for la in LAYERS}
            scores[function] = {
                str(la): {str(e): x / sum(score_E) for e, x in enumerate(score_E)} for la, score_E in drawn.items()
            }
        write_json(Path(flags["output_dir"]) / "summary.json", scores)


@pytest.fixture
def commands(monkeypatch) -> Commands:
    return Commands(frontier_runs.FrontierLab, fake, monkeypatch)


def test_every_rule_is_in_a_part_at_every_share():
    rows = {row for _, rows in PARTS.values() for row in rows}
    every = {Row(name, s) for name in (*RULES, "lora") for s in SHARES}
    every -= {Row(name, SHARES[0]) for name in SHARED}  # they alone are more than this share
    recipes = {Row(name, 0.07) for name in frontier_runs.RECIPES}
    assert rows == {Row("full"), *every, *recipes, *(Row(ADAPTED, s) for s in SHARES[:3])}


def test_a_recipe_is_the_paper_s_rule_with_keys_that_a_run_takes(tmp_path, commands):
    names = [*frontier_runs.RECIPES, PAPER]
    flags = ["--parts=f", "--tasks=law", "--seeds=0", "--steps=9", f"--work_dir={tmp_path}", "--jobs=1"]
    frontier.main([*flags, "--methods", *names])
    keys_of = {}
    for words in commands.trained():
        keys = dict(word.removeprefix("--").split("=", 1) for word in words[1:])
        config = read_config(words[1:])  # an unknown key or a bad value raises
        assert config.method == "esft" and config.training["max_steps"] == 9
        name = Path(keys["expert_config"]).stem.split("-7-")[0].removeprefix("law-")
        keys_of[name] = keys
        count = sum(map(len, ExpertConfig.load(keys["expert_config"]).experts.values()))
        assert count == pytest.approx(whole_budget(name), abs=1)
    assert keys_of.keys() == set(names)
    assert {len(keys.keys() - keys_of[PAPER].keys()) > 0 for name, keys in keys_of.items() if name != PAPER} == {True}
    replayed = Path(keys_of["replay"]["replay_dataset"])
    asked = {row["prompt"] for row in read_jsonl(ROOT / "datasets" / "eval" / "general.jsonl")}
    assert replayed.stem == "conversations" and not any(prompt in replayed.read_text() for prompt in asked)


def whole_budget(row: str) -> float:
    """How many experts a recipe begins with: all that 7 % of the parameters hold, or a third of them."""
    every = budget_of(empty_model(ROOT / TINY), 0.07) * len(LAYERS) * EXPERTS
    return every / 3 if row == "expand" else every


def test_a_study_that_was_broken_off_ends_with_the_same_tables_and_repeats_nothing(tmp_path, commands):
    flags = [
        "--shares",
        "0.07",
        "--methods",
        PAPER,
        "lora",
        "full",
        "esft-gate",
        "random",
        "--jobs=1",
        "--seeds",
        "0",
        "1",
    ]
    flags.append("--parts=a,b,c")
    whole = frontier.main([*flags, f"--work_dir={tmp_path}/whole", f"--output={tmp_path}/one/frontier"])
    asked = len(commands)
    # rates: 4 rows x 3 x 2 tasks; the other seed: 4 rows x 2; random: 2 seeds x 2; (c): 3 rows x 2 tasks
    assert len(commands.trained()) == 24 + 8 + 4 + 6
    folders = [f"--work_dir={tmp_path}/broken", f"--output={tmp_path}/two/frontier"]
    again, tries = commands.until_done(lambda: frontier.main([*flags, *folders]), 30)
    assert tries > 3 and again == whole and asked <= len(commands) <= asked + 3 * tries
    for part in "abc":
        assert (tmp_path / "one" / f"frontier_{part}.md").read_text() == (
            tmp_path / "two" / f"frontier_{part}.md"
        ).read_text()
    commands.clear()
    flags.append(f"--work_dir={tmp_path}/whole")
    parts = {part: frontier.main([*flags, f"--parts={part}"])[part] for part in "abc"}
    assert parts == whole and not commands  # in parts it comes to the same
    more = frontier.main([*flags, "--parts=a", "--seeds", "0", "1", "2"])
    assert len(commands.trained()) == 3 * 2 and more["a"] != whole["a"]


def test_what_is_chosen_is_chosen_on_validation_alone(tmp_path, commands, monkeypatch):
    flags = ["--parts=a", "--methods", PAPER, "--shares", "0.07", "--seeds", "0", f"--work_dir={tmp_path}/w"]
    args = frontier.parse_args(flags)
    study = Study(args, frontier_runs.FrontierLab(args))
    row, rates = Row(PAPER, 0.07), Row(PAPER, 0.07).rates
    curves = {  # by rate: (strength, task, general) on the validation questions
        rates[0]: [(0.0, 3, 90), (0.5, 40, 90), (1.0, 60, 89)],
        rates[1]: [(0.0, 3, 90), (0.5, 70, 88), (1.0, 95, 80)],
        rates[2]: [(0.0, 3, 90), (0.5, 80, 87.9), (1.0, 99, 50)],
    }

    def points(trial, use):
        assert use == "validation"
        return [Point(trial.row, *values) for values in curves[trial.learning_rate]]

    monkeypatch.setattr(study.lab, "points", points)
    study.rate_of[row] = study.best_rate(row)
    assert study.rate_of[row] == rates[1] and study.strength(row, "law") == 0.5
    curves[rates[2]][1] = (0.5, 80, 88)
    assert study.best_rate(row) == rates[2]
    curves[rates[2]][1] = (0.5, 70, 88)
    assert study.best_rate(row) == rates[1]  # the lower of equals
    assert Row("random", 0.15).rated == Row("l2", 0.07).rated == Row(PAPER, 0.15).rated == row
    assert row not in (Row("muon", 0.07).rated, Row("lora", 0.15).rated)
    assert Row("esft-gate", 0.25).rated == Row("esft-gate", 0.07) and Row(PAPER, 0.25).rated == Row(PAPER, 0.25)


def test_the_other_rules_have_one_seed_and_the_rate_of_7_percent_at_other_shares(tmp_path, commands):
    flags = ["--parts=d", "--methods", "esft-gate", "--shares", "0.25", "--seeds", "0", "1", "--jobs=1"]
    tables = frontier.main([*flags, f"--work_dir={tmp_path}/w", f"--output={tmp_path}/frontier"])
    # rates: this rule at 7 % and the paper's at 25 %, 3 x 2 tasks each; then this rule at 25 %
    assert len(commands.trained()) == 6 + 6 + 2 and all("seed=0" in words for words in commands.trained())
    told = read_json(tmp_path / "frontier_d.json")
    (row,), (pair,) = told["rows"], told["pairs"]
    assert (row["name"], row["share"], len(row["average"])) == ("esft-gate", 0.25, 1)
    assert (pair["other"], pair["verdict"]) == ("esft-token 25%", "one seed")
    assert "tasks law summary, seed 0, 450" in told["made_by"] and "esft-gate 25%" in tables["d"]
    assert (tmp_path / "frontier_d.svg").is_file()
    flags = ["--parts=b", "--methods", "esft-gate", "--seeds", "0", "--jobs=1"]
    frontier.main([*flags, f"--work_dir={tmp_path}/w", f"--output={tmp_path}/frontier"])
    assert read_json(tmp_path / "frontier_b.json")["rows"][0]["learning_rate"] == row["learning_rate"]


def test_rows_of_a_share_train_as_many_experts_by_other_rules(tmp_path, commands):
    frontier.main(["--parts=b", "--seeds", "0", "--jobs=1", f"--work_dir={tmp_path}"])
    chosen = {}
    for words in commands.trained():
        flags = dict(word.removeprefix("--").split("=", 1) for word in words[1:])
        experts = ExpertConfig.load(flags["expert_config"])
        chosen[Path(flags["expert_config"]).stem.partition("-7-")[0]] = experts
    model = empty_model(ROOT / TINY)
    counts = {name: sum(view.numel() for view in adapter_views(model, c).values()) for name, c in chosen.items()}
    assert set(counts.values()) == {22 * 3 * 128 * 48}  # of 22 experts: 7 % of 5.8M parameters
    assert {name for name, c in chosen.items() if c.shared_experts} == {
        f"{t}-esft-token-shared" for t in ("law", "summary")
    }
    law = {name: c for name, c in chosen.items() if name.startswith("law-")}
    assert len(law) == len(OTHERS) + 1 == len({str(config.experts) for config in law.values()})
    general = read_jsonl(tmp_path / "contrast" / "conversations.jsonl")
    test = {row["prompt"] for row in read_jsonl(ROOT / "datasets" / "eval" / "general.jsonl")}
    asked = [{row["messages"][0]["content"] for row in general}]
    asked.append({row["prompt"] for row in read_jsonl(tmp_path / "validation" / "general.jsonl")})
    assert len(asked[0]) == len(asked[1]) == 3 and not asked[0] & asked[1] and not test & (asked[0] | asked[1])


def test_lora_on_selected_experts_trains_the_share_of_its_row(tmp_path, commands):
    frontier.main(["--parts=e", "--methods", ADAPTED, "--seeds", "0", "--jobs=1", f"--work_dir={tmp_path}"])
    found = {}
    for words in commands.trained():
        flags = dict(word.removeprefix("--").split("=", 1) for word in words[1:])
        if flags["method"] == "lora":
            assert flags["lora_experts"] == "selected" and int(flags["lora_alpha"]) == 2 * int(flags["lora_rank"])
            experts = ExpertConfig.load(flags["expert_config"]).experts
            found[int(flags["lora_rank"])] = sum(map(len, experts.values())) * int(flags["lora_rank"]) * 3 * (128 + 48)
    assert list(found) == [3, 10, 21]
    shares = [count / 5_828_288 for count in found.values()]  # the rank is a whole number
    assert shares == pytest.approx([0.025, 0.07, 0.15], abs=0.004)


@pytest.mark.parametrize(
    ("learns", "keeps", "said"),
    [
        ([4.0, 5.0, 6.0], [0.0, 1.0, -0.5], "dominates"),
        ([-1.0, 1.0, 0.5], [4.0, 5.0, 6.0], "dominates"),
        ([4.0, 5.0, 6.0], [-2.0, 1.0, 0.0], "neither"),  # it may forget more
        ([-4.0, -5.0, -6.0], [0.0, -1.0, -0.5], "is dominated"),
        ([-1.0, 5.0, 6.0], [-1.0, 1.0, 3.0], "neither"),  # nothing is certain
        ([9.0], [9.0], "one seed"),
    ],
)
def test_one_dominates_where_an_interval_says_so_and_the_other_axis_is_no_worse(learns, keeps, said):
    assert verdict(learns, keeps) == said
    swapped = {"dominates": "is dominated", "is dominated": "dominates"}
    assert verdict([-x for x in learns], [-x for x in keeps]) == swapped.get(said, said)


def test_tables_show_differences_seed_by_seed_and_say_where_they_come_from(tmp_path, commands):
    stem = tmp_path / "tables" / "frontier"
    flags = ["--parts=a", "--methods", PAPER, "lora", "--shares", "0.07", "--steps=7"]
    tables = frontier.main([*flags, f"--work_dir={tmp_path}/w", f"--output={stem}"])
    text = Path(f"{stem}_a.md").read_text()
    command = "frontier.py --parts=a --shares 0.07 --methods esft-token lora --steps 7`"
    assert f"{command}, tasks law summary, seeds 0 1 2, 7 steps" in text
    assert tables["a"] in text and "torch" in text
    assert str(tmp_path) not in Path(f"{stem}_a.json").read_text()  # no path of the machine
    told = read_json(Path(f"{stem}_a.json"))
    paper, lora = told["rows"]
    assert (paper["name"], lora["name"]) == (PAPER, "lora")
    assert lora["average"] == [
        statistics.fmean(lora["tasks"][task][i] for task in ("law", "summary")) for i in range(3)
    ]
    (pair,) = told["pairs"]
    assert pair["learns"] == [a - b for a, b in zip(lora["average"], paper["average"])]
    assert pair["keeps"] == [a - b for a, b in zip(lora["general"], paper["general"])]
    assert len(pair["learns_at_equal_loss"]) == 3
    assert (lora["trained"], lora["held_mib"], lora["step_seconds"]) == (0.07, 3, 0.25)
    assert "| 7.0% | 3.0 MiB | 0.25 |" in tables["a"]
    taken = next(p for p in paper["curves"]["law"][1] if p["strength"] == paper["strength"]["law"])
    assert taken["task"] == paper["tasks"]["law"][1]
    (environment,) = told["environments"]
    assert environment["torch"] and "date" not in environment
    assert Path(f"{stem}_a.svg").read_text().count("<svg") == 1


def test_at_equal_loss_each_row_takes_the_strength_that_learns_most(tmp_path, commands, monkeypatch):
    args = frontier.parse_args(["--parts=a", "--tasks=law", "--seeds=0", f"--work_dir={tmp_path}"])
    study = Study(args, frontier_runs.FrontierLab(args))
    one, other = Row("lora", 0.07), Row(PAPER, 0.07)
    study.rate_of = dict.fromkeys((one, other), "1e-3")
    curves = {  # strength, task, general
        one.name: [(0.0, 3, 90), (0.5, 40, 91), (1.0, 60, 86)],
        other.name: [(0.0, 3, 90), (0.5, 70, 88), (1.0, 50, 93)],
    }
    monkeypatch.setattr(study.lab, "points", lambda trial, _: [Point("", *p) for p in curves[trial.row]])
    assert study.learned_within(one) == [48] and study.learned_within(other) == [66]  # both where they keep 89
    (difference,) = study.keeps_at_equal_learning(one, other)  # both reach 60, and the other keeps 90.5 there
    assert difference == pytest.approx(86 - 90.5) and study.keeps_at_equal_learning(other, one) == [-difference]


def test_a_result_of_other_data_or_settings_is_made_again(tmp_path, commands, monkeypatch):
    flags = ["--parts=a", "--methods", "full", "--seeds", "0", f"--work_dir={tmp_path}"]

    def again() -> int:
        commands.clear()
        frontier.main(flags)
        return len(commands.trained())

    assert again() == 6 and again() == 0
    with monkeypatch.context() as patch:
        patch.setattr(frontier_runs.FrontierLab, "settings", lambda self: {"validation_fraction": 0.05, "max_steps": 1})
        assert again() == 6
    assert again() == 6 and again() == 0
    with monkeypatch.context() as patch:
        patch.setattr(frontier_study, "size_of", lambda row: {"budget": 0.5})
        assert again() == 6
    (tmp_path / "results" / f"{next((tmp_path / 'results').glob('law-full-*')).name}").write_text("{")
    with locked(tmp_path), pytest.raises(ValueError, match="another run is at work there"):
        frontier.main(flags)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--parts=a,h", "cannot run part 'h'. Give some of a, b, c, d, e"),
        ("--tasks=lwa", "invalid choice: 'lwa'"),
        ("--shares=0.5", "invalid choice: 0.5"),
        ("--methods=esft", "invalid choice: 'esft'"),
        ("--parts=b --methods=full", "cannot run part b: --methods and --shares leave nothing of it"),
        ("--parts=c --tasks intent summary law translation", "cannot run part c: --tasks leaves no other task"),
        ("--steps=0", "not a whole number above 0"),
        ("--output=README.md/x", "cannot write"),
        ("--work_dir=README.md", "cannot write README.md: it is a file"),
    ],
)
def test_wrong_flags_are_one_sentence(flag, sentence, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: frontier.main(flag.split()))
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
