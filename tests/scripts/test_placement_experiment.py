"""scripts/experiments/placement.py: the simulation by hand, what is held out, and what is refused."""

import json
import sys

import pytest

from scripts.experiments import placement
from utils import run_cli


def write(path, obj):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(obj if isinstance(obj, str) else json.dumps(obj))
    return path


def write_scores(folder, *layers):
    """A summary of layers 1, 2, ... with these shares."""
    write(folder / "summary.json", {"token_scores": {n: dict(enumerate(row)) for n, row in enumerate(layers, 1)}})
    return folder


def write_log(path, *forwards):
    """A routing log: each forward is a list of tokens, each a pair of experts."""
    lines = []
    for tokens in forwards:
        ids = [str(expert) for token in tokens for expert in token]
        lines.append("\t".join(ids) + "\t\t" + "\t".join(["0.5"] * len(ids)))
    return write(path, "\n".join(lines) + "\n")


def run(tmp_path, scores, experts, *flags):
    config = write(tmp_path / "config.json", {"experts": experts})
    argv = [f"--expert_scores_dir={scores}", f"--expert_config={config}", f"--output={tmp_path / 'out' / 'p'}", *flags]
    return placement.main(argv)


def test_two_layers_by_hand(tmp_path):
    scores = write_scores(tmp_path / "scores", [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25])
    ((recording, (found,)),) = run(tmp_path, scores, {"1": [0, 1]}, "--ranks=2")
    assert recording.name == "summary" and "flattered" in recording.how
    old, new = found["contiguous"], found["score"]
    # blocks of layer 1: 1.4 and 0.6 of the mean rank's rows, all 1.4 at trained experts; layer 2: even, none trained
    assert old["load"] == pytest.approx((1.4 + 1) / 2) and old["load_worst"] == pytest.approx(1.4)
    assert old["trained"] == 2
    assert old["step"] == pytest.approx(((1.4 + 2.8) + (1 + 1)) / 2)
    # by score {0, 3} and {1, 2}: even rows, of which 0.8 and 0.6 are trained
    assert new["load"] == new["load_worst"] == pytest.approx(1) and new["trained"] == 1
    assert new["step"] == pytest.approx(((1 + 1.8) + (1 + 1)) / 2)
    assert old["even"] == new["even"] == pytest.approx(((2 + 0.7) + 2) / 2)
    assert found["floor"] == pytest.approx(1)  # no expert has more than half of the rows


def test_the_floor_is_reached_with_one_expert_per_rank(tmp_path):
    scores = write_scores(tmp_path / "scores", [0.4, 0.3, 0.2, 0.1])
    ((_, (found,)),) = run(tmp_path, scores, {"1": [0]}, "--ranks=4")
    assert found["floor"] == found["score"]["load"] == found["contiguous"]["load"] == pytest.approx(1.6)
    assert found["score"]["step"] == found["contiguous"]["step"]


FIRST, SECOND = [(0, 1), (0, 1), (2, 3)], [(2, 0)] * 4


def test_logs_are_placed_by_their_first_half_and_measured_on_the_second(tmp_path):
    write_log(tmp_path / "logs" / "expert_weights_1.txt", FIRST, SECOND)
    ((recording, (found,)),) = run(tmp_path, tmp_path / "logs", {"1": [0], "9": [5]}, "--ranks=2")  # 9 was not logged
    assert recording.name == "held out" and "(3 tokens)" in recording.how and "(4); layers 1;" in recording.how
    assert recording.place_LE == {1: {0: 2, 1: 2, 2: 1, 3: 1}} and recording.measure_LE == {1: {0: 4, 1: 0, 2: 4, 3: 0}}
    # the first half says {0, 2} and {1, 3}; in the second all rows are at 0 and 2
    assert found["score"]["load"] == pytest.approx(2)
    # had it seen all of this, it would have kept 0 and 2 apart
    write_log(tmp_path / "logs" / "expert_weights_1.txt", [*FIRST, *SECOND], [*FIRST, *SECOND])
    ((_, (found,)),) = run(tmp_path, tmp_path / "logs", {"1": [0]}, "--ranks=2")
    assert found["score"]["load"] == pytest.approx(1)


def test_the_halves_of_several_processes_are_those_of_each_file(tmp_path):
    for rank in ("rank_0", "rank_1"):
        write_log(tmp_path / "logs" / rank / "expert_weights_1.txt", FIRST, SECOND)
    ((recording, _),) = run(tmp_path, tmp_path / "logs", {"1": [0]}, "--ranks=2")
    assert recording.place_LE == {1: {0: 4, 1: 4, 2: 2, 3: 2}}


def test_logs_beside_a_summary_give_both_tables(tmp_path):
    scores = write_scores(tmp_path / "scores", [0.3, 0.3, 0.2, 0.1, 0.1])  # its fifth expert is in no log
    write_log(scores / "expert_weights_1.txt", FIRST, SECOND)
    found = run(tmp_path, scores, {"1": [4]}, "--ranks", "2", "5", "8", "--title=a task")
    assert [recording.name for recording, _ in found] == ["held out", "summary"]
    assert [[r["ranks"] for r in results] for _, results in found] == [[2, 5]] * 2  # 8 is said to be left out
    page, note = (tmp_path / "out" / "p.md").read_text(), json.loads((tmp_path / "out" / "p.json").read_text())
    assert page.startswith("# Placement of experts: a task\n") and "Left out: 8 ranks" in page
    assert page.count("| 2 |") == page.count("| 5 |") == 2 and "--ranks 2 5 8" in page
    assert note["environment"]["date"] and note["skipped_ranks"] == [8] and "--title=a task" in note["command"]
    assert note["recordings"][0]["results"] == found[0][1]
    assert (tmp_path / "out" / "p.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_table_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install -e .*\[plot\]"):
        run(tmp_path, write_scores(tmp_path / "scores", [0.5, 0.5]), {"1": [0]}, "--ranks=2")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["p.json", "p.md"]


@pytest.mark.parametrize(
    ("experts", "flags", "told"),
    [
        ({"1": [7]}, (), "names other experts than the scores"),
        ({"5": [0]}, (), "names other experts than the scores"),
        ({"1": [0]}, ("--ranks", "8", "16"), "cannot use ep_size=8: layer 1 has 4 experts"),
        ({"1": [0]}, ("--expert_scores_dir=nowhere",), "nowhere: no such scores"),
        ({"1": [0]}, ("--output=/dev/null/p",), "cannot write"),
    ],
)
def test_wrong_input_is_refused_and_nothing_written(tmp_path, experts, flags, told):
    scores = write_scores(tmp_path / "scores", [0.4, 0.3, 0.2, 0.1])
    with pytest.raises((ValueError, OSError), match=told):
        run(tmp_path, scores, experts, *flags)
    assert not (tmp_path / "out").exists()


def test_a_log_that_cannot_be_halved_or_shows_no_trained_expert_is_refused(tmp_path):
    write_log(tmp_path / "one" / "expert_weights_1.txt", FIRST)
    with pytest.raises(ValueError, match=r"cannot halve .*one forward"):
        run(tmp_path, tmp_path / "one", {"1": [0]})
    write_log(tmp_path / "two" / "expert_weights_1.txt", FIRST, SECOND)
    with pytest.raises(ValueError, match="names other experts than the scores"):
        run(tmp_path, tmp_path / "two", {"2": [0]})


def test_the_command_tells_an_error_in_one_sentence(tmp_path, capsys):
    flags = [f"--expert_scores_dir={tmp_path}", f"--expert_config={tmp_path / 'none.json'}"]
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: placement.main(flags))
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and len(printed.err.splitlines()) == 1
