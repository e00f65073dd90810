"""What pip installs: the library, nothing else, and it works beside any files of the user's own."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.clients
USES_THE_LIBRARY = """
import sys
import torch
from transformers import AutoModelForCausalLM
import esft
from esft import ExpertScores, RouterCapture, add_adapter, save_adapter, select_experts, to_esft, unload

base, installed = sys.argv[1:]
assert esft.__file__.startswith(installed), esft.__file__
model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
batch = {"input_ids": torch.arange(3, 35).view(2, 16)}
with RouterCapture(model) as capture, torch.no_grad():
    model(**batch)
config = select_experts(ExpertScores.from_counts(capture.counts()), score_function="token", top_p=0.5)
to_esft(model, config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(3):
    loss = model(**batch, labels=batch["input_ids"]).loss
    losses.append(loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert losses[2] < losses[0], losses
trained = model(**batch).logits
save_adapter(model, "adapter")
unload(model)
assert not torch.equal(model(**batch).logits, trained)
torch.testing.assert_close(add_adapter(model, "adapter")(**batch).logits, trained)
print("done")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built from a copy, so that a build leaves nothing in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.splitlines():
        if name.startswith("results/") or not (ROOT / name).is_file():
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    built = subprocess.run([*pip, "-q", "-w", folder, source], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel):
    """A folder with the installed wheel, as `pip install` lays it out."""
    target = wheel.parent / "installed"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*pip, "--target", target, wheel], check=True)
    return target


def run(script: str, folder: Path, installed: Path, *words: str) -> subprocess.CompletedProcess:
    """Run a script that stands in `folder`, with the installed library on the path."""
    (folder / "script.py").write_text(script)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "script.py", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def top_level(names: list[str]) -> set[str]:
    """Importable top-level names among the files of a wheel."""
    return {name.partition("/")[0].removesuffix(".py") for name in names if ".dist-info/" not in name}


def test_a_wheel_has_two_top_level_names(wheel):
    assert top_level(["esft.py", "utils.py", "deepseek/a.py", "esft-0.dist-info/METADATA"]) == {
        "esft", "utils", "deepseek"
    }  # fmt: skip
    assert top_level(zipfile.ZipFile(wheel).namelist()) == {"esft", "deepseek"}


def test_it_imports_beside_files_of_the_same_names_as_ours(installed, tmp_path):
    for name in ("utils", "data", "metrics", "train", "benchmarks"):
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    for name in ("training", "evaluation", "scripts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("mine = True\n")
    mine = "import utils, data, metrics, train, benchmarks, training, evaluation, scripts\n"
    mine += "assert all(m.mine for m in (utils, data, metrics, train, benchmarks, training, evaluation, scripts))\n"
    ended = run(f"from esft import to_esft\n{mine}print(to_esft.__name__)", tmp_path, installed)
    assert (ended.returncode, ended.stdout) == (0, "to_esft\n"), ended.stderr


@pytest.mark.long
def test_a_data_package_of_the_user_s_is_left_alone(installed, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("mine = True\n")
    ended = run("from esft import to_esft\nimport data\nprint(data.mine)", tmp_path, installed)
    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr


@pytest.mark.long
def test_the_installed_library_does_the_whole_method(installed, tiny_model_dir, tmp_path):
    ended = run(USES_THE_LIBRARY, tmp_path, installed, str(tiny_model_dir), str(installed))
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
