"""Set before anything imports torch."""

import os

# Tests run beside other work, and start processes that share the cores. OpenMP's threads would spin
# for a time slice at each barrier, waiting for one that does not run: ten times as long, measured.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
