"""Point-to-point TCP: authenticated, with deadlines, no I/O thread.

`meeting` brings ranks together, `handshake` lets nobody else in, `channel` moves frames over one
connection, `transport` is what the executor uses.
"""

from disco.runtime.tcp.handshake import Identity
from disco.runtime.tcp.meeting import Meeting, listen
from disco.runtime.tcp.transport import TcpTransport

__all__ = ["Identity", "Meeting", "TcpTransport", "listen"]
