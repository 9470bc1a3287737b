"""A PyTorch without CUDA: just enough of it to run the package torch_memory_saver and the scripts
of examples/python on the host device. A tensor is a numpy array over memory that the library under
test, or numpy, has allocated; streams and graphs do their work at once.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator, List, Optional, Tuple

import numpy as np

from . import version  # noqa: F401
from ._memory import OutOfMemoryError, Storage  # noqa: F401

uint8, int64, float32 = np.dtype("u1"), np.dtype("i8"), np.dtype("f4")
strided = "strided"


class device:
    def __init__(self, name: Any) -> None:
        self.type, _, index = str(name).partition(":")
        self.index = int(index) if index else None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, device) and str(other) == str(self)


class Tensor:
    layout = strided
    is_quantized = False
    requires_grad = False
    #: Counts changes in place; copies that PyTorch made; whether the host memory is pinned.
    version = copies = 0
    pinned = False

    def __init__(self, array: np.ndarray, place: Any, storage: Optional[Storage] = None) -> None:
        self.array = array
        self.place = "cuda:0" if str(place) == "cuda" else str(place)
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
    is_cuda = property(lambda self: self.place.startswith("cuda"))
    is_xpu = False

    def is_contiguous(self) -> bool:
        return bool(self.array.flags.c_contiguous)

    def stride(self) -> Tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def numel(self) -> int:
        return int(self.array.size)

    def element_size(self) -> int:
        return int(self.array.itemsize)

    def is_conj(self) -> bool:
        return False

    def is_neg(self) -> bool:
        return False

    def is_inference(self) -> bool:
        return False

    def is_pinned(self) -> bool:
        return self.pinned

    def detach(self) -> "Tensor":
        return self._like(self.array)

    def contiguous(self) -> "Tensor":
        return self if self.is_contiguous() else self._fresh(self.array)

    def reshape(self, *shape: int) -> "Tensor":
        return self._like(self.array.reshape(shape))

    def as_strided(self, size: Tuple[int, ...], stride: Tuple[int, ...]) -> "Tensor":
        steps = tuple(step * self.array.itemsize for step in stride)
        return self._like(np.lib.stride_tricks.as_strided(self.array, size, steps))

    def to(self, place: Any, non_blocking: bool = False) -> "Tensor":
        told.append(self.data_ptr())
        return empty(*self.shape, dtype=self.dtype, device=str(place)).copy_(self)

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
        self.copies += 1
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


#: Addresses of memory whose copies PyTorch's allocator was told of.
told: List[int] = []


class nn:
    class Parameter(Tensor):
        pass


class autograd:
    class graph:
        @staticmethod
        def increment_version(tensor: Tensor) -> None:
            tensor.version += 1


grad_enabled = False


def is_grad_enabled() -> bool:
    return grad_enabled


@contextmanager
def enable_grad() -> Iterator[None]:
    global grad_enabled
    grad_enabled = True
    try:
        yield
    finally:
        grad_enabled = False


def is_inference_mode_enabled() -> bool:
    return False


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


def empty_like(like: Tensor, device: Any, pin_memory: bool = False, **_: Any) -> Tensor:
    result = empty(*like.shape, dtype=like.dtype, device=str(device))
    result.pinned = pin_memory
    return result


def full(shape: Tuple[int, ...], value: Any, dtype: Any, device: str) -> Tensor:
    result = empty(*shape, dtype=dtype, device=device)
    result.array[...] = value
    return result


def stack(tensors: List[Tensor], dim: int) -> Tensor:
    return Tensor(np.stack([tensor.array for tensor in tensors], dim), "cpu")


def arange(low: int, high: Optional[int] = None, *, dtype: Any, device: str) -> Tensor:
    if high is None:
        low, high = 0, low
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
