"""Pools and blocks, as the caching allocator of PyTorch handles them with ``MemPool``.

A block goes back to its pool when the tensor dies, and to its allocator when the pool dies. The
allocator is the pluggable one, else a preloaded ``cudaMalloc``, else ordinary memory.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

ROUND = 2 << 20
active = threading.local()


class OutOfMemoryError(RuntimeError):
    pass


class Preloaded:
    """``cudaMalloc`` of a preloaded library, ``None`` without one."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self.functions = None
        if hasattr(library, "cudaMalloc"):
            library.cudaMalloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
            library.cudaFree.argtypes = [ctypes.c_void_p]
            self.functions = library

    def malloc(self, size: int) -> int:
        out = ctypes.c_void_p()
        if self.functions.cudaMalloc(ctypes.byref(out), size) != 0:
            return 0
        return out.value or 0

    def free(self, address: int, size: int) -> None:
        code = self.functions.cudaFree(address)
        if code != 0:
            raise RuntimeError(f"cudaFree returned {code}")


class Ordinary:
    """Memory outside every library."""

    def __init__(self) -> None:
        self.blocks: Dict[int, mmap.mmap] = {}

    def malloc(self, size: int) -> int:
        block = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(block))
        self.blocks[address] = block
        return address

    def free(self, address: int, size: int) -> None:
        self.blocks.pop(address)


_preloaded = Preloaded()
_default: Any = _preloaded if _preloaded.functions else Ordinary()


class Pool:
    """Blocks of one allocator."""

    def __init__(self, allocator: Any) -> None:
        self.allocator = allocator or _default
        self.cached: List[Tuple[int, int]] = []
        self.closed = False

    def take(self, size: int) -> int:
        for index, (address, length) in enumerate(self.cached):
            if length == size:
                del self.cached[index]
                return address
        address = self.allocator.malloc(size)
        if not address:
            raise OutOfMemoryError(f"{size} bytes")
        return address

    def give(self, address: int, size: int) -> None:
        if self.closed:
            self.allocator.free(address, size)
        else:
            self.cached.append((address, size))

    def close(self) -> None:
        self.closed = True
        while self.cached:
            self.allocator.free(*self.cached.pop())


_default_pool: Optional[Pool] = None


def current_pool() -> Pool:
    """The thread's pool; outside pools each block goes back at once."""
    global _default_pool
    stack = getattr(active, "pools", [])
    if stack:
        return stack[-1]
    if _default_pool is None:
        _default_pool = Pool(None)
        _default_pool.closed = True
    return _default_pool


class Storage:
    """One block, over the life of its tensors."""

    def __init__(self, size: int) -> None:
        self.size = max(ROUND, -(-size // ROUND) * ROUND)
        self.pool = current_pool()
        self.address = self.pool.take(self.size)
        block = (ctypes.c_ubyte * size).from_address(self.address)
        self.array = np.frombuffer(block, dtype=np.uint8)

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self.pool.give(self.address, self.size)
