#!/usr/bin/env python3
"""The drop-in tool, without installing anything: see ``python -m tms_memcache.dropin --help``.

    python use_with_torch_memory_saver.py install|status|restore [--env DIR | --python FILE]

After ``install``, programs that use the package torch_memory_saver run on our file, unchanged.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from tms_memcache.dropin import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
