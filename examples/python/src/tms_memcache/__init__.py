"""Pause and resume GPU memory: the Python binding of ``libtms_memcache.so``.

Regions are per thread and say how memory allocated in them is kept; a :class:`Saver` allocates,
pauses and resumes. :func:`cuda_copy_` and its kin copy PyTorch tensors. Every failure is a
:class:`TmsError` with the library's own message.
"""

from ._errors import LibraryNotFound, TmsError
from ._library import library_path, version
from .copies import (
    cuda_copy_,
    cuda_copy_d2d,
    cuda_copy_d2h,
    cuda_copy_h2d,
    is_cuda_memcpy_available,
)
from .logs import forward_logs, stop_forwarding_logs
from .saver import (
    Allocation,
    Device,
    Failure,
    Operation,
    OrderedResume,
    PinnedStats,
    Result,
    Saver,
    State,
    Stats,
    device_count,
    device_info,
    region,
    shutdown,
)

__version__ = "0.1.0"

__all__ = [
    "Allocation",
    "Device",
    "Failure",
    "LibraryNotFound",
    "Operation",
    "OrderedResume",
    "PinnedStats",
    "Result",
    "Saver",
    "State",
    "Stats",
    "TmsError",
    "cuda_copy_",
    "cuda_copy_d2d",
    "cuda_copy_d2h",
    "cuda_copy_h2d",
    "device_count",
    "device_info",
    "forward_logs",
    "is_cuda_memcpy_available",
    "library_path",
    "region",
    "shutdown",
    "stop_forwarding_logs",
    "version",
]
