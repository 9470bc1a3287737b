"""What the binding raises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from .saver import Result

#: Names of the status codes of tms.h, without their ``TMS_ERR_``; the code of the first is -1.
NAMES = (
    "INVALID_ARGUMENT",
    "NULL_POINTER",
    "NOT_FOUND",
    "OUT_OF_DEVICE_MEMORY",
    "OUT_OF_HOST_MEMORY",
    "UNSUPPORTED",
    "NO_DEVICE",
    "DEVICE",
    "DEVICE_LOST",
    "BUSY",
    "TIMEOUT",
    "IO",
    "NO_SPACE",
    "CORRUPT",
    "EXPORTED",
    "CAPTURE",
    "FORKED",
    "SHUTDOWN",
    "ABI",
    "PARTIAL",
    "CANCELLED",
    "INTERNAL",
)


def name_of(code: int) -> str:
    """``"TIMEOUT"`` for -11; ``"CODE_-99"`` for a code that this binding does not know."""
    return NAMES[-code - 1] if 1 <= -code <= len(NAMES) else f"CODE_{code}"


class TmsError(RuntimeError):
    """A call failed.

    ``code`` is the negative status, ``name`` its name without ``TMS_ERR_``, ``message`` the
    library's text. ``result`` is set where a pause or resume tells what was and was not done.
    """

    def __init__(self, code: int, message: str, result: Optional["Result"] = None) -> None:
        super().__init__(f"{name_of(code)}: {message}")
        self.code = code
        self.name = name_of(code)
        self.message = message
        self.result = result


class LibraryNotFound(ImportError):
    """``libtms_memcache.so`` is in none of the places where it is looked for."""
