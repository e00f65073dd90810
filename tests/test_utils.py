"""utils.py and deepseek/files.py: whole files or none, errors in one sentence, the environment of a result."""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from tqdm import tqdm

import utils
from deepseek.files import (
    atomic_path,
    check_file,
    check_output,
    named,
    read_json,
    read_jsonl,
    sha256,
    suggest,
    suggest_path,
    write_json,
    write_jsonl,
)


def test_an_output_that_cannot_be_is_refused_and_nothing_is_made(tmp_path):
    (tmp_path / "file").touch()
    for path, folder in ((tmp_path / "file", True), (tmp_path, False), (tmp_path / "file" / "a" / "b", True)):
        with pytest.raises(ValueError, match="cannot write"):
            check_output(path, folder)
    check_output(tmp_path / "a" / "b")
    check_output(tmp_path / "file")
    check_output("/dev/null")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_wrong_flag_is_one_sentence(capsys):
    parser = utils.command_parser("what it does")
    parser.add_argument("--number", "--count", type=utils.positive, required=True, help="how many")
    for argv, text in (
        (["--number=0"], "not a whole number"),
        (["--number=1", "x"], "unrecognized"),
        (["--number=1", "--numb=2"], "unrecognized arguments: --numb (did you mean '--number'?)"),  # no abbreviations
        (["--number=1", "--zzz"], "unrecognized arguments: --zzz. --help"),
        ([], "required: --number"),
    ):
        for parse in (parser.parse_args, parser.parse_intermixed_args):
            with pytest.raises(SystemExit) as stop:
                parse(argv)
            error = capsys.readouterr().err
            assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and text in error
    assert parser.parse_args(["--count", "2"]).number == 2


@pytest.mark.parametrize("words", [["--hf_token=s3cret"], ["hf_token=s3cret"], ["--hf_token", "s3cret"]])
def test_an_unknown_flag_is_named_without_its_value(words, capsys):
    with pytest.raises(SystemExit):
        utils.command_parser("what it does").parse_args(words)
    error = capsys.readouterr().err
    assert "hf_token" in error and "s3cret" not in error


def test_both_writings_of_a_flag():
    parser = utils.command_parser("what it does")
    parser.add_argument("--number", "--count", type=int)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("rest", nargs="*")
    for parse in (parser.parse_args, parser.parse_intermixed_args):
        for words in (
            ["--number=2", "--all"],
            ["number=2", "all=true"],
            ["count=2", "--all=true"],
            ["--all", "--number", "2"],
        ):
            assert vars(parse(words)) == {"number": 2, "all": True, "rest": []}
        assert vars(parse(["all=false", "lr=2", "a=b=number=2"])) == {
            "number": None, "all": False, "rest": ["lr=2", "a=b=number=2"]
        }  # fmt: skip
        with pytest.raises(SystemExit):
            parse(["all=maybe"])


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    write_jsonl(path, [{"old": 1}])

    def rows():
        yield {"new": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, rows())
    assert read_jsonl(path) == [{"old": 1}]
    assert os.listdir(path.parent) == ["rows.jsonl"]  # nothing is left beside it
    write_jsonl(path, [{"new": 1}])
    assert read_jsonl(path) == [{"new": 1}]
    for place in (path / "below_a_file.json", path.parent):
        with pytest.raises(ValueError, match=r"cannot write .*: .*. Give another path"):
            write_json(place, {})


def test_atomic_path_of_folders_and_devices(tmp_path):
    def fill(fail: bool):
        with atomic_path(tmp_path / "folder.d", folder=True) as folder:
            assert folder.name == "folder.d" and not list(tmp_path.glob("*.d"))  # an unfinished output has no such name
            folder.mkdir()
            (folder / "a").write_text("a")
            if fail:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill(True)
    assert os.listdir(tmp_path) == []
    fill(False)
    assert (tmp_path / "folder.d" / "a").read_text() == "a"
    with atomic_path("/dev/null") as path:  # never to be replaced by a file
        assert path == Path("/dev/null")


def test_environment_never_fails(monkeypatch):
    assert utils.environment()["torch"] == torch.__version__
    monkeypatch.setenv("PATH", "")  # no git
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)
    facts = utils.environment()
    assert facts["git"] is None and facts["device"] is None
    json.dumps(facts)


@pytest.mark.parametrize("count, text", [(0, "0 packs"), (1, "1 pack"), (2, "2 packs"), (1234, "1,234 packs")])
def test_counted(count, text):
    assert utils.counted(count, "pack") == text


def test_suggest():
    assert suggest("trainslation", ["law", "translation"]) == " (did you mean 'translation'?)"
    assert suggest("xyz", ["law", "translation"]) == ""


@pytest.mark.parametrize(
    "path, near",
    [
        ("runs/lwa", "law"),
        ("rums/law/adapter", "runs"),  # the first part that is not there
        ("runs/law/file/x", None),
        ("runs/xyz", None),
        ("runs/law", None),
    ],
)
def test_suggest_path(tmp_path, path, near):
    (tmp_path / "runs" / "law").mkdir(parents=True)
    (tmp_path / "runs" / "law" / "file").touch()
    assert suggest_path(tmp_path / path) == (f" (did you mean {near!r}?)" if near else "")


@pytest.fixture
def odd(tmp_path) -> Path:
    """A folder with a pipe, a link to nothing, a link to itself, a link to a device, and a folder."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "name, told",
    [
        ("pipe", "it is not a file, but a pipe or a device"),
        ("zero", "it is not a file, but a pipe or a device"),
        ("folder", "it is not a file, but a folder"),
        ("link", "no such file (PLACE/link is a link that leads nowhere)"),
        ("link/below", "no such file (PLACE/link is a link that leads nowhere)"),
        ("loop", "no such file (PLACE/loop is a link that leads nowhere)"),
        ("folde", "no such file (did you mean 'folder'?)"),
        ("xyz", "no such file"),
    ],
)
@pytest.mark.parametrize("read", [check_file, sha256, read_json, read_jsonl])
def test_what_is_not_a_file_is_not_read(odd, read, name, told):
    with pytest.raises(FileNotFoundError) as error:
        read(odd / name)
    assert str(error.value) == f"cannot read {odd / name}: {told.replace('PLACE', str(odd))}."


def test_an_output_may_be_a_device_and_no_pipe(odd):
    write_json(odd / "link", {})  # a file takes the place of a link
    assert not (odd / "link").is_symlink()
    for name, folder in (("pipe", False), ("pipe", True), ("loop", True), ("zero", True)):
        with pytest.raises(ValueError, match=f"cannot write .*{name}: it is"):
            check_output(odd / name, folder)


@pytest.mark.parametrize(
    "text, told",
    [
        ("[1]", "an object is expected, found list"),
        ("{}", "it has no 'config'"),
        ('{"config": 1, "config": 2}', "the key 'config' is there twice"),
        ('{"config": {"a": 1, "a": 2}}', "the key 'a' is there twice"),
        ('{"config": ' * 99_999, "recursion"),
        ('{"config": ' + "9" * 9999 + "}", "Exceeds the limit"),
        ('{"config": "\\ud800"}', "surrogates"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_what_is_not_the_json_that_is_expected_is_told_with_its_file(tmp_path, text, told):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_json(path, "config")
    assert str(error.value).startswith(f"cannot read {path}: ") and told in str(error.value)
    path.write_text('{"config": 1, "more": "\\ud83d\\ude00"}')
    assert read_json(path, "config") == {"config": 1, "more": "\U0001f600"}


@pytest.mark.parametrize(
    "use", [lambda: {}["x"], lambda: [][1], lambda: None.x, lambda: 1 / 0, lambda: int(1e400), lambda: "x" + 1]
)
def test_what_the_content_of_a_file_causes_is_told_with_its_file(use):
    told = r"^cannot use summary.json: it does not hold what it should \(\w+Error: "
    with pytest.raises(ValueError, match=told), named("summary.json"):
        use()
    with pytest.raises(RuntimeError, match="ours"), named("summary.json"):
        raise RuntimeError("ours")


def test_errors_of_the_system_say_what_cannot_be_used(tmp_path):
    for cause, told in (
        (lambda: (tmp_path / "x" / "y").read_text(), f"cannot use {tmp_path / 'x' / 'y'}: No such file or directory"),
        (lambda: (tmp_path / ("n" * 999)).read_text(), "cannot use .*nnn: File name too long"),
        (lambda: shutil.copytree(tmp_path, tmp_path.with_name("copy")), "cannot copy .*loop: .*symbolic links"),
    ):
        (tmp_path / "loop").unlink(missing_ok=True)
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(OSError) as error:
            cause()
        assert re.fullmatch(told + ".*", utils.reason_of(error.value)), utils.reason_of(error.value)


@pytest.mark.parametrize(
    "body, debug, code, error",
    [
        ("print('fine')", "", 0, ""),
        ("raise ValueError('key a:\\n  wrong')", "", 2, "error: key a: wrong\n"),
        ("open('/no/such')", "", 2, "error: cannot use /no/such: No such file or directory\n"),
        ("raise ValueError('wrong')", "1", 1, "Traceback"),
        ("raise RuntimeError('ours')", "", 1, "Traceback"),
        ("raise KeyboardInterrupt", "", 130, "interrupted\n"),
    ],
)
def test_run_cli(body, debug, code, error, capsys, monkeypatch):
    monkeypatch.setenv("ESFT_DEBUG", debug)

    def main():
        exec(body)

    if code == 0:
        utils.run_cli(main)
    elif error == "Traceback":
        with pytest.raises((ValueError, RuntimeError)):
            utils.run_cli(main)
    else:
        with pytest.raises(SystemExit) as exit:
            utils.run_cli(main)
        assert exit.value.code == code
        assert capsys.readouterr().err == error


def test_a_closed_pipe_is_quiet():
    script = "import utils\ndef main():\n    while True: print('line')\nutils.run_cli(main)"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=utils.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_a_quiet_command_returns_what_it_printed_or_tells_its_error(tmp_path):
    tool = tmp_path / "tool.py"
    tool.write_text("import os; print(os.environ['COLOUR'])")
    assert utils.run_command([tool], quiet=True, env={"COLOUR": "red"}) == "red\n"
    tool.write_text("import sys; sys.exit('first\\nerror: it broke\\nlast')")
    with pytest.raises(ChildProcessError, match=rf"^cannot run {tool}: it broke$"):
        utils.run_command([tool], quiet=True)


def test_a_line_of_the_log_stands_apart_from_a_progress_bar(capsys):
    utils.log_to_stdout(0)
    with tqdm(total=9, desc="training") as bar:
        bar.update(1)
        logging.getLogger("esft").info("after step 1")
        both = capsys.readouterr()
    cleared = both.err.rstrip("\r").split("\r")
    assert both.out == "after step 1\n" and any(part and not part.strip() for part in cleared)


def test_a_warning_is_one_line():
    script = "import utils, warnings\nutils.run_cli(lambda: warnings.warn('the index is not read'))"
    ended = subprocess.run([sys.executable, "-c", script], cwd=utils.ROOT, capture_output=True, text=True, check=True)
    assert ended.stderr == "warning: the index is not read\n"


# ---- one owner of an output

OWNER = """
import os, sys, time, utils
with utils.locked(sys.argv[1]):
    if not os.fork():  # as a worker of a DataLoader, which ends some time after the run
        time.sleep(60)
    print("at work", flush=True)
    time.sleep(60)
"""


def test_an_output_has_one_owner_until_that_ends(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with utils.locked(out):
        assert not out.exists()
        for other in (out, tmp_path / "a" / "b" / ".." / "b" / "out"):
            with pytest.raises(
                ValueError, match=r"cannot write .*out: another run is at work there \(.*process \d+ on"
            ):
                utils.locked(other).__enter__()
        with utils.locked(out.with_name("other")):
            pass
    assert os.listdir(tmp_path) == []  # nor an empty folder that was made for it
    with pytest.raises(KeyError), utils.locked(out):
        out.mkdir()
        raise KeyError
    with utils.locked(out):
        assert os.listdir(out) == []
    assert os.listdir(out.parent) == ["out"]


def test_an_owner_may_be_known_under_another_name(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    with utils.locked(tmp_path / "out"), pytest.raises(ValueError, match="another run is at work"):
        utils.locked(tmp_path / "link").__enter__()


def test_an_owner_that_is_killed_leaves_nothing_locked(tmp_path):
    with subprocess.Popen([sys.executable, "-c", OWNER, tmp_path / "out"], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "at work\n"
        (child,) = psutil.Process(owner.pid).children()
        try:
            with pytest.raises(ValueError, match=f"process {owner.pid} on"):
                utils.locked(tmp_path / "out").__enter__()
            owner.kill()
            owner.wait()
            assert child.is_running()
            with utils.locked(tmp_path / "out"):
                pass
        finally:
            owner.kill()
            child.kill()
    assert os.listdir(tmp_path) == []


def test_of_two_that_begin_as_an_owner_ends_one_owns(tmp_path, monkeypatch):
    """The second opened the lock before the first removed it, and must not own a file that is gone."""
    flock, first = fcntl.flock, utils.locked(tmp_path / "out")
    first.__enter__()

    def late(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        first.__exit__(None, None, None)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with utils.locked(tmp_path / "out"):
        assert os.listdir(tmp_path) == [".out.lock"]
        with pytest.raises(ValueError, match="another run is at work"):
            utils.locked(tmp_path / "out").__enter__()


def test_pipes_and_file_systems_without_locks_are_written_all_the_same(tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "pipe")
    for pipe in (tmp_path / "pipe", "/dev/null"):
        with utils.locked(pipe):
            assert os.listdir(tmp_path) == ["pipe"]

    def unknown(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with utils.locked(tmp_path / "out"):
        pass
    assert "cannot be locked (Function not implemented): start no second run" in capsys.readouterr().err
