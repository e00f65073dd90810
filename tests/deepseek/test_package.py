"""Test that importing the package drops one line that means nothing to a user, and no other."""

import logging
import subprocess
import sys
from importlib.util import find_spec

import pytest

import deepseek  # noqa: F401
import esft
from tests.helpers import ROOT

FIRST = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes.backends":
            assert "deepseek" in sys.modules, "bitsandbytes is imported first, so its line is printed"
            print("imported")

sys.meta_path.insert(0, Finder())
import {module}
"""


def test_only_the_line_about_an_unused_kernel_is_dropped(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "No module named 'kernels'")
    logger.warning("Failed to load something else")
    assert [record.getMessage() for record in caplog.records] == ["Failed to load something else"]


@pytest.mark.long
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_the_package_is_imported_before_bitsandbytes():
    """train.py imports transformers' Trainer, which imports peft, which imports bitsandbytes."""
    ended = subprocess.run(
        [sys.executable, "-c", FIRST.format(module="train")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout.strip()) == (0, "imported"), ended.stderr


@pytest.mark.long
@pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
def test_the_library_and_the_evaluation_start_without_peft():
    """peft takes two seconds to import, and neither needs it."""
    program = "import sys, esft, eval_multigpu; print('peft' in sys.modules, 'bitsandbytes' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False", "False"]


def test_the_callback_answers_every_event_of_the_trainer():
    from transformers import TrainerCallback  # here, as its import is what the test above is about

    callback = esft.ESFTCallback()
    events = [name for name in vars(TrainerCallback) if name.startswith("on_")]
    own = {name for name in vars(esft.ESFTCallback) if name.startswith("on_")}
    assert len(events) > 10 and own < set(events)
    assert all(getattr(callback, name)(None, None, None, model=None) is None for name in set(events) - own)
    assert not hasattr(callback, "name_of_no_event")
