"""Puts our file into a Python environment's package ``torch_memory_saver``, and takes it out again.

    python -m tms_memcache.dropin install|status|restore [--env DIR | --python FILE | --package DIR]

The package loads one native file by its name. ``install`` keeps each of those files as
``NAME.orig`` and puts ``libtms_preload.so`` under its name; ``restore`` undoes that, and after
``pip uninstall`` removes what was left. The package's Python code is not touched. A running process
keeps the file that it has loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from . import _library
from ._errors import LibraryNotFound

PACKAGE = "torch_memory_saver"
RECORD = "torch_memory_saver_dropin.json"

#: The version of the package that our file stands in for.
SUPPORTED = "0.0.10"

#: The names that the package looks for, whatever it was built for.
_NAME = re.compile(r"torch_memory_saver_hook_mode_(preload|torch)(_cu\d+)?\.[\w.\-]*so")

#: A symbol that only our library has.
_MARK = b"\0tms_saver_create\0"

_PROBE_LIBRARY = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
for name in ("cudaMalloc", "cudaFree", "tms_pause", "tms_torch_malloc", "tms_saver_create"):
    getattr(library, name)
library.tms_version.restype = ctypes.c_char_p
print(library.tms_version().decode())
"""

_PROBE_PACKAGE = """
import importlib.util, json, os, sys
spec = importlib.util.find_spec("torch_memory_saver")
names = ("site-packages", "dist-packages")
folders = [folder for folder in sys.path if os.path.basename(folder) in names]
print(json.dumps({"origin": spec.origin if spec else None, "folders": folders}))
"""


class DropinError(Exception):
    """The user must do something; the text says what."""


@dataclass(frozen=True)
class NativeFile:
    """One native file of the package."""

    path: Path

    @property
    def original(self) -> Path:
        return self.path.with_name(self.path.name + ".orig")

    @property
    def is_ours(self) -> bool:
        return _MARK in self.path.read_bytes()

    @property
    def state(self) -> str:
        """``ours``, ``original``, or ``reinstalled``: the package came anew over our file."""
        if self.is_ours:
            return "ours"
        return "reinstalled" if self.original.exists() else "original"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def package_version(package: Path) -> Optional[str]:
    """What the package's dist-info says, ``None`` without one."""
    versions = set()
    for metadata in package.parent.glob(f"{PACKAGE}-*.dist-info/METADATA"):
        found = re.search(r"^Version: *(\S+)", metadata.read_text(errors="replace"), re.MULTILINE)
        if found:
            versions.add(found.group(1))
    return " and ".join(sorted(versions)) or None


def _check_version(package: Path) -> None:
    version = package_version(package)
    if version != SUPPORTED:
        found = f"is version {version}" if version else "has no dist-info that tells its version"
        raise DropinError(
            f"{PACKAGE} in {package.parent} {found}; our file stands in for {SUPPORTED}: "
            f"`pip install {PACKAGE}=={SUPPORTED}`, or install with --force"
        )


def _probe(python: str) -> Tuple[Optional[Path], List[Path]]:
    """Where ``python`` would import the package from, and its folders of installed packages."""
    try:
        answer = subprocess.run(
            [python, "-c", _PROBE_PACKAGE], capture_output=True, text=True, timeout=60
        )
    except OSError as error:
        raise DropinError(f"{python} cannot be run: {error}") from error
    if answer.returncode != 0:
        raise DropinError(f"{python} failed: {answer.stderr.strip()}")
    found = json.loads(answer.stdout)
    package = Path(found["origin"]).parent if found["origin"] else None
    return package, [Path(folder) for folder in found["folders"]]


def leftover_folders(folders: List[Path]) -> List[Path]:
    """Of folders of installed packages: those where a record of ours lies."""
    places = [place for folder in folders for place in (folder, folder / PACKAGE)]
    return [place for place in dict.fromkeys(places) if (place / RECORD).is_file()]


def _not_installed(where: str, leftovers: List[Path]) -> DropinError:
    text = f"the package {PACKAGE} is not installed {where}; "
    text += f"install it with `pip install {PACKAGE}=={SUPPORTED}`"
    if leftovers:
        text += f"; `restore` removes what an earlier install left in {leftovers[0]}"
    return DropinError(text)


def native_files(package: Path) -> List[NativeFile]:
    """The package's native files: in its folder, or else in the one above, as it searches."""
    if not (package / "__init__.py").is_file():
        raise _not_installed(f"in {package}", leftover_folders([package.parent]))
    for folder in (package, package.parent):
        names = sorted(entry.name for entry in folder.iterdir() if _NAME.fullmatch(entry.name))
        if names:
            return [NativeFile(folder / name) for name in names]
    raise DropinError(
        f"no file torch_memory_saver_hook_mode_*.so is in {package} or {package.parent}; "
        f"install {PACKAGE} anew"
    )


def _check_library(library: Path) -> str:
    """The version of our library; refuses a file that does not load or is something else."""
    answer = subprocess.run(
        [sys.executable, "-c", _PROBE_LIBRARY, str(library)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if answer.returncode != 0:
        lines = answer.stderr.strip().splitlines()
        raise DropinError(
            f"{library} is not a usable libtms_preload.so: {lines[-1] if lines else 'it crashed'}"
        )
    return answer.stdout.strip()


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DropinError(
            f"no permission to write to {folder}; run this as the user who owns the environment"
        )


def _put(source: Path, target: Path) -> None:
    """Copies by renaming, so that whoever has the old file open keeps it."""
    descriptor, name = tempfile.mkstemp(prefix=target.name + ".", dir=target.parent)
    os.close(descriptor)
    try:
        shutil.copyfile(source, name)
        os.chmod(name, 0o755)
        os.replace(name, target)
    except OSError:
        os.unlink(name)
        raise


def _read_record(folder: Path) -> Dict[str, Dict[str, str]]:
    try:
        files = json.loads((folder / RECORD).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return files if isinstance(files, dict) else {}


def _write_record(folder: Path, version: str, files: Dict[str, Dict[str, str]]) -> None:
    text = json.dumps({"version": version, "files": files}, indent=2)
    (folder / RECORD).write_text(text + "\n")


def install(package: Path, library: Path, force: bool = False) -> str:
    """Returns what was done, one line. ``force``: whatever the version of the package."""
    files = native_files(package)
    if not force:
        _check_version(package)
    folder = files[0].path.parent
    _check_writable(folder)
    version = _check_library(library)
    wanted = sha256(library)
    if all(sha256(file.path) == wanted for file in files):
        return f"already installed: {len(files)} files in {folder} are {version} ({wanted[:12]})"
    record = _read_record(folder)
    for file in files:
        if not file.is_ours:
            _put(file.path, file.original)
        elif not file.original.exists():
            raise DropinError(
                f"{file.path} is ours but its original is gone; install {PACKAGE} anew first"
            )
        record[file.path.name] = {"original": sha256(file.original), "installed": wanted}
    # The originals are recorded before the first file changes.
    _write_record(folder, version, record)
    for file in files:
        _put(library, file.path)
    return f"installed {version} ({wanted[:12]}) as {len(files)} files in {folder}"


def restore(package: Path) -> str:
    """Returns what was done, one line."""
    files = native_files(package)
    folder = files[0].path.parent
    ours = [file for file in files if file.is_ours]
    stale = [file for file in files if not file.is_ours and file.original.exists()]
    record = _read_record(folder)
    # Names that the package no longer has.
    gone = [NativeFile(folder / name) for name in record if _NAME.fullmatch(name)]
    stale += [file for file in gone if file.original.exists() and not file.path.exists()]
    if not ours and not stale:
        return f"nothing to restore: {folder} has the package's own files"
    _check_writable(folder)
    for file in ours:
        if not file.original.exists():
            raise DropinError(f"{file.original} is gone; install {PACKAGE} anew")
        expected = record.get(file.path.name, {}).get("original")
        if expected and expected != sha256(file.original):
            raise DropinError(
                f"{file.original} is not the file that was kept (recorded {expected[:12]}); "
                f"install {PACKAGE} anew"
            )
    for file in ours:
        os.replace(file.original, file.path)
    # The package was installed anew over these: what was kept is out of date.
    for file in stale:
        file.original.unlink()
    if (folder / RECORD).exists():
        (folder / RECORD).unlink()
    return f"restored {len(ours)} files in {folder}"


def remove_leftovers(folder: Path) -> str:
    """Removes the record and the kept originals of a package that is gone; says so in one line.

    A file of ours that is still in place gives way to its original.
    """
    _check_writable(folder)
    count = 1
    for name in _read_record(folder):
        file = NativeFile(folder / name)
        if not _NAME.fullmatch(name) or not file.original.is_file():
            continue
        if file.path.is_file() and file.is_ours:
            os.replace(file.original, file.path)
        else:
            file.original.unlink()
        count += 1
    (folder / RECORD).unlink()
    if folder.name == PACKAGE and not any(folder.iterdir()):
        folder.rmdir()
    return f"removed {count} leftover files from {folder}; {PACKAGE} is not installed"


def status(package: Path) -> Dict[str, object]:
    """Which file is active, as plain data."""
    files = native_files(package)
    states = [file.state for file in files]
    active = "ours" if all(state == "ours" for state in states) else "original"
    if "ours" in states and active != "ours":
        active = "mixed"
    return {
        "package": str(package),
        "version": package_version(package),
        "active": active,
        "overwritten": "reinstalled" in states,
        "files": [
            {"name": file.path.name, "state": state, "sha256": sha256(file.path)}
            for file, state in zip(files, states)
        ],
    }


def _print_status(found: Dict[str, object]) -> None:
    hint = " (ours was overwritten; run install again)" if found["overwritten"] else ""
    version = found["version"] or "of unknown version"
    print(f"{PACKAGE} {version} in {found['package']}: {found['active']}{hint}")
    for file in found["files"]:  # type: ignore[attr-defined]
        print(f"  {file['state']:12} {file['sha256'][:12]}  {file['name']}")


def _environment_python(folder: str) -> str:
    python = Path(folder) / "bin" / "python"
    if not python.exists():
        raise DropinError(f"{folder} is not a Python environment: {python} does not exist")
    return str(python)


def _parse(arguments: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tms_memcache.dropin",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("action", choices=["install", "status", "restore"])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--env", metavar="DIR", help="a virtual environment")
    where.add_argument("--python", metavar="FILE", help="an interpreter (default: this one)")
    where.add_argument("--package", metavar="DIR", help=f"the folder {PACKAGE} itself")
    parser.add_argument("--library", metavar="FILE", help="our libtms_preload.so")
    parser.add_argument(
        "--force", action="store_true", help=f"install into another version than {SUPPORTED}"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> None:
    if options.package:
        place = Path(options.package).resolve()
        where = f"in {place}"
        package = place if (place / "__init__.py").is_file() else None
        folders = [place.parent]
    else:
        python = options.python or sys.executable
        if options.env:
            python = _environment_python(options.env)
        where = f"for {python}"
        package, folders = _probe(python)
    if package is None:
        leftovers = leftover_folders(folders)
        if options.action != "restore" or not leftovers:
            raise _not_installed(where, leftovers)
        removed = "; ".join(remove_leftovers(folder) for folder in leftovers)
        gone = {"message": removed, "package": None, "active": None}
        print(json.dumps({**gone, "files": []}) if options.json else removed)
        return
    message: Optional[str] = None
    if options.action == "install":
        if options.library and not Path(options.library).is_file():
            raise DropinError(f"{options.library} is not a file")
        library = Path(options.library or _library.find(_library.PRELOAD)).resolve()
        message = install(package, library, options.force)
    elif options.action == "restore":
        message = restore(package)
    found = status(package)
    if options.json:
        print(json.dumps({"message": message, **found}))
    elif message:
        print(message)
    else:
        _print_status(found)


def main(arguments: Optional[List[str]] = None) -> int:
    """The command; returns the exit status."""
    options = _parse(arguments)
    try:
        _run(options)
    except (DropinError, LibraryNotFound) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
