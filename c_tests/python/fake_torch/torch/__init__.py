"""A PyTorch without CUDA: just enough of it to run the package torch_memory_saver and the scripts
of examples/python on the host device. A tensor is a numpy array over memory that the library under
test, or numpy, has allocated; streams and graphs do their work at once.
"""

from __future__ import annotations

from typing import Any, Optional, Tuple

import numpy as np

from . import version  # noqa: F401
from ._memory import OutOfMemoryError, Storage  # noqa: F401

uint8, int64, float32 = np.dtype("u1"), np.dtype("i8"), np.dtype("f4")


class device:
    def __init__(self, name: str) -> None:
        self.type = name.split(":")[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, device) and other.type == self.type


class Tensor:
    def __init__(self, array: np.ndarray, place: str, storage: Optional[Storage] = None) -> None:
        self.array = array
        self.place = place.split(":")[0]
        self.storage = storage

    def _like(self, array: np.ndarray) -> "Tensor":
        return Tensor(array, self.place, self.storage)

    def _fresh(self, array: np.ndarray) -> "Tensor":
        result = empty(*array.shape, dtype=array.dtype, device=self.place)
        result.array[...] = array
        return result

    device = property(lambda self: device(self.place))
    dtype = property(lambda self: self.array.dtype)
    shape = property(lambda self: self.array.shape)
    nbytes = property(lambda self: self.array.nbytes)
    is_cuda = property(lambda self: self.place == "cuda")
    is_xpu = False

    def is_contiguous(self) -> bool:
        return bool(self.array.flags.c_contiguous)

    def stride(self) -> Tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def data_ptr(self) -> int:
        return int(self.array.__array_interface__["data"][0])

    def view(self, *what: Any) -> "Tensor":
        if isinstance(what[0], np.dtype):
            return self._like(self.array.view(what[0]))
        shape = what[0] if isinstance(what[0], tuple) else what
        return self._like(self.array.reshape(shape))

    def clone(self) -> "Tensor":
        return self._fresh(self.array)

    def cpu(self) -> "Tensor":
        return Tensor(self.array.copy(), "cpu")

    def float(self) -> "Tensor":
        return self._fresh(self.array.astype(float32))

    def copy_(self, other: "Tensor", non_blocking: bool = False) -> "Tensor":
        self.array[...] = other.array
        return self

    def fill_(self, value: float) -> "Tensor":
        self.array[...] = value
        return self

    def add_(self, value: float) -> "Tensor":
        self.array += self.array.dtype.type(value)
        return self

    def mul_(self, value: float) -> "Tensor":
        self.array *= self.array.dtype.type(value)
        return self

    def normal_(self) -> "Tensor":
        self.array[...] = np.random.standard_normal(self.array.shape)
        return self

    def random_(self) -> "Tensor":
        self.array[...] = np.frombuffer(np.random.bytes(self.nbytes), self.array.dtype)
        return self

    def mean(self) -> np.ndarray:
        return self.array.mean()

    def min(self) -> np.ndarray:
        return self.array.min()

    def max(self) -> np.ndarray:
        return self.array.max()

    def sum(self) -> np.ndarray:
        return self.array.sum()

    def sin(self) -> "Tensor":
        return self._fresh(np.sin(self.array))

    def __getitem__(self, index: Any) -> "Tensor":
        return self._like(self.array[index])

    def __eq__(self, other: Any) -> "Tensor":  # type: ignore[override]
        return Tensor(self.array == other.array, "cpu")

    def __mul__(self, other: Any) -> "Tensor":
        return self._fresh(self.array * getattr(other, "array", other))

    def __add__(self, other: Any) -> "Tensor":
        return self._fresh(self.array + getattr(other, "array", other))


def empty(*shape: Any, dtype: Any = float32, device: str = "cpu", **_: Any) -> Tensor:
    if device.startswith("cuda"):
        storage = Storage(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return Tensor(storage.array.view(dtype).reshape(shape), device, storage)
    return Tensor(np.empty(shape, dtype), "cpu")


def randint(low: int, high: int, shape: Tuple[int, ...], dtype: Any, device: str) -> Tensor:
    result = empty(*shape, dtype=dtype, device=device)
    if (low, high) != (0, 256):
        raise NotImplementedError
    return result.random_()


def randn(*shape: int, device: str) -> Tensor:
    return empty(*shape, device=device).normal_()


def arange(low: int, high: int, dtype: Any, device: str) -> Tensor:
    result = empty(high - low, dtype=dtype, device=device)
    result.array[...] = np.arange(low, high)
    return result


def from_numpy(array: np.ndarray) -> Tensor:
    return Tensor(array, "cpu")


def equal(left: Tensor, right: Tensor) -> bool:
    return bool(np.array_equal(left.array, right.array))


def allclose(left: Tensor, right: Tensor, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    return bool(np.allclose(left.array, right.array, rtol, atol))


def mm(left: Tensor, right: Tensor, out: Optional[Tensor] = None) -> Tensor:
    product = left.array @ right.array
    return out.copy_(Tensor(product, "cpu")) if out is not None else left._fresh(product)


def get_device_module() -> Any:
    return cuda


from . import cuda  # noqa: E402
