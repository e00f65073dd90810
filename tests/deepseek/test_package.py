"""Test that importing the package drops one line that means nothing to a user, and no other."""

import logging
import subprocess
import sys
from importlib.util import find_spec

import pytest

import deepseek  # noqa: F401
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
