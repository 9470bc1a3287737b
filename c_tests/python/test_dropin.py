"""The drop-in tool on a copy of the real package. Run by run.sh, which sets TMS_TEST_PACKAGE (the
unpacked package) and TMS_PRELOAD_LIBRARY."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

PACKAGE = Path(os.environ["TMS_TEST_PACKAGE"])
OURS = Path(os.environ["TMS_PRELOAD_LIBRARY"])
NAMES = [
    f"torch_memory_saver_hook_mode_{mode}{cuda}.abi3.so"
    for mode in ("preload", "torch")
    for cuda in ("", "_cu12", "_cu13")
]


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class DropinTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.site = Path(folder.name) / "site"
        shutil.copytree(PACKAGE, self.site)
        self.originals = {name: digest(self.site / name) for name in NAMES}

    def tool(self, action, *arguments, where=None):
        where = where or ["--package", str(self.site / "torch_memory_saver")]
        return subprocess.run(
            [sys.executable, "-m", "tms_memcache.dropin", action, *where, *arguments],
            capture_output=True,
            text=True,
        )

    def active(self):
        return json.loads(self.tool("status", "--json").stdout)["active"]

    def done(self, ended):
        self.assertEqual((ended.returncode, ended.stderr), (0, ""))
        return ended.stdout

    def refused(self, ended, *words):
        self.assertEqual(ended.returncode, 1, ended.stdout)
        self.assertNotIn("Traceback", ended.stderr)
        for word in words:
            self.assertIn(word, ended.stderr)

    def assert_original(self):
        for name, expected in self.originals.items():
            self.assertEqual(digest(self.site / name), expected, name)
        self.assertEqual(list(self.site.glob("*.orig")), [])

    def test_install_status_restore(self):
        self.assertEqual(self.active(), "original")
        self.assertIn("installed", self.done(self.tool("install")))
        self.assertEqual(self.active(), "ours")
        for name, expected in self.originals.items():
            self.assertEqual(digest(self.site / name), digest(OURS))
            self.assertEqual(digest(self.site / (name + ".orig")), expected)
        self.assertIn("already installed", self.done(self.tool("install")))
        self.assertIn("restored 6 files", self.done(self.tool("restore")))
        self.assertEqual(self.active(), "original")
        self.assert_original()
        self.assertIn("nothing to restore", self.done(self.tool("restore")))

    def test_another_version_of_ours(self):
        newer = self.site / "newer.so"
        newer.write_bytes(OURS.read_bytes() + b"\0")
        self.done(self.tool("install"))
        self.done(self.tool("install", "--library", str(newer)))
        self.assertEqual(digest(self.site / NAMES[0]), digest(newer))
        self.done(self.tool("restore"))
        newer.unlink()
        self.assert_original()

    def test_package_reinstalled_over_ours(self):
        self.done(self.tool("install"))
        for name in NAMES[:3]:
            shutil.copyfile(PACKAGE / name, self.site / name)
        self.assertEqual(self.active(), "mixed")
        self.done(self.tool("install"))
        self.assertEqual(self.active(), "ours")
        self.done(self.tool("restore"))
        self.assert_original()

    def test_reinstalled_then_restored(self):
        self.done(self.tool("install"))
        for name in NAMES:
            shutil.copyfile(PACKAGE / name, self.site / name)
        self.done(self.tool("restore"))
        self.assert_original()

    def test_status_after_a_reinstall(self):
        self.assertNotIn("overwritten", self.done(self.tool("status")))
        self.done(self.tool("install"))
        for name in NAMES:
            shutil.copyfile(PACKAGE / name, self.site / name)
        text = self.done(self.tool("status"))
        self.assertIn("original (ours was overwritten; run install again)", text)
        self.assertIn(" 0.0.10 in ", text)

    def test_another_version_of_the_package(self):
        information = self.site / "torch_memory_saver-0.0.10.dist-info"
        metadata = information / "METADATA"
        metadata.write_text(metadata.read_text().replace("Version: 0.0.10", "Version: 0.0.9"))
        words = ("0.0.9", "pip install torch_memory_saver==0.0.10", "--force")
        self.refused(self.tool("install"), *words)
        self.assert_original()
        self.assertIn(" 0.0.9 in ", self.done(self.tool("status")))
        self.done(self.tool("install", "--force"))
        self.assertEqual(self.active(), "ours")
        self.done(self.tool("restore"))
        shutil.rmtree(information)
        self.refused(self.tool("install"), "dist-info", "--force")
        self.assert_original()

    def uninstall(self, site):
        """What pip does: removes the files that it installed, and empty folders."""
        record = next(site.glob("torch_memory_saver-*.dist-info/RECORD"))
        for line in record.read_text().splitlines():
            (site / line.split(",")[0]).unlink()
        for folder in (record.parent, site / "torch_memory_saver"):
            shutil.rmtree(folder)

    def assert_nothing_left(self, site):
        self.assertEqual(list(site.glob("torch_memory_saver*")), [])

    def test_restore_after_an_uninstall(self):
        self.done(self.tool("install"))
        self.uninstall(self.site)
        self.assertNotEqual(list(self.site.glob("*.orig")), [])
        self.refused(self.tool("status"), "not installed", "`restore` removes")
        self.assertIn("removed 7 leftover files", self.done(self.tool("restore")))
        self.assert_nothing_left(self.site)
        self.refused(self.tool("restore"), "not installed")

    def test_restore_where_only_the_package_is_gone(self):
        self.done(self.tool("install"))
        shutil.rmtree(self.site / "torch_memory_saver")
        self.done(self.tool("restore"))
        self.assert_original()
        self.assertEqual(list(self.site.glob("*.json")), [])

    def test_leftovers_of_names_outside(self):
        (self.site / "torch_memory_saver_dropin.json").write_text(
            json.dumps({"files": {"../precious": {}, "precious": {}}})
        )
        for place in (self.site.parent, self.site):
            (place / "precious.orig").write_text("kept")
        shutil.rmtree(self.site / "torch_memory_saver")
        self.done(self.tool("restore"))
        for place in (self.site.parent, self.site):
            self.assertTrue((place / "precious.orig").exists())

    def test_damaged_original(self):
        self.done(self.tool("install"))
        (self.site / (NAMES[0] + ".orig")).write_bytes(b"something else")
        self.refused(self.tool("restore"), NAMES[0], "anew")
        self.assertEqual(self.active(), "ours")

    def test_wrong_library(self):
        self.refused(self.tool("install", "--library", "/nowhere.so"), "/nowhere.so")
        self.refused(self.tool("install", "--library", __file__), "test_dropin.py")
        theirs = str(self.site / NAMES[0])
        self.refused(self.tool("install", "--library", theirs), NAMES[0])
        self.assert_original()

    def test_missing_package(self):
        self.refused(self.tool("status", where=["--python", sys.executable]), "not installed")
        self.refused(self.tool("status", where=["--env", "/nowhere"]), "/nowhere")
        self.refused(self.tool("install", where=["--package", "/nowhere"]), "/nowhere")

    def test_no_permission(self):
        if os.geteuid() == 0:
            self.skipTest("root may write anywhere")
        self.site.chmod(0o555)
        self.addCleanup(self.site.chmod, 0o755)
        self.refused(self.tool("install"), "permission")

    def test_found_through_an_interpreter(self):
        environment = Path(self.site.parent) / "env"
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True
        )
        packages = next(environment.glob("lib/python*/site-packages"))
        shutil.copytree(PACKAGE, packages, dirs_exist_ok=True)
        self.done(self.tool("install", where=["--env", str(environment)]))
        self.assertEqual(digest(packages / NAMES[0]), digest(OURS))
        python = str(environment / "bin" / "python")
        self.done(self.tool("restore", where=["--python", python]))
        self.assertEqual(digest(packages / NAMES[0]), self.originals[NAMES[0]])
        self.done(self.tool("install", where=["--python", python]))
        self.uninstall(packages)
        self.refused(self.tool("install", where=["--python", python]), "`restore` removes")
        found = json.loads(self.done(self.tool("restore", "--json", where=["--python", python])))
        self.assertEqual((found["package"], found["files"]), (None, []))
        self.assert_nothing_left(packages)


if __name__ == "__main__":
    unittest.main()
