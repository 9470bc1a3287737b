"""Savers, regions and operations."""

from __future__ import annotations

import ctypes
import enum
import operator
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator, List, Optional, Sequence, Set, Tuple, Type, TypeVar

from . import _library as c
from ._errors import TmsError, name_of

_MAX_FAILURES = 256
_TIMEOUT = -11
_FOREVER_MS = 1 << 40
_SLICE_MS = 500
_UINT32_MAX = 2**32 - 1
_UINT64_MAX = 2**64 - 1

Record = TypeVar("Record", bound=ctypes.Structure)


class State(enum.IntEnum):
    """Where an allocation stands between its address and its memory."""

    ACTIVE = 0
    PAUSING = 1
    PAUSED = 2
    RESUMING = 3


@dataclass(frozen=True)
class Failure:
    """An allocation that a pause or resume could not do."""

    address: int
    bytes: int
    code: int

    @property
    def name(self) -> str:
        return name_of(self.code)


@dataclass(frozen=True)
class Result:
    """What a pause or resume did. ``unchanged_count`` were already in the wanted state.

    ``shortfall_bytes``: memory that was released and did not become free on the device, because
    something else holds it. ``unchanged_bytes``: what a retained backup had already, and a pause
    did not copy again. ``failures`` lists at most 256; ``failed_count`` counts all.
    """

    done_count: int
    done_bytes: int
    copied_bytes: int
    unchanged_count: int
    failed_count: int
    shortfall_bytes: int
    failures: Tuple[Failure, ...]
    unchanged_bytes: int = 0


@dataclass(frozen=True)
class Stats:
    """Allocations of one tag on one device, bytes of physical memory.

    ``held_bytes``: what freed allocations left in handles that others still use. Later allocations
    of the same kind take it; a pause gives it back.
    """

    tag: str
    device: int
    active_count: int
    active_bytes: int
    paused_count: int
    paused_bytes: int
    backed_bytes: int
    held_bytes: int


@dataclass(frozen=True)
class PinnedStats:
    """Pinned host memory of a saver, bytes; ``chunk_count`` is a number.

    ``pinned_bytes`` are in use (``used_bytes``), idle, or registered in place for others
    (``adopted_bytes``); in another division they are on huge pages or not. ``limit_bytes`` is
    ``None`` if only the host is the limit.
    """

    chunk_count: int
    pinned_bytes: int
    used_bytes: int
    idle_bytes: int
    adopted_bytes: int
    high_water_bytes: int
    limit_bytes: Optional[int]
    keep_bytes: int
    huge_page_bytes: int
    small_page_bytes: int


@dataclass(frozen=True)
class Allocation:
    """The allocation that an address lies in. ``bytes`` is rounded up to the granularity."""

    base: int
    bytes: int
    requested_bytes: int
    device: int
    state: State
    tag: str


@dataclass(frozen=True)
class Device:
    """A device of the process. ``missing`` names features that its driver does not have."""

    kind: str
    ordinal: int
    name: str
    driver_version: int
    granularity: int
    total_bytes: int
    free_bytes: int
    can_export: bool
    rdma: bool
    peer_count: int
    missing: str


def _record(kind: Type[Record]) -> Record:
    record = kind()
    record.struct_size = ctypes.sizeof(kind)
    return record


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def device_count() -> int:
    """Number of visible devices."""
    count = ctypes.c_uint32()
    c.check(c.load().tms_device_count(ctypes.byref(count)))
    return count.value


def device_info(device: int = 0) -> Device:
    """What is known of device ``device``."""
    info = _record(c.DeviceInfo)
    c.check(c.load().tms_device_info(device, ctypes.byref(info)))
    return Device(
        kind="cuda" if info.kind == 1 else "host",
        ordinal=info.ordinal,
        name=_text(info.name),
        driver_version=info.driver_version,
        granularity=info.granularity,
        total_bytes=info.total_bytes,
        free_bytes=info.free_bytes,
        can_export=bool(info.flags & c.DEVICE_CAN_EXPORT),
        rdma=bool(info.flags & c.DEVICE_RDMA),
        peer_count=info.peer_count,
        missing=_text(info.missing),
    )


def shutdown() -> None:
    """Frees the default saver with all its allocations and stops its threads.

    Their addresses are invalid afterwards. Raises ``BUSY`` while an operation runs.
    """
    c.check(c.load().tms_shutdown())


def _region_options(
    tag: Optional[str],
    backup: Optional[str],
    directory: Optional[str],
    flags: int,
) -> c.RegionOptions:
    options = _record(c.RegionOptions)
    options.flags = flags
    options.tag = c.encode(tag)
    options.backup = c.encode(backup)
    options.directory = c.encode(directory)
    return options


def _region_flags(retain: bool, exportable: bool, peer_access: bool, disabled: bool) -> int:
    return (
        c.REGION_RETAIN * retain
        | c.REGION_EXPORTABLE * exportable
        | c.REGION_PEER_ACCESS * peer_access
        | c.REGION_DISABLED * disabled
    )


@contextmanager
def region(
    tag: str = "default",
    backup: Optional[str] = None,
    *,
    retain: bool = False,
    exportable: bool = False,
    peer_access: bool = False,
    disabled: bool = False,
    directory: Optional[str] = None,
) -> Iterator[None]:
    """Says how memory allocated inside the block, by this thread, is kept.

    ``backup``: ``None`` or ``"none"`` (contents are lost by a pause), ``"pinned"``, ``"mmap"`` or
    ``"file"``. ``retain`` keeps the host copy at its address after a resume. ``disabled`` makes
    the block ordinary memory inside an outer region. ``directory`` is for file backups.
    """
    library = c.load()
    flags = _region_flags(retain, exportable, peer_access, disabled)
    options = _region_options(tag, backup, directory, flags)
    c.check(library.tms_region_push(ctypes.byref(options)))
    try:
        yield
    except BaseException:
        library.tms_region_pop()
        raise
    c.check(library.tms_region_pop())


def _tags(options: ctypes.Structure, tags: Tuple[str, ...]) -> None:
    if tags:
        array = (ctypes.c_char_p * len(tags))(*[c.encode(tag) for tag in tags])
        options.tags = ctypes.cast(array, ctypes.POINTER(ctypes.c_char_p))
        options.tag_count = len(tags)


def _unsigned(name: str, value: int) -> int:
    """``value``, which ctypes would cut to 64 bits, or take from a string, without a word."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if not 0 <= number <= _UINT64_MAX:
        raise ValueError(f"{name} must be 0 to {_UINT64_MAX}, and is {number}")
    return number


def _pause_options(
    tags: Tuple[str, ...], backup: Optional[str], skip_exported: bool, copy_all: bool
) -> c.PauseOptions:
    options = _record(c.PauseOptions)
    options.flags = c.PAUSE_SKIP_EXPORTED * skip_exported | c.PAUSE_COPY_ALL * copy_all
    options.backup = c.encode(backup)
    _tags(options, tags)
    return options


def _resume_options(tags: Tuple[str, ...], wait_ms: int) -> c.ResumeOptions:
    if not 0 <= wait_ms <= _UINT32_MAX:
        raise ValueError(f"wait_ms must be 0 to {_UINT32_MAX}, and is {wait_ms}")
    options = _record(c.ResumeOptions)
    options.wait_ms = wait_ms
    _tags(options, tags)
    return options


class _ResultRecord:
    """A result record with room for failures."""

    def __init__(self) -> None:
        self._failures = (c.FailureRecord * _MAX_FAILURES)()
        self.record = _record(c.ResultRecord)
        self.record.failures = ctypes.cast(self._failures, ctypes.POINTER(c.FailureRecord))
        self.record.failures_capacity = _MAX_FAILURES

    def result(self) -> Result:
        record = self.record
        listed = min(record.failed_count, _MAX_FAILURES)
        return Result(
            done_count=record.done_count,
            done_bytes=record.done_bytes,
            copied_bytes=record.copied_bytes,
            unchanged_count=record.unchanged_count,
            failed_count=record.failed_count,
            shortfall_bytes=record.shortfall_bytes,
            failures=tuple(
                Failure(failure.address or 0, failure.bytes, failure.status)
                for failure in self._failures[:listed]
            ),
            unchanged_bytes=record.unchanged_bytes,
        )


class _OperationHandle:
    """A native operation. Its :class:`Operation` and, until it has ended, its saver keep it."""

    def __init__(self, value: int) -> None:
        self.value = value

    def done(self) -> bool:
        done = ctypes.c_int32()
        c.check(c.load().tms_op_poll(self.value, ctypes.byref(done)))
        return done.value != 0

    def finish(self) -> None:
        """Waits for the end, in slices, so that Python's signal handlers run."""
        while c.load().tms_op_wait(self.value, _SLICE_MS) == _TIMEOUT:
            pass

    def __del__(self) -> None:
        c.load().tms_op_free(self.value)


class Operation:
    """A pause, resume or prewarm that runs on the library's threads."""

    def __init__(self, handle: _OperationHandle, running: Set[_OperationHandle]) -> None:
        self._handle: Optional[_OperationHandle] = handle
        self._running = running

    def _live(self) -> int:
        if self._handle is None:
            raise ValueError("the operation is closed")
        return self._handle.value

    @property
    def done(self) -> bool:
        if self._handle is None:
            raise ValueError("the operation is closed")
        return self._handle.done()

    @property
    def progress(self) -> Tuple[int, int]:
        """Bytes done and bytes in all."""
        done, total = ctypes.c_uint64(), ctypes.c_uint64()
        c.check(c.load().tms_op_progress(self._live(), ctypes.byref(done), ctypes.byref(total)))
        return done.value, total.value

    def wait(self, timeout: Optional[float] = None) -> Result:
        """Waits, at most ``timeout`` seconds, and returns what was done.

        Raises :class:`TimeoutError` if the operation still runs, :class:`TmsError` if it failed.
        """
        handle = self._live()
        wait_ms = _FOREVER_MS if timeout is None else max(0, round(timeout * 1000))
        code = c.load().tms_op_wait(handle, wait_ms)
        if code == _TIMEOUT and not self.done:
            raise TimeoutError(f"the operation still runs after {timeout} s")
        if code < 0:
            raise TmsError(code, c.last_message(code), self._result())
        return self._result()

    def _result(self) -> Result:
        out = _ResultRecord()
        c.check(c.load().tms_op_result(self._live(), ctypes.byref(out.record)))
        return out.result()

    def fileno(self) -> int:
        """A descriptor that becomes readable when the operation is done; the operation owns it."""
        descriptor = ctypes.c_int32()
        c.check(c.load().tms_op_eventfd(self._live(), ctypes.byref(descriptor)))
        return descriptor.value

    def close(self) -> None:
        """Forgets the operation; a running one goes on to its end."""
        handle, self._handle = self._handle, None
        if handle is not None and handle.done():
            self._running.discard(handle)

    def __enter__(self) -> "Operation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OrderedResume(Operation):
    """A resume whose allocations become usable one after the other, in the order given."""

    def ready(self, address: int) -> bool:
        """Whether the contents of the allocation at ``address`` are complete. Does not wait.

        Raises the :class:`TmsError` of the allocation if it stays paused.
        """
        ready = ctypes.c_int32()
        c.check(c.load().tms_op_ready(self._live(), address, ctypes.byref(ready)))
        return ready.value != 0

    def stream_wait(self, address: int, stream: int = 0) -> None:
        """Makes ``stream`` wait for the contents: work queued on it afterwards sees them.

        ``stream`` is a ``CUstream`` as a number, such as ``torch.cuda.Stream.cuda_stream``; 0 is
        the legacy default stream. Returns once the contents are on their way: the calling thread
        waits until memory is mapped, and for other backups than ``"pinned"`` until they are there,
        as on the host device.
        """
        number = _unsigned("stream", stream)
        c.check(c.load().tms_op_stream_wait(self._live(), address, number))


AnyOperation = TypeVar("AnyOperation", bound=Operation)


class Saver:
    """Allocates memory that can be paused. Usable from many threads at once.

    ``device`` is ``"host"``, ``"cuda"`` or ``"auto"``; ``None`` does as ``TMS_DEVICE`` says. Memory
    of a saver goes with it: on :meth:`close`, at the end of a ``with`` block, or with the object.
    Each of them waits for the saver's running operations.
    """

    def __init__(self, device: Optional[str] = None) -> None:
        self._handle: Optional[int] = None
        self._owned = True
        self._running: Set[_OperationHandle] = set()
        options = _record(c.SaverOptions)
        options.device = c.encode(device)
        out = ctypes.c_void_p()
        c.check(c.load().tms_saver_create(ctypes.byref(options), ctypes.byref(out)))
        self._handle = out.value

    @classmethod
    def default(cls) -> "Saver":
        """The process-wide saver, which also serves the hooks. It is never closed."""
        out = ctypes.c_void_p()
        c.check(c.load().tms_saver_default(ctypes.byref(out)))
        saver = cls.__new__(cls)
        saver._handle = out.value
        saver._owned = False
        saver._running = set()
        return saver

    def _live(self) -> int:
        if self._handle is None:
            raise ValueError("the saver is closed")
        return self._handle

    def _operation(self, value: Optional[int], kind: Type[AnyOperation]) -> AnyOperation:
        """Remembers a new operation, because the saver cannot be freed while it runs."""
        for earlier in tuple(self._running):
            if earlier.done():
                self._running.discard(earlier)
        handle = _OperationHandle(value or 0)
        self._running.add(handle)
        return kind(handle, self._running)

    def malloc(
        self,
        bytes: int,
        device: int = -1,
        *,
        tag: Optional[str] = None,
        backup: Optional[str] = None,
        retain: bool = False,
        exportable: bool = False,
        peer_access: bool = False,
        directory: Optional[str] = None,
    ) -> int:
        """The address of new memory on ``device`` (-1: the thread's current one).

        Without any keyword the thread's :func:`region` says how it is kept; with one, the
        keywords alone do.
        """
        _unsigned("bytes", bytes)
        flags = _region_flags(retain, exportable, peer_access, False)
        options = None
        if flags or (tag, backup, directory) != (None, None, None):
            options = ctypes.byref(_region_options(tag, backup, directory, flags))
        out = ctypes.c_void_p()
        c.check(c.load().tms_saver_malloc(self._live(), bytes, device, options, ctypes.byref(out)))
        return out.value or 0

    def free(self, address: int) -> None:
        """Frees memory of :meth:`malloc`, active or paused. 0 is nothing."""
        c.check(c.load().tms_saver_free_memory(self._live(), address))

    def pause(
        self,
        *tags: str,
        backup: Optional[str] = None,
        skip_exported: bool = False,
        copy_all: bool = False,
    ) -> Result:
        """Releases the memory of ``tags`` (none: of all) after copying what is to be kept.

        ``backup`` overrides what the regions said; ``"none"`` discards the contents. ``copy_all``
        copies also what a retained backup is known to have already.
        """
        options = _pause_options(tags, backup, skip_exported, copy_all)
        out = _ResultRecord()
        code = c.load().tms_saver_pause(
            self._live(), ctypes.byref(options), ctypes.byref(out.record)
        )
        if code < 0:
            raise TmsError(code, c.last_message(code), out.result())
        return out.result()

    def resume(self, *tags: str, wait_ms: int = 0) -> Result:
        """Gives memory and contents back, at the same addresses.

        ``wait_ms``: how long to wait for device memory that others are about to release.
        """
        options = _resume_options(tags, wait_ms)
        out = _ResultRecord()
        code = c.load().tms_saver_resume(
            self._live(), ctypes.byref(options), ctypes.byref(out.record)
        )
        if code < 0:
            raise TmsError(code, c.last_message(code), out.result())
        return out.result()

    def pause_async(
        self,
        *tags: str,
        backup: Optional[str] = None,
        skip_exported: bool = False,
        copy_all: bool = False,
    ) -> Operation:
        """Like :meth:`pause`, and returns at once."""
        options = _pause_options(tags, backup, skip_exported, copy_all)
        out = ctypes.c_void_p()
        c.check(
            c.load().tms_saver_pause_async(self._live(), ctypes.byref(options), ctypes.byref(out))
        )
        return self._operation(out.value, Operation)

    def resume_async(self, *tags: str, wait_ms: int = 0) -> Operation:
        """Like :meth:`resume`, and returns at once."""
        options = _resume_options(tags, wait_ms)
        out = ctypes.c_void_p()
        c.check(
            c.load().tms_saver_resume_async(self._live(), ctypes.byref(options), ctypes.byref(out))
        )
        return self._operation(out.value, Operation)

    def resume_ordered_async(self, addresses: Sequence[int], *, wait_ms: int = 0) -> OrderedResume:
        """Resumes the allocations at ``addresses``, and no others, in that order; returns at once.

        Work can start with the first of them while the rest arrives.
        """
        options = _resume_options((), wait_ms)
        numbers = [_unsigned(f"addresses[{at}]", each) for at, each in enumerate(addresses)]
        pointers = (ctypes.c_void_p * len(numbers))(*numbers)
        out = ctypes.c_void_p()
        c.check(
            c.load().tms_saver_resume_ordered_async(
                self._live(), pointers, len(numbers), ctypes.byref(options), ctypes.byref(out)
            )
        )
        return self._operation(out.value, OrderedResume)

    def prewarm(self, bytes: int, device: int = -1) -> None:
        """Pins ``bytes`` of host memory beyond what is used, near ``device``, for the next pause.

        They stay pinned while nobody uses them, until :meth:`trim` or until the host runs short.
        """
        c.check(c.load().tms_saver_prewarm(self._live(), device, _unsigned("bytes", bytes)))

    def prewarm_async(self, bytes: int, device: int = -1) -> Operation:
        """Like :meth:`prewarm`, and returns at once. A pause that is started later waits for it."""
        _unsigned("bytes", bytes)
        out = ctypes.c_void_p()
        c.check(
            c.load().tms_saver_prewarm_async(self._live(), device, bytes, ctypes.byref(out))
        )
        return self._operation(out.value, Operation)

    def trim(self, keep_bytes: int = 0) -> int:
        """Unpins idle host memory until at most ``keep_bytes`` of it are left; how much it was."""
        _unsigned("keep_bytes", keep_bytes)
        released = ctypes.c_uint64()
        c.check(c.load().tms_saver_trim(self._live(), keep_bytes, ctypes.byref(released)))
        return released.value

    def pinned_stats(self) -> PinnedStats:
        """Figures of the saver's pinned host memory."""
        record = _record(c.PinnedStatsRecord)
        c.check(c.load().tms_saver_pinned_stats(self._live(), ctypes.byref(record)))
        return PinnedStats(
            chunk_count=record.chunk_count,
            pinned_bytes=record.pinned_bytes,
            used_bytes=record.used_bytes,
            idle_bytes=record.idle_bytes,
            adopted_bytes=record.adopted_bytes,
            high_water_bytes=record.high_water_bytes,
            limit_bytes=None if record.limit_bytes == _UINT64_MAX else record.limit_bytes,
            keep_bytes=record.keep_bytes,
            huge_page_bytes=record.huge_page_bytes,
            small_page_bytes=record.small_page_bytes,
        )

    def stats(self) -> List[Stats]:
        """One entry for each tag and device that has allocations."""
        count = ctypes.c_size_t()
        capacity = 16
        while True:
            entries = (c.StatsRecord * capacity)()
            for entry in entries:
                entry.struct_size = ctypes.sizeof(c.StatsRecord)
            c.check(c.load().tms_saver_stats(self._live(), entries, capacity, ctypes.byref(count)))
            if count.value <= capacity:
                break
            capacity = count.value * 2
        return [
            Stats(
                tag=_text(entry.tag),
                device=entry.device,
                active_count=entry.active_count,
                active_bytes=entry.active_bytes,
                paused_count=entry.paused_count,
                paused_bytes=entry.paused_bytes,
                backed_bytes=entry.backed_bytes,
                held_bytes=entry.held_bytes,
            )
            for entry in entries[: count.value]
        ]

    def query(self, address: int) -> Allocation:
        """The allocation that ``address`` lies in."""
        info = _record(c.AllocationInfo)
        c.check(c.load().tms_saver_query(self._live(), address, ctypes.byref(info)))
        return Allocation(
            base=info.base or 0,
            bytes=info.bytes,
            requested_bytes=info.requested_bytes,
            device=info.device,
            state=State(info.state),
            tag=_text(info.tag),
        )

    def backup(self, address: int, bytes: int) -> memoryview:
        """The host copy of ``bytes`` from ``address`` on, writable, without copying.

        Valid until the memory is resumed (retained backups: until it is freed).
        """
        out = ctypes.c_void_p()
        c.check(c.load().tms_saver_backup_pointer(self._live(), address, bytes, ctypes.byref(out)))
        return memoryview((ctypes.c_ubyte * bytes).from_address(out.value or 0)).cast("B")

    def set_memory_margin(self, bytes: int, device: int = -1) -> None:
        """Device memory that allocations leave free, on ``device`` or on all."""
        c.check(c.load().tms_saver_set_memory_margin(self._live(), device, bytes))

    def export(self, address: int) -> Tuple[int, int]:
        """A descriptor that another process can import, and its bytes. The caller closes it."""
        descriptor, size = ctypes.c_int32(), ctypes.c_uint64()
        c.check(
            c.load().tms_saver_export(
                self._live(), address, ctypes.byref(descriptor), ctypes.byref(size)
            )
        )
        return descriptor.value, size.value

    def close(self) -> None:
        """Waits for running operations, then frees every allocation of the saver.

        The default saver only forgets its handle. Raises ``BUSY``, and frees nothing, while
        another thread is inside :meth:`pause` or :meth:`resume`.
        """
        if self._handle is None:
            return
        if self._owned:
            self._finish()
            c.check(c.load().tms_saver_free(self._handle))
        self._handle = None

    def _finish(self) -> None:
        for operation in tuple(self._running):
            operation.finish()
            self._running.discard(operation)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], *_: object) -> None:
        try:
            self.close()
        except TmsError:
            # The exception of the block says more.
            if kind is None:
                raise

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is None or not self._owned:
            return
        # The end of the process gives everything back, and must not wait for memory.
        if not sys.is_finalizing():
            self._finish()
        c.load().tms_saver_free(handle)
