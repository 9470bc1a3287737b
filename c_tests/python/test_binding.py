"""The ctypes binding on the host device. Run by run.sh; TMS_LIBRARY names the library."""

import ctypes
import logging
import os
import select
import subprocess
import sys
import threading
import unittest
from unittest import mock

import tms_memcache as tms
from tms_memcache import _library

MIB = 1 << 20
SIZE = 8 * MIB


def write(address, data):
    ctypes.memmove(address, data, len(data))


class SaverTest(unittest.TestCase):
    def setUp(self):
        self.saver = tms.Saver(device="host")
        self.addCleanup(self.saver.close)

    def filled(self, tag="default", backup=None, **options):
        with tms.region(tag, backup, **options):
            address = self.saver.malloc(SIZE)
        data = os.urandom(SIZE)
        write(address, data)
        return address, data

    def test_backup_keeps_bytes(self):
        for backup in ("pinned", "mmap", "file"):
            with self.subTest(backup=backup):
                address, data = self.filled(backup, backup)
                for _ in range(2):
                    result = self.saver.pause(backup)
                    self.assertEqual((result.done_count, result.done_bytes), (1, SIZE))
                    self.assertEqual(result.failures, ())
                    self.assertEqual(self.saver.query(address).state, tms.State.PAUSED)
                    self.assertEqual(self.saver.resume(backup).done_count, 1)
                    self.assertEqual(ctypes.string_at(address, SIZE), data)
                self.saver.free(address)

    def test_without_backup_bytes_are_gone(self):
        address, data = self.filled()
        self.saver.pause()
        self.saver.resume()
        self.assertNotEqual(ctypes.string_at(address, SIZE), data)

    def test_discarding_needs_none(self):
        address, data = self.filled("weights", "mmap")
        self.assertEqual(self.saver.pause("weights", backup="none").copied_bytes, 0)
        self.saver.resume()
        self.assertNotEqual(ctypes.string_at(address, SIZE), data)

    def test_tags_select(self):
        one, _ = self.filled("one", "mmap")
        two, data = self.filled("two", "mmap")
        self.saver.pause("one")
        self.assertEqual(self.saver.query(one).state, tms.State.PAUSED)
        self.assertEqual(self.saver.query(two).state, tms.State.ACTIVE)
        self.assertEqual(ctypes.string_at(two, SIZE), data)
        result = self.saver.pause("one", "two")
        self.assertEqual((result.done_count, result.unchanged_count), (1, 1))
        self.saver.resume("one", "two")

    def test_nested_regions(self):
        with tms.region("outer"):
            with tms.region("inner"):
                inner = self.saver.malloc(SIZE)
            outer = self.saver.malloc(SIZE)
        self.assertEqual(self.saver.query(inner).tag, "inner")
        self.assertEqual(self.saver.query(outer).tag, "outer")
        with self.assertRaises(ZeroDivisionError):
            with tms.region("left by an exception"):
                1 / 0
        with tms.region("after"):
            self.assertEqual(self.saver.query(self.saver.malloc(SIZE)).tag, "after")

    def test_keywords_instead_of_a_region(self):
        with tms.region("around"):
            address = self.saver.malloc(100, tag="own", backup="mmap")
        found = self.saver.query(address + 50)
        self.assertEqual((found.tag, found.base, found.requested_bytes), ("own", address, 100))
        self.assertGreaterEqual(found.bytes, 100)

    def test_stats(self):
        self.filled("kept", "mmap")
        self.filled("kept", "mmap")
        self.filled("lost")
        self.saver.pause("kept")
        stats = {entry.tag: entry for entry in self.saver.stats()}
        self.assertEqual(set(stats), {"kept", "lost"})
        self.assertEqual((stats["kept"].paused_count, stats["kept"].paused_bytes), (2, 2 * SIZE))
        self.assertEqual(stats["kept"].backed_bytes, 2 * SIZE)
        self.assertEqual((stats["lost"].active_count, stats["lost"].active_bytes), (1, SIZE))

    def test_many_tags_in_stats(self):
        for index in range(40):
            self.saver.malloc(1, tag=f"tag-{index}")
        self.assertEqual(len(self.saver.stats()), 40)

    def test_backup_view(self):
        address, data = self.filled("weights", "mmap")
        self.saver.pause()
        view = self.saver.backup(address, SIZE)
        self.assertEqual(bytes(view), data)
        view[:4] = b"edit"
        self.saver.resume()
        self.assertEqual(ctypes.string_at(address, 4), b"edit")
        self.assertEqual(ctypes.string_at(address + 4, SIZE - 4), data[4:])

    def test_operations(self):
        address, data = self.filled("weights", "pinned")
        with self.saver.pause_async("weights") as operation:
            ready, _, _ = select.select([operation], [], [], 30)
            self.assertTrue(ready)
            self.assertTrue(operation.done)
            self.assertEqual(operation.wait(30).done_bytes, SIZE)
            done, total = operation.progress
            self.assertEqual(done, total)
        operation = self.saver.resume_async()
        self.assertEqual(operation.wait().done_count, 1)
        operation.close()
        operation.close()
        with self.assertRaises(ValueError):
            operation.wait()
        self.assertEqual(ctypes.string_at(address, SIZE), data)

    def test_ordered_resume(self):
        filled = [self.filled("layers", "pinned") for _ in range(4)]
        other, _ = self.filled("others", "pinned")
        self.saver.pause()
        order = [address for address, _ in reversed(filled)]
        with self.saver.resume_ordered_async(order) as operation:
            self.assertIsInstance(operation, tms.OrderedResume)
            for address, data in reversed(filled):
                operation.stream_wait(address)
                self.assertTrue(operation.ready(address + 100))
                self.assertEqual(ctypes.string_at(address, SIZE), data)
            self.assertEqual(operation.wait(30).done_count, 4)
            with self.assertRaisesRegex(TypeError, "^stream must be an integer"):
                operation.stream_wait(order[0], "stream")
            with self.assertRaises(tms.TmsError) as caught:
                operation.ready(other)
            self.assertEqual(caught.exception.name, "NOT_FOUND")
        with self.assertRaises(ValueError):
            operation.ready(order[0])
        self.assertEqual(self.saver.query(other).state, tms.State.PAUSED)
        with self.assertRaises(tms.TmsError) as caught:
            self.saver.resume_ordered_async([other, 16])
        self.assertIn("pointers[1]", str(caught.exception))
        self.assertEqual(self.saver.resume_ordered_async([], wait_ms=5).wait().done_count, 0)
        with self.assertRaises(ValueError):
            self.saver.resume_ordered_async([other], wait_ms=-1)
        with self.assertRaisesRegex(TypeError, r"^addresses\[1\] must be an integer"):
            self.saver.resume_ordered_async([other, None])

    def test_unchanged_memory_is_not_copied_again(self):
        address, data = self.filled("weights", "pinned", retain=True)
        self.assertEqual(self.saver.pause().copied_bytes, SIZE)
        self.saver.resume()
        result = self.saver.pause()
        self.assertEqual((result.copied_bytes, result.unchanged_bytes), (0, SIZE))
        self.saver.resume()
        result = self.saver.pause_async(copy_all=True).wait()
        self.assertEqual((result.copied_bytes, result.unchanged_bytes), (SIZE, 0))
        self.saver.resume()
        result = self.saver.pause(copy_all=True)
        self.assertEqual((result.copied_bytes, result.unchanged_bytes), (SIZE, 0))
        self.saver.resume()
        self.assertEqual(ctypes.string_at(address, SIZE), data)

    def test_pinned_memory(self):
        self.assertEqual(self.saver.pinned_stats().pinned_bytes, 0)
        self.saver.prewarm(SIZE)
        stats = self.saver.pinned_stats()
        self.assertGreaterEqual(stats.idle_bytes, SIZE)
        self.assertGreaterEqual(stats.pinned_bytes, stats.idle_bytes + stats.used_bytes)
        self.assertEqual(stats.pinned_bytes, stats.huge_page_bytes + stats.small_page_bytes)
        self.assertGreaterEqual(stats.high_water_bytes, stats.pinned_bytes)
        self.assertGreaterEqual(stats.chunk_count, 1)
        self.assertIsNone(stats.limit_bytes)
        with self.saver.prewarm_async(2 * SIZE) as operation:
            operation.wait(30)
            self.assertGreaterEqual(operation.progress[0], SIZE)
        self.assertGreaterEqual(self.saver.pinned_stats().idle_bytes, 2 * SIZE)
        self.assertGreaterEqual(self.saver.trim(), 2 * SIZE)
        self.assertEqual(self.saver.pinned_stats().idle_bytes, 0)
        with self.assertRaises(tms.TmsError) as caught:
            self.saver.prewarm(1 << 60)
        self.assertEqual(caught.exception.name, "OUT_OF_HOST_MEMORY")
        with self.assertRaises(tms.TmsError) as caught:
            self.saver.prewarm(SIZE, device=99)
        self.assertIn("device", str(caught.exception))

    def test_sizes_have_a_range(self):
        for size in (-1, 1 << 64):
            for call in (
                self.saver.malloc,
                self.saver.prewarm,
                self.saver.prewarm_async,
                self.saver.trim,
            ):
                with self.assertRaisesRegex(ValueError, "bytes must be 0 to"):
                    call(size)
        with self.assertRaisesRegex(TypeError, "^bytes must be an integer, not str"):
            self.saver.prewarm("1G")

    def test_wait_ms_has_a_range(self):
        for wait_ms in (-1, 1 << 32):
            with self.assertRaises(ValueError):
                self.saver.resume(wait_ms=wait_ms)
            with self.assertRaises(ValueError):
                self.saver.resume_async(wait_ms=wait_ms)
        self.saver.resume(wait_ms=(1 << 32) - 1)

    def test_ended_operations_are_not_kept(self):
        for _ in range(3):
            with self.saver.pause_async() as operation:
                operation.wait()
            self.saver.resume_async().wait()
        self.assertLessEqual(len(self.saver._running), 1)

    def test_exit_keeps_the_exception(self):
        library = _library.load()
        with mock.patch.object(library, "tms_saver_free", lambda handle: -10):
            with self.assertRaises(ZeroDivisionError):
                with tms.Saver(device="host") as saver:
                    1 / 0
            with self.assertRaises(tms.TmsError) as caught:
                with saver:
                    pass
        self.assertEqual(caught.exception.name, "BUSY")
        saver.close()

    def test_errors_carry_the_message(self):
        with self.assertRaises(tms.TmsError) as caught:
            self.saver.malloc(1 << 60)
        self.assertIn(caught.exception.name, ("OUT_OF_DEVICE_MEMORY", "OUT_OF_HOST_MEMORY"))
        self.assertTrue(caught.exception.message)
        with self.assertRaises(tms.TmsError) as caught:
            self.saver.query(16)
        self.assertEqual(caught.exception.name, "NOT_FOUND")
        with self.assertRaises(tms.TmsError) as caught:
            self.saver.malloc(0)
        self.assertEqual(caught.exception.name, "INVALID_ARGUMENT")
        with self.assertRaises(tms.TmsError) as caught:
            with tms.region(backup="stone tablets"):
                self.fail("a region with an unknown backup was entered")
        self.assertIn("stone tablets", str(caught.exception))
        with self.assertRaises(tms.TmsError):
            tms.device_info(999)
        with self.assertRaises(ValueError):
            tms.Saver(device="ho\0st")

    def test_messages_are_per_thread(self):
        messages = []

        def fail():
            with self.assertRaises(tms.TmsError) as caught:
                self.saver.query(32)
            messages.append(caught.exception.message)

        threads = [threading.Thread(target=fail) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len(messages), 4)
        self.assertTrue(all(messages))

    def test_free(self):
        address, _ = self.filled("weights", "mmap")
        self.saver.pause()
        self.saver.free(address)
        self.saver.free(0)
        self.assertEqual(self.saver.stats(), [])
        with self.assertRaises(tms.TmsError):
            self.saver.free(address)

    def test_savers_are_apart(self):
        address, data = self.filled("weights")
        with tms.Saver(device="host") as other:
            other.pause()
            self.assertEqual(other.stats(), [])
        self.assertEqual(ctypes.string_at(address, SIZE), data)
        with self.assertRaises(ValueError):
            other.malloc(1)

    def test_threads(self):
        failures = []

        def work(index):
            try:
                for _ in range(5):
                    address, data = self.filled(f"thread-{index}", "mmap")
                    self.saver.pause(f"thread-{index}")
                    self.saver.resume(f"thread-{index}")
                    self.assertEqual(ctypes.string_at(address, SIZE), data)
                    self.saver.free(address)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])


class ModuleTest(unittest.TestCase):
    def test_versions_agree(self):
        self.assertEqual(tms.version(), tms.__version__)
        self.assertEqual(tms.library_path(), os.environ["TMS_LIBRARY"])

    def test_device(self):
        self.assertGreaterEqual(tms.device_count(), 1)
        info = tms.device_info(0)
        self.assertEqual(info.kind, "host")
        self.assertEqual(info.granularity & (info.granularity - 1), 0)

    def test_default_saver_is_one(self):
        one, two = tms.Saver.default(), tms.Saver.default()
        address = one.malloc(SIZE, tag="shared")
        one.close()
        self.assertEqual(two.query(address).tag, "shared")
        two.free(address)

    def test_logs_arrive(self):
        records = []

        class Keep(logging.Handler):
            def emit(self, record):
                records.append(record)

        logger = logging.getLogger("test-of-tms")
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(Keep())
        tms.forward_logs(logging.DEBUG, logger)
        complain = ctypes.CDLL(tms.library_path()).tms_set_cpu_backup_backend
        complain(b"stone tablets")
        tms.stop_forwarding_logs()
        self.assertTrue(any("stone tablets" in record.getMessage() for record in records))
        self.assertTrue(all(record.name.startswith("test-of-tms") for record in records))
        self.assertIn(logging.ERROR, [record.levelno for record in records])
        count = len(records)
        complain(b"stone tablets")
        tms.stop_forwarding_logs()
        self.assertEqual(len(records), count)

    def test_missing_library_is_named(self):
        environment = {**os.environ, "TMS_LIBRARY": "/nowhere/libtms_memcache.so"}
        ended = subprocess.run(
            [sys.executable, "-c", "import tms_memcache; tms_memcache.version()"],
            env=environment,
            capture_output=True,
            text=True,
        )
        self.assertIn("LibraryNotFound", ended.stderr)
        self.assertIn("/nowhere/libtms_memcache.so", ended.stderr)

    def test_library_in_no_place(self):
        with mock.patch.dict(os.environ):
            del os.environ["TMS_LIBRARY"]
            with mock.patch.object(_library, "candidates", lambda name: []):
                with self.assertRaises(tms.LibraryNotFound) as caught:
                    _library.find()
        self.assertIn("set TMS_LIBRARY or use pip install -e", str(caught.exception))

    def test_saver_dropped_while_an_operation_runs(self):
        script = (
            "import time, tms_memcache as tms\n"
            "before = tms.device_info().free_bytes\n"
            "for how in ('del', 'close', 'with', 'closed operation'):\n"
            "    saver = tms.Saver(device='host')\n"
            "    saver.malloc(48 << 20, tag='paused', backup='mmap')\n"
            "    saver.pause('paused')\n"
            "    saver.malloc(48 << 20, tag='full')\n"
            "    operation = saver.resume_async('paused', wait_ms=700)\n"
            "    assert not operation.done\n"
            "    if how == 'closed operation':\n"
            "        operation.close()\n"
            "        del operation\n"
            "    start = time.monotonic()\n"
            "    if how == 'with':\n"
            "        with saver:\n"
            "            pass\n"
            "    elif how == 'close':\n"
            "        saver.close()\n"
            "    del saver\n"
            "    assert time.monotonic() - start > 0.3, how\n"
            "    free = tms.device_info().free_bytes\n"
            "    assert free == before, (how, free, before)\n"
            "    if how != 'closed operation':\n"
            "        assert operation.done\n"
        )
        environment = {**os.environ, "TMS_HOST_DEVICE_MEMORY": "64MB"}
        ended = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.assertEqual((ended.returncode, ended.stderr), (0, ""))

    def test_exit_while_paused(self):
        script = (
            "import tms_memcache as tms, logging\n"
            "tms.forward_logs(logging.DEBUG)\n"
            "saver = tms.Saver.default()\n"
            "saver.malloc(1 << 22, backup='mmap')\n"
            "other = tms.Saver(device='host')\n"
            "other.malloc(1 << 22, backup='file')\n"
            "saver.pause()\n"
            "operation = other.pause_async()\n"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
        )
        self.assertEqual((ended.returncode, ended.stderr), (0, ""))


if __name__ == "__main__":
    unittest.main()
