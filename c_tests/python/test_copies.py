"""Copies of tensors, with PyTorch's stand-in over real memory of the library. Run by run.sh, once
on the host device and once on the software CUDA driver (TMS_DEVICE=cuda), whose streams are late.
"""

import contextlib
import ctypes
import itertools
import logging
import os
import random
import subprocess
import sys
import unittest
from unittest import mock

import numpy as np
import tms_memcache as tms
import torch
from tms_memcache import _layout, _library, copies

ON_CUDA = os.environ["TMS_DEVICE"] == "cuda"
GUARD = 64
saver = tms.Saver.default()


class DriverStream:
    """A stream of the CUDA driver on the primary context of a device, as PyTorch has them."""

    def __init__(self, index):
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.context, handle = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), index)
        with self.current():
            self.call("cuStreamCreate", ctypes.byref(handle), 1)
        self.cuda_stream = handle.value

    def call(self, name, *arguments):
        code = getattr(self.driver, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name} returned {code}")

    @contextlib.contextmanager
    def current(self):
        self.call("cuCtxPushCurrent_v2", self.context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def fill(self, tensor, value):
        """Queues work that PyTorch would do by a kernel."""
        count = ctypes.c_size_t(tensor.nbytes)
        with self.current():
            address, stream = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_void_p(self.cuda_stream)
            self.call("cuMemsetD8Async", address, ctypes.c_ubyte(value), count, stream)

    def synchronize(self):
        with self.current():
            self.call("cuStreamSynchronize", ctypes.c_void_p(self.cuda_stream))

    def wait_stream(self, other):
        event = ctypes.c_void_p()
        with other.current():
            self.call("cuEventCreate", ctypes.byref(event), 2)
            self.call("cuEventRecord", event, ctypes.c_void_p(other.cuda_stream))
        with self.current():
            self.call("cuStreamWaitEvent", ctypes.c_void_p(self.cuda_stream), event, 0)


class TensorTest(unittest.TestCase):
    """What the tests have in common."""

    def setUp(self):
        self.random = np.random.default_rng(7)
        if not ON_CUDA:
            # The copies are for CUDA, and the host device stands in for it.
            for name in ("_why_not", "_why_not_on"):
                fake = mock.Mock(return_value=None)
                patch = mock.patch.object(copies, name, fake)
                patch.start()
                self.addCleanup(patch.stop)

    def bytes(self, count):
        return self.random.integers(0, 256, count, dtype=np.uint8)

    def block(self, place, count):
        """Random bytes on a device or on the host, as an array that keeps nothing else alive."""
        if place == "cpu":
            return self.bytes(count)
        address = saver.malloc(max(count, 1), int(place.split(":")[1]))
        self.addCleanup(saver.free, address)
        array = np.frombuffer((ctypes.c_ubyte * count).from_address(address), np.uint8)
        array[:] = self.bytes(count)
        return array

    def tensor(self, place, shape, dtype="u1", order=None):
        """A tensor inside guard bytes. ``order``: dimensions, the widest step first."""
        dtype = np.dtype(dtype)
        shape = tuple(shape)
        order = tuple(order if order is not None else range(len(shape)))
        count = int(np.prod(shape)) * dtype.itemsize
        block = self.block(place, count + 2 * GUARD)
        inner = block[GUARD : GUARD + count].view(dtype)
        inner = inner.reshape([shape[dimension] for dimension in order])
        return torch.Tensor(inner.transpose(np.argsort(order).astype(int)), place), block

    @contextlib.contextmanager
    def calls(self):
        """The library's copy functions that are called meanwhile, with their arguments."""
        found = []
        library = _library.load()

        def spy(name):
            function = getattr(library, name)

            def call(*arguments):
                found.append((name, arguments))
                return function(*arguments)

            return call

        with contextlib.ExitStack() as stack:
            for name in _library._COPIES:
                stack.enter_context(mock.patch.object(library, name, spy(name)))
            yield found

    def raw(self, tensor):
        return np.ascontiguousarray(tensor.array).tobytes()


class CopyTest(TensorTest):
    def check(self, dst, src, function, block=None, copy=tms.cuda_copy_):
        """Copies; bytes are right, the given function did it, and nothing around was touched."""
        before = None if block is None else (bytes(block[:GUARD]), bytes(block[-GUARD:]))
        expected = self.raw(src)
        version = dst.version
        with self.calls() as calls:
            self.assertIs(copy(dst, src), dst)
        self.assertEqual(self.raw(dst), expected)
        self.assertEqual(self.raw(src), expected)
        self.assertEqual([name for name, _ in calls], [function] if function else [])
        self.assertEqual(dst.copies, 0)
        self.assertEqual(dst.version - version, 1 if function else 0)
        if before:
            self.assertEqual((bytes(block[:GUARD]), bytes(block[-GUARD:])), before)

    PLACES = (("cuda:0", "cpu"), ("cpu", "cuda:0"), ("cuda:0", "cuda:0"))

    def test_shapes_and_dtypes(self):
        shapes = ((), (1,), (7,), (3, 5, 7), (1 << 20, 3), (2, 1, 1, 2))
        for (to, start), shape in itertools.product(self.PLACES, shapes):
            for dtype in ("?", "u1", "i2", "f4", "f8", "c16"):
                with self.subTest(to=to, start=start, shape=shape, dtype=dtype):
                    dst, block = self.tensor(to, shape, dtype)
                    src, _ = self.tensor(start, shape, dtype)
                    self.check(dst, src, "tms_memcpy", block)

    def test_nothing_to_copy(self):
        for to, start in self.PLACES:
            dst, block = self.tensor(to, (3, 0, 2))
            src, _ = self.tensor(start, (3, 0, 2))
            self.check(dst, src, None, block)
        dst, _ = self.tensor("cuda:0", (4,))
        self.check(dst, dst, None)

    def test_the_same_order_is_one_copy(self):
        for (to, start), order in itertools.product(self.PLACES, itertools.permutations(range(3))):
            dst, block = self.tensor(to, (4, 6, 10), "i2", order)
            src, _ = self.tensor(start, (4, 6, 10), "i2", order)
            self.check(dst, src, "tms_memcpy", block)

    def test_rows(self):
        for to, start in self.PLACES:
            dst, block = self.tensor(to, (37, 400), "f4")
            src, _ = self.tensor(start, (37, 300), "f4")
            other = self.raw(dst[:, 300:])
            self.check(dst[:, 100:300], src[:, 50:250], "tms_memcpy_2d", block)
            self.assertEqual(self.raw(dst[:, 300:]), other)
            # Rows of two dimensions each are rows all the same.
            src, _ = self.tensor(start, (37, 4, 100), "f4")
            self.check(dst.view(37, 4, 100)[5::2, :2], src[5::2, 2:], "tms_memcpy_2d", block)

    def test_runs(self):
        for to, start in self.PLACES:
            dst, block = self.tensor(to, (5, 7, 9, 128), "i2")
            src, _ = self.tensor(start, (5, 7, 9, 128), "i2", (2, 0, 1, 3))
            self.check(dst, src, "tms_memcpy_batch", block)
            src, _ = self.tensor(start, (5, 9, 11, 128), "i2")
            inside = src[:, 1:8, 2:]
            self.check(dst, inside, "tms_memcpy_batch", block)
            one, _ = self.tensor(start, (1, 7, 1, 128), "i2")
            repeated = torch.Tensor(np.broadcast_to(one.array, dst.shape), start)
            self.check(dst, repeated, "tms_memcpy_batch", block)

    def test_random_strides(self):
        chance = random.Random(3)
        for _ in range(40):
            to, start = chance.choice(self.PLACES)
            shape = [chance.randint(1, 6) for _ in range(chance.randint(1, 3))] + [256]
            whole = [count + chance.randint(0, 3) for count in shape]
            step = [chance.choice((1, 1, 2)) for _ in shape[:-1]] + [1]
            parts = []
            for place in (to, start):
                sizes = [count * each for count, each in zip(whole, step)]
                order = [*chance.sample(range(len(sizes) - 1), len(sizes) - 1), len(sizes) - 1]
                tensor, block = self.tensor(place, sizes, order=order)
                index = tuple(slice(0, n * each, each) for n, each in zip(shape, step))
                parts.append((tensor[index], block))
            (dst, block), (src, _) = parts
            before = bytes(block[:GUARD]), bytes(block[-GUARD:])
            with self.subTest(shape=shape, dst=dst.stride(), src=src.stride()):
                tms.cuda_copy_(dst, src)
                self.assertEqual(self.raw(dst), self.raw(src))
                self.assertEqual((bytes(block[:GUARD]), bytes(block[-GUARD:])), before)
                self.assertEqual(dst.copies, 0)

    def left_to_torch(self, dst, src):
        with self.calls() as calls:
            self.assertIs(tms.cuda_copy_(dst, src), dst)
        self.assertEqual((calls, dst.copies), ([], 1))

    def test_what_copy_does_better(self):
        dst, _ = self.tensor("cuda:0", (500, 100))
        src, _ = self.tensor("cpu", (500, 100), order=(1, 0))
        self.left_to_torch(dst, src)
        self.assertEqual(self.raw(dst), self.raw(src))
        with mock.patch.object(copies, "MOST_PIECES", 5 * 7 * 9 - 1):
            dst, _ = self.tensor("cuda:0", (5, 7, 9, 256))
            src, _ = self.tensor("cpu", (5, 7, 9, 256), order=(2, 0, 1, 3))
            self.left_to_torch(dst, src)
            self.assertEqual(self.raw(dst), self.raw(src))

    def test_what_is_more_than_bytes(self):
        dst, _ = self.tensor("cuda:0", (4, 6), "f8")
        src, _ = self.tensor("cpu", (4, 6), "u1")
        self.left_to_torch(dst, src)
        np.testing.assert_array_equal(dst.array, src.array)
        row, _ = self.tensor("cpu", (6,), "f8")
        dst.copies = 0
        self.left_to_torch(dst, row)
        self.assertEqual(self.raw(dst), self.raw(row) * 4)
        for name, value in (
            ("is_conj", lambda: True),
            ("is_neg", lambda: True),
            ("is_inference", lambda: True),
            ("is_quantized", True),
            ("layout", "sparse"),
        ):
            with self.subTest(name):
                dst, _ = self.tensor("cuda:0", (8,))
                src, _ = self.tensor("cpu", (8,))
                setattr(dst, name, value)
                self.left_to_torch(dst, src)
        with torch.enable_grad():
            src, _ = self.tensor("cpu", (8,))
            src.requires_grad = True
            dst, _ = self.tensor("cuda:0", (8,))
            self.left_to_torch(dst, src)
        dst, _ = self.tensor("cuda:0", (8,))
        self.check(dst, src, "tms_memcpy")

        class Subclass(torch.Tensor):
            pass

        self.left_to_torch(Subclass(dst.array.copy(), "cuda:0"), src)
        parameter = torch.nn.Parameter(dst.array, "cuda:0")
        self.check(parameter, src, "tms_memcpy")
        on_host, _ = self.tensor("cpu", (8,))
        self.left_to_torch(on_host, src)
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
            dst, _ = self.tensor("cuda:0", (8,))
            self.left_to_torch(dst, src)

    def test_overlap_is_left_to_torch(self):
        dst, _ = self.tensor("cuda:0", (1000,))
        self.left_to_torch(dst[:600], dst[400:])
        self.check(dst[:500], dst[500:], "tms_memcpy")
        src, _ = self.tensor("cpu", (5, 300))
        one, _ = self.tensor("cuda:0", (300,))
        folded = np.lib.stride_tricks.as_strided(one.array, (5, 300), (0, 1))
        self.left_to_torch(torch.Tensor(folded, "cuda:0"), src)

    def test_directions(self):
        host, _ = self.tensor("cpu", (3, 400), "i2")
        device, block = self.tensor("cuda:0", (3, 400), "i2")
        self.assertIs(tms.cuda_copy_h2d(host, out=device), device)
        self.assertEqual(self.raw(device), self.raw(host))
        back, _ = self.tensor("cpu", (3, 400), "i2")
        self.assertIs(tms.cuda_copy_d2h(device, back), back)
        self.assertEqual(self.raw(back), self.raw(host))
        self.check(
            self.tensor("cuda:0", (3, 400), "i2")[0], device, "tms_memcpy", copy=tms.cuda_copy_d2d
        )
        fresh = tms.cuda_copy_d2h(device)
        self.assertEqual((self.raw(fresh), fresh.pinned), (self.raw(host), False))
        fresh = tms.cuda_copy_d2h(device, pin_memory=True)
        self.assertEqual((self.raw(fresh), fresh.pinned), (self.raw(host), True))

    @contextlib.contextmanager
    def torch_allocates_here(self):
        """PyTorch's GPU memory comes from the library meanwhile."""
        from torch import _memory

        class Allocator:
            malloc = staticmethod(saver.malloc)
            free = staticmethod(lambda address, _: saver.free(address))

        pool = _memory.Pool(Allocator)
        pool.closed = True
        _memory.active.__dict__.setdefault("pools", []).append(pool)
        try:
            yield
        finally:
            _memory.active.pools.pop()

    def test_new_tensors_on_a_device(self):
        host, _ = self.tensor("cpu", (3, 400), "i2")
        with self.torch_allocates_here():
            for device in (None, "cuda", "cuda:0", torch.device("cuda:0"), 0):
                found = tms.cuda_copy_h2d(host, device)
                self.assertEqual((str(found.device), found.copies), ("cuda:0", 0))
                self.assertEqual(self.raw(found), self.raw(host))
                del found

    def test_wrong_arguments_are_named(self):
        host, _ = self.tensor("cpu", (3, 4), "i2")
        device, _ = self.tensor("cuda:0", (3, 4), "i2")
        wide, _ = self.tensor("cuda:0", (3, 4), "f4")
        long, _ = self.tensor("cpu", (4, 4), "i2")
        sparse, _ = self.tensor("cpu", (3, 4), "i2")
        sparse.layout = "sparse"
        for error, words, call in (
            (TypeError, "dst", lambda: tms.cuda_copy_(host.array, host)),
            (TypeError, "src", lambda: tms.cuda_copy_(device, [1, 2])),
            (ValueError, "src .* cpu tensor", lambda: tms.cuda_copy_h2d(device)),
            (ValueError, "src .* cuda tensor", lambda: tms.cuda_copy_d2h(host)),
            (ValueError, "out .* cuda tensor", lambda: tms.cuda_copy_h2d(host, out=host)),
            (ValueError, "out .* cpu tensor", lambda: tms.cuda_copy_d2h(device, device)),
            (ValueError, "src .* cuda tensor", lambda: tms.cuda_copy_d2d(device, host)),
            (ValueError, "dst .* cuda tensor", lambda: tms.cuda_copy_d2d(host, device)),
            (TypeError, "out .* dtype", lambda: tms.cuda_copy_h2d(host, out=wide)),
            (TypeError, "dst .* dtype", lambda: tms.cuda_copy_d2d(device, wide)),
            (ValueError, "out .* shape", lambda: tms.cuda_copy_d2h(device, long)),
            (ValueError, "device", lambda: tms.cuda_copy_h2d(host, "cpu")),
            (ValueError, "out .* cuda:1", lambda: tms.cuda_copy_h2d(host, 1, device)),
            (ValueError, "out .* pinned", lambda: tms.cuda_copy_d2h(device, host, True)),
            (TypeError, "src .* dense", lambda: tms.cuda_copy_h2d(sparse)),
        ):
            with self.subTest(words), self.calls() as calls:
                with self.assertRaisesRegex(error, words):
                    call()
                self.assertEqual(calls, [])

    @contextlib.contextmanager
    def streams(self, **streams):
        """PyTorch's current streams; the ones of a driver also make their device current."""

        def of(device):
            return streams[f"device{device.index}"]

        def current(device):
            return getattr(of(device), "current", contextlib.nullcontext)()

        with mock.patch.object(torch.cuda, "current_stream", of):
            with mock.patch.object(torch.cuda, "device", current):
                yield

    def test_streams_of_torch(self):
        log = []

        class Stream:
            cuda_stream = 0

            def __init__(self, name):
                self.name = name

            def synchronize(self):
                log.append(f"{self.name} synchronised")

            def wait_stream(self, other):
                log.append(f"{self.name} waits for {other.name}")

        def copy(dst, src, non_blocking):
            log.clear()
            torch.told.clear()
            library = _library.load()
            with contextlib.ExitStack() as stack:
                for name in _library._COPIES:
                    call = mock.Mock(side_effect=lambda *_, name=name: log.append(name) or 0)
                    stack.enter_context(mock.patch.object(library, name, call))
                stack.enter_context(self.streams(device0=Stream("zero"), device1=Stream("one")))
                tms.cuda_copy_(dst, src, non_blocking)
            return list(log)

        zero, _ = self.tensor("cuda:0", (100,))
        near, _ = self.tensor("cuda:0", (100,))
        host, _ = self.tensor("cpu", (100,))
        far = torch.Tensor(self.bytes(100), "cuda:1")
        for dst, src in ((zero, host), (host, zero), (zero, near)):
            self.assertEqual(copy(dst, src, False), ["zero synchronised", "tms_memcpy"])
        for dst, src in ((zero, host), (host, zero), (zero, near)):
            self.assertEqual(copy(dst, src, True), ["tms_memcpy_on_stream"])
        self.assertEqual(torch.told, [])
        host.pinned = True
        for dst, src in ((zero, host), (host, zero)):
            self.assertEqual(copy(dst, src, True), ["tms_memcpy_on_stream"])
            self.assertEqual(torch.told, [host.data_ptr()])
            self.assertEqual(copy(dst, src, False), ["zero synchronised", "tms_memcpy"])
            self.assertEqual(torch.told, [])
        if not ON_CUDA or tms.device_count() > 1:
            self.assertEqual(
                copy(far, zero, False), ["zero synchronised", "one synchronised", "tms_memcpy"]
            )
            self.assertEqual(
                copy(far, zero, True),
                ["zero waits for one", "tms_memcpy_on_stream", "one waits for zero"],
            )

    @unittest.skipUnless(ON_CUDA, "needs a driver")
    def test_order_on_a_late_stream(self):
        stream = DriverStream(0)
        for round_number, shape in enumerate(((5000,), (20, 700), (6, 5, 512)) * 4):
            middle, _ = self.tensor("cuda:0", shape)
            dst, _ = self.tensor("cuda:0", shape)
            if len(shape) == 2:
                middle, dst = middle[:, :400], dst[:, 100:500]
            elif len(shape) == 3:
                middle, dst = middle[:, 1:4, :256], dst[:, 1:4, 256:]
            block = torch.Tensor(
                np.lib.stride_tricks.as_strided(
                    middle.array, (_layout.extent(middle.shape, middle.stride()),), (1,)
                ),
                "cuda:0",
            )
            host, _ = self.tensor("cpu", dst.shape)
            with self.streams(device0=stream):
                stream.fill(block, round_number + 1)
                self.check_late(dst, middle, True)
                stream.fill(block, 200)
                tms.cuda_copy_(host, dst)
                self.assertEqual(set(self.raw(host)), {round_number + 1})
                # What was queued before the copy still reads the old bytes.
                tms.cuda_copy_(host, middle)
                self.assertEqual(set(self.raw(host)), {200})

    def check_late(self, dst, src, non_blocking):
        with self.calls() as calls:
            tms.cuda_copy_(dst, src, non_blocking=non_blocking)
        self.assertEqual(len(calls), 1)
        self.assertTrue(calls[0][0].endswith("_on_stream"), calls)

    @unittest.skipUnless(ON_CUDA and tms.device_count() > 1, "needs two devices of a driver")
    def test_two_devices(self):
        streams = {"device0": DriverStream(0), "device1": DriverStream(1)}
        for shape, non_blocking in itertools.product(((300_000,), (50, 600)), (False, True)):
            src, _ = self.tensor("cuda:0", shape)
            dst, block = self.tensor("cuda:1", shape)
            back, _ = self.tensor("cuda:0", shape)
            if len(shape) == 2:
                src, dst, back = src[:, :512], dst[:, 50:562], back[:, 88:]
            about = {"shape": shape, "non_blocking": non_blocking}
            with self.subTest(**about), self.streams(**streams):
                expected = self.raw(src)
                tms.cuda_copy_d2d(dst, src, non_blocking)
                tms.cuda_copy_d2d(back, dst, non_blocking)
                torch.cuda.current_stream(torch.device("cuda:0")).synchronize()
                self.assertEqual(self.raw(dst), expected)
                self.assertEqual(self.raw(back), expected)
                self.assertEqual((dst.copies, back.copies), (0, 0))


class FallBackTest(TensorTest):
    """What happens where the library cannot be used."""

    def setUp(self):
        super().setUp()
        copies._say.cache_clear()

    def falls_back(self, *words):
        """Two copies are right, PyTorch made them, and one line of the log says why."""
        host, _ = self.tensor("cpu", (3, 5), "i2")
        with self.assertLogs("tms_memcache.copies", logging.WARNING) as logs:
            for _ in range(2):
                dst = torch.Tensor(np.zeros((3, 5), "i2"), "cuda:0")
                self.assertIs(tms.cuda_copy_h2d(host, out=dst), dst)
                self.assertEqual((self.raw(dst), dst.copies), (self.raw(host), 1))
        self.assertEqual(len(logs.output), 1)
        for word in words:
            self.assertIn(word, logs.output[0])

    @contextlib.contextmanager
    def asked_anew(self):
        """The availability is found out again, and again afterwards."""
        real = [copies._why_not, copies._why_not_on]
        if not ON_CUDA:
            mock.patch.stopall()
            real = [copies._why_not, copies._why_not_on]
        for function in real:
            function.cache_clear()
        try:
            yield
        finally:
            for function in real:
                function.cache_clear()

    def test_a_missing_library(self):
        missing = mock.Mock(side_effect=tms.LibraryNotFound("nowhere\nat all"))
        with self.asked_anew(), mock.patch.dict(os.environ, TMS_DEVICE="auto"):
            with mock.patch.object(_library, "load", missing):
                self.assertFalse(tms.is_cuda_memcpy_available())
                self.falls_back("copy_", "nowhere")

    def test_an_older_library(self):
        with self.asked_anew(), mock.patch.dict(os.environ, TMS_DEVICE="auto"):
            with mock.patch.object(_library, "has_copies", lambda: False):
                self.assertFalse(tms.is_cuda_memcpy_available())
                self.falls_back("copy_", "older")

    def test_a_missing_driver(self):
        with self.asked_anew(), mock.patch.dict(os.environ, TMS_DEVICE="auto"):
            with mock.patch.object(ctypes, "CDLL", mock.Mock(side_effect=OSError("no such"))):
                self.assertFalse(tms.is_cuda_memcpy_available())
                self.falls_back("copy_", "driver")

    def test_host_memory_is_no_device(self):
        with self.asked_anew(), mock.patch.dict(os.environ, TMS_DEVICE="HOST"):
            self.assertFalse(tms.is_cuda_memcpy_available())
            self.falls_back("copy_", "TMS_DEVICE")

    def test_what_the_library_refuses(self):
        library = _library.load()
        with mock.patch.object(library, "tms_memcpy", lambda *_: -6):
            self.falls_back("copy_")
        with mock.patch.object(library, "tms_memcpy", lambda *_: -8):
            dst, _ = self.tensor("cuda:0", (3, 5))
            src, _ = self.tensor("cpu", (3, 5))
            with self.assertRaises(tms.TmsError) as caught:
                tms.cuda_copy_(dst, src)
            self.assertEqual((caught.exception.name, dst.copies, dst.version), ("DEVICE", 0, 0))

    def script(self, script, **environment):
        ended = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.assertEqual(ended.returncode, 0, ended.stderr)
        return ended.stdout

    def test_availability(self):
        ask = (
            "import os, sys, tms_memcache as tms\n"
            "print(tms.is_cuda_memcpy_available(), 'torch' in sys.modules)\n"
        )
        self.assertEqual(self.script(ask), f"{ON_CUDA} False\n")
        self.assertEqual(self.script(ask, TMS_LIBRARY="/nowhere"), "False False\n")
        self.assertEqual(self.script(ask, TMS_DEVICE="nonsense"), "False False\n")
        if ON_CUDA:
            child = (
                ask + "child = os.fork()\n"
                "if child == 0:\n"
                "    os._exit(tms.is_cuda_memcpy_available())\n"
                "print(os.waitpid(child, 0)[1])\n"
            )
            self.assertEqual(self.script(child), "True False\n0\n")
            self.assertEqual(self.script(ask, FAKECUDA_DEVICES="0"), "False False\n")


if __name__ == "__main__":
    unittest.main()
