"""Copies of PyTorch tensors between host and GPU, and between GPUs, by the library's engine.

The drop-in for ``Tensor.copy_`` is :func:`cuda_copy_`; the others name their direction. They move
the bytes of a tensor of any dtype and shape. Pageable memory goes through the library's pinned
buffers by several threads, scattered pieces by one kernel or one call of the driver.

Strides: tensors that lie in memory in the same order are one copy, rows with gaps one pitched
copy, everything else a batch of contiguous runs. More than :data:`MOST_PIECES` runs, or runs
shorter than :data:`SHORTEST_PIECE` bytes, are left to ``copy_``, whose own kernels gather them.

Order: the copy follows the work on PyTorch's current stream of the tensors' device (of both
devices, where there are two). It is complete on return; with ``non_blocking`` it is queued on that
stream instead, except that pageable memory is read or written before the return. Where the
library, its copies or a CUDA device is missing, ``copy_`` does the work, and one line in the log
says why.

PyTorch is imported by the first call, not with this module.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Optional, Tuple, Union

from . import _layout
from . import _library as c
from ._errors import LibraryNotFound, TmsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: More contiguous runs than this are not one batch.
MOST_PIECES = 65536

#: Bytes below which a run of several is not worth a piece of its own.
SHORTEST_PIECE = 256

_OLDEST_DRIVER = 12000
_UNSUPPORTED = -6

_log = logging.getLogger("tms_memcache.copies")


def is_cuda_memcpy_available() -> bool:
    """Whether the copies of this module go through the library.

    True if the library is found and has them, and a CUDA driver and a device answer. Never raises;
    initialises the driver like ``torch.cuda.is_available``, and neither makes a context nor
    imports PyTorch. The answer is kept for the life of the process.
    """
    return _why_not() is None


def cuda_copy_(dst: "Tensor", src: "Tensor", non_blocking: bool = False) -> "Tensor":
    """Copies ``src`` into ``dst`` and returns ``dst``: ``dst.copy_(src)``, at the speed of the bus.

    Whatever ``copy_`` does beside moving bytes it does here too, because it is called: converting
    dtypes, broadcasting, recording gradients, resolving conjugate views; tensors that overlap,
    subclasses of ``Tensor``, devices other than CPU and CUDA, and a current stream that is being
    captured. Its errors are then the ones raised.

    Differs in one point: without ``non_blocking`` a copy between GPUs is complete on return too.
    With it, pinned memory must stay unchanged until the stream has passed the copy; it may be
    dropped at once. Raises :class:`TypeError` if an argument is no tensor, :class:`TmsError` if
    the library fails.
    """
    torch = _torch()
    _require_tensor(torch, "dst", dst)
    _require_tensor(torch, "src", src)
    if _compiling(torch) or not _copied(torch, dst, src, non_blocking):
        dst.copy_(src, non_blocking=non_blocking)
    return dst


def cuda_copy_h2d(
    src: "Tensor",
    device: Union["torch.device", str, int, None] = None,
    out: Optional["Tensor"] = None,
    non_blocking: bool = False,
) -> "Tensor":
    """Copies a CPU tensor to a GPU; returns ``out``, or a new tensor on ``device``.

    ``device``: default the current CUDA device. ``out`` has the shape and dtype of ``src``; a new
    tensor has its strides as far as they are dense. ``non_blocking`` as for :func:`cuda_copy_`.
    Raises :class:`TypeError` or :class:`ValueError` that names the argument.
    """
    torch = _torch()
    _require(torch, "src", src, "cpu")
    where = None if device is None and out is not None else _cuda_device(torch, device)
    if out is None:
        out = torch.empty_like(src, device=where, requires_grad=False)
    else:
        _require_same(torch, "out", out, "cuda", src)
        if where is not None and where.index not in (None, out.device.index):
            raise ValueError(f"out must be on {where}, the device asked for, not {out.device}")
    return cuda_copy_(out, src, non_blocking)


def cuda_copy_d2h(
    src: "Tensor",
    out: Optional["Tensor"] = None,
    pin_memory: bool = False,
    non_blocking: bool = False,
) -> "Tensor":
    """Copies a CUDA tensor to the host; returns ``out``, or a new CPU tensor.

    ``out`` has the shape and dtype of ``src``. ``pin_memory`` makes the new tensor pinned, which
    ``non_blocking`` needs to have an effect: synchronise the stream before reading it then.
    Raises :class:`TypeError` or :class:`ValueError` that names the argument.
    """
    torch = _torch()
    _require(torch, "src", src, "cuda")
    if out is None:
        out = torch.empty_like(src, device="cpu", pin_memory=pin_memory, requires_grad=False)
    else:
        _require_same(torch, "out", out, "cpu", src)
        if pin_memory and not out.is_pinned():
            raise ValueError("out must be pinned, as pin_memory asks; leave one of them out")
    return cuda_copy_(out, src, non_blocking)


def cuda_copy_d2d(dst: "Tensor", src: "Tensor", non_blocking: bool = False) -> "Tensor":
    """Copies between CUDA tensors of one GPU or of two; returns ``dst``.

    Between GPUs bytes go directly where one can reach the other, else through pinned memory. Shape
    and dtype must be the same. Raises :class:`TypeError` or :class:`ValueError` that names the
    argument.
    """
    torch = _torch()
    _require(torch, "src", src, "cuda")
    _require_same(torch, "dst", dst, "cuda", src)
    return cuda_copy_(dst, src, non_blocking)


# ------------------------------------------------------------------------------ arguments


def _torch() -> Any:
    import torch

    return torch


def _compiling(torch: Any) -> bool:
    """Whether a compiler traces this code, which knows ``copy_`` and not our calls."""
    is_compiling = getattr(getattr(torch, "compiler", None), "is_compiling", None)
    return is_compiling is not None and is_compiling()


def _require_tensor(torch: Any, name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")


def _require(torch: Any, name: str, tensor: Any, place: str) -> None:
    _require_tensor(torch, name, tensor)
    if tensor.device.type != place:
        raise ValueError(f"{name} must be a {place} tensor, and is on {tensor.device}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, and its layout is {tensor.layout}")


def _require_same(torch: Any, name: str, tensor: Any, place: str, src: Any) -> None:
    _require(torch, name, tensor, place)
    if tensor.dtype != src.dtype:
        raise TypeError(
            f"{name} must have the dtype of src, {src.dtype}, and has {tensor.dtype}; "
            "cuda_copy_ converts"
        )
    if tensor.shape != src.shape:
        raise ValueError(
            f"{name} must have the shape of src, {tuple(src.shape)}, and has "
            f"{tuple(tensor.shape)}; cuda_copy_ broadcasts"
        )


def _cuda_device(torch: Any, device: Any) -> Any:
    if isinstance(device, int):
        return torch.device(f"cuda:{device}")
    where = torch.device("cuda" if device is None else device)
    if where.type != "cuda":
        raise ValueError(f"device must be a CUDA device, and is {where}")
    return where


# ------------------------------------------------------------------------------ availability


@lru_cache(maxsize=None)
def _why_not() -> Optional[str]:
    """Why the library cannot copy for anybody; ``None`` if it can."""
    if os.environ.get("TMS_DEVICE", "").lower() == "host":
        return "TMS_DEVICE is host"
    try:
        library = c.load()
    except LibraryNotFound as error:
        return str(error).splitlines()[0]
    if not c.has_copies():
        return f"{c.library_path()} is older than its copy functions"
    count = ctypes.c_uint32()
    code = library.tms_device_count(ctypes.byref(count))
    if code < 0:
        return c.last_message(code)
    return _why_no_driver()


def _why_no_driver() -> Optional[str]:
    """The library would rather work on host memory than without a driver; that is no copy here."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int()
        code = driver.cuInit(0)
        if code == 0:
            code = driver.cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError) as error:
        return f"there is no CUDA driver: {error}"
    if code != 0:
        return f"the CUDA driver answers {code}"
    if number.value < _OLDEST_DRIVER:
        return f"the CUDA driver is of version {number.value}, older than {_OLDEST_DRIVER}"
    return None


@lru_cache(maxsize=None)
def _why_not_on(index: int) -> Optional[str]:
    """Why the library cannot copy for a device that PyTorch uses; ``None`` if it can."""
    why = _why_not()
    if why is not None:
        return why
    info = c.DeviceInfo()
    info.struct_size = ctypes.sizeof(info)
    code = c.load().tms_device_info(index, ctypes.byref(info))
    if code < 0:
        return c.last_message(code)
    return None if info.kind == c.DEVICE_CUDA else "the library works on host memory"


@lru_cache(maxsize=None)
def _say(why: str) -> None:
    _log.warning("tensors are copied by Tensor.copy_: %s", why)


def _usable(index: int) -> bool:
    why = _why_not_on(index)
    if why is not None:
        _say(why)
    return why is None


def _forget() -> None:
    _why_not.cache_clear()
    _why_not_on.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# ------------------------------------------------------------------------------ copies


def _only_bytes(torch: Any, dst: Any, src: Any) -> bool:
    """Whether ``dst.copy_(src)`` does nothing but move bytes, to or from a GPU."""
    plain = (torch.Tensor, torch.nn.Parameter)
    if type(dst) not in plain or type(src) not in plain:
        return False
    if {dst.device.type, src.device.type} not in ({"cuda"}, {"cuda", "cpu"}):
        return False
    if (dst.dtype, dst.shape, dst.layout) != (src.dtype, src.shape, torch.strided):
        return False
    if src.layout != torch.strided or any(
        special for tensor in (dst, src) for special in (tensor.is_conj(), tensor.is_neg())
    ):
        return False
    if dst.is_quantized or dst.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return not (torch.is_grad_enabled() and (dst.requires_grad or src.requires_grad))


def _capturing(torch: Any, tensor: Any) -> bool:
    if not tensor.is_cuda:
        return False
    with torch.cuda.device(tensor.device):
        return bool(torch.cuda.is_current_stream_capturing())


def _address(tensor: Any) -> int:
    """0 for a tensor without memory: emptied storage, or one that a transform has wrapped."""
    try:
        return int(tensor.data_ptr())
    except RuntimeError:
        return 0


def _copied(torch: Any, dst: Any, src: Any, non_blocking: bool) -> bool:
    """Copies, and says whether it did; ``False`` leaves the work to ``copy_``."""
    if not _only_bytes(torch, dst, src):
        return False
    if dst.numel() == 0 or dst is src:
        return True
    if _capturing(torch, dst) or _capturing(torch, src):
        return False
    if not all(_usable(tensor.device.index) for tensor in (dst, src) if tensor.is_cuda):
        return False
    plan = _Plan.of(torch, dst, src)
    if plan is None:
        return False
    try:
        _move(torch, plan, dst, src, non_blocking)
    except TmsError as error:
        if error.code != _UNSUPPORTED:
            raise
        _say(error.message)
        return False
    increment = getattr(torch.autograd.graph, "increment_version", None)
    if increment is not None and not dst.is_inference():
        increment(dst)
    return True


def _move(torch: Any, plan: "_Plan", dst: Any, src: Any, non_blocking: bool) -> None:
    """Puts the copy into the order of PyTorch's streams."""
    host = next((tensor for tensor in (dst, src) if not tensor.is_cuda), None)
    device = (src if src.is_cuda else dst).device
    stream = torch.cuda.current_stream(device)
    # The other GPU's stream, where the two are not the same.
    other = torch.cuda.current_stream(dst.device) if dst.is_cuda and dst.device != device else None
    if not non_blocking:
        stream.synchronize()
        if other is not None:
            other.synchronize()
        plan.run()
        return
    if other is not None:
        stream.wait_stream(other)
    # The handle 0 means the default stream of whichever device is current.
    with torch.cuda.device(device):
        plan.queue(stream.cuda_stream)
    if other is not None:
        other.wait_stream(stream)
    if host is not None and host.is_pinned():
        _tell_allocator(host, device)


def _tell_allocator(host: Any, device: Any) -> None:
    """Keeps PyTorch from giving pinned memory to somebody else before the stream has passed here.

    Its host allocator knows of copies made by PyTorch only, so it gets to see one, of an element.
    """
    host.detach().as_strided((1,), (1,)).to(device, non_blocking=True)


class _Plan:
    """A copy as the library takes it: one of bytes, of rows, or of a list of pieces."""

    def __init__(self, name: str, arguments: Tuple[Any, ...], keep: Any = None) -> None:
        self._name = name
        self._arguments = arguments
        #: What the arguments point to.
        self._keep = keep

    @classmethod
    def of(cls, torch: Any, dst: Any, src: Any) -> Optional["_Plan"]:
        """``None`` where ``copy_`` does better, or refuses."""
        to, start = _address(dst), _address(src)
        shape, size = dst.shape, dst.element_size()
        to_strides, strides = dst.stride(), src.stride()
        if not to or not start or _layout.overlaps_itself(shape, to_strides):
            return None
        if dst.device == src.device:
            to_end = to + size * _layout.extent(shape, to_strides)
            end = start + size * _layout.extent(shape, strides)
            if to < end and start < to_end:
                return None
        runs = _layout.runs(shape, to_strides, strides)
        width = runs.elements * size
        if not runs.outer:
            return cls("tms_memcpy", (to, start, width))
        if width < SHORTEST_PIECE:
            return None
        rows = runs.outer[0]
        if len(runs.outer) == 1 and min(rows.dst, rows.src) >= runs.elements:
            pitches = (rows.dst * size, rows.src * size)
            return cls("tms_memcpy_2d", (to, pitches[0], start, pitches[1], width, rows.count))
        if runs.count > MOST_PIECES:
            return None
        pieces = _pieces(torch, runs, to, start, size)
        return cls("tms_memcpy_batch", (pieces.data_ptr(), runs.count), pieces)

    def run(self) -> None:
        """Copies and waits; in no order with any stream."""
        c.check(getattr(c.load(), self._name)(None, *self._arguments, None))

    def queue(self, stream: int) -> None:
        """Puts the copy on a stream of the current device."""
        c.check(getattr(c.load(), f"{self._name}_on_stream")(None, *self._arguments, stream))


def _pieces(torch: Any, runs: _layout.Runs, to: int, start: int, size: int) -> Any:
    """The runs as ``tms_copy_t``, three words each, in a CPU tensor."""
    columns = []
    for base, side in ((to, "dst"), (start, "src")):
        places = torch.full((1,), base, dtype=torch.int64, device="cpu")
        for dimension in runs.outer:
            steps = torch.arange(dimension.count, dtype=torch.int64, device="cpu")
            steps = steps * (getattr(dimension, side) * size)
            places = (places.reshape(-1, 1) + steps.reshape(1, -1)).reshape(-1)
        columns.append(places)
    columns.append(torch.full((runs.count,), runs.elements * size, dtype=torch.int64, device="cpu"))
    return torch.stack(columns, 1).contiguous()
