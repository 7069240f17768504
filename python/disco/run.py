"""``python -m disco.run ...`` is ``disco run ...``, for launchers that start modules (torchrun)."""

from __future__ import annotations

import sys

from disco.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
