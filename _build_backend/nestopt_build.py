"""setuptools' build backend, with the installed PyTorch made visible to an isolated build.

The extension must be compiled against the torch it will run with. A build environment of pip's own has none, and naming
torch as a build requirement would fetch another one, several gigabytes of it.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

_FIND_TORCH = "import importlib.util; spec = importlib.util.find_spec('torch'); print(spec.origin if spec else '')"
_REMEDY = (
    "nestopt_ext is compiled against the installed PyTorch, and this interpreter has none.\n"
    "Install PyTorch first, then: pip install --no-build-isolation ."
)


def _expose_torch() -> None:
    if importlib.util.find_spec("torch") is not None:
        return
    # -I: without the PYTHONPATH through which pip isolates the build.
    found = subprocess.run([sys.executable, "-I", "-c", _FIND_TORCH], capture_output=True, text=True, check=False)
    origin = found.stdout.strip()
    if not origin:
        raise SystemExit(_REMEDY)
    sys.path.append(str(Path(origin).parent.parent))


def _with_torch(hook: str) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        _expose_torch()
        return getattr(build_meta, hook)(*args, **kwargs)

    return wrapped


for _hook in (
    "get_requires_for_build_wheel",
    "get_requires_for_build_editable",
    "prepare_metadata_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "build_wheel",
    "build_editable",
):
    globals()[_hook] = _with_torch(_hook)
