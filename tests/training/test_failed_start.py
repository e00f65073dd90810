"""What keeps a run from starting is told once on each node, and no rank waits for another."""

import re

import pytest

from tests.rank_helpers import rank_arguments, told, train_on


@pytest.mark.parametrize(
    "name, text",
    [
        ("data", r"data.jsonl:31: not valid JSON"),
        ("experts", r"names expert 8 of layer 1"),
        ("weights", r"cannot read .*weights/model.safetensors"),
        ("config", r"cannot load model .*config'"),
        ("tokenizer", r"cannot load model .*tokenizer'"),
        ("argument", r"cannot start this run: "),
        ("batch", r"global_batch_size=3 cannot be shared out"),
        ("optimizer", r"lomo"),
    ],
)
def test_what_no_rank_can_start_with_is_told_once_on_each_node(files, broken, tmp_path, name, text):
    """Two nodes of two ranks."""
    out = tmp_path / "out"
    ended = train_on(4, rank_arguments(files, out, **broken[name]), tmp_path, per_node=2)
    assert [rank.code for rank in ended] == [2] * 4
    lines = [told([rank]) for rank in ended]
    assert [len(own) for own in lines] == [1, 0, 1, 0], lines
    assert all(re.search(text, line) for line in (*lines[0], *lines[2])), lines
    assert not any("Traceback" in rank.err for rank in ended)
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("name", ["weights", "tokenizer", "no experts", "argument"])
def test_what_one_node_cannot_start_with_is_told_on_all(files, broken, tmp_path, name):
    """Two nodes of one rank, the second of which has bad files: no other waits for it, or speaks of a dead process."""
    out = tmp_path / "out"
    argvs = [rank_arguments(files, out, **(broken[name] if rank else {})) for rank in range(2)]
    ended = train_on(2, argvs, tmp_path, per_node=1)
    assert [rank.code for rank in ended] == [2, 2]
    assert [line.startswith("error: rank 1: ") for line in told(ended)] == [True, True], told(ended)
    assert not out.exists()
