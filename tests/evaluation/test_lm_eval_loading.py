"""Which suites a name stands for, and which names are refused before a model is loaded."""

import sys

import pytest
import yaml

from evaluation import lm_eval_harness
from evaluation.config import KNOWN, EvalConfig
from evaluation.lm_eval_harness import load_suites
from evaluation.lm_eval_results import PRIMARY

pytest.importorskip("lm_eval")


@pytest.mark.parametrize("name", ["mine_tag", "mine_bundle"])
def test_a_tag_or_a_group_without_a_mean_is_what_it_is_made_of(suite_dir, name):
    found = load_suites([name], task_dir=suite_dir)[name]
    assert sorted(suite.name for suite in found) == ["mine_few", "mine_many"]


def test_data_that_cannot_be_fetched_are_named(suite_dir, tmp_path):
    config = yaml.safe_load((suite_dir / "mine_choices.yaml").read_text())
    remote = tmp_path / "remote.yaml"
    remote.write_text(yaml.safe_dump({**config, "dataset_path": "nobody/no_such_set", "dataset_kwargs": None}))
    with pytest.raises(ValueError, match=r"cannot run --suite .*remote.yaml: .*nobody/no_such_set"):
        load_suites([str(remote)])
    remote.write_text(yaml.safe_dump({**config, "dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}))
    with pytest.raises(ValueError, match=r"remote.yaml: .*gone.jsonl"):
        load_suites([str(remote)])
    remote.write_text(yaml.safe_dump({**config, "doc_to_target": "{{nothing.of.this}}", "output_type": "no_such"}))
    with pytest.raises(ValueError, match=r"remote.yaml: .*no_such"):
        load_suites([str(remote)])
    remote.write_text("task: [")
    with pytest.raises(ValueError, match=r"cannot run --suite .*remote.yaml: ParserError"):
        load_suites([str(remote)])


def test_wrong_names_are_one_sentence(suite_dir):
    for flag in ("suite", "task_dir"):
        config = EvalConfig("m", **{"suite": "mine_choices", flag: str(suite_dir / "mine_choces.yaml")})
        with pytest.raises(ValueError, match=r"mine_choces.yaml: no such .*did you mean 'mine_choices.yaml'"):
            config.check()
    with pytest.raises(ValueError, match=r"mine_by_size.yaml: it is a group. Give its name, .*--task_dir"):
        load_suites([str(suite_dir / "mine_by_size.yaml")])


@pytest.mark.long
def test_lm_eval_has_the_suites_that_the_help_names():
    index = lm_eval_harness._task_manager(None, True).task_index
    for name in KNOWN:
        leaves = list(lm_eval_harness._task_configs(index, name))
        assert leaves and all(leaf["dataset_path"] for leaf in leaves)
        if name in PRIMARY:
            assert PRIMARY[name] in [metric["metric"] for metric in leaves[0]["metric_list"]]
    assert len(list(lm_eval_harness._task_configs(index, "mmlu"))) == 57
    with pytest.raises(ValueError, match="cannot run --suite humaneval: it runs the code"):
        load_suites(["humaneval"])
    with pytest.raises(ValueError, match=r"neither lm-eval nor --task_dir has a task gms8k \(did you mean 'gsm8k'\?\)"):
        load_suites(["gms8k"])


def test_without_lm_eval_the_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r"cannot import lm_eval\.tasks: .*pip install -e '\.\[suites\]'"):
        load_suites(["mmlu"], task_dir=tmp_path)
