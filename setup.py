"""Builds the native library beside the package; the metadata is in pyproject.toml.

Environment:
  NESTOPT_NATIVE    auto (default: build if it can be built), 1 (fail if it cannot), 0 (pure Python)
  NESTOPT_CUDA      auto (default: if torch is a CUDA build and nvcc is there), 1, 0
  NESTOPT_SANITIZE  e.g. address,undefined
  TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX: as torch.utils.cpp_extension takes them
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)


def say(text: str) -> None:
    """Tells the user what the build decided; pip shows it with -v."""
    print(f"nestopt_ext: {text}", file=sys.stderr, flush=True)


def find_cuda_home() -> None:
    """Sets CUDA_HOME: from an nvcc on PATH that is a wrapper script, torch would guess a wrong one."""
    if "CUDA_HOME" in os.environ:
        return
    for nvcc in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if nvcc and (home := Path(nvcc).resolve().parent.parent).joinpath("include/cuda_runtime.h").exists():
            os.environ["CUDA_HOME"] = str(home)
            return


def write_report(folder: Path, report: dict[str, str]) -> None:
    """Leaves beside the package what native_status() says about the build."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_report.json").write_text(json.dumps(report) + "\n", encoding="utf-8")


def reason_not_to_build() -> str:
    """Why there will be no native library, as a clause for native_status(); empty if there can be one."""
    if os.environ.get("NESTOPT_NATIVE", "auto") == "0":
        return "it was left out of the build (NESTOPT_NATIVE=0)"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not any(shutil.which(name) for name in (compiler, "g++", "clang++")):
        return f"no C++ compiler was found when it was installed (looked for {compiler}, g++, clang++)"
    return ""


def extension() -> Any:
    """The extension module, with its CUDA part or without."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension

    want = os.environ.get("NESTOPT_CUDA", "auto")
    if want == "1" and (torch.version.cuda is None or CUDA_HOME is None):
        missing = "this torch is a CPU build" if torch.version.cuda is None else "nvcc was not found; set CUDA_HOME"
        raise SystemExit(f"nestopt_ext: NESTOPT_CUDA=1, but {missing}.")
    cuda = want == "1" or (want == "auto" and torch.version.cuda is not None and CUDA_HOME is not None)

    sources = Path("csrc/sources.txt").read_text(encoding="utf-8").split()
    cxx = [
        "-std=c++20",
        "-fvisibility=hidden",
        "-fopenmp",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
    ]
    cxx += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-D_GLIBCXX_ASSERTIONS"]
    link = ["-fopenmp", "-Wl,--as-needed"]
    if sanitize := os.environ.get("NESTOPT_SANITIZE", ""):
        cxx += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}"]
        link += [f"-fsanitize={sanitize}"]
    else:
        cxx += ["-O3", "-g0"]

    options = {"cxx": cxx}
    what = "CPU only"
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        archs = os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ")
        cxx += ["-DNESTOPT_WITH_CUDA", f'-DNESTOPT_CUDA_ARCHS="{archs}"']
        what = f"with CUDA for {archs}"
        options["nvcc"] = ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]
    else:
        sources = [source for source in sources if not source.endswith(".cu")]
    say(f"building the native library, {what}, for torch {torch.__version__}")
    kind = CUDAExtension if cuda else CppExtension
    include = [str(ROOT / "csrc")]
    return kind("nestopt_ext._C", sources, include_dirs=include, extra_compile_args=options, extra_link_args=link)


def build_command() -> Any:
    """The build_ext of torch, which on failure leaves a pure-Python package and the reason, unless NESTOPT_NATIVE=1."""
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class BuildNative(BuildExtension):
        def run(self) -> None:
            folder = ROOT / "nestopt_ext" if self.inplace else Path(self.build_lib) / "nestopt_ext"
            reason = reason_not_to_build()
            if not reason:
                try:
                    super().run()
                except (Exception, SystemExit) as error:
                    cause = " ".join(str(error).split()) or type(error).__name__
                    reason = f"the compiler failed when it was installed ({cause[:200]})"
            if reason and os.environ.get("NESTOPT_NATIVE") == "1":
                raise SystemExit(f"nestopt_ext: native library not built: {reason}.")
            if reason:
                for stale in folder.glob("_C.*.so"):  # of an earlier build; it would be loaded as if it were this one
                    stale.unlink()
                say(f"native library not built: {reason}. The package works on the PyTorch reference path.")
                self.extensions = []
            ops = hashlib.sha256((ROOT / "nestopt_ext/_ops.py").read_bytes()).hexdigest()
            report = {"torch": torch.__version__, "ops": ops}
            write_report(folder, {"reason": reason, **report} if reason else report)

        def get_outputs(self) -> list[str]:
            return [path for path in super().get_outputs() if Path(path).exists()]

    return BuildNative


def main() -> None:
    """Runs setuptools; torch is needed only by the commands that compile."""
    find_cuda_home()
    if not {"build", "build_ext", "bdist_wheel", "develop", "editable_wheel", "install"} & set(sys.argv):
        setup()
        return
    # Without a compiler an empty extension stands in, so that build_ext still runs and leaves its report.
    module = Extension("nestopt_ext._C", []) if reason_not_to_build() else extension()
    setup(ext_modules=[module], cmdclass={"build_ext": build_command()})


main()
