"""A private copy of the package torch_memory_saver, for scripts that try it with different files.

Not for installing anything: that is ``tms_memcache.dropin``, which this uses on the copy.
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from tms_memcache import _library, dropin  # noqa: E402


#: Ends with one line that says what is missing. A process of its own: the caller stays small.
_PROBE = """
import sys
try:
    import numpy
except Exception as error:
    sys.exit(f"numpy cannot be imported by {sys.executable}: {error}; pip install numpy")
try:
    import torch
except Exception as error:
    sys.exit(f"PyTorch cannot be imported by {sys.executable}: {error}; pip install torch")
if not torch.cuda.is_available():
    sys.exit("PyTorch finds no GPU: torch.cuda.is_available() is False")
"""


class PackageMissing(Exception):
    """The package is neither installed nor given."""


class Unready(Exception):
    """The machine has not what the scripts need; the text is one line."""


#: What a script answers with one line and the exit status 2.
PROBLEMS = (
    Unready,
    PackageMissing,
    dropin.DropinError,
    ImportError,
    OSError,
    zipfile.BadZipFile,
)


def check_machine() -> None:
    """Raises :class:`Unready` unless numpy and PyTorch can be imported and there is a GPU."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired as error:
        raise Unready("PyTorch did not say within 300 s whether there is a GPU") from error
    if answer.returncode != 0:
        lines = answer.stderr.strip().splitlines()
        ended = f"importing PyTorch ended with code {answer.returncode}"
        raise Unready(lines[-1] if lines else ended)


def exit_on_sigterm() -> None:
    """Makes SIGTERM an exception, so that temporary folders are removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def copy_package(folder: Path, wheel: Optional[str]) -> Path:
    """Copies the package into ``folder`` (from a wheel, or the installed one); its own files.

    ``wheel`` is a file or a folder that holds one. Returns the package's folder in the copy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / dropin.PACKAGE
    if wheel:
        path = Path(wheel)
        if path.is_dir():
            found = sorted(path.glob("torch_memory_saver-*.whl"))
            if not found:
                raise PackageMissing(f"no torch_memory_saver-*.whl in {path}")
            path = found[-1]
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        return target
    spec = importlib.util.find_spec(dropin.PACKAGE)
    if spec is None or not spec.origin:
        raise PackageMissing(
            f"the package {dropin.PACKAGE} is not installed; install it or give --wheel"
        )
    source = Path(spec.origin).parent
    for information in source.parent.glob(f"{dropin.PACKAGE}-*.dist-info"):
        shutil.copytree(information, folder / information.name)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so*", "__pycache__"))
    for file in dropin.native_files(source):
        kept = file.original if file.is_ours and file.original.exists() else file.path
        inside = file.path.parent == source
        shutil.copyfile(kept, (target if inside else folder) / file.path.name)
    return target


def put_ours(package: Path, library: Optional[str]) -> str:
    """Puts our file into a copy; returns what was done."""
    path = Path(library) if library else _library.find(_library.PRELOAD)
    return dropin.install(package, path.resolve())
