"""The environment of all tests, which torch and transformers read when they are imported. Fixtures: fixtures.py."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the number of threads can change the bits that are compared

gc.disable()  # while modules are imported and collected


def pytest_configure(config):
    if not config.getoption("numprocesses", None):  # the process that hands out tests to others imports nothing
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_finish():
    freeze()
    gc.enable()


def pytest_runtest_teardown(item, nextitem):
    if nextitem is None or item.path != nextitem.path:
        freeze()


def freeze():
    """Exempt all live objects from garbage collection. The Trainer runs it several times for every run."""
    gc.collect()
    gc.freeze()
