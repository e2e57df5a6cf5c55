"""What every test shares: property tests that repeat exactly, and GPU tests that are skipped where there is none."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# No deadline: the first example pays for imports, and a shared machine is slow now and then.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts named by MEGATEXT_DATA; tests that ask for it are skipped without it."""
    folder = os.environ.get("MEGATEXT_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MEGATEXT_DATA does not name a folder with real texts")
    return Path(folder)
