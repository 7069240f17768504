"""Ranks in processes of their own: transports, the worker, launching (`rank_processes`).

Only this package touches `torch.distributed` or a socket.
"""

from disco.runtime.rank_processes import RankProcesses, RunResult

__all__ = ["RankProcesses", "RunResult"]
