"""A folder that a command writes belongs to one run at a time. A second one is refused, and changes nothing."""

import os

import pytest

import eval_multigpu
import train
import utils
from scripts import merge_adapter, pipeline, report
from scripts.expert import get_expert_scores
from tests.helpers import arguments, refused, write_rows

AT_WORK = "another run is at work there"
COMMANDS = {
    "training": (train, lambda files, out: arguments(files, out)),
    "training that selects": (train, lambda files, out: arguments(files, out, expert_config=None)),
    "training afresh": (train, lambda files, out: arguments(files, out, overwrite=True)),
    "scoring": (
        get_expert_scores,
        lambda files, out: [
            f"--eval_dataset={files}/data.jsonl",
            f"--base_model_path={files}/m32",
            f"--output_dir={out}",
        ],
    ),
    "merging": (merge_adapter, lambda files, out: [f"--model={files}/m32", "--adapter_dir=a", f"--output_dir={out}"]),
    "pipeline": (
        pipeline,
        lambda files, out: [f"--model={files}/m32", f"--data={files}/data.jsonl", f"--output_dir={out}"],
    ),
    "report": (report, lambda files, out: [str(files), f"--output={out}"]),
    "evaluation": (
        eval_multigpu,
        lambda files, out: [f"--model={files}/m32", f"--eval_dataset={files}/eval.jsonl", f"--output_path={out}"],
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_leaves_the_output_of_another_alone(files, tmp_path, capsys, name):
    command, words = COMMANDS[name]
    write_rows(files / "eval.jsonl", ["a"] * 6)
    with utils.locked(tmp_path / "out.jsonl"):
        refused(
            capsys,
            command.main,
            words(files, tmp_path / "out.jsonl"),
            "cannot write",
            AT_WORK,
            f"process {os.getpid()}",
        )
    assert os.listdir(tmp_path) == []
