"""Where the shared library is, and the C declarations of ``tms.h``. Nothing here has a policy."""

from __future__ import annotations

import ctypes
import os
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_int32,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from functools import lru_cache
from pathlib import Path
from typing import List, Optional

from ._errors import LibraryNotFound, TmsError

ABI_VERSION = 1

LIBRARY = "libtms_memcache.so"
PRELOAD = "libtms_preload.so"

REGION_EXPORTABLE = 1
REGION_PEER_ACCESS = 2
REGION_RETAIN = 4
REGION_DISABLED = 8
PAUSE_SKIP_EXPORTED = 1
PAUSE_COPY_ALL = 2
DEVICE_CUDA = 1
DEVICE_CAN_EXPORT = 1
DEVICE_RDMA = 2


class DeviceInfo(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("kind", c_int32),
        ("ordinal", c_uint32),
        ("driver_version", c_uint32),
        ("granularity", c_uint64),
        ("total_bytes", c_uint64),
        ("free_bytes", c_uint64),
        ("flags", c_uint32),
        ("peer_count", c_uint32),
        ("name", c_char * 128),
        ("missing", c_char * 256),
    ]


class RegionOptions(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("tag", c_char_p),
        ("backup", c_char_p),
        ("directory", c_char_p),
    ]


class SaverOptions(Structure):
    _fields_ = [("struct_size", c_uint32), ("flags", c_uint32), ("device", c_char_p)]


class PauseOptions(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("tags", POINTER(c_char_p)),
        ("tag_count", c_size_t),
        ("backup", c_char_p),
    ]


class ResumeOptions(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("tags", POINTER(c_char_p)),
        ("tag_count", c_size_t),
        ("wait_ms", c_uint32),
    ]


class FailureRecord(Structure):
    _fields_ = [
        ("address", c_void_p),
        ("bytes", c_uint64),
        ("status", c_int32),
        ("reserved", c_uint32),
    ]


class ResultRecord(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("reserved", c_uint32),
        ("done_count", c_uint64),
        ("done_bytes", c_uint64),
        ("copied_bytes", c_uint64),
        ("unchanged_count", c_uint64),
        ("failed_count", c_uint64),
        ("shortfall_bytes", c_uint64),
        ("failures", POINTER(FailureRecord)),
        ("failures_capacity", c_size_t),
        ("unchanged_bytes", c_uint64),
    ]


class StatsRecord(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("device", c_int32),
        ("active_count", c_uint64),
        ("active_bytes", c_uint64),
        ("paused_count", c_uint64),
        ("paused_bytes", c_uint64),
        ("backed_bytes", c_uint64),
        ("tag", c_char * 256),
        ("held_bytes", c_uint64),
    ]


class AllocationInfo(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("device", c_int32),
        ("state", c_int32),
        ("flags", c_uint32),
        ("base", c_void_p),
        ("bytes", c_uint64),
        ("requested_bytes", c_uint64),
        ("tag", c_char * 256),
    ]


class PinnedStatsRecord(Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("chunk_count", c_uint32),
        ("pinned_bytes", c_uint64),
        ("used_bytes", c_uint64),
        ("idle_bytes", c_uint64),
        ("adopted_bytes", c_uint64),
        ("high_water_bytes", c_uint64),
        ("limit_bytes", c_uint64),
        ("keep_bytes", c_uint64),
        ("huge_page_bytes", c_uint64),
        ("small_page_bytes", c_uint64),
    ]


LogCallback = CFUNCTYPE(None, c_void_p, c_int32, c_char_p, c_char_p)

_STATUS = c_int32
_SAVER = c_void_p
_OPERATION = c_void_p

_SIGNATURES = {
    "tms_version": (c_char_p, []),
    "tms_abi_version": (c_uint32, []),
    "tms_status_str": (c_char_p, [c_int32]),
    "tms_last_error_message": (c_char_p, []),
    "tms_log_set_callback": (_STATUS, [LogCallback, c_void_p, c_int32]),
    "tms_log_flush": (_STATUS, [c_uint32]),
    "tms_shutdown": (_STATUS, []),
    "tms_device_count": (_STATUS, [POINTER(c_uint32)]),
    "tms_device_info": (_STATUS, [c_int32, POINTER(DeviceInfo)]),
    "tms_region_push": (_STATUS, [POINTER(RegionOptions)]),
    "tms_region_pop": (_STATUS, []),
    "tms_saver_create": (_STATUS, [POINTER(SaverOptions), POINTER(_SAVER)]),
    "tms_saver_default": (_STATUS, [POINTER(_SAVER)]),
    "tms_saver_free": (_STATUS, [_SAVER]),
    "tms_saver_malloc": (
        _STATUS,
        [_SAVER, c_size_t, c_int32, POINTER(RegionOptions), POINTER(c_void_p)],
    ),
    "tms_saver_free_memory": (_STATUS, [_SAVER, c_void_p]),
    "tms_saver_pause": (_STATUS, [_SAVER, POINTER(PauseOptions), POINTER(ResultRecord)]),
    "tms_saver_resume": (_STATUS, [_SAVER, POINTER(ResumeOptions), POINTER(ResultRecord)]),
    "tms_saver_pause_async": (_STATUS, [_SAVER, POINTER(PauseOptions), POINTER(_OPERATION)]),
    "tms_saver_resume_async": (_STATUS, [_SAVER, POINTER(ResumeOptions), POINTER(_OPERATION)]),
    "tms_op_poll": (_STATUS, [_OPERATION, POINTER(c_int32)]),
    "tms_op_wait": (_STATUS, [_OPERATION, c_uint64]),
    "tms_op_progress": (_STATUS, [_OPERATION, POINTER(c_uint64), POINTER(c_uint64)]),
    "tms_op_result": (_STATUS, [_OPERATION, POINTER(ResultRecord)]),
    "tms_op_eventfd": (_STATUS, [_OPERATION, POINTER(c_int32)]),
    "tms_op_free": (_STATUS, [_OPERATION]),
    "tms_saver_stats": (_STATUS, [_SAVER, POINTER(StatsRecord), c_size_t, POINTER(c_size_t)]),
    "tms_saver_query": (_STATUS, [_SAVER, c_void_p, POINTER(AllocationInfo)]),
    "tms_saver_backup_pointer": (_STATUS, [_SAVER, c_void_p, c_size_t, POINTER(c_void_p)]),
    "tms_saver_set_memory_margin": (_STATUS, [_SAVER, c_int32, c_uint64]),
    "tms_saver_export": (_STATUS, [_SAVER, c_void_p, POINTER(c_int32), POINTER(c_uint64)]),
}

#: Functions that a library of this ABI version may lack, because it is older.
_LATER = {
    "tms_saver_prewarm": (_STATUS, [_SAVER, c_int32, c_uint64]),
    "tms_saver_prewarm_async": (_STATUS, [_SAVER, c_int32, c_uint64, POINTER(_OPERATION)]),
    "tms_saver_trim": (_STATUS, [_SAVER, c_uint64, POINTER(c_uint64)]),
    "tms_saver_pinned_stats": (_STATUS, [_SAVER, POINTER(PinnedStatsRecord)]),
    "tms_saver_resume_ordered_async": (
        _STATUS,
        [_SAVER, POINTER(c_void_p), c_size_t, POINTER(ResumeOptions), POINTER(_OPERATION)],
    ),
    "tms_op_stream_wait": (_STATUS, [_OPERATION, c_void_p, c_void_p]),
    "tms_op_ready": (_STATUS, [_OPERATION, c_void_p, POINTER(c_int32)]),
}

_ENGINE = c_void_p
_CERTAIN = POINTER(c_uint64)
_BYTES = [_ENGINE, c_void_p, c_void_p, c_size_t]
_ROWS = [_ENGINE, c_void_p, c_size_t, c_void_p, c_size_t, c_size_t, c_size_t]
_PIECES = [_ENGINE, c_void_p, c_size_t]

#: The explicit copies, which an older library may lack too.
_COPIES = {
    "tms_memcpy": (_STATUS, [*_BYTES, _CERTAIN]),
    "tms_memcpy_on_stream": (_STATUS, [*_BYTES, c_void_p]),
    "tms_memcpy_2d": (_STATUS, [*_ROWS, _CERTAIN]),
    "tms_memcpy_2d_on_stream": (_STATUS, [*_ROWS, c_void_p]),
    "tms_memcpy_batch": (_STATUS, [*_PIECES, _CERTAIN]),
    "tms_memcpy_batch_on_stream": (_STATUS, [*_PIECES, c_void_p]),
}


def candidates(name: str = LIBRARY) -> List[Path]:
    """Where ``name`` is looked for, best first. The files need not exist."""
    package = Path(__file__).resolve().parent
    places = []
    if name == LIBRARY and os.environ.get("TMS_LIBRARY"):
        places.append(Path(os.environ["TMS_LIBRARY"]))
    if name == PRELOAD and os.environ.get("TMS_PRELOAD_LIBRARY"):
        places.append(Path(os.environ["TMS_PRELOAD_LIBRARY"]))
    places.append(package / "lib" / name)
    folder = "examples" if name == PRELOAD else ""
    targets = [Path(os.environ["CARGO_TARGET_DIR"])] if os.environ.get("CARGO_TARGET_DIR") else []
    # examples/python/src/tms_memcache of a checkout: four folders up is its root.
    if len(package.parents) >= 4 and (package.parents[3] / "Cargo.toml").is_file():
        targets.append(package.parents[3] / "target")
    for target in targets:
        places += [target / "release" / folder / name, target / "debug" / folder / name]
    return places


def find(name: str = LIBRARY) -> Path:
    """The first of :func:`candidates` that exists."""
    places = candidates(name)
    variable = "TMS_LIBRARY" if name == LIBRARY else "TMS_PRELOAD_LIBRARY"
    if os.environ.get(variable) and not places[0].is_file():
        raise LibraryNotFound(f"{variable} names {places[0]}, which is not a file")
    for place in places:
        if place.is_file():
            return place
    looked = "".join(f"\n  {place}" for place in places)
    raise LibraryNotFound(
        f"{name} is not there. Build it with `cargo build --release --all-targets`, or let "
        f"{variable} name the file; an installed package does not know the repository: set "
        f"{variable} or use pip install -e. Looked for:{looked}"
    )


@lru_cache(maxsize=None)
def load() -> ctypes.CDLL:
    """The library, loaded once, with every signature declared."""
    path = find()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryNotFound(f"{path} cannot be loaded: {error}") from error
    for name, (result, arguments) in _SIGNATURES.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise LibraryNotFound(f"{path} has no {name}: it is not a {LIBRARY}") from error
        function.restype = result
        function.argtypes = arguments
    for name, (result, arguments) in {**_LATER, **_COPIES}.items():
        if hasattr(library, name):
            getattr(library, name).restype = result
            getattr(library, name).argtypes = arguments
    found = library.tms_abi_version()
    if found != ABI_VERSION:
        raise LibraryNotFound(f"{path} has ABI version {found}, this binding needs {ABI_VERSION}")
    return library


def has_copies() -> bool:
    """Whether the loaded library has the explicit copies."""
    return all(hasattr(load(), name) for name in _COPIES)


def library_path() -> str:
    """The file that is, or would be, loaded."""
    return str(find())


def version() -> str:
    """Version of the loaded library, for example ``"0.1.0"``."""
    return bytes(load().tms_version()).decode()


def last_message(code: int) -> str:
    """The thread's last error text, or the code's own description."""
    library = load()
    text = library.tms_last_error_message() or library.tms_status_str(code) or b""
    return bytes(text).decode(errors="replace")


def check(code: int) -> int:
    """The code if it is no failure, otherwise :class:`TmsError`."""
    if code < 0:
        raise TmsError(code, last_message(code))
    return code


def encode(text: Optional[str]) -> Optional[bytes]:
    """UTF-8 for C; refuses a NUL in the middle, which C would cut off."""
    if text is None:
        return None
    data = os.fsencode(text)
    if b"\0" in data:
        raise ValueError(f"{text!r} contains a NUL character")
    return data
