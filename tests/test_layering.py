"""The walls of the house: who may import whom. The picture is in CONTRIBUTING.md."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nestopt_ext"

FOUNDATION = {
    "_ops",
    "_stack",
    "_functions",
    "_lists",
    "_low_rank",
    "_operator",
    "_distributed",
    "_types",
    "_reference",
    "_version",
}
LOOPS = {"_progress", "_checkpoint", "_json_log"}
ROOMS = {
    "_version": set(),
    "_stack": set(),
    "_types": set(),
    "_lists": {"_types"},
    "_low_rank": {"_lists", "_types"},
    "_operator": {"_lists", "_low_rank", "_types"},
    "_distributed": {"_reference"},
    "_functions": {"_ops", "_reference", "_types"},
    "_reference": set(),
    "_checks": set(),
    "_library": {"_version"},
    "_ops": {"_library", "_reference", "_checks"},
    "optim": FOUNDATION | {"_checks"},
    "curvature": FOUNDATION,
    "solvers": FOUNDATION,  # never curvature: a solver sees only a matvec
    "hypergrad": FOUNDATION | {"solvers", "curvature", *LOOPS},
    "response": FOUNDATION | {"hypergrad", "optim", "curvature", *LOOPS},
    "games": FOUNDATION | {"hypergrad", "optim", "curvature", *LOOPS},
    "_progress": set(),
    "_checkpoint": set(),
    "_json_log": set(),
    "experiments": FOUNDATION | {"optim", "curvature", "solvers", "hypergrad", "games", "response", "_library", *LOOPS},
    "__main__": {"experiments"},
    "__init__": FOUNDATION | {"_library", "optim", "curvature", "solvers", "hypergrad", "games", "response"},
}
REQUIRED = {"torch", "numpy", "typing_extensions"}  # the last comes with torch, and is imported for type checkers alone
EXTRAS = {
    "_progress": {"tqdm"},
    "response": {"matplotlib"},
    "games": {"matplotlib"},
    "experiments": {"matplotlib", "optuna", "rich", "sklearn", "tqdm", "PIL"},
}

CPP = {
    "math": {"math"},
    "cpu": {"cpu", "math"},
    "cuda": {"cuda", "math"},
    "ops": {"ops", "cpu", "cuda", "math"},
    "module.cpp": {"cpu"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """The rooms of the package and the other top-level modules that a file imports."""
    own, other = set(), set()
    here = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            inside_root = module == ("nestopt_ext",)
            modules = [(*module, alias.name) for alias in node.names] if inside_root else [module]
        else:
            continue
        for module in modules:
            if module[0] == "nestopt_ext":
                own.add(module[1] if len(module) > 1 else "__init__")
            else:
                other.add(module[0])
    return own, other


PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_python_imports_stay_within_their_walls(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS, f"{path} is in no room of tests/test_layering.py"
    own, other = imports_of(path)
    names = {path.stem for path in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if p.is_dir()}
    # `from nestopt_ext import ComplexSGD` reaches the front door, which everything above it may use.
    own = {name if name in names else "__init__" for name in own}
    allowed = ROOMS[room] | {room, "_C"} | ({"__init__"} if room in ("experiments", "__main__") else set())
    assert own <= allowed, f"{room} must not import {sorted(own - allowed)}"
    known = set(sys.stdlib_module_names) | REQUIRED | EXTRAS.get(room, set())
    assert other <= known, f"{room} must not import {sorted(other - known)}"


def test_extras_are_imported_where_they_are_used_and_not_at_import_time() -> None:
    for path in PYTHON_FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                for name in names:
                    assert name.split(".")[0] not in set().union(*EXTRAS.values()), f"{path}: {name} at import time"


CPP_FILES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))


@pytest.mark.parametrize("path", CPP_FILES, ids=lambda p: str(p.relative_to(ROOT / "csrc")))
def test_cpp_includes_stay_within_their_walls(path: Path) -> None:
    part = path.relative_to(ROOT / "csrc").parts[0]
    text = path.read_text(encoding="utf-8")
    own = {include.split("/")[0] for include in re.findall(r'#include "([^"]+)"', text)}
    assert own <= CPP[part], f"{part} must not include {sorted(own - CPP[part])}"
    if part in ("math", "cpu", "cuda"):
        assert not re.search(r"#include <(torch|ATen|c10|pybind11|Python)", text), "only csrc/ops may see torch"


def test_every_source_is_listed_once() -> None:
    listed = (ROOT / "csrc/sources.txt").read_text(encoding="utf-8").split()
    found = sorted(str(p.relative_to(ROOT)) for p in CPP_FILES if p.suffix in (".cpp", ".cu"))
    assert sorted(listed) == found


def test_an_op_has_one_stem_everywhere() -> None:
    stems = ("complex_adam", "complex_sgd", "dual_series", "hadamard_gram", "neumann", "rank_one_update", "row_dot")
    for stem in (*stems, "softmax_hessian", "stn_gate"):
        expected = [
            f"csrc/math/{stem}.h",
            f"csrc/cpu/{stem}.cpp",
            f"csrc/cuda/{stem}.cu",
            f"csrc/ops/{stem}.cpp",
            f"tests/test_ops_{stem}.py",
            f"bench/cases/{stem}.py",
        ]
        assert [p for p in expected if not (ROOT / p).exists()] == []
