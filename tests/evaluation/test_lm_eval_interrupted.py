"""Suites that were interrupted go on from the answers that are there, to the results of an unbroken evaluation."""

import json
from pathlib import Path

import pytest

import eval_multigpu
from evaluation import lm_eval_harness
from evaluation.journal import AnswerJournal
from tests.helpers import untimed

pytest.importorskip("lm_eval")
SUITES = "--suite=mine_choices,mine_written,mine_likelihood"


@pytest.fixture
def forwards(monkeypatch) -> list:
    """One entry for each call of the model by lm-eval. Its attribute `last` is the call that is interrupted."""
    from lm_eval.models.huggingface import HFLM

    class Forwards(list):
        last = None

    calls = Forwards()

    def watched(name: str):
        ask = getattr(HFLM, name)

        def asked(*args, **options):
            if len(calls) == calls.last:
                raise KeyboardInterrupt
            calls.append(name)
            return ask(*args, **options)

        monkeypatch.setattr(HFLM, name, asked)

    watched("_model_call")
    watched("_model_generate")
    return calls


def evaluate(model_dir: str, adapter_dir: str, suite_dir: Path, out: Path, *more: str) -> list[dict]:
    flags = [f"--base_model_path={model_dir}", f"--adapter_dir={adapter_dir}", f"--task_dir={suite_dir}"]
    flags += ["--with_base", SUITES, "--device=cpu", "--eval_batch_size=2", f"--output_dir={out}"]
    return eval_multigpu.main([*flags, *more])


def files_of(folder: Path) -> dict[str, object]:
    """What an evaluation wrote, without times."""
    found = {path.name: path.read_text() for path in folder.glob("*.jsonl")}
    return found | {path.name: untimed(json.loads(path.read_text())) for path in folder.glob("*.summary.json")}


@pytest.mark.slow
def test_interrupted_suites_ask_only_what_is_missing(model_dir, adapter_dir, suite_dir, tmp_path, forwards, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    evaluate(model_dir, adapter_dir, suite_dir, whole)
    needed = len(forwards)
    forwards.clear()
    stops = [needed // 4, needed // 3, 3 * needed // 4]  # while the base answers, and after it
    for forwards.last in stops:
        with pytest.raises(KeyboardInterrupt):
            evaluate(model_dir, adapter_dir, suite_dir, out)
        assert list(out.glob(".*.partial"))
    forwards.last = None
    capsys.readouterr()
    evaluate(model_dir, adapter_dir, suite_dir, out)
    assert "answers to mine_choices are there" in capsys.readouterr().err
    assert needed <= len(forwards) <= needed + len(stops)
    assert files_of(out) == files_of(whole) and len(files_of(out)) == 12
    assert not list(out.glob(".*"))
    forwards.clear()
    evaluate(model_dir, adapter_dir, suite_dir, out)
    assert len(forwards) == needed  # a finished evaluation leaves nothing to go on from


def test_another_adapter_or_setting_is_asked_anew(model_dir, adapter_dir, suite_dir, tmp_path, forwards):
    for more in ([], ["--dtype=bfloat16"]):
        forwards.last = len(forwards) + 3
        with pytest.raises(KeyboardInterrupt):
            evaluate(model_dir, adapter_dir, suite_dir, tmp_path, *more)
    assert len(forwards) == 6


def test_drawn_answers_are_asked_every_time(tmp_path):
    """Only what a greedy answer depends on is in a request."""

    class Model:
        def generate_until(self, requests):
            self.asked = len(requests)
            return ["x"] * len(requests)

        loglikelihood = loglikelihood_rolling = generate_until

        def set_cache_hook(self, hook):
            self.hook = hook

    class Request:
        def __init__(self, sample: bool):
            self.args = ("question", {"do_sample": sample})

    lm = Model()
    with AnswerJournal(tmp_path / "out.jsonl", {}) as journal:
        lm_eval_harness._keep_answers(lm, journal)
        for sample in (True, False):
            lm.hook.add_partial("generate_until", Request(sample).args, "kept")
        assert lm.generate_until([Request(False), Request(True), Request(False)]) == ["kept", "x", "kept"]
        assert lm.asked == 1
