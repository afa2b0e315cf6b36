"""How the native library is found, what is said where it is absent or broken, and that importing is quiet and quick."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_python

import nestopt_ext as nx
from nestopt_ext import _library, _ops

STEP = """
import torch, nestopt_ext as nx
p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
nx.ComplexSGD([p], lr=0.5).step()
assert p.tolist() == [0.5] * 3
print(nx.native_status())
"""
DISABLED = "native library not loaded: NESTOPT_DISABLE_NATIVE is set; the PyTorch reference path is used."
PURE = {"NESTOPT_DISABLE_NATIVE": "0"}


@pytest.fixture
def copy_of_package(tmp_path):
    """The package without its native library."""
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "_build_report.json", "__pycache__", "experiments")
    shutil.copytree(ROOT / "nestopt_ext", tmp_path / "nestopt_ext", ignore=ignore)
    return tmp_path


def run_beside(folder, code, **environment):
    return run_python(
        f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}",
        PYTHONSAFEPATH="1",
        PYTHONPATH=str(folder),
        **environment,
    )


def test_status_and_build_info_agree():
    status, info = nx.native_status(), nx.build_info()
    assert status.endswith(".") and "\n" not in status
    assert info["version"] == nx.__version__ and info["torch_runtime"] == torch.__version__
    assert info["native"] is (_library.native() is not None)
    if info["native"]:
        assert set(info) == {"version", "torch_runtime", "native", "compiler", "torch", "cuda", "cuda_archs", "simd"}
        assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
        assert info["simd"] in status and status.startswith("native library loaded: ")
        assert bool(info["cuda_archs"]) is info["cuda"]
    else:
        assert status.startswith("native library not loaded: ") and status.endswith(
            "the PyTorch reference path is used."
        )
    info["native"] = "spoiled"
    assert nx.build_info()["native"] != "spoiled"  # a new dict each time


def test_is_native_tells_which_kernels_are_there():
    for op in ("complex_sgd_step_", "neumann_step_"):
        assert _ops.is_native(op, "cpu") is nx.build_info()["native"]
        assert _ops.is_native(op, "cuda") is nx.build_info().get("cuda", False)
        assert not _ops.is_native(op, "meta")
    assert not _ops.is_native("unknown", "cpu")


def test_disabled_by_the_environment():
    done = run_python(STEP, NESTOPT_DISABLE_NATIVE="1")
    assert done.stdout == f"{DISABLED}\n", done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("value", ["1", "true", "yes", "", "0"])
def test_values_of_the_variable(value, monkeypatch):
    for name in ("_native", "_status"):
        monkeypatch.setattr(_library, name, getattr(_library, name))
    monkeypatch.setenv("NESTOPT_DISABLE_NATIVE", value)
    _library.load()
    assert (nx.native_status() == DISABLED) is (value not in ("", "0"))


def test_a_missing_library_says_how_to_build_it(copy_of_package):
    done = run_beside(copy_of_package, STEP, **PURE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "native library not loaded: it was not built; build it with a C++ compiler: python setup.py build_ext"
        " --inplace; the PyTorch reference path is used.\n"
    )
    assert done.stderr == ""


def test_a_library_that_could_not_be_built_says_why(copy_of_package):
    report = {"reason": "no C++ compiler was found when it was installed (looked for c++)", "torch": "2.13.0"}
    (copy_of_package / "nestopt_ext/_build_report.json").write_text(json.dumps(report))
    done = run_beside(copy_of_package, STEP, **PURE)
    assert done.stdout == f"native library not loaded: {report['reason']}; the PyTorch reference path is used.\n", (
        done.stderr
    )


@pytest.mark.parametrize("report", ["", "{", "[1, 2]", "null"], ids=repr)
def test_a_spoiled_build_report_counts_as_none(report, tmp_path, monkeypatch):
    (tmp_path / "_build_report.json").write_text(report)
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    assert _library._build_report() == {}


def broken_library(folder):
    suffix = next(s for s in __import__("importlib.machinery").machinery.EXTENSION_SUFFIXES)
    path = folder / "nestopt_ext" / f"_C{suffix}"
    path.write_bytes(b"this is no library" * 100)
    return path


def test_a_broken_library_explains_itself(copy_of_package):
    path = broken_library(copy_of_package)
    done = run_beside(copy_of_package, STEP, **PURE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("native library not loaded: ") and done.stdout.endswith(
        "the PyTorch reference path is used.\n"
    )
    assert path.name in done.stdout and len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_a_library_for_another_torch_names_both(copy_of_package):
    broken_library(copy_of_package)
    (copy_of_package / "nestopt_ext/_build_report.json").write_text('{"torch": "1.2.3"}')
    done = run_beside(copy_of_package, STEP, **PURE)
    assert done.stdout == (
        f"native library not loaded: it was built for torch 1.2.3, and this is torch {torch.__version__};"
        " build it again; the PyTorch reference path is used.\n"
    ), done.stderr


def test_a_library_for_other_ops_is_not_asked(copy_of_package):
    """Its kernels would take arguments for what they are not, without a word."""
    broken_library(copy_of_package)
    (copy_of_package / "nestopt_ext/_build_report.json").write_text(json.dumps({"torch": "2.13.0", "ops": "0" * 64}))
    done = run_beside(copy_of_package, STEP, **PURE)
    assert done.stdout == (
        "native library not loaded: it was built for other ops than these; build it again: python setup.py build_ext"
        " --inplace; the PyTorch reference path is used.\n"
    ), done.stderr


IMPORT = """
import json, sys, time, torch
known, start = set(sys.modules), time.process_time()
import nestopt_ext
facts = [time.process_time() - start, sorted(set(sys.modules) - known), torch.cuda.is_initialized()]
open({path!r}, "w").write(json.dumps(facts))
"""


@pytest.mark.parametrize("disable_native", ["0", "1"], ids=["native", "reference"])
def test_import_is_quiet_and_quick(disable_native, tmp_path):
    """Nothing on stdout and stderr, no CUDA, no optional package; under 0.15 s of the processor over torch."""
    done = run_python(IMPORT.format(path=str(tmp_path / "facts")), NESTOPT_DISABLE_NATIVE=disable_native)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    seconds, modules, cuda = json.loads((tmp_path / "facts").read_text())
    assert not {"matplotlib", "optuna", "sklearn", "tqdm", "PIL", "rich", "pandas", "torch._dynamo"} & set(modules)
    assert not cuda
    assert seconds < 0.15


def test_importing_leaves_the_process_as_it_was(tmp_path):
    code = """
import os, random, warnings, logging, numpy, torch
def state():
    return (torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ),
            list(warnings.filters), logging.getLogger().level, os.getcwd(), sorted(os.listdir()))
before = state()
import nestopt_ext
assert state() == before
"""
    done = run_python(f"import os; os.chdir({str(tmp_path)!r})\n{code}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names_are_there_and_documented():
    assert sorted(nx.__all__) == sorted(set(nx.__all__))
    for name in nx.__all__:
        value = getattr(nx, name)
        assert name == "__version__" or value.__doc__, name
    assert Path(nx.__file__).with_name("py.typed").exists()


def test_native_and_reference_agree_across_processes(native):
    """The same steps in a process of each kind end in the same numbers."""
    code = """
import torch, nestopt_ext as nx
torch.manual_seed(0)
params = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in [(3,), (40000,), (5, 7)]]
optimizer = nx.ComplexSGD(params, lr=0.1, weight_decay=0.01)
for i in range(4):
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
print(*[repr(float(p.detach().sum())) for p in params])
"""
    found = [run_python(code, NESTOPT_DISABLE_NATIVE=v).stdout.split() for v in ("0", "1")]
    assert len(found[0]) == 3
    for a, b in zip(*found, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-12)


def test_a_build_that_fails_leaves_no_older_library_behind(tmp_path):
    for name in ("nestopt_ext", "csrc", "requirements", "_build_backend"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    stale = tmp_path / "nestopt_ext/_C.of-an-earlier-build.so"
    stale.write_bytes(b"")
    build = "import runpy, sys; sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']; runpy.run_path('setup.py')"
    done = run_python(f"import os; os.chdir({str(tmp_path)!r})\n{build}", NESTOPT_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert not stale.exists()
    report = json.loads((tmp_path / "nestopt_ext/_build_report.json").read_text())
    assert report["reason"] == "it was left out of the build (NESTOPT_NATIVE=0)"


def test_the_build_report_names_the_ops_of_this_package(native):
    ops = hashlib.sha256((ROOT / "nestopt_ext/_ops.py").read_bytes()).hexdigest()
    assert _library._build_report()["ops"] == ops
