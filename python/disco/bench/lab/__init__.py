"""The network lab: nodes on one machine, with cables of a stated rate and cores of their own.

with Lab(2, "100mbit") as lab:
    print(lab.calibrate())
    lab.run(0, ["hostname"])
"""

from disco.bench.lab.calibration import Calibration, LinkFit, Point, Skipped
from disco.bench.lab.lab import Lab
from disco.bench.lab.loopback import Loopback
from disco.bench.lab.processes import NodeProcess
from disco.bench.lab.rates import Shape
from disco.bench.lab.requirements import LabUnavailable

__all__ = [
    "Calibration",
    "Lab",
    "LabUnavailable",
    "LinkFit",
    "Loopback",
    "NodeProcess",
    "Point",
    "Shape",
    "Skipped",
]
