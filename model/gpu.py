"""Our Triton kernels where they can run on NVIDIA GPUs; None elsewhere, and PyTorch's own operations serve.

`VIDEOFACTORY_TRITON=0` in the environment turns them off.
"""

import logging
import os
import shutil
import sysconfig
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

SWITCH = "VIDEOFACTORY_TRITON"

logger = logging.getLogger(__name__)


def obstacle() -> str:
    """Why our kernels cannot run here, GPU or not; empty if they can."""
    if os.environ.get(SWITCH, "1").lower() in ("0", "false", "off", "no"):
        return f"{SWITCH}={os.environ[SWITCH]} turns them off"
    if torch.version.hip is not None or find_spec("triton") is None:
        return "PyTorch came without Triton for NVIDIA GPUs"
    # Triton compiles the few lines of C that launch a kernel when it first runs, and fails then.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler: install gcc or clang, or name one in CC"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"there is no Python.h in {headers}: install the headers of Python (python3-dev)"
    return ""


def _module(name: str) -> Any:
    return None if _OBSTACLE else import_module(f".{name}", __package__)


_OBSTACLE = obstacle()
if _OBSTACLE:
    logger.info("Our kernels for GPUs are not used; PyTorch's own serve: %s.", _OBSTACLE)

kernels = _module("kernels")
group_norm = _module("group_norm")
