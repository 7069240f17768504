"""PSNR and SSIM over photographs that arrive in patches, by torchmetrics."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from disco.tasks.metric_library import import_torchmetrics

# An image that is exact has no finite PSNR. Far above what rounding to 8 bits allows (59 dB).
_MOST_DB = 100.0
# Patches whose SSIM waits to be asked for: it costs more than most small networks.
_MOST_WAITING = 4096


class Fidelity:
    """Both metrics, the mean over the photographs. Values range over 1.

    PSNR pools the squared errors of a photograph's patches. SSIM (Wang et al., 2004: a Gaussian
    window of deviation 1.5) is the mean over its patches.

    Raises:
        InputError: torchmetrics is not installed.
    """

    def __init__(self) -> None:
        self._metrics = import_torchmetrics("image")
        self._psnr: dict[int, Any] = {}
        self._ssim: dict[int, Any] = {}
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, found: Tensor, wanted: Tensor, photographs: Tensor) -> None:
        """Patches float32 [B, 1, h, w] on the CPU, and the number of each one's photograph."""
        for number in photographs.unique().tolist():
            own = photographs == number
            if number not in self._psnr:
                self._psnr[number] = self._metrics.PeakSignalNoiseRatio(data_range=1.0)
            self._psnr[number].update(found[own], wanted[own])
        self._waiting.append((found, wanted, photographs))
        if sum(len(patches) for _, _, patches in self._waiting) > _MOST_WAITING:
            self._measure_ssim()

    def psnr(self) -> float:
        """In dB, at most 100 a photograph."""
        values = [min(float(metric.compute()), _MOST_DB) for metric in self._psnr.values()]
        return sum(values) / len(values)

    def ssim(self) -> float:
        """At most 1."""
        self._measure_ssim()
        values = [float(metric.compute()) for metric in self._ssim.values()]
        return sum(values) / len(values)

    def _measure_ssim(self) -> None:
        for found, wanted, photographs in self._waiting:
            for number in photographs.unique().tolist():
                own = photographs == number
                if number not in self._ssim:
                    made = self._metrics.StructuralSimilarityIndexMeasure(data_range=1.0)
                    self._ssim[number] = made
                self._ssim[number].update(found[own], wanted[own])
        self._waiting.clear()
