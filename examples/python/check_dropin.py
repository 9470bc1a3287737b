#!/usr/bin/env python3
"""Runs the unmodified package torch_memory_saver on our file and checks every behaviour.

    python check_dropin.py [--mode torch|preload|all] [--wheel FILE_OR_DIR] [--library FILE]

Needs a GPU, PyTorch, numpy and the package (installed, or as a wheel). The package is copied to a
temporary folder, where our file takes the place of its own; nothing that is installed changes.
Checks run in groups, each group in its own process, so that a crash hides little. One line a
check: ``ok MODE.NAME`` or ``FAIL MODE.NAME why``; the exit status is 1 if any failed.

``--theirs`` runs the same checks on the package's own file, to compare; several fail there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

MIB = 1 << 20
GIB = 1 << 30
GRANULE = 2 * MIB
GROUP_TIMEOUT_S = 120
RESUME_WAIT_MS = 1500
NVML_SLACK = 30 * 1000 * 1000


class Skip(Exception):
    """The machine has not what the check needs."""


Check = Callable[["Lab"], None]
GROUPS: Dict[str, List[Tuple[str, Check]]] = {}

#: Environment of a group's process, beside the usual.
GROUP_ENVIRONMENT: Dict[str, Dict[str, str]] = {
    "memory": {"TMS_RESUME_WAIT_MS": str(RESUME_WAIT_MS)},
    "environment": {
        "TMS_INIT_ENABLE": "YES",
        "TMS_INIT_ENABLE_CPU_BACKUP": "1",
        "TMS_INIT_CPU_BACKUP_BACKEND": "mmap",
        "TMS_INIT_ENABLE_DISK_BACKUP": "no",
        "TMS_RETAIN_CPU_BACKUP": "perhaps",
    },
}


def check(group: str) -> Callable[[Check], Check]:
    """Adds a function to a group; the name of the check is its own."""

    def add(function: Check) -> Check:
        GROUPS.setdefault(group, []).append((function.__name__, function))
        return function

    return add


def expect(condition: object, text: str) -> None:
    if not condition:
        raise AssertionError(text)


def mib(count: float) -> str:
    return f"{count / MIB:.1f} MiB"


class Lab:
    """What a check works with: torch, the package, its native file."""

    def __init__(self, mode: str, scratch: Path) -> None:
        import torch
        from torch_memory_saver import torch_memory_saver

        self.mode = mode
        self.scratch = scratch
        self.torch = torch
        self.cuda = torch.cuda
        self.saver = torch_memory_saver
        self.saver.hook_mode = mode
        self.cuda.init()
        self.saver._ensure_initialized()
        self.cdll = self.saver._impl._binary_wrapper.cdll
        self.cdll.tms_torch_malloc.restype = ctypes.c_void_p
        self.cdll.tms_torch_malloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
        self.cdll.tms_torch_free.restype = None
        self.cdll.tms_torch_free.argtypes = [
            ctypes.c_void_p,
            ctypes.c_ssize_t,
            ctypes.c_int,
            ctypes.c_void_p,
        ]
        self.device = "cuda"
        self.random(MIB)  # the context, the generator and the copy kernels exist from here on
        self.cuda.synchronize()

    def empty(self, count: int, device: Optional[str] = None) -> Any:
        return self.torch.empty(count, dtype=self.torch.uint8, device=device or self.device)

    def random(self, count: int, device: Optional[str] = None) -> Any:
        return self.torch.randint(
            0, 256, (count,), dtype=self.torch.uint8, device=device or self.device
        )

    def same(self, left: Any, right: Any) -> bool:
        return bool(self.torch.equal(left, right))

    def in_region(self, tag: str, count: int, device: Optional[str] = None, **options: Any) -> Any:
        """A tensor of a region, and a copy outside, both with the same random bytes."""
        with self.saver.region(tag=tag, **options):
            tensor = self.empty(count, device)
        expected = self.random(count, device)
        tensor.copy_(expected)
        return tensor, expected

    def used(self, device: int = 0) -> int:
        """Bytes in use on the device, by NVML."""
        self.cuda.synchronize()
        try:
            return int(self.cuda.device_memory_used(device))
        except Exception:  # no NVML binding for Python
            pass
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
            text = subprocess.run(
                ["nvidia-smi", "-i", str(device), "--query-gpu=memory.used"]
                + ["--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            ).stdout
            return int(text.strip()) * MIB
        return self.used_by_driver(device)

    def used_by_driver(self, device: int = 0) -> int:
        free, total = self.cuda.mem_get_info(device)
        return int(total - free)

    def drop(self, *tags: str) -> None:
        """Frees the pools of the tags, whose tensors the caller has deleted."""
        pools = self.saver._impl._mem_pools
        for key in [key for key in pools if key[0] in tags]:
            del pools[key]
        gc.collect()
        self.cuda.synchronize()
        self.cuda.empty_cache()

    def backup_pointer(self, tensor: Any) -> int:
        pointer = self.cdll.tms_get_cpu_backup_pointer(
            ctypes.cast(tensor.data_ptr(), ctypes.POINTER(ctypes.c_uint8)), tensor.nbytes
        )
        return ctypes.cast(pointer, ctypes.c_void_p).value or 0

    def host_flags_code(self, pointer: int) -> int:
        flags = ctypes.c_uint()
        code = self.cdll.cudaHostGetFlags(ctypes.byref(flags), ctypes.c_void_p(pointer))
        self.cdll.cudaGetLastError()
        return int(code)


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def in_thread(work: Callable[[], None]) -> None:
    """Runs in a fresh thread and hands its exception on."""
    failures: List[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


# ---- basics ------------------------------------------------------------------------------------


@check("basics")
def mmap_resident_memory(lab: Lab) -> None:
    """RSS rises on pause and falls back on resume, at once."""
    tensor, expected = lab.in_region(
        "rss", 64 * MIB, enable_cpu_backup=True, cpu_backup_backend="mmap"
    )
    lab.cuda.synchronize()
    before = resident()
    lab.saver.pause("rss")
    paused = resident()
    lab.saver.resume("rss")
    resumed = resident()
    expect(paused - before >= 48 * MIB, f"pausing 64 MiB raised RSS by {mib(paused - before)}")
    expect(paused - resumed >= 48 * MIB, f"resuming lowered RSS by {mib(paused - resumed)}")
    expect(lab.same(tensor, expected), "bytes differ")
    del tensor
    lab.drop("rss")


@check("basics")
def device_memory_drops_and_returns(lab: Lab) -> None:
    size = 2 * GIB
    tensor, expected = lab.in_region("nvml", size, enable_cpu_backup=True)
    left = lab.empty(512 * 512).view(512, 512).float()
    lab.torch.mm(left, left)
    before = lab.used()
    lab.saver.pause("nvml")
    paused = lab.used()
    lab.saver.resume("nvml")
    resumed = lab.used()
    expect(
        abs(before - paused - size) <= NVML_SLACK,
        f"pausing {mib(size)} freed {mib(before - paused)}",
    )
    expect(
        abs(resumed - before) <= NVML_SLACK,
        f"after the resume {mib(resumed - before)} more are in use than before",
    )
    lab.torch.mm(left, left)
    tensor.add_(1)
    later = lab.used()
    expect(abs(later - resumed) <= MIB, f"a forward pass changed it by {mib(later - resumed)}")
    expected.add_(1)
    expect(lab.same(tensor, expected), "bytes differ")
    del tensor, expected
    lab.drop("nvml")


@check("basics")
def tags(lab: Lab) -> None:
    a, a_bytes = lab.in_region("tag-a", 32 * MIB, enable_cpu_backup=True)
    b, b_bytes = lab.in_region("tag-b", 32 * MIB, enable_cpu_backup=True)
    before = lab.used_by_driver()
    lab.saver.pause("tag-a")
    after_a = lab.used_by_driver()
    expect(before - after_a >= 32 * MIB, "pausing one tag freed too little")
    expect(lab.same(b, b_bytes), "the other tag's bytes changed")
    before_b = lab.used_by_driver()
    lab.saver.pause("tag-b")
    expect(before_b - lab.used_by_driver() >= 32 * MIB, "pausing the other freed too little")
    lab.saver.resume("tag-a")
    expect(lab.same(a, a_bytes), "bytes of the resumed tag differ")
    lab.saver.resume()
    expect(lab.same(b, b_bytes), "bytes differ after resuming all")
    lab.saver.pause()
    lab.saver.resume()
    expect(lab.same(a, a_bytes) and lab.same(b, b_bytes), "bytes differ after a cycle of all")
    del a, b
    lab.drop("tag-a", "tag-b")


@check("basics")
def nested_regions(lab: Lab) -> None:
    cdll = lab.cdll

    def flags() -> Tuple[Any, ...]:
        return (
            cdll.tms_get_current_tag(),
            cdll.tms_get_interesting_region(),
            cdll.tms_get_enable_cpu_backup(),
            cdll.tms_get_cpu_backup_backend(),
            cdll.tms_get_enable_disk_backup(),
        )

    outside = flags()
    with lab.saver.region("outer", enable_cpu_backup=True, cpu_backup_backend="mmap"):
        outer = flags()
        first = lab.empty(24 * MIB)
        with lab.saver.region("inner"):
            expect(flags()[0] == b"inner" and flags()[2] is False, f"inside: {flags()}")
            inner = lab.empty(24 * MIB)
        expect(flags() == outer, f"after the inner region: {flags()}, expected {outer}")
        second = lab.empty(24 * MIB)
    expect(flags() == outside, f"after the outer region: {flags()}, expected {outside}")
    expected = lab.random(24 * MIB)
    for tensor in (first, inner, second):
        tensor.copy_(expected)
    lab.saver.pause("outer")
    expect(lab.same(inner, expected), "the inner region was paused with the outer")
    lab.saver.resume("outer")
    expect(lab.same(first, expected) and lab.same(second, expected), "bytes differ")
    del first, inner, second
    lab.drop("outer", "inner")


@check("basics")
def flags_are_per_thread(lab: Lab) -> None:
    def other() -> None:
        expect(not lab.cdll.tms_get_interesting_region(), "another thread is in the region")
        expect(lab.cdll.tms_get_current_tag() == b"default", "another thread has the tag")

    with lab.saver.region("mine"):
        in_thread(other)
        expect(lab.cdll.tms_get_current_tag() == b"mine", "the tag was lost")


@check("basics")
def backup_pinned(lab: Lab) -> None:
    backup_cycle(lab, "pinned")


@check("basics")
def backup_mmap(lab: Lab) -> None:
    backup_cycle(lab, "mmap")


def backup_cycle(lab: Lab, backend: str) -> None:
    sizes = [1000, 3 * MIB + 123, 64 * MIB, 300 * MIB]
    pairs = [
        lab.in_region("cycle", size, enable_cpu_backup=True, cpu_backup_backend=backend)
        for size in sizes
    ]
    addresses = [tensor.data_ptr() for tensor, _ in pairs]
    for cycle in range(3):
        lab.saver.pause("cycle")
        for tensor, expected in pairs:
            copy = lab.saver.get_cpu_backup(tensor)
            expect(copy is not None, f"cycle {cycle}: there is no backup of {tensor.nbytes} bytes")
            expect(lab.same(copy, expected.cpu()), f"the backup of {tensor.nbytes} bytes is wrong")
        lab.saver.resume("cycle")
        for tensor, expected in pairs:
            expect(lab.same(tensor, expected), f"cycle {cycle}: {tensor.nbytes} bytes differ")
            expect(lab.backup_pointer(tensor) == 0, "an active allocation has a backup pointer")
            expected.add_(1)
            tensor.copy_(expected)
    expect(addresses == [tensor.data_ptr() for tensor, _ in pairs], "addresses changed")
    del pairs, tensor
    lab.drop("cycle")


@check("basics")
def contents_without_backup_are_gone(lab: Lab) -> None:
    tensor, expected = lab.in_region("lost", 64 * MIB)
    for _ in range(3):
        tensor.copy_(expected)
        lab.saver.pause("lost")
        expect(lab.saver.get_cpu_backup(tensor) is None, "there is a backup")
        lab.saver.resume("lost")
        equal = float((tensor == expected).float().mean())
        expect(equal < 0.05, f"{equal:.0%} of the old bytes came back")
    del tensor
    lab.drop("lost")


@check("basics")
def twice_is_harmless(lab: Lab) -> None:
    tensor, expected = lab.in_region("twice", 32 * MIB, enable_cpu_backup=True)
    expect(lab.cdll.tms_resume(b"twice") == 0, "resuming what is active failed")
    expect(lab.same(tensor, expected), "and changed the bytes")
    expect(lab.cdll.tms_pause(b"twice") == 0, "the pause failed")
    expect(lab.cdll.tms_pause(b"twice") == 0, "pausing what is paused failed")
    expect(lab.cdll.tms_pause(None) == 0, "pausing all failed")
    expect(lab.cdll.tms_resume(b"twice") == 0, "the resume failed")
    expect(lab.cdll.tms_resume(b"") == 0, "resuming all by an empty tag failed")
    expect(lab.cdll.tms_pause(b"no such tag") == 0, "a tag without memory failed")
    expect(lab.same(tensor, expected), "bytes differ")
    del tensor
    lab.drop("twice")


@check("basics")
def freed_while_paused(lab: Lab) -> None:
    keep, expected = lab.in_region("keep", 32 * MIB, enable_cpu_backup=True)
    gone, _ = lab.in_region("gone", 512 * MIB, enable_cpu_backup=True)
    lab.saver.pause()
    before = lab.used_by_driver()
    del gone
    lab.drop("gone")
    lab.saver.resume()
    expect(lab.used_by_driver() - before < 256 * MIB, "what was freed came back")
    expect(lab.same(keep, expected), "bytes of the rest differ")
    del keep
    lab.drop("keep")


@check("basics")
def freed_by_another_thread(lab: Lab) -> None:
    with lab.saver.region("elsewhere"):
        address = lab.cdll.tms_torch_malloc(64 * MIB, 0, None)
    expect(address, "tms_torch_malloc failed")
    before = lab.used_by_driver()
    in_thread(lambda: lab.cdll.tms_torch_free(address, 64 * MIB, 0, None))
    freed = before - lab.used_by_driver()
    expect(freed >= 64 * MIB, f"freeing 64 MiB freed {mib(freed)}")


@check("basics")
def queued_work_is_finished_first(lab: Lab) -> None:
    tensor, _ = lab.in_region("ordered", 32 * MIB, enable_cpu_backup=True)
    lab.cuda.synchronize()
    side = lab.cuda.Stream()
    with lab.cuda.stream(side):
        lab.cuda._sleep(200_000_000)
        tensor.fill_(77)
    lab.saver.pause("ordered")
    lab.saver.resume("ordered")
    with lab.cuda.stream(lab.cuda.Stream()):
        low, high = int(tensor.min()), int(tensor.max())
    expect((low, high) == (77, 77), f"bytes {low}..{high}, expected 77")
    del tensor
    lab.drop("ordered")


@check("basics")
def memory_outside_stays(lab: Lab) -> None:
    outside = lab.random(32 * MIB)
    copy = outside.cpu()
    lab.saver.pause()
    expect(lab.same(outside.cpu(), copy), "memory outside regions was paused")
    lab.saver.resume()
    before = lab.used_by_driver()
    big = lab.empty(512 * MIB)
    del big
    lab.cuda.empty_cache()
    expect(abs(lab.used_by_driver() - before) <= 64 * MIB, "freeing foreign memory frees nothing")


#: What ``disable()`` of the package does with pools, in PyTorch alone.
NESTED_POOLS = """
import torch
outer = torch.cuda.MemPool()
with torch.cuda.use_mem_pool(outer):
    kept = torch.empty(1 << 25, dtype=torch.uint8, device="cuda")
    inner = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(inner):
        gone = torch.empty(1 << 25, dtype=torch.uint8, device="cuda")
        del gone
    del inner
"""


@check("basics")
def disabled_region(lab: Lab) -> None:
    alone = subprocess.run(
        [sys.executable, "-c", NESTED_POOLS],
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
        capture_output=True,
    )
    if alone.returncode != 0:
        raise Skip("this PyTorch ends a process that deletes a pool inside another, without us too")
    with lab.saver.region("around", enable_cpu_backup=True):
        tensor = lab.empty(32 * MIB)
        for cycle in range(2):
            before = lab.used()
            with lab.saver.disable():
                entered = lab.used()
                temporary = lab.random(64 * MIB)
                copy = temporary.cpu()
                lab.saver.pause("around")
                expect(lab.same(temporary.cpu(), copy), "memory of a disabled region was paused")
                lab.saver.resume("around")
                del temporary
            left = lab.used()
            if cycle:
                expect(abs(entered - before) == 0, f"entering took {mib(entered - before)}")
                expect(abs(left - before) <= 10 * MIB, f"leaving left {mib(left - before)}")
    del tensor
    lab.drop("around")


@check("basics")
def small_allocation_takes_one_granule(lab: Lab) -> None:
    count = 64
    with lab.saver.region("small"):
        lab.cdll.tms_torch_free(lab.cdll.tms_torch_malloc(6912, 0, None), 6912, 0, None)
        before = lab.used_by_driver()
        addresses = [lab.cdll.tms_torch_malloc(6912, 0, None) for _ in range(count)]
        taken = lab.used_by_driver() - before
    for address in addresses:
        lab.cdll.tms_torch_free(address, 6912, 0, None)
    expect(all(addresses), "an allocation failed")
    expect(abs(taken - count * GRANULE) <= 4 * GRANULE, f"{count} allocations took {mib(taken)}")


@check("basics")
def current_device_is_unchanged(lab: Lab) -> None:
    before = lab.cuda.current_device()
    for device in range(lab.cuda.device_count()):
        tensor, expected = lab.in_region(
            "device", 32 * MIB, f"cuda:{device}", enable_cpu_backup=True
        )
        lab.saver.pause("device")
        lab.saver.resume("device")
        expect(lab.same(tensor, expected), f"bytes on device {device} differ")
    expect(lab.cuda.current_device() == before, "the current device changed")
    del tensor
    lab.drop("device")


@check("basics")
def each_device_gets_its_own_back(lab: Lab) -> None:
    if lab.cuda.device_count() < 2:
        raise Skip("one GPU")
    pairs = []
    for device in (0, 1):
        with lab.cuda.device(device):
            pairs.append(lab.in_region("both", 256 * MIB, f"cuda:{device}", enable_cpu_backup=True))
    before = [lab.used_by_driver(device) for device in (0, 1)]
    lab.saver.pause("both")
    for device in (0, 1):
        freed = before[device] - lab.used_by_driver(device)
        expect(abs(freed - 256 * MIB) <= NVML_SLACK, f"device {device} freed {mib(freed)}")
    lab.saver.resume("both")
    for device in (0, 1):
        more = lab.used_by_driver(device) - before[device]
        expect(abs(more) <= NVML_SLACK, f"device {device} has {mib(more)} more in use")
        expect(lab.same(*pairs[device]), f"bytes on device {device} differ")
    expect(lab.cuda.current_device() == 0, "the current device changed")
    del pairs
    lab.drop("both")


# ---- retention ---------------------------------------------------------------------------------


@check("retention")
def host_flags_without_retention(lab: Lab) -> None:
    tensor, expected = lab.in_region("plain", 64 * MIB, enable_cpu_backup=True)
    expect(lab.saver.retain_cpu_backup is False, "retention is on from the start")
    lab.saver.pause("plain")
    pointer = lab.backup_pointer(tensor)
    expect(pointer != 0, "there is no backup pointer while paused")
    expect(lab.host_flags_code(pointer) == 0, "the backup is not pinned memory")
    lab.saver.resume("plain")
    expect(lab.backup_pointer(tensor) == 0, "there is a backup pointer while active")
    expect(lab.same(tensor, expected), "bytes differ")
    del tensor
    lab.drop("plain")


@check("retention")
def retained_backup(lab: Lab) -> None:
    lab.saver.retain_cpu_backup = True
    expect(lab.saver.retain_cpu_backup is True, "the setting did not stay")
    tensor, expected = lab.in_region("kept", 64 * MIB, enable_cpu_backup=True)
    pointers = set()
    for cycle in range(3):
        lab.saver.pause("kept")
        view = lab.saver.get_cpu_backup(tensor, zero_copy=True)
        pointers.add(lab.backup_pointer(tensor))
        expect(view.data_ptr() in pointers, "zero_copy gave a copy")
        expect(lab.host_flags_code(view.data_ptr()) == 0, f"cycle {cycle}: not pinned, paused")
        expect(lab.same(view, expected.cpu()), f"cycle {cycle}: the backup is wrong")
        edited = lab.random(64 * MIB)
        view.copy_(edited.cpu())
        lab.saver.resume("kept")
        pointers.add(lab.backup_pointer(tensor))
        expect(lab.same(tensor, edited), f"cycle {cycle}: what the host wrote was not restored")
        expect(lab.host_flags_code(view.data_ptr()) == 0, f"cycle {cycle}: not pinned, active")
        view.fill_(7)
        expect(lab.same(tensor, edited), "an edit of the backup reached active memory")
        expected = edited
    expect(len(pointers) == 1, f"{len(pointers)} backup pointers in 3 cycles")
    lab.saver.pause("kept")
    expect(
        lab.same(lab.saver.get_cpu_backup(tensor), expected.cpu()),
        "the next pause did not overwrite an edit",
    )
    lab.saver.resume("kept")
    expect(lab.same(tensor, expected), "bytes differ at the end")
    pointer = lab.backup_pointer(tensor)
    del tensor, view
    lab.drop("kept")
    expect(lab.host_flags_code(pointer) != 0, "the backup is still pinned after the free")
    lab.saver.retain_cpu_backup = False


@check("retention")
def part_of_a_backup(lab: Lab) -> None:
    tensor, expected = lab.in_region("part", 64 * MIB, enable_cpu_backup=True)
    piece = tensor[5 * MIB + 64 : 6 * MIB]
    lab.saver.pause("part")
    copy = lab.saver.get_cpu_backup(piece)
    expect(copy is not None, "there is no backup of a part")
    expect(lab.same(copy, expected[5 * MIB + 64 : 6 * MIB].cpu()), "the part is wrong")
    lab.saver.resume("part")
    del tensor, piece
    lab.drop("part")


# ---- memory ------------------------------------------------------------------------------------


@check("memory")
def full_in_a_region_is_reported(lab: Lab) -> None:
    """The failure reaches torch. Some versions free their cache and try again by themselves;
    others do not while a pool is in use (pytorch issue 159674), and the host does it."""
    size = fill_cache(lab)
    try:
        with lab.saver.region("full"):
            tensor = lab.empty(size)
    except lab.torch.OutOfMemoryError:
        lab.cuda.empty_cache()
        with lab.saver.region("full"):
            tensor = lab.empty(size)
    tensor[:MIB].fill_(3)
    expect(int(tensor[:MIB].max()) == 3, "the memory cannot be used")
    del tensor
    lab.drop("full")


@check("memory")
def full_in_a_region_frees_the_cache(lab: Lab) -> None:
    """With the region's flags alone, as in a graph capture, torch frees its cache and retries."""
    if lab.mode != "preload":
        raise Skip("only the cudaMalloc hook serves torch outside a pool")
    size = fill_cache(lab)
    retries = lab.cuda.memory_stats().get("num_alloc_retries", 0)
    with lab.saver._impl._with_region_config(
        tag="full", enable_cpu_backup=False, cpu_backup_backend=None
    ):
        tensor = lab.empty(size)
    expect(
        lab.cuda.memory_stats().get("num_alloc_retries", 0) > retries,
        "torch did not have to try again, so nothing was checked",
    )
    before = lab.used_by_driver()
    lab.saver.pause("full")
    freed = before - lab.used_by_driver()
    expect(freed >= size - NVML_SLACK, f"the allocation is not in the region: {mib(freed)} freed")
    lab.saver.resume("full")
    del tensor
    lab.cuda.empty_cache()


def fill_cache(lab: Lab) -> int:
    """Leaves 60% of the free memory in torch's cache, in blocks of 1 GiB, and returns that size."""
    lab.cuda.empty_cache()
    free, _ = lab.cuda.mem_get_info()
    size = int(free * 6 // 10) // GIB * GIB
    cached = [lab.empty(GIB) for _ in range(size // GIB)]
    del cached
    return size


@check("memory")
def full_for_good_is_an_exception(lab: Lab) -> None:
    _, total = lab.cuda.mem_get_info()
    for _ in range(2):
        try:
            with lab.saver.region("never"):
                lab.empty(total + GIB)
        except lab.torch.OutOfMemoryError:
            continue
        raise AssertionError("more than the device has was allocated")
    tensor, expected = lab.in_region("never", 32 * MIB, enable_cpu_backup=True)
    lab.saver.pause("never")
    lab.saver.resume("never")
    expect(lab.same(tensor, expected), "bytes differ afterwards")
    del tensor
    lab.drop("never")


@check("memory")
def memory_margin(lab: Lab) -> None:
    free, _ = lab.cuda.mem_get_info()
    lab.saver.memory_margin_bytes = free - GIB
    try:
        with lab.saver.region("margin"):
            lab.empty(2 * GIB)
        raise AssertionError("an allocation took from the margin")
    except lab.torch.OutOfMemoryError:
        pass
    finally:
        lab.saver.memory_margin_bytes = 0
    with lab.saver.region("margin"):
        tensor = lab.empty(2 * GIB)
    del tensor
    lab.drop("margin")


@check("memory")
def full_at_resume(lab: Lab) -> None:
    size = 2 * GIB
    tensor, expected = lab.in_region("short", size, enable_cpu_backup=True)
    other, other_expected = lab.in_region("short", 32 * MIB, enable_cpu_backup=True)
    expected_host = expected.cpu()
    del expected
    lab.cuda.empty_cache()
    lab.saver.pause("short")
    free, _ = lab.cuda.mem_get_info()
    hog = lab.empty(free - GIB)
    before = lab.used_by_driver()
    start = time.monotonic()
    code = lab.cdll.tms_resume(b"short")
    seconds = time.monotonic() - start
    expect(code != 0, "a resume without memory succeeded")
    expect(
        RESUME_WAIT_MS / 2000 <= seconds <= 20,
        f"it took {seconds:.1f} s, with TMS_RESUME_WAIT_MS={RESUME_WAIT_MS}",
    )
    lab.saver.resume("short")
    after = lab.used_by_driver()
    expect(abs(after - before) <= NVML_SLACK, f"it left {mib(after - before)} behind")
    backup = lab.saver.get_cpu_backup(tensor)
    expect(backup is not None and lab.same(backup, expected_host), "it is not paused any more")
    del hog
    lab.cuda.empty_cache()
    expect(lab.cdll.tms_resume(b"short") == 0, "the resume failed with memory free again")
    expect(lab.same(tensor.cpu(), expected_host), "bytes differ")
    expect(lab.same(other, other_expected), "bytes of the small one differ")
    del tensor, other
    lab.drop("short")


@check("memory")
def resume_waits_for_memory(lab: Lab) -> None:
    tensor, expected = lab.in_region("wait", 2 * GIB, enable_cpu_backup=True)
    expected_host = expected.cpu()
    del expected
    lab.cuda.empty_cache()
    lab.saver.pause("wait")
    free, _ = lab.cuda.mem_get_info()
    hog = [lab.empty(free - GIB)]

    def release() -> None:
        time.sleep(0.2)
        hog.clear()
        lab.cuda.empty_cache()

    thread = threading.Thread(target=release)
    thread.start()
    code = lab.cdll.tms_resume(b"wait")
    thread.join()
    expect(code == 0, f"status {code}, though memory came free in time")
    expect(lab.same(tensor.cpu(), expected_host), "bytes differ")
    del tensor
    lab.drop("wait")


# ---- concurrency -------------------------------------------------------------------------------


@check("concurrency")
def several_threads(lab: Lab) -> None:
    failures: List[str] = []

    def work(index: int) -> None:
        try:
            tag = f"thread-{index}"
            with lab.cuda.stream(lab.cuda.Stream()):
                for cycle in range(5):
                    tensor, expected = lab.in_region(tag, 24 * MIB, enable_cpu_backup=True)
                    lab.saver.pause(tag)
                    churn = lab.empty(32 * MIB)
                    del churn
                    lab.saver.resume(tag)
                    expect(lab.same(tensor, expected), f"cycle {cycle}: bytes differ")
                    del tensor
        except BaseException as error:
            failures.append(f"thread {index}: {error!r}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expect(not failures, "; ".join(failures))
    lab.drop(*[f"thread-{index}" for index in range(4)])


@check("concurrency")
def graph_over_region_memory(lab: Lab) -> None:
    """Captured by hand: inputs, weights and outputs live in regions, the graph outside."""
    torch = lab.torch
    with lab.saver.region("graph-weights", enable_cpu_backup=True):
        weight = torch.empty(1024, 1024, device=lab.device)
    with lab.saver.region("graph-buffers"):
        source = torch.empty(1024, 1024, device=lab.device)
        target = torch.empty(1024, 1024, device=lab.device)
    weight.normal_()
    source.normal_()

    def step(source: Any = source, weight: Any = weight, target: Any = target) -> None:
        torch.mm(source, weight, out=target)
        target.mul_(2)

    graph = capture(lab, step, lambda graph: torch.cuda.graph(graph))
    for cycle in range(3):
        lab.saver.pause()
        lab.saver.resume()
        source.normal_()
        graph.replay()
        close = torch.allclose(target, torch.mm(source, weight) * 2, rtol=1e-3, atol=1e-2)
        expect(close, f"cycle {cycle}: the replay computed something else")
    del graph, step, weight, source, target
    lab.drop("graph-weights", "graph-buffers")


@check("concurrency")
def graph_of_the_package(lab: Lab) -> None:
    """``cuda_graph`` of the package: the graph's own memory is paused too."""
    if lab.mode != "preload":
        raise Skip("the package has it in preload mode only")
    torch = lab.torch
    source = torch.randn(1024, 1024, device=lab.device)
    results: List[Any] = []

    def step() -> None:
        middle = source * 2 + 1
        results[:] = [middle.sin() + middle]

    graph = capture(lab, step, lambda graph: lab.saver.cuda_graph(graph, tag="graph"))
    graph.replay()
    lab.cuda.synchronize()
    for cycle in range(3):
        before = lab.used_by_driver()
        lab.saver.pause("graph")
        freed = before - lab.used_by_driver()
        expect(freed >= 4 * MIB, f"pausing the graph's memory freed {mib(freed)}")
        lab.saver.resume("graph")
        source.normal_()
        graph.replay()
        middle = source * 2 + 1
        close = torch.allclose(results[0], middle.sin() + middle)
        expect(close, f"cycle {cycle}: the replay computed something else")
        lab.cuda.synchronize()
    results.clear()
    graph.reset()


def capture(lab: Lab, step: Callable[[], None], around: Callable[[Any], Any]) -> Any:
    """Warms up on a side stream, as torch asks for, and captures."""
    side = lab.cuda.Stream()
    side.wait_stream(lab.cuda.current_stream())
    with lab.cuda.stream(side):
        for _ in range(3):
            step()
    lab.cuda.current_stream().wait_stream(side)
    lab.cuda.synchronize()
    graph = lab.cuda.CUDAGraph()
    with around(graph):
        step()
    return graph


# ---- disk --------------------------------------------------------------------------------------


def backup_files(folder: Path) -> List[Path]:
    """Visible files of at least one granule: not the lock file of the process."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.stat().st_size >= GRANULE
    )


@check("disk")
def files_while_paused(lab: Lab) -> None:
    folder = lab.scratch / "disk"
    lab.saver.set_disk_backup_dir(str(folder))
    one, one_bytes = lab.in_region("disk", 64 * MIB, enable_disk_backup=True)
    two, two_bytes = lab.in_region("disk", 48 * MIB, enable_disk_backup=True)
    seen = set()
    for cycle in range(3):
        lab.saver.pause("disk")
        files = backup_files(folder)
        names = [path.name for path in files]
        expect(len(files) == 2, f"cycle {cycle}: 2 allocations, files {names}")
        for path in files:
            mode = path.stat().st_mode & 0o777
            expect(mode == 0o600, f"{path.name} has mode {mode:o}")
        seen.add(tuple((path.name, path.stat().st_ino) for path in files))
        lab.saver.resume("disk")
        expect(lab.same(one, one_bytes) and lab.same(two, two_bytes), "bytes differ")
        one_bytes.add_(1)
        one.copy_(one_bytes)
    expect(len(seen) == 1, "the files were not reused over the cycles")
    lab.saver.pause("disk")
    del one, two
    lab.drop("disk")
    left = [path.name for path in backup_files(folder)]
    expect(not left, f"after the free: {left}")


@check("disk")
def cpu_and_disk_exclude_each_other(lab: Lab) -> None:
    try:
        with lab.saver.region("both", enable_cpu_backup=True, enable_disk_backup=True):
            pass
        raise AssertionError("the package accepted both")
    except AssertionError as error:
        expect("mutually exclusive" in str(error), str(error))
    cdll = lab.cdll
    cdll.tms_set_enable_cpu_backup(True)
    cdll.tms_set_enable_disk_backup(True)
    cdll.tms_set_interesting_region(True)
    both = cdll.tms_get_enable_cpu_backup() and cdll.tms_get_enable_disk_backup()
    address = cdll.tms_torch_malloc(GRANULE, 0, None) if both else None
    cdll.tms_set_interesting_region(False)
    cdll.tms_set_enable_disk_backup(False)
    cdll.tms_set_enable_cpu_backup(False)
    expect(not address, "an allocation with both was not refused")


@check("disk")
def left_paused_at_exit(lab: Lab) -> None:
    """The process ends with everything paused; the parent looks at the files and the code."""
    lab.saver.set_disk_backup_dir(str(lab.scratch / "disk"))
    _left_behind[:] = [
        lab.in_region("exit-pinned", 32 * MIB, enable_cpu_backup=True),
        lab.in_region("exit-mmap", 32 * MIB, enable_cpu_backup=True, cpu_backup_backend="mmap"),
        lab.in_region("exit-disk", 32 * MIB, enable_disk_backup=True),
        lab.in_region("exit-nothing", 32 * MIB),
    ]
    lab.saver.pause()
    expect(len(backup_files(lab.scratch / "disk")) == 1, "there is no file")


_left_behind: List[Any] = []


# ---- environment: no torch ---------------------------------------------------------------------


def environment_checks(path: str) -> Iterator[Tuple[str, Optional[str]]]:
    """The defaults of each thread's flags, with the file loaded by ctypes alone."""
    library = ctypes.CDLL(path)
    library.tms_get_cpu_backup_backend.restype = ctypes.c_char_p
    for name in ("interesting_region", "enable_cpu_backup", "enable_disk_backup"):
        getattr(library, f"tms_get_{name}").restype = ctypes.c_bool
    library.tms_get_retain_cpu_backup.restype = ctypes.c_bool

    def flags() -> Tuple[Any, ...]:
        return (
            library.tms_get_interesting_region(),
            library.tms_get_enable_cpu_backup(),
            library.tms_get_enable_disk_backup(),
            library.tms_get_cpu_backup_backend(),
            library.tms_get_retain_cpu_backup(),
        )

    wanted = (True, True, False, b"mmap", False)
    found = [flags()]
    thread = threading.Thread(target=lambda: found.append(flags()))
    thread.start()
    thread.join()
    for name, value in zip(("defaults_of_main_thread", "defaults_of_new_thread"), found):
        yield name, None if value == wanted else f"{value}, expected {wanted}"


# ---- running -----------------------------------------------------------------------------------


def report(name: str, failure: Optional[str], note: str = "") -> None:
    print(json.dumps({"check": name, "failure": failure, "note": note}), flush=True)


def run_group(mode: str, group: str, scratch: Path, wanted: List[str]) -> None:
    if group == "environment":
        from torch_memory_saver.utils import get_binary_path_from_package

        path = str(get_binary_path_from_package(f"torch_memory_saver_hook_mode_{mode}"))
        for name, failure in environment_checks(path):
            report(name, failure)
        return
    lab = Lab(mode, scratch)
    for name, function in GROUPS[group]:
        if name not in wanted:
            continue
        try:
            function(lab)
            report(name, None)
        except Skip as why:
            report(name, None, f"skipped: {why}")
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            report(name, f"{type(error).__name__}: {error} ({place.name}:{place.lineno})")
            recover(lab)
    lab.cuda.synchronize()


def recover(lab: Lab) -> None:
    """After a failed check: nothing paused, nothing cached, for the checks that follow."""
    with contextlib.suppress(Exception):
        lab.saver.resume()
        gc.collect()
        lab.cuda.empty_cache()


def names_of(group: str) -> List[str]:
    if group == "environment":
        return ["defaults_of_main_thread", "defaults_of_new_thread"]
    return [name for name, _ in GROUPS[group]]


class Runner:
    """Starts the groups and collects their lines."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.results: List[Dict[str, Any]] = []

    def add(self, mode: str, name: str, failure: Optional[str], note: str = "") -> None:
        self.results.append(
            {"mode": mode, "check": name, "ok": failure is None, "why": failure or note}
        )
        if not self.options.json:
            verdict = "ok" if failure is None else "FAIL"
            text = f" {failure}" if failure else f" # {note}" if note else ""
            print(f"{verdict} {mode}.{name}{text}", flush=True)

    def group(self, mode: str, group: str, environment: Dict[str, str]) -> None:
        options = self.options
        wanted = [
            name
            for name in names_of(group)
            if name not in options.skip and (not options.only or name in options.only)
        ]
        if not wanted:
            return
        scratch = self.folder / f"{mode}-{group}"
        scratch.mkdir()
        command = [sys.executable, __file__, "--child", group, "--mode", mode]
        command += ["--scratch", str(scratch)]
        for name in wanted:
            command += ["--only", name]
        environment = {**environment, **GROUP_ENVIRONMENT.get(group, {})}
        output = open(scratch / "output", "w+")
        errors = open(scratch / "errors", "w+")
        start = time.monotonic()
        try:
            code = subprocess.run(
                command,
                env=environment,
                stdout=output,
                stderr=errors,
                timeout=GROUP_TIMEOUT_S,
            ).returncode
            ended = f"the process ended with code {code}"
        except subprocess.TimeoutExpired:
            code, ended = 124, f"the process ran longer than {GROUP_TIMEOUT_S} s"
        seconds = time.monotonic() - start
        output.seek(0)
        errors.seek(0)
        tail = " | ".join(errors.read().strip().splitlines()[-3:])[-400:]
        seen = set()
        for line in output:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                seen.add(entry["check"])
                self.add(mode, entry["check"], entry["failure"], entry["note"])
        output.close()
        errors.close()
        for name in wanted:
            if name not in seen:
                self.add(mode, name, f"never reported: {ended}: {tail}")
        failure = None if code == 0 else f"{ended}: {tail}"
        self.add(mode, f"exit_code_of_{group}", failure, f"{seconds:.1f} s")
        if group == "disk" and "left_paused_at_exit" in wanted:
            left = [path.name for path in backup_files(scratch / "disk")]
            self.add(mode, "no_files_after_exit", f"left: {left}" if left else None)

    def mode(self, mode: str, environment: Dict[str, str]) -> None:
        groups = self.options.group or [*GROUPS, "environment"]
        for group in groups:
            self.group(mode, group, environment)


def parse(arguments: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mode", choices=["torch", "preload", "all"], default="all")
    parser.add_argument("--wheel", help="the package's wheel, or a folder that holds it")
    parser.add_argument("--library", help="our libtms_preload.so")
    parser.add_argument("--theirs", action="store_true", help="the package's own file")
    parser.add_argument("--group", action="append", choices=[*GROUPS, "environment"])
    parser.add_argument("--only", action="append", default=[], help="one check by name")
    parser.add_argument("--skip", action="append", default=[], help="leave a check out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    if options.child:
        run_group(options.mode, options.child, Path(options.scratch), options.only)
        return 0

    import package_copy

    package_copy.exit_on_sigterm()
    try:
        package_copy.check_machine()
    except package_copy.Unready as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tms-dropin-") as name:
        folder = Path(name)
        try:
            package = package_copy.copy_package(folder / "package", options.wheel)
            done = "the package's own file"
            if not options.theirs:
                done = package_copy.put_ours(package, options.library)
        except package_copy.PROBLEMS as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if not options.json:
            print(f"# {done}", flush=True)
        path = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        runner = Runner(options, folder)
        if options.mode in ("torch", "all"):
            runner.mode("torch", environment)
        if options.mode in ("preload", "all"):
            sys.path.insert(0, str(package.parent))
            import torch_memory_saver

            with torch_memory_saver.configure_subprocess():
                preload = os.environ["LD_PRELOAD"]
            runner.mode("preload", {**environment, "LD_PRELOAD": preload})
    failed = [result for result in runner.results if not result["ok"]]
    seconds = time.monotonic() - started
    if options.json:
        print(json.dumps({"file": done, "seconds": round(seconds, 1), "results": runner.results}))
    else:
        print(f"# {len(runner.results)} checks, {len(failed)} failed, {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
