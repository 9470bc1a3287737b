"""Pause and resume GPU memory: the Python binding of ``libtms_memcache.so``.

Regions are per thread and say how memory allocated in them is kept; a :class:`Saver` allocates,
pauses and resumes. Every failure is a :class:`TmsError` with the library's own message.
"""

from ._errors import LibraryNotFound, TmsError
from ._library import library_path, version
from .logs import forward_logs, stop_forwarding_logs
from .saver import (
    Allocation,
    Device,
    Failure,
    Operation,
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
    "Result",
    "Saver",
    "State",
    "Stats",
    "TmsError",
    "device_count",
    "device_info",
    "forward_logs",
    "library_path",
    "region",
    "shutdown",
    "stop_forwarding_logs",
    "version",
]
