"""Ranks in processes of their own: transports, the worker, launching. See `disco.runtime.cluster`.

Only this package touches `torch.distributed` or a socket.
"""

from disco.runtime.cluster import Cluster, RunResult

__all__ = ["Cluster", "RunResult"]
