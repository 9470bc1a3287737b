"""The pluggable allocator: two functions of a shared library, looked up by name."""

from __future__ import annotations

import ctypes


class CUDAPluggableAllocator:
    def __init__(self, path: str, malloc: str, free: str) -> None:
        library = ctypes.CDLL(path)
        self._malloc = getattr(library, malloc)
        self._malloc.restype = ctypes.c_void_p
        self._malloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
        self._free = getattr(library, free)
        self._free.restype = None
        self._free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]

    def allocator(self) -> "CUDAPluggableAllocator":
        return self

    def malloc(self, size: int) -> int:
        return self._malloc(size, 0, None) or 0

    def free(self, address: int, size: int) -> None:
        self._free(address, size, 0, None)
