#!/usr/bin/env python3
"""The package torch_memory_saver beside our file, in the same run, on the same machine.

    python bench_torch_memory_saver.py [--wheel FILE_OR_DIR] [--library FILE] [--disk DIR] [--json]

10.7 GB as 320 x 32 MiB and as 20 x 512 MiB: pause and resume without a backup and with pinned memory,
for the first time and again, retained (with other bytes each time, and unchanged), mmap and file;
and the bare pinned copy of the same run.
Each file and shape has its own process, so that "first time" is one. Host memory is touched and
released once before the timing, because on a virtual machine the first touch is slower; at most
half of what is available. Data are random and compared by a checksum on the GPU after the timing.
Needs a GPU, PyTorch, numpy and the package; ends with 2 and one line if something is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

MIB = 1 << 20
SHAPES = {"320x32": (320, 32 * MIB), "20x512": (20, 512 * MIB)}
FILES = ("ours", "package")
CHILD_TIMEOUT_S = 150

#: Further processes for each file in which "none" is measured, by turns.
ROUNDS = 4

#: Between a pause and its resume, where bytes are copied. The driver clears released memory in the
#: background (17 ms for 10.7 GB on an H200), which slows copies to whoever resumes at once.
IDLE_S = 0.3

#: Case: region options, cycles before the timing, timed cycles.
CASES: Dict[str, Tuple[Dict[str, Any], int, int]] = {
    "none first": ({}, 0, 1),
    "none": ({}, 2, 7),
    "pinned first": ({"enable_cpu_backup": True}, 0, 1),
    "pinned again": ({"enable_cpu_backup": True}, 0, 3),
    "retained": ({"enable_cpu_backup": True}, 1, 3),
    "retained unchanged": ({"enable_cpu_backup": True}, 1, 3),
    "mmap": ({"enable_cpu_backup": True, "cpu_backup_backend": "mmap"}, 0, 2),
    "file": ({"enable_disk_backup": True}, 0, 2),
}

#: Runs on the memory of this case, if it is the one before.
SAME_MEMORY = {
    "none": "none first",
    "pinned again": "pinned first",
    "retained unchanged": "retained",
}

#: Gets other bytes before every pause; the other cases keep theirs.
CHANGED = {"retained"}

#: Without a backup: measured by several processes for each file.
BY_TURNS = ("none first", "none")


class Weights:
    """The tensors of one case, and the checksums of their random bytes."""

    def __init__(
        self, torch: Any, saver: Any, tag: str, count: int, size: int, region: Dict[str, Any]
    ) -> None:
        self.torch = torch
        self.bytes = count * size
        with saver.region(tag=tag, **region):
            self.tensors = [
                torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(count)
            ]
        self.positions = torch.arange(1, size // 8 + 1, dtype=torch.int64, device="cuda")
        self.change()

    def change(self) -> None:
        for tensor in self.tensors:
            tensor.view(self.torch.int64).random_()
        self.expected = self.checksums()

    def checksums(self) -> List[int]:
        """Depends on every byte and its position; wraps around."""
        sums = [(tensor.view(self.torch.int64) * self.positions).sum() for tensor in self.tensors]
        return [int(value) for value in sums]

    def unchanged(self) -> bool:
        return self.checksums() == self.expected


def timed(torch: Any, work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def copy_ceiling(torch: Any) -> Dict[str, float]:
    """GB/s of cudaMemcpyAsync to and from pinned memory, median of five copies of 1 GiB."""
    rates = pinned_copies(torch, 1024 * MIB)
    gc.collect()
    torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, RuntimeError):
        torch._C._host_emptyCache()
    return rates


def pinned_copies(torch: Any, size: int) -> Dict[str, float]:
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    device.view(torch.int64).random_()
    host.copy_(device)
    to_host = [timed(torch, lambda: host.copy_(device, non_blocking=True)) for _ in range(5)]
    to_device = [timed(torch, lambda: device.copy_(host, non_blocking=True)) for _ in range(5)]
    return {
        "d2h": size / statistics.median(to_host) / 1e9,
        "h2d": size / statistics.median(to_device) / 1e9,
    }


def run_child(shape: str, shrink: int, disk: str, cases: List[str]) -> None:
    """One process: prints a JSON line for every case as it is done."""
    count, size = SHAPES[shape]
    size //= shrink
    import torch
    from torch_memory_saver import torch_memory_saver as saver

    saver.hook_mode = "torch"
    torch.cuda.init()
    print(json.dumps({"ceiling": copy_ceiling(torch)}), flush=True)
    saver.set_disk_backup_dir(disk)
    weights: Optional[Weights] = None
    tag = ""
    for previous, case, following in zip([None, *cases], cases, [*cases[1:], None]):
        region, warm, cycles = CASES[case]
        if weights is None or SAME_MEMORY.get(case) != previous:
            tag = case.replace(" ", "-")
            saver.retain_cpu_backup = case.startswith("retained")
            weights = Weights(torch, saver, tag, count, size, region)
        pause, resume = [], []
        for cycle in range(warm + cycles):
            if case in CHANGED:
                weights.change()
            pause_s = timed(torch, lambda: saver.pause(tag))
            if region:
                time.sleep(IDLE_S)
            resume_s = timed(torch, lambda: saver.resume(tag))
            if cycle >= warm:
                pause.append(pause_s)
                resume.append(resume_s)
        right = case in BY_TURNS or weights.unchanged()
        print(
            json.dumps(
                {
                    "case": case,
                    "bytes": weights.bytes,
                    "pause_s": statistics.median(pause),
                    "resume_s": statistics.median(resume),
                    "bytes_right": right,
                }
            ),
            flush=True,
        )
        if following is None or SAME_MEMORY.get(following) != case:
            weights = None
            drop(torch, saver, tag)


def drop(torch: Any, saver: Any, tag: str) -> None:
    pools = saver._impl._mem_pools
    cdll = saver._impl._binary_wrapper.cdll
    gc.collect()
    torch.cuda.synchronize()
    # The package's own file ends the process when memory is freed outside a region.
    cdll.tms_set_interesting_region(True)
    for key in [key for key in pools if key[0] == tag]:
        del pools[key]
    gc.collect()
    torch.cuda.empty_cache()
    cdll.tms_set_interesting_region(False)


def touchable_gib(wanted: int) -> int:
    """``wanted``, but no more than half of the memory that is available."""
    amounts = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        amounts.append(int(text.split("MemAvailable:")[1].split()[0]) << 10)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        amounts.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    most = min(amounts, default=0) // 2 >> 30
    if wanted <= most:
        return wanted
    print(
        f"# touching {most} GiB of host memory instead of {wanted}: half of what is available",
        file=sys.stderr,
        flush=True,
    )
    return most


def touch_host_memory(wanted: int) -> int:
    """Lets the machine find its memory before anything is timed; returns the GiB."""
    gib = touchable_gib(wanted)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0x8000)
    pieces = [mmap.mmap(-1, 1 << 30, flags=flags) for _ in range(gib)]
    for piece in pieces:
        piece.close()
    return max(gib, 0)


def measure(
    file: str, shape: str, package: Path, options: argparse.Namespace, disk: Path
) -> Dict[str, Any]:
    path = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, __file__, "--child", shape, "--disk", str(disk)]
    command += ["--shrink", str(options.shrink)]
    for case in options.case or CASES:
        command += ["--case", case]
    found: Dict[str, Any] = {"cases": {}, "ceiling": None, "error": None}
    output, code = "", 0
    try:
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S
        )
        output, errors, code = child.stdout, child.stderr, child.returncode
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        errors, code = f"longer than {CHILD_TIMEOUT_S} s", 124
    for line in output.splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if "ceiling" in entry:
                found["ceiling"] = entry["ceiling"]
            elif "case" in entry:
                found["cases"][entry.pop("case")] = entry
    if code != 0:
        last = " | ".join(errors.strip().splitlines()[-3:])[-400:]
        found["error"] = f"{file} {shape}: ended with code {code}: {last}"
        print(f"# {found['error']}", file=sys.stderr, flush=True)
    return found


def interleave(
    shape: str,
    packages: Dict[str, Path],
    options: argparse.Namespace,
    found: Dict[str, Dict[str, Any]],
) -> None:
    """Measures without a backup again, by turns, and keeps the median of all processes.

    These are milliseconds of driver calls, which differ more between two processes than between
    the two files.
    """
    cases = [case for case in BY_TURNS if case in (options.case or CASES)]
    these = argparse.Namespace(**{**vars(options), "case": cases})
    measured: Dict[str, List[Dict[str, Any]]] = {file: [found[file]] for file in FILES}
    for round_number in range(ROUNDS):
        for file in FILES if round_number % 2 else FILES[::-1]:
            again = measure(file, shape, packages[file], these, Path(options.disk or "."))
            measured[file].append(again)
    for file in FILES:
        for case in set(cases) & set(found[file]["cases"]):
            entries = [each["cases"][case] for each in measured[file] if case in each["cases"]]
            medians = {
                part: statistics.median(entry[part] for entry in entries)
                for part in ("pause_s", "resume_s")
            }
            found[file]["cases"][case].update(medians)


def rate(entry: Optional[Dict[str, Any]], part: str, case: str) -> str:
    if entry is None:
        return "-"
    if not entry["bytes_right"]:
        return "WRONG BYTES"
    seconds = entry[f"{part}_s"]
    if in_milliseconds(part, case):
        return f"{seconds * 1e3:.1f} ms"
    return f"{entry['bytes'] / seconds / 1e9:.1f}"


def in_milliseconds(part: str, case: str) -> bool:
    """Whether a time says more than a rate, because nothing should be copied."""
    return case in BY_TURNS or (part, case) == ("pause", "retained unchanged")


def speedup(ours: Optional[Dict[str, Any]], theirs: Optional[Dict[str, Any]], part: str) -> str:
    if not ours or not theirs:
        return "-"
    return f"{theirs[f'{part}_s'] / ours[f'{part}_s']:.2f}"


def table(measured: Dict[str, Dict[str, Dict[str, Any]]], cases: List[str]) -> str:
    lines = [
        "GB/s; where nothing should be copied: milliseconds. Ratio: time of the package / time of ours.",
        "",
        "| shape, MiB | backup | | ours | package | ratio | bare copy |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, files in measured.items():
        ceilings = [files[file]["ceiling"] for file in FILES if files[file]["ceiling"]]
        for case in cases:
            ours, theirs = (files[file]["cases"].get(case) for file in FILES)
            for part, direction in (("pause", "d2h"), ("resume", "h2d")):
                bare = "-"
                if ceilings and not in_milliseconds(part, case):
                    bare = f"{statistics.median(c[direction] for c in ceilings):.1f}"
                lines.append(
                    f"| {shape} | {case} | {part} | {rate(ours, part, case)} | "
                    f"{rate(theirs, part, case)} | {speedup(ours, theirs, part)} | {bare} |"
                )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheel", help="the package's wheel, or a folder that holds it")
    parser.add_argument("--library", help="our libtms_preload.so")
    parser.add_argument("--disk", help="folder of the file backups (default: a temporary one)")
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--touch-gib", type=int, default=32, help="host memory touched first")
    parser.add_argument("--shrink", type=int, default=1, help="divide sizes, to try the script")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", choices=list(SHAPES), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    cases = options.case or list(CASES)
    if options.child:
        run_child(options.child, options.shrink, options.disk, cases)
        return 0

    import package_copy

    package_copy.exit_on_sigterm()
    try:
        package_copy.check_machine()
    except package_copy.Unready as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    started = time.monotonic()
    measured: Dict[str, Dict[str, Dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="tms-bench-") as name:
        folder = Path(name)
        try:
            packages = {
                file: package_copy.copy_package(folder / file, options.wheel) for file in FILES
            }
            package_copy.put_ours(packages["ours"], options.library)
        except package_copy.PROBLEMS as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        touched = touch_host_memory(options.touch_gib)
        for shape in options.shape or SHAPES:
            measured[shape] = {}
            for file in FILES:
                disk = Path(options.disk or folder) / f"tms-bench-{file}-{shape}"
                disk.mkdir(parents=True, exist_ok=True)
                try:
                    measured[shape][file] = measure(file, shape, packages[file], options, disk)
                finally:
                    shutil.rmtree(disk, ignore_errors=True)
            if not set(BY_TURNS).isdisjoint(cases):
                interleave(shape, packages, options, measured[shape])
    seconds = time.monotonic() - started
    complete = all(
        entry["bytes_right"]
        for files in measured.values()
        for found in files.values()
        for entry in found["cases"].values()
    ) and all(
        len(found["cases"]) == len(cases) for files in measured.values() for found in files.values()
    )
    if options.json:
        found = {"seconds": round(seconds, 1), "touched_gib": touched, "measured": measured}
        print(json.dumps(found))
    else:
        print(table(measured, cases))
        print(f"\n{touched} GiB of host memory touched first; {seconds:.0f} s in all.")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
