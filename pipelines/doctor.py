"""What this machine has and lacks for each step: found by looking, with the way to get what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_PACKAGES = (
    "torch",
    "transformers",
    "open_clip_torch",
    "ray",
    "av",
    "scenedetect-headless",
    "duckdb",
    "pyarrow",
    "webdataset",
    "yt-dlp",
)
_HUB_TIMEOUT = 5.0


@dataclass(frozen=True)
class Finding:
    """One thing looked for.

    Attributes:
        state: there; not there and only some uses need it; not there and a build needs it.
        what: the thing.
        found: version, path or amount, or what is wrong.
        advice: what it is for, and how to get it.
    """

    state: Literal["ok", "optional", "missing"]
    what: str
    found: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Look for everything, one finding after another."""
    yield Finding("ok" if sys.version_info >= (3, 11) else "missing", "Python", sys.version.split()[0], "3.11 or newer")
    for package in _PACKAGES:
        yield _package(package)
    yield _ffmpeg()
    yield _javascript()
    yield _gpu()
    yield _hub()
    yield _disk()
    yield _memory()


def _package(name: str) -> Finding:
    try:
        return Finding("ok", name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding("missing", name, "not installed", "pip install 'videofactory[curation]'")


def _ffmpeg() -> Finding:
    from videofactory.curation.cut_encode import find_ffmpeg

    try:
        path = find_ffmpeg()
        done = subprocess.run([path, "-hide_banner", "-version"], capture_output=True, text=True, timeout=30, check=True)
        encoders = subprocess.run([path, "-hide_banner", "-encoders"], capture_output=True, text=True, timeout=30, check=True)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it is the finding
        return Finding(
            "missing", "ffmpeg", str(error), "cuts clips: apt install ffmpeg, or pip install imageio-ffmpeg, or set FFMPEG"
        )
    if "libx264" not in encoders.stdout:
        return Finding(
            "missing", "ffmpeg", f"{path} has no libx264", "encodes clips: install a build with libx264, or set FFMPEG"
        )
    return Finding("ok", "ffmpeg", f"{done.stdout.split()[2]} ({path})", "encodes clips that cannot be copied")


def _javascript() -> Finding:
    for name in ("deno", "node", "qjs"):
        if path := shutil.which(name):
            return Finding("ok", "JavaScript runtime", path, "yt-dlp needs one for YouTube")
    return Finding("optional", "JavaScript runtime", "none", "yt-dlp needs one for YouTube: pip install deno")


def _gpu() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("missing", "GPU", "torch is not installed", "pip install 'videofactory[curation]'")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Finding("ok", "GPU", f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory >> 30} GiB")
    return Finding("optional", "GPU", "none", "everything works without; BLIP-2 on a CPU takes seconds per clip")


def _hub() -> Finding:
    advice = "models by name come from the Hugging Face Hub; local directories work without it"
    if os.environ.get("HF_HUB_OFFLINE"):
        return Finding("optional", "Hugging Face Hub", "switched off by HF_HUB_OFFLINE", advice)
    import urllib.error
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310 - the user's own endpoint
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT):  # noqa: S310
            return Finding("ok", "Hugging Face Hub", endpoint, advice)
    except (urllib.error.URLError, OSError, ValueError) as error:
        return Finding("optional", "Hugging Face Hub", f"not reached ({getattr(error, 'reason', error)})", advice)


def _disk() -> Finding:
    usage = shutil.disk_usage(Path.cwd())
    state: Literal["ok", "missing"] = "ok" if usage.free > 5 << 30 else "missing"
    return Finding(state, "disk here", f"{usage.free / 1e9:.0f} GB free", "an hour of kept 720p clips takes 1 to 3 GB")


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available
    state: Literal["ok", "missing"] = "ok" if free > 4 << 30 else "missing"
    return Finding(state, "memory", f"{free / 1e9:.0f} GB available", "Ray takes 30% of it for rows on their way")
