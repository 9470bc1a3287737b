#!/usr/bin/env python3
"""Pauses and resumes memory through the ctypes binding and checks the bytes. Needs no GPU.

    python basic.py [--mib 256]

It runs on the host device, also on a machine with a GPU: the script writes through the addresses,
and device memory can be written only by the GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

import tms_memcache as tms  # noqa: E402


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / (1 << 20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256, help="size of the weights")
    arguments = parser.parse_args()

    logging.basicConfig(level=logging.WARNING)
    tms.forward_logs(logging.WARNING)
    print(f"library {tms.version()} from {tms.library_path()}")

    size = arguments.mib << 20
    secret = os.urandom(1 << 20)
    with tms.Saver(device="host") as saver:
        with tms.region("weights", backup="mmap"):
            weights = saver.malloc(size)
        with tms.region("cache"):
            cache = saver.malloc(size)
        for offset in range(0, size, len(secret)):
            ctypes.memmove(weights + offset, secret, len(secret))
            ctypes.memmove(cache + offset, secret, len(secret))
        print(f"filled          {resident_mib():8.0f} MiB resident")

        saver.pause("cache")
        print(f"cache paused    {resident_mib():8.0f} MiB resident")

        with saver.pause_async("weights") as operation:
            result = operation.wait(60)
        print(f"weights paused  {resident_mib():8.0f} MiB resident, {result.copied_bytes} copied")
        for entry in saver.stats():
            print(f"  {entry.tag:8} paused {entry.paused_bytes} backed {entry.backed_bytes}")

        start = time.perf_counter()
        saver.resume()
        seconds = time.perf_counter() - start
        same = all(
            ctypes.string_at(weights + offset, len(secret)) == secret
            for offset in range(0, size, len(secret))
        )
        print(f"resumed         {resident_mib():8.0f} MiB resident, {seconds * 1000:.1f} ms")
        print("the weights are byte for byte what they were" if same else "the weights DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
