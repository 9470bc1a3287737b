#!/usr/bin/env python3
"""Checks the copies of tms_memcache on a GPU with PyTorch: bytes, strides, streams, lifetimes.

    python check_copies.py [--mib 64] [--only WORD]

Every check compares with what ``Tensor.copy_`` makes of the same tensors. One line a check:
``ok NAME``, ``skip NAME why`` or ``FAIL NAME why``; the exit status is 1 if any failed, 2 if there
is nothing to check with. The library is found as by the package (``TMS_LIBRARY`` names the file).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, Callable, List, Tuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

import tms_memcache as tms  # noqa: E402
from tms_memcache import copies  # noqa: E402

CYCLES = 100_000_000  # of a kernel that keeps a stream busy, tens of milliseconds
DIRECTIONS = (
    ("cuda", "cpu"),
    ("cuda", "pinned"),
    ("cpu", "cuda"),
    ("pinned", "cuda"),
    ("cuda", "cuda"),
)

Check = Callable[["Lab"], None]
CHECKS: List[Check] = []


class Skip(Exception):
    """The machine has not what the check needs."""


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


def expect(condition: object, text: str) -> None:
    if not condition:
        raise AssertionError(text)


class Lab:
    def __init__(self, torch: Any, mib: int) -> None:
        self.torch = torch
        self.cuda = torch.cuda
        self.bytes = mib << 20
        self.moved: List[str] = []
        real = copies._move

        def watched(torch: Any, plan: Any, *arguments: Any) -> None:
            self.moved.append(plan._name)
            real(torch, plan, *arguments)

        mock.patch.object(copies, "_move", watched).start()

    def random(self, place: str, *shape: int, dtype: Any = None) -> Any:
        """Random bytes, on "cpu", "pinned", "cuda" or "cuda:1"."""
        torch = self.torch
        dtype = dtype or torch.uint8
        host = place in ("cpu", "pinned")
        tensor = torch.empty(
            shape, dtype=dtype, device="cpu" if host else place, pin_memory=place == "pinned"
        )
        # Any bits, the ones of infinities and of several kinds of NaN among them.
        tensor.view(-1).view(torch.uint8).random_(0, 2 if dtype == torch.bool else 256)
        return tensor

    def synchronize(self) -> None:
        for index in range(self.cuda.device_count()):
            self.cuda.synchronize(index)

    def same(self, left: Any, right: Any) -> bool:
        """Bit for bit, so that a NaN equals itself."""
        torch = self.torch
        left, right = (each.detach().cpu().contiguous().view(-1) for each in (left, right))
        return left.numel() == 0 or torch.equal(left.view(torch.uint8), right.view(torch.uint8))

    def copy(self, dst: Any, src: Any, how: str, non_blocking: bool = False) -> None:
        """Copies; the library did it in the given way, and only bytes of ``dst`` have changed."""
        whole = dst
        while whole._base is not None:
            whole = whole._base
        expected = whole.detach().clone()
        expected.as_strided(dst.shape, dst.stride(), dst.storage_offset()).copy_(src)
        version = dst._version
        self.moved.clear()
        expect(tms.cuda_copy_(dst, src, non_blocking) is dst, "not dst was returned")
        expect(self.moved == [how], f"copied by {self.moved}, not by {how}")
        expect(dst._version > version, "autograd does not see that dst changed")
        if non_blocking:
            self.synchronize()
        expect(self.same(whole, expected), "wrong bytes, in dst or beside it")

    def stream(self, index: int = 0) -> Any:
        return self.cuda.Stream(device=index)


@check
def availability(lab: Lab) -> None:
    expect(tms.is_cuda_memcpy_available(), copies._why_not())
    script = (
        "import sys, tms_memcache as tms\n"
        "sys.exit(0 if tms.is_cuda_memcpy_available() and 'torch' not in sys.modules else 1)\n"
    )
    source = str(Path(__file__).resolve().parent / "src")
    environment = {**os.environ, "PYTHONPATH": source}
    found = subprocess.run([sys.executable, "-c", script], env=environment, timeout=120)
    expect(found.returncode == 0, "a process without PyTorch has another answer")


@check
def shapes(lab: Lab) -> None:
    big = lab.bytes // 8
    for (to, start), shape in itertools.product(
        DIRECTIONS, ((), (1,), (3, 5, 7), (4097,), (big, 8), (0, 4))
    ):
        dst, src = lab.random(to, *shape), lab.random(start, *shape)
        if 0 in shape:
            expect(tms.cuda_copy_(dst, src) is dst, "nothing is not copied")
            continue
        for non_blocking in (False, True):
            lab.copy(dst, src, "tms_memcpy", non_blocking)
            src = lab.random(start, *shape)


@check
def unaligned(lab: Lab) -> None:
    for to, start in DIRECTIONS:
        dst, src = lab.random(to, 1 << 20), lab.random(start, 1 << 20)
        for at, count in ((1, 1), (3, 4093), (17, 65537), (5, 1_000_001)):
            lab.copy(dst[at : at + count], src[2 * at : 2 * at + count], "tms_memcpy")


@check
def dtypes(lab: Lab) -> None:
    torch = lab.torch
    names = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64"
    names += " complex128 float8_e4m3fn float8_e5m2 uint16 uint32 uint64"
    for name in names.split():
        dtype = getattr(torch, name, None)
        for to, start in DIRECTIONS if dtype else ():
            source = lab.random(start, 3, 1000, dtype=dtype)
            lab.copy(lab.random(to, 3, 1000, dtype=dtype), source, "tms_memcpy")
            narrow = lab.random(to, 3, 2000, dtype=dtype)[:, 500:1500]
            lab.copy(narrow, source, "tms_memcpy_2d")


@check
def strides(lab: Lab) -> None:
    torch = lab.torch
    for to, start in DIRECTIONS:
        for non_blocking in (False, True):
            dst = lab.random(to, 64, 32, 16, 256)
            src = lab.random(start, 32, 64, 16, 256)
            lab.copy(dst, src.transpose(0, 1), "tms_memcpy_batch", non_blocking)
            src = lab.random(start, 64, 40, 18, 256)
            lab.copy(dst, src[:, 4:36, 1:17], "tms_memcpy_batch", non_blocking)
            row = lab.random(start, 1, 32, 1, 256)
            lab.copy(dst, row.expand_as(dst), "tms_memcpy_batch", non_blocking)
            lab.copy(dst[:, ::2], src[:, :32:2, :16].contiguous(), "tms_memcpy_2d", non_blocking)
            rows = lab.random(start, 8192, 1024)
            dst = lab.random(to, 8192, 512)
            lab.copy(dst, rows[:, 512:], "tms_memcpy_2d", non_blocking)
        if "pinned" not in (to, start):
            image = torch.channels_last
            dst = lab.random(to, 8, 32, 64, 64, dtype=torch.float16).to(memory_format=image)
            src = lab.random(start, 8, 32, 64, 64, dtype=torch.float16).to(memory_format=image)
            lab.copy(dst, src, "tms_memcpy")
            dst, src = lab.random(to, 512, 512), lab.random(start, 512, 512)
            lab.moved.clear()
            tms.cuda_copy_(dst, src.t())
            expect(lab.moved == [] and lab.same(dst, src.t()), "a transposed copy is wrong")


@check
def most_pieces(lab: Lab) -> None:
    for to, start in (("cuda", "pinned"), ("pinned", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")):
        dst = lab.random(to, 256, 256, 256)
        src = lab.random(start, 256, 256, 256)
        lab.copy(dst, src.transpose(0, 1), "tms_memcpy_batch")


@check
def what_copy_does(lab: Lab) -> None:
    torch = lab.torch
    device = torch.randn(100, 100, device="cuda")
    host = torch.randn(100, 100)
    cases = [
        (torch.empty_like(device, dtype=torch.float64), host),
        (torch.empty_like(device), host[0]),
        (torch.empty_like(device, dtype=torch.complex64), host.to(torch.complex64).conj()),
        (torch.empty(100, 100, requires_grad=True, device="cuda") * 1, host),
    ]
    for dst, src in cases:
        expected = torch.empty_like(dst).copy_(src)
        lab.moved.clear()
        tms.cuda_copy_(dst, src)
        expect(lab.moved == [], "the library took a copy that is more than bytes")
        expect(torch.equal(dst.detach().resolve_conj(), expected.resolve_conj()), "wrong values")
    leaf = torch.zeros(4, requires_grad=True)
    on_gpu = tms.cuda_copy_h2d(leaf)
    on_gpu.sum().backward()
    expect(leaf.grad is not None and leaf.grad.sum() == 4, "a gradient was lost")
    weight = torch.nn.Parameter(torch.zeros(64, 64, device="cuda"))
    for wrong in (
        lambda: tms.cuda_copy_(weight, host[:64, :64]),
        lambda: tms.cuda_copy_(device, torch.zeros(3)),
        lambda: tms.cuda_copy_(device.view(-1)[:600], device.view(-1)[400:1000]),
        lambda: tms.cuda_copy_(device[:1].expand(9, 100), host[:9]),
    ):
        try:
            wrong()
        except RuntimeError:
            continue
        raise AssertionError("copy_ refuses it, and cuda_copy_ does not")
    with torch.no_grad():
        lab.copy(weight, host[:64, :64].contiguous(), "tms_memcpy")
    with torch.inference_mode():
        inside = torch.empty(64, 64, device="cuda")
        tms.cuda_copy_(inside, host[:64, :64])
        expect(torch.equal(inside.cpu(), host[:64, :64]), "wrong values in inference mode")


@check
def directions(lab: Lab) -> None:
    torch = lab.torch
    host = lab.random("cpu", 1000, 1000, dtype=torch.bfloat16)
    device = tms.cuda_copy_h2d(host)
    expect(device.is_cuda and lab.same(device, host), "h2d")
    pinned = tms.cuda_copy_d2h(device, pin_memory=True, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    expect(pinned.is_pinned() and lab.same(pinned, host), "d2h into pinned memory")
    expect(lab.same(tms.cuda_copy_d2h(device), host), "d2h")
    expect(lab.same(tms.cuda_copy_d2d(torch.empty_like(device), device), host), "d2d")
    for error, wrong in (
        (ValueError, lambda: tms.cuda_copy_h2d(device)),
        (ValueError, lambda: tms.cuda_copy_d2d(device, host)),
        (TypeError, lambda: tms.cuda_copy_h2d(host, out=device.float())),
        (ValueError, lambda: tms.cuda_copy_d2h(device, host[1:])),
        (TypeError, lambda: tms.cuda_copy_(device, 1)),
    ):
        try:
            wrong()
        except error:
            continue
        raise AssertionError(f"{error.__name__} was expected")


@check
def after_late_kernels(lab: Lab) -> None:
    """The source is written, and the destination read, by kernels queued before the copy."""
    torch = lab.torch
    for stream, place, non_blocking, rows in itertools.product(
        (torch.cuda.current_stream(), lab.stream()), ("cpu", "pinned"), (False, True), (False, True)
    ):
        count = 1 << 22
        device = torch.zeros(2048, count // 1024, dtype=torch.uint8, device="cuda")
        device = device[:, : count // 2048] if rows else device.view(-1)[:count]
        earlier = torch.empty_like(device)
        into, back = lab.random(place, *device.shape), lab.random(place, *device.shape)
        expected = into.clone()
        lab.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES)
            device.fill_(7)
            tms.cuda_copy_(back, device, non_blocking)
            if place == "cpu" or not non_blocking:
                expect(bool((back == 7).all()), "the copy was not complete on return")
            torch.cuda._sleep(CYCLES)
            earlier.copy_(device)
            tms.cuda_copy_(device, into, non_blocking)
            later = device.clone()
        stream.synchronize()
        expect(bool((back == 7).all()), "the copy did not wait for the kernel")
        expect(bool((earlier == 7).all()), "the copy overtook a kernel that reads")
        expect(lab.same(later, expected), "a later kernel did not see the copy")


@check
def non_blocking_returns_early(lab: Lab) -> None:
    torch = lab.torch
    device, pinned = lab.random("cuda", lab.bytes), lab.random("pinned", lab.bytes)
    tms.cuda_copy_(device, pinned, True)
    lab.cuda.synchronize()
    for dst, src in ((device, pinned), (pinned, device), (device, device.clone())):
        torch.cuda._sleep(10 * CYCLES)
        tms.cuda_copy_(dst, src, non_blocking=True)
        waiting = not torch.cuda.current_stream().query()
        lab.cuda.synchronize()
        expect(waiting, "a queued copy waited for the stream")


@check
def pinned_memory_that_is_dropped(lab: Lab) -> None:
    """Dropped while its copy waits, it must not be handed out again."""
    torch = lab.torch
    count = 1 << 20
    device = torch.empty(count, dtype=torch.uint8, device="cuda")
    for round_number in range(5):
        src = torch.full((count,), round_number + 1, dtype=torch.uint8).pin_memory()
        torch.cuda._sleep(CYCLES)
        tms.cuda_copy_(device, src, non_blocking=True)
        del src
        gc.collect()
        spoil = [torch.full((count,), 99, dtype=torch.uint8).pin_memory() for _ in range(4)]
        lab.cuda.synchronize()
        expect(bool((device == round_number + 1).all()), "the memory was used again too early")
        del spoil


@check
def device_memory_that_is_dropped(lab: Lab) -> None:
    torch = lab.torch
    pinned = torch.empty(1 << 20, dtype=torch.uint8).pin_memory()
    for value in range(1, 6):
        device = torch.full((1 << 20,), value, dtype=torch.uint8, device="cuda")
        torch.cuda._sleep(CYCLES)
        tms.cuda_copy_d2h(device, pinned, non_blocking=True)
        del device
        spoil = torch.full((1 << 20,), 99, dtype=torch.uint8, device="cuda")
        lab.cuda.synchronize()
        expect(bool((pinned == value).all()), "the memory was used again too early")
        del spoil


@check
def under_capture(lab: Lab) -> None:
    torch = lab.torch
    src, dst = lab.random("cuda", 1 << 20), lab.random("cuda", 1 << 20)
    lab.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tms.cuda_copy_(dst, src)
    src.random_(0, 256)
    graph.replay()
    lab.cuda.synchronize()
    expect(lab.same(dst, src), "the graph does not hold the copy")


@check
def expandable_segments(lab: Lab) -> None:
    """Memory of many small mappings side by side."""
    torch = lab.torch
    settings = getattr(torch.cuda.memory, "_set_allocator_settings", None)
    if settings is None:
        raise Skip("this PyTorch cannot change the setting")
    lab.cuda.empty_cache()
    try:
        settings("expandable_segments:True")
    except RuntimeError as error:
        raise Skip(str(error).splitlines()[0]) from error
    try:
        device = lab.random("cuda", 200 << 20)
        for place in ("cpu", "pinned"):
            lab.copy(device, lab.random(place, 200 << 20), "tms_memcpy")
            lab.copy(lab.random(place, 200 << 20), device, "tms_memcpy", place == "pinned")
    finally:
        device = None
        lab.cuda.empty_cache()
        settings("expandable_segments:False")


@check
def memory_of_a_saver(lab: Lab) -> None:
    """Addresses stay valid over a pause, with other memory behind them."""
    torch = lab.torch
    saver = tms.Saver.default()
    address = saver.malloc(64 << 20, 0, tag="copies", backup="pinned")

    class Memory:
        __cuda_array_interface__ = {
            "shape": (64 << 20,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

    device = torch.as_tensor(Memory(), device="cuda")
    host = lab.random("cpu", 64 << 20)
    tms.cuda_copy_(device, host)
    for _ in range(2):
        saver.pause("copies")
        view = saver.backup(address, 64 << 20)
        kept = torch.frombuffer(view, dtype=torch.uint8)
        expect(torch.equal(kept, host), "the backup has other bytes")
        other = lab.random("cuda", 64 << 20)
        lab.copy(other, kept, "tms_memcpy")
        del kept, view
        saver.resume("copies")
        expect(lab.same(tms.cuda_copy_d2h(device), host), "wrong bytes after a resume")
        host.random_(0, 256)
        lab.copy(device, host, "tms_memcpy")
    del device
    lab.cuda.synchronize()
    saver.free(address)


@check
def threads(lab: Lab) -> None:
    torch = lab.torch
    failures: List[str] = []

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(lab.stream()):
                for _ in range(10):
                    host = torch.full((3 << 20,), number, dtype=torch.uint8)
                    device = tms.cuda_copy_h2d(host)
                    back = tms.cuda_copy_d2h(device, pin_memory=bool(number % 2))
                    expect(bool((back == number).all()), f"thread {number} has other bytes")
        except BaseException:
            failures.append(traceback.format_exc())

    running = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    expect(not failures, failures[0] if failures else "")


@check
def two_devices(lab: Lab) -> None:
    torch = lab.torch
    if lab.cuda.device_count() < 2:
        raise Skip("one GPU")
    for to, start in (
        ("cuda:0", "cuda:1"),
        ("cuda:1", "cuda:0"),
        ("cuda:1", "cpu"),
        ("cuda:1", "pinned"),
        ("cpu", "cuda:1"),
        ("pinned", "cuda:1"),
    ):
        for non_blocking in (False, True):
            lab.copy(
                lab.random(to, lab.bytes), lab.random(start, lab.bytes), "tms_memcpy", non_blocking
            )
            dst, src = lab.random(to, 1000, 3000), lab.random(start, 1000, 2000)
            lab.copy(dst[:, :1500], src[:, 500:], "tms_memcpy_2d", non_blocking)
            dst, src = lab.random(to, 30, 40, 512), lab.random(start, 40, 30, 512)
            lab.copy(dst, src.transpose(0, 1), "tms_memcpy_batch", non_blocking)
    near = torch.zeros(1 << 22, dtype=torch.uint8, device="cuda:0")
    far = torch.zeros(1 << 22, dtype=torch.uint8, device="cuda:1")
    for value in range(1, 5):
        with torch.cuda.device(0):
            torch.cuda._sleep(CYCLES)
            near.fill_(value)
        tms.cuda_copy_d2d(far, near, non_blocking=True)
        with torch.cuda.device(1):
            seen = far.clone()
        near.fill_(99)
        expect(bool((seen == value).all()), "the copy is in no order with the streams")


def run(lab: Lab, wanted: str) -> Tuple[int, int]:
    passed = failed = 0
    for function in CHECKS:
        name = function.__name__
        if wanted not in name:
            continue
        try:
            function(lab)
            lab.synchronize()
        except Skip as why:
            print(f"skip {name} {why}", flush=True)
        except Exception as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)
            lines = " < ".join(str(frame.lineno) for frame in reversed(where))
            text = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"FAIL {name} {text[:600]} (lines {lines})", flush=True)
        else:
            passed += 1
            print(f"ok {name}", flush=True)
    return passed, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=64, help="size of the large tensors")
    parser.add_argument("--only", default="", metavar="WORD", help="checks with it in the name")
    options = parser.parse_args()
    try:
        import torch
    except ImportError as error:
        print(f"error: PyTorch cannot be imported: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: PyTorch finds no GPU", file=sys.stderr)
        return 2
    passed, failed = run(Lab(torch, options.mib), options.only)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
