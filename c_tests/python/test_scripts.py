"""What the scripts check before they work. Run by run.sh; PyTorch and numpy are one-line files."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "python"
sys.path.insert(0, str(SCRIPTS))

import bench_torch_memory_saver as bench  # noqa: E402

ABSENT = "raise ImportError('not here')\n"
NO_GPU = "class cuda:\n    is_available = staticmethod(lambda: False)\n"
GPU = NO_GPU.replace("False", "True")


class UpFrontTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.modules = Path(folder.name) / "modules"
        self.temporary = Path(folder.name) / "temporary"
        self.modules.mkdir()
        self.temporary.mkdir()

    def refused(self, torch, numpy, *words, arguments=()):
        (self.modules / "torch.py").write_text(torch)
        (self.modules / "numpy.py").write_text(numpy)
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.modules),
            "TMPDIR": str(self.temporary),
        }
        for script in ("bench_torch_memory_saver.py", "check_dropin.py"):
            with self.subTest(script=script):
                ended = subprocess.run(
                    [sys.executable, str(SCRIPTS / script), *arguments],
                    env=environment,
                    capture_output=True,
                    text=True,
                )
                self.assertEqual((ended.returncode, ended.stdout), (2, ""), ended.stderr)
                self.assertEqual(len(ended.stderr.splitlines()), 1, ended.stderr)
                for word in ("error: ", *words):
                    self.assertIn(word, ended.stderr)
                self.assertEqual(list(self.temporary.iterdir()), [])

    def test_without_torch(self):
        self.refused(ABSENT, "", "PyTorch", "not here")

    def test_without_numpy(self):
        self.refused(GPU, ABSENT, "numpy", "not here")

    def test_without_a_gpu(self):
        self.refused(NO_GPU, "", "no GPU")

    def test_without_the_package(self):
        self.refused(GPU, "", "nowhere", arguments=["--wheel", str(self.modules / "nowhere")])

    def test_host_memory_that_is_touched(self):
        self.assertEqual(bench.touchable_gib(0), 0)
        total = os.sysconf("SC_PAGESIZE") * os.sysconf("SC_PHYS_PAGES")
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            self.assertLessEqual(bench.touchable_gib(1 << 30), total // 2 >> 30)
        self.assertIn("half of what is available", said.getvalue())

    def test_ended_by_a_signal(self):
        (self.modules / "torch.py").write_text(GPU)
        (self.modules / "numpy.py").write_text("")
        # The probe goes through; the check's own process hangs in its import of PyTorch.
        package = self.modules / "torch_memory_saver"
        package.mkdir()
        (package / "__init__.py").write_text("import time\ntime.sleep(60)\n")
        (self.modules / "torch_memory_saver_hook_mode_torch.abi3.so").write_bytes(b"")
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.modules),
            "TMPDIR": str(self.temporary),
        }
        command = [sys.executable, str(SCRIPTS / "check_dropin.py"), "--theirs", "--mode", "torch"]
        script = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        with script:
            script.stdout.readline()
            self.assertNotEqual(list(self.temporary.iterdir()), [])
            script.terminate()
        self.assertEqual(script.returncode, 128 + signal.SIGTERM)
        self.assertEqual(list(self.temporary.iterdir()), [])


if __name__ == "__main__":
    unittest.main()
