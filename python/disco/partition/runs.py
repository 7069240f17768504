"""What a gather reads: runs of channels, and cache lines of a pixel."""

from __future__ import annotations

import torch

from disco.partition.exchange_plan import GatherRuns
from disco.partition.rank_builder import Exchange

LINE_BYTES = 64


def gather_runs(exchange: Exchange) -> GatherRuns:
    """Of what is selected; zeros for a value that travels whole, and for partial sums."""
    if exchange.gathered_by or exchange.form != "inputs":
        return GatherRuns()
    item_bytes = torch.empty(0, dtype=getattr(torch, exchange.dtype)).element_size()
    channels = runs = lines = 0
    for sender, owned in enumerate(exchange.placement.ownership.channels):
        place = {channel: i for i, channel in enumerate(owned)}
        for row in exchange.sent:
            positions = sorted(place[channel] for channel in row[sender])
            taken = set(positions)
            channels += len(positions)
            runs += sum(position - 1 not in taken for position in positions)
            lines += len({position * item_bytes // LINE_BYTES for position in positions})
    return GatherRuns(channels, runs, lines)
