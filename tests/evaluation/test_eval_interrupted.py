"""An evaluation that was interrupted, on any number of processes, goes on to the results of an unbroken one."""

import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import esft
from tests.helpers import ROOT, contents, run_eval, stop_after, untimed, write_rows
from utils import locked, run_cli


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_stopped(model_dir, tmp_path, watched, capsys):
    answers = ["a", "b", "hang", "x", "y", "z"]  # "hang" is in the first batch
    eval_file = write_rows(tmp_path / "mine.jsonl", answers)
    (unbroken,) = run_eval(model_dir, eval_file, tmp_path / "unbroken.jsonl")
    assert len(watched.scored()) == 6

    (tmp_path / "armed").touch()
    partial, log = tmp_path / ".out.jsonl.partial", tmp_path / "log"
    script = (
        "import sys; import eval_multigpu; from pathlib import Path; from tests import helpers\n"
        "watched = helpers.Watched(Path(sys.argv[1]))\n"
        "eval_multigpu.get_evaluator = lambda *_: watched\n"
        "helpers.run_eval(*sys.argv[2:])"
    )
    words = [str(tmp_path), model_dir, eval_file, str(tmp_path / "out.jsonl"), "--world_size=2"]
    process = subprocess.Popen([sys.executable, "-c", script, *words], cwd=ROOT)
    try:  # rank 0 hangs in the first batch, rank 1 has one batch, the second
        wait_for(lambda: partial.exists() and partial.read_bytes().count(b"indices") == 1)
        wait_for(lambda: "hang" in log.read_text())
    finally:
        process.kill()
        process.wait()
    pids = {int(line.split()[0]) for line in log.read_text().splitlines()}
    wait_for(lambda: all(map(gone, pids)))
    assert len(pids) == 2 and not (tmp_path / "out.jsonl").exists()

    (tmp_path / "armed").unlink()
    with open(partial, "ab") as file:
        file.write(b'\n{"indices": [0, 1], "resu')
    kept = json.loads(partial.read_bytes().split(b"\n")[2])["indices"]
    watched.scored()
    (resumed,) = run_eval(model_dir, eval_file, tmp_path / "out.jsonl")
    assert sorted(watched.scored()) == [answer for i, answer in enumerate(answers) if i not in kept]
    assert "2 of 6 answers are there" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    assert untimed(resumed) == untimed(unbroken) and not partial.exists()


@pytest.mark.long
def test_a_rank_that_dies_ends_the_command_and_the_same_command_goes_on(model_dir, tmp_path, watched, capsys):
    eval_file = write_rows(tmp_path / "mine.jsonl", ["a", "die", "c", "d", "e", "f"])  # "die" is in the third batch
    (tmp_path / "armed").touch()
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: run_eval(model_dir, eval_file, tmp_path / "out.jsonl", "--world_size=2"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and re.match(r"error: cannot go on: rank 0 died \(SIGKILL\).* goes on", error)
    assert not multiprocessing.active_children() and not (tmp_path / "out.jsonl").exists()

    (tmp_path / "armed").unlink()
    watched.scored()
    run_eval(model_dir, eval_file, tmp_path / "out.jsonl", "--world_size=3")
    again = watched.scored()
    assert "die" in again and len(again) <= 4  # the first batch was rank 0's, too
    run_eval(model_dir, eval_file, tmp_path / "unbroken.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()


@pytest.mark.long
def test_what_a_rank_raises_names_it(model_dir, eval_file, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    tensors = load_file(broken / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "norm" not in name}, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"^rank [01]: cannot load model .*broken"):
        run_eval(str(broken), eval_file, tmp_path / "out.jsonl", "--world_size=2")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--max_new_tokens=5"], "max_new_tokens"),
        (["--eval_batch_size=3"], "eval_batch_size"),
        (["--template=released"], "template"),
        (["--dtype=bfloat16"], "dtype"),
        (["--evaluator=general"], "evaluator"),
        (["--n_samples=5"], "dataset"),
        (["--seed=1"], None),
    ],
)
def test_another_command_starts_over(model_dir, eval_file, tmp_path, monkeypatch, capsys, more, word):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        run_eval(model_dir, eval_file, tmp_path / "out.jsonl")
    (summary,) = run_eval(model_dir, eval_file, tmp_path / "out.jsonl", *more)
    error = capsys.readouterr().err
    assert (f"another {word}: starting over" in error) == bool(word)
    assert ("4 of 6 answers are there" in error) == (not word)
    (fresh,) = run_eval(model_dir, eval_file, tmp_path / "fresh.jsonl", *more)
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "fresh.jsonl").read_text()
    assert untimed(summary) == untimed(fresh)


def test_finished_datasets_are_not_answered_again(model_dir, tmp_path, watched, monkeypatch):
    files = [write_rows(tmp_path / f"{name}.jsonl", [name] * 6) for name in ("one", "two")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 4)
        run_eval(model_dir, ",".join(files), tmp_path / "out.jsonl")
    assert watched.scored() == ["one"] * 6 + ["two"] * 2
    run_eval(model_dir, ",".join(files), tmp_path / "out.jsonl")
    assert watched.scored() == ["two"] * 4
    assert len(list(tmp_path.glob("out.*.jsonl"))) == 2 and not list(tmp_path.glob(".*"))


def test_two_evaluations_cannot_share_an_output(model_dir, eval_file, tmp_path):
    with locked(tmp_path / "out.jsonl"):
        with pytest.raises(ValueError, match="another run is at work there"):
            run_eval(model_dir, eval_file, tmp_path / "out.jsonl")
        run_eval(model_dir, eval_file, tmp_path / "other.jsonl")
    assert sorted(path.name for path in tmp_path.glob("*out*")) == []


def test_another_adapter_in_the_same_folder_starts_over(tiny_model, tiny_model_dir, tmp_path, monkeypatch, capsys):
    eval_file = write_rows(tmp_path / "mine.jsonl", ["a"] * 6)
    esft.to_esft(tiny_model, esft.ExpertConfig({1: tuple(range(8))}))
    command = (str(tiny_model_dir), eval_file, tmp_path / "out.jsonl", f"--adapter_dir={tmp_path / 'adapter'}")
    esft.save_adapter(tiny_model, tmp_path / "adapter")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 1)
        run_eval(*command)
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-20)
    esft.save_adapter(tiny_model, tmp_path / "adapter")
    run_eval(*command)
    assert "with another adapter: starting over" in capsys.readouterr().err


@pytest.mark.long
def test_base_and_adapter_on_ranks_and_after_an_interruption(
    model_dir, adapter_dir, eval_file, tmp_path, monkeypatch, capsys
):
    flags = (f"--adapter_dir={adapter_dir}", "--with_base")
    run_eval(model_dir, eval_file, tmp_path / "unbroken" / "a.jsonl", *flags)
    wanted = contents(tmp_path / "unbroken", "*")
    assert wanted.keys() == {"a.jsonl", "a.base.jsonl"} and wanted["a.jsonl"] != wanted["a.base.jsonl"]
    for batches, world_size in ((1, 2), (4, 1)):  # while the base answers, and while the adapter does
        folder = tmp_path / str(batches)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, batches)
            run_eval(model_dir, eval_file, folder / "a.jsonl", *flags)
        capsys.readouterr()
        run_eval(model_dir, eval_file, folder / "a.jsonl", *flags, f"--world_size={world_size}")
        assert f"{2 * batches} of 12 answers are there" in capsys.readouterr().err
        assert contents(folder, "*") == wanted and not list(folder.glob(".*"))
