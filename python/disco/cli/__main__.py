"""`python -m disco.cli` is the command `disco`."""

from __future__ import annotations

import sys

from disco.cli import main

sys.exit(main())
