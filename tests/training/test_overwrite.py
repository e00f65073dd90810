"""`overwrite=true` removes what a run and its evaluation wrote, and refuses to touch any other file."""

import pytest

from tests.helpers import Killed, arguments, at_step, fails, kill

pytestmark = pytest.mark.long

KEYS = {"overwrite": True, "learning_rate": 1e-3}
OWN = [
    "notes.txt",
    "README.md",
    ".env",
    ".git/config",
    "a/b/c",
    "completions/mine.txt",
    "checkpoint-4/mine",
    "my.safetensors",
]


def everything_in(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(params=["finished", "killed"])
def run(request, start, monkeypatch):
    """The folder of a run."""
    if request.param == "finished":
        start(save_opt_states=True)
    else:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            at_step(patch, 5, kill)
            start(save_opt_states=True)
    return start.folder / "out"


@pytest.mark.parametrize("name", OWN)
def test_a_file_of_the_user_is_named_and_kept(name, run, files, capsys):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("mine")
    before = everything_in(run)
    assert f"cannot overwrite {run}: no run wrote {name} in it" in fails(arguments(files, run, **KEYS), capsys)
    assert everything_in(run) == before


def test_a_link_is_a_file_of_the_user(run, files, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (run / "link").symlink_to(tmp_path / "elsewhere")
    assert "no run wrote link in it" in fails(arguments(files, run, **KEYS), capsys)
    assert (run / "link").is_symlink()


def test_what_comes_while_the_model_is_loaded_is_kept(run, files, capsys, monkeypatch):
    import train

    load = train.load_model

    def load_model(*args):
        (run / "late.txt").write_text("mine")
        return load(*args)

    monkeypatch.setattr(train, "load_model", load_model)
    assert "no run wrote late.txt in it" in fails(arguments(files, run, **KEYS), capsys)
    assert (run / "late.txt").exists() and (run / "run.json").exists()


@pytest.mark.parametrize("method", ["esft", "full", "lora"])
def test_what_a_run_wrote_is_removed(method, start):
    keys = {"method": method, "save_opt_states": True, "report_to": "none"}
    start(**keys)
    out = start.folder / "out"
    completions = [out / "completions" / name for name in ("law.jsonl", "law.summary.json", ".law.jsonl.partial")]
    completions[0].parent.mkdir()
    for path in (*completions, out / "held_out.jsonl", out / "report.html"):
        path.write_text("{}")
    start(**keys, **KEYS, max_steps=2)
    assert not any(path.exists() for path in completions)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_folder_that_is_not_there_is_made(start):
    start("new", overwrite=True, max_steps=1)
    assert (start.folder / "new" / "adapter.safetensors").is_file()
