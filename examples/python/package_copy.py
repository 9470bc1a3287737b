"""A private copy of the package torch_memory_saver, for scripts that try it with different files.

Not for installing anything: that is ``tms_memcache.dropin``, which this uses on the copy.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from tms_memcache import _library, dropin  # noqa: E402


class PackageMissing(Exception):
    """The package is neither installed nor given."""


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
