"""A table of text, for reports."""

from __future__ import annotations

from collections.abc import Sequence

# p90 over median from which on a report warns. A judgement, not a measurement.
BUSY = 1.5


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns under each other: the first row is the head, the first column left-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
