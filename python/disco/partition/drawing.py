"""The exchange of a plan as a picture: who sends how much to whom, tensor by tensor."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disco.errors import InputError
from disco.whole_file import check_can_be_written, write_whole_file

if TYPE_CHECKING:
    from disco.partition.exchange_plan import ExchangePlan
    from disco.partition.plan import Plan

FORMATS = (".png", ".svg")

_COLUMNS = 8
_PANEL_INCHES = 1.7
_TITLE_CHARACTERS = 24
# Numbers in the cells would not be read in panels of more ranks.
_LARGEST_WITH_NUMBERS = 4
_DPI = 100
_SETTINGS = {
    "svg.hashsalt": "disco",  # otherwise ids are random, and the same plan gives other bytes
    "font.size": 6,
    "axes.titlesize": 6,
}


def check_drawing(path: str | os.PathLike[str]) -> None:
    """Refuse what `draw_exchange` could not write. Raises InputError."""
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise InputError(
            f"a drawing ends in {' or '.join(FORMATS)}, given {target.name!r}: choose one of them"
        )
    check_can_be_written(target, str(target))
    _pyplot()


def draw_exchange(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Draw one matrix an exchanged tensor, receivers down and senders across, and their sum.

    The shade is the part of a sender's channels that travel; numbers are kB an image. Equal plans
    give equal files.

    Args:
        path: ends in .png or .svg.

    Raises:
        InputError: another ending, a folder that is not there, or matplotlib is not installed.
    """
    check_drawing(path)
    matplotlib = _pyplot()
    from matplotlib.figure import Figure

    panels = len(plan.exchanges) + 1
    columns = min(_COLUMNS, panels)
    rows = math.ceil(panels / columns)
    with matplotlib.rc_context(_SETTINGS):
        size = (columns * _PANEL_INCHES, rows * _PANEL_INCHES + 0.4)
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        figure.suptitle(
            f"{plan.world_size} nodes, {plan.bytes_per_image / 1e6:.3f} MB an image "
            f"(dense exchange {plan.bytes_dense_exchange / 1e6:.3f} MB); "
            "rows receive, columns send",
            fontsize=8,
        )
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        _panel(axes[0], "all", *_total(plan))
        for place, exchange in zip(axes[1:], plan.exchanges, strict=False):
            _panel(place, _title(exchange), *_matrices(exchange))
        for place in axes[panels:]:
            place.set_axis_off()
        ending = Path(path).suffix.lower().removeprefix(".")
        # Without a date and a version, which would differ from run to run.
        metadata = {"Date": None, "Creator": None} if ending == "svg" else {"Software": None}
        write_whole_file(
            Path(path), lambda part: figure.savefig(part, format=ending, metadata=metadata)
        )


Matrix = list[list[float]]


def _matrices(exchange: ExchangePlan) -> tuple[Matrix, Matrix]:
    """Per receiver and sender the part of the sender's channels that travel, and the bytes."""
    ranks = range(len(exchange.ownership))
    owned = [len(channels) for channels in exchange.ownership]
    shares = [
        [len(exchange.sent[i][j]) / owned[j] if owned[j] else 0.0 for j in ranks] for i in ranks
    ]
    return shares, [[float(exchange.bytes_between(i, j)) for j in ranks] for i in ranks]


def _total(plan: Plan) -> tuple[Matrix, Matrix]:
    ranks = range(plan.world_size)
    sent = [[float(plan.bytes_matrix[j][i]) for j in ranks] for i in ranks]
    dense = [sum(len(e.ownership[j]) * e.bytes_per_channel for e in plan.exchanges) for j in ranks]
    return [[sent[i][j] / dense[j] if dense[j] else 0.0 for j in ranks] for i in ranks], sent


def _title(exchange: ExchangePlan) -> str:
    readers = (*exchange.consumers, *exchange.gathered_by)
    name = readers[0] if readers else exchange.value
    if len(name) > _TITLE_CHARACTERS:
        name = f"...{name[3 - _TITLE_CHARACTERS :]}"
    more = f" +{len(readers) - 1}" if len(readers) > 1 else ""
    return f"{exchange.number}: {name}{more}"


def _panel(axes: Any, title: str, shares: Matrix, num_bytes: Matrix) -> None:
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    axes.set_title(title)
    ranks = range(len(shares))
    axes.set_xticks(ranks)
    axes.set_yticks(ranks)
    axes.tick_params(length=0)
    if len(shares) > _LARGEST_WITH_NUMBERS:
        return
    for i in ranks:
        for j in ranks:
            text = "-" if i == j else f"{num_bytes[i][j] / 1e3:.1f}"
            colour = "white" if shares[i][j] > 0.6 else "black"
            axes.text(j, i, text, ha="center", va="center", color=colour)


def _pyplot() -> Any:
    """matplotlib, drawing into files only: `Figure` brings no window and no global state."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "drawing needs matplotlib, which is not installed: "
            "install the extra with `pip install 'disco-kernels[plot]'`"
        ) from None
    return matplotlib
