"""What every test gets: a fixed seed, random state and threads given back, and memory that is poisoned when new."""

import gc
import os
import random

# Read when torch is loaded. Threads that spin at barriers would take the processor from whatever else is running.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from nestopt_ext import native_status
from nestopt_ext._library import native as native_module

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products on a GPU ask for


@pytest.fixture(autouse=True)
def _random_state():
    """Seeds, and gives back the state that was there, so that no test depends on the one before it."""
    state, python_state = torch.get_rng_state(), random.getstate()
    torch.manual_seed(0)
    random.seed(0)
    yield
    torch.set_rng_state(state)
    random.setstate(python_state)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fills what torch.empty returns with NaN (integers: the largest), so that reading it shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Runs a test on the CPU and, where there is one, on the GPU."""
    return torch.device(request.param)


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are composed but not drawn, which takes most of the time of a small run; for tests of something else."""
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, file, **_: file.write(b"\x89PNG\r\n\x1a\n"))


@pytest.fixture
def native():
    """For tests of what only the native library does."""
    if native_module() is None:
        pytest.skip(f"needs the native library ({native_status()})")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("big_memory") and os.environ.get("NESTOPT_BIG_MEMORY", "0") in ("", "0"):
            item.add_marker(pytest.mark.skip(reason="needs tens of gigabytes of memory; set NESTOPT_BIG_MEMORY=1"))


def pytest_collection_finish():
    """What collecting the tests left stays to the end: no collection of garbage looks at it again."""
    gc.collect()
    gc.freeze()
