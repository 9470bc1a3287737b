"""Devices, pools, streams and graphs of the stand-in."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Tuple

from .. import _memory
from . import memory  # noqa: F401

TOTAL = 1 << 37


class MemPool:
    def __init__(self, allocator: Any = None) -> None:
        self.pool = _memory.Pool(allocator)

    def __del__(self) -> None:
        self.pool.close()


@contextmanager
def use_mem_pool(pool: MemPool, device: Any = None) -> Iterator[None]:
    stack = _memory.active.__dict__.setdefault("pools", [])
    stack.append(pool.pool)
    try:
        yield
    finally:
        stack.pop()


class Stream:
    #: The handle of the default stream.
    cuda_stream = 0

    def synchronize(self) -> None:
        pass

    def wait_stream(self, other: "Stream") -> None:
        pass


@contextmanager
def stream(_: Stream) -> Iterator[None]:
    yield


@contextmanager
def device(_: Any) -> Iterator[None]:
    yield


class CUDAGraph:
    """Nothing is recorded: ``step`` is set by whoever wants a replay."""

    step: Callable[[], None] = staticmethod(lambda: None)

    def replay(self) -> None:
        self.step()

    def reset(self) -> None:
        pass


@contextmanager
def graph(graph: CUDAGraph, **_: Any) -> Iterator[None]:
    yield


def init() -> None:
    pass


def is_available() -> bool:
    return True


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def current_stream(_: Any = None) -> Stream:
    return Stream()


def is_current_stream_capturing() -> bool:
    return False


def synchronize(_: Any = None) -> None:
    pass


def empty_cache() -> None:
    pass


def _sleep(_: int) -> None:
    pass


def memory_stats() -> Dict[str, int]:
    return {}


class _Stats(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("active_count", ctypes.c_uint64),
        ("active_bytes", ctypes.c_uint64),
        ("paused_count", ctypes.c_uint64),
        ("paused_bytes", ctypes.c_uint64),
        ("backed_bytes", ctypes.c_uint64),
        ("tag", ctypes.c_char * 256),
    ]


def _active_bytes() -> int:
    """What the library under test says that its default saver has on the device."""
    from torch_memory_saver import torch_memory_saver

    library = torch_memory_saver._impl._binary_wrapper.cdll
    saver = ctypes.c_void_p()
    library.tms_saver_default(ctypes.byref(saver))
    entries: List[Any] = (_Stats * 64)()
    for entry in entries:
        entry.struct_size = ctypes.sizeof(_Stats)
    count = ctypes.c_size_t()
    library.tms_saver_stats(saver, entries, ctypes.c_size_t(64), ctypes.byref(count))
    return sum(entry.active_bytes for entry in entries[: count.value])


def mem_get_info(_: int = 0) -> Tuple[int, int]:
    return TOTAL - _active_bytes(), TOTAL


def device_memory_used(_: int = 0) -> int:
    return _active_bytes()
