"""The library's log records as records of Python's :mod:`logging`."""

from __future__ import annotations

import atexit
import logging
from typing import Any, Optional

from ._library import LogCallback, check, load

_TO_PYTHON = {1: logging.ERROR, 2: logging.WARNING, 3: logging.INFO, 4: logging.DEBUG}

#: The callback that C holds; it must outlive its registration.
_callback: Optional[Any] = None


def _native_level(level: int) -> int:
    """The most talkative level of the library that ``level`` still lets through."""
    return max([native for native, python in _TO_PYTHON.items() if python >= level], default=1)


def forward_logs(
    level: int = logging.INFO, logger: Optional[logging.Logger] = None
) -> logging.Logger:
    """Sends records from ``level`` on to ``logger`` (default: the logger ``tms_memcache``).

    A record's logger is a child of it named after the library's module. Calling again replaces
    the earlier choice. Records may come from threads of the library.
    """
    global _callback
    target = logger if logger is not None else logging.getLogger("tms_memcache")

    def write(_user: object, native: int, module: bytes, message: bytes) -> None:
        try:
            name = (module or b"").decode(errors="replace").replace("::", ".")
            name = name[len("tms_memcache.") :] if name.startswith("tms_memcache.") else name
            child = target.getChild(name) if name and name != "tms_memcache" else target
            text = (message or b"").decode(errors="replace")
            child.log(_TO_PYTHON.get(native, logging.DEBUG), "%s", text)
        except Exception:  # a handler's failure must not reach C
            return

    callback = LogCallback(write)
    check(load().tms_log_set_callback(callback, None, _native_level(level)))
    if _callback is None:
        atexit.register(stop_forwarding_logs)
    _callback = callback
    return target


def stop_forwarding_logs() -> None:
    """Delivers what is queued, then stops. Runs by itself before the interpreter ends."""
    global _callback
    if _callback is None:
        return
    library = load()
    library.tms_log_flush(1000)
    library.tms_log_set_callback(LogCallback(), None, 1)
    _callback = None
