"""Namespaces held by a process, and commands started in them. Run by its path, never imported.

The lab runs this file with a bare interpreter (`python -I -S namespaces.py ...`), so that it starts
in milliseconds and needs nothing of the package. Two modes:

    hold [--node] WATCH_FD      make namespaces and hold them until the lab ends
    enter OPTIONS -- COMMAND    start a command in the namespaces of a holder

Namespaces have no names: the kernel removes them, and all that is in them, with their last process.
A node has a PID namespace, and the holder is its first process, with whose end the kernel kills
every other one in it, daemons and orphans too. `WATCH_FD` is a pidfd of the lab: it becomes
readable when the lab is dead, however it died.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import select
import signal
import sys
from typing import NoReturn

# <linux/sched.h>, <linux/prctl.h>, <linux/mount.h>
CLONE_NEWNS, CLONE_NEWIPC = 0x0002_0000, 0x0800_0000
CLONE_NEWPID, CLONE_NEWNET = 0x2000_0000, 0x4000_0000
PR_SET_PDEATHSIG = 1
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_SLAVE = 2, 4, 8, 0x4000, 1 << 19

# In the order of entering: the mount namespace last, because it changes /proc.
KINDS = {"ipc": CLONE_NEWIPC, "pid": CLONE_NEWPID, "net": CLONE_NEWNET, "mnt": CLONE_NEWNS}
CANNOT_START = 127

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Parse the mode and run it."""
    parser = argparse.ArgumentParser()
    modes = parser.add_subparsers(dest="mode", required=True)
    holding = modes.add_parser("hold")
    holding.add_argument("--node", action="store_true")
    holding.add_argument("watch_fd", type=int)
    entering = modes.add_parser("enter")
    entering.add_argument("--pid", type=int, help="of a holder")
    entering.add_argument("--kinds", default="", help="of namespaces to enter, comma separated")
    entering.add_argument("--cores", default="", help="to pin to, comma separated")
    entering.add_argument("--watch-fd", type=int, required=True)
    entering.add_argument("--report-fd", type=int, required=True)
    entering.add_argument("command", nargs="+")
    args = parser.parse_args()
    if args.mode == "hold":
        return hold(args.watch_fd, node=args.node)
    return enter(args)


def hold(watch_fd: int, *, node: bool) -> int:
    """Make namespaces, print {"pid": holder} or {"error": reason}, wait for the holder's end."""
    try:
        kinds = CLONE_NEWNET
        if node:
            kinds |= CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC
        _check(_libc.unshare(kinds), "unshare")
        ready, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ready)
            _hold_inside(watch_fd, tell, node=node)
        os.close(tell)
        problem = os.read(ready, 4096).decode()
        if problem != "ready":
            raise OSError(0, problem or "the holder died")
    except OSError as error:
        print(json.dumps({"error": error.strerror, "errno": error.errno}), flush=True)
        return 1
    print(json.dumps({"pid": pid}), flush=True)
    os.waitpid(pid, 0)
    return 0


def _hold_inside(watch_fd: int, tell: int, *, node: bool) -> NoReturn:
    try:
        _die_with_parent()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        # Orphans of the node become children of this process, which then need not be waited for.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        if node:
            _mount_own_views()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.write(tell, b"ready")
        os.close(tell)
    except OSError as error:
        os.write(tell, str(error.strerror).encode())
        os._exit(1)
    # Standard input: the lab's word that this is the end.
    select.select([watch_fd, 0], [], [])
    os._exit(0)


def _die_with_parent() -> None:
    number = ctypes.c_ulong(signal.SIGKILL)
    _check(_libc.prctl(PR_SET_PDEATHSIG, number), "prctl")


def _mount_own_views() -> None:
    """Of processes, interfaces and shared memory a node sees its own."""
    _mount("none", "/", None, MS_REC | MS_SLAVE, None)
    guarded = MS_NOSUID | MS_NODEV | MS_NOEXEC
    _mount("proc", "/proc", "proc", guarded, None)
    _mount("sysfs", "/sys", "sysfs", guarded, None)
    if os.path.isdir("/dev/shm"):
        _mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None) -> None:
    def raw(text: str | None) -> bytes | None:
        return None if text is None else text.encode()

    _check(
        _libc.mount(raw(source), raw(target), raw(kind), ctypes.c_ulong(flags), raw(data)),
        f"mount {kind or 'propagation'} on {target}",
    )


def enter(args: argparse.Namespace) -> int:
    """Start the command, report its pid or why it cannot start, and end as it ends."""
    try:
        folder = os.getcwd()
        handles = [
            (os.open(f"/proc/{args.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC), KINDS[kind])
            for kind in KINDS
            if kind in args.kinds.split(",")
        ]
        for handle, kind in handles:
            _check(_libc.setns(handle, kind), "setns")
        os.chdir(folder)  # entering a mount namespace moves to its root
        if args.cores:
            os.sched_setaffinity(0, [int(core) for core in args.cores.split(",")])
        pid = os.fork()
        if pid == 0:
            os.set_inheritable(args.watch_fd, False)
            os.set_inheritable(args.report_fd, False)
            _become(args.command, args.report_fd)
    except OSError as error:
        os.write(args.report_fd, f"error {error.errno} entering: {error.strerror}\n".encode())
        return CANNOT_START
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the command
    os.write(args.report_fd, f"pid {pid}\n".encode())
    os.close(args.report_fd)
    _release_streams()
    return _wait(pid, args.watch_fd)


def _become(command: list[str], report_fd: int) -> NoReturn:
    try:
        _die_with_parent()
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # Python changed them when it started
        os.execvp(command[0], command)
    except OSError as error:
        os.write(report_fd, _problem(error))
    os._exit(CANNOT_START)


def _problem(error: OSError) -> bytes:
    return f"error {error.errno} {error.strerror}\n".encode()


def _release_streams() -> None:
    """Leave the command alone with its pipes, so that their other end sees it close them."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)


def _wait(pid: int, watch_fd: int) -> int:
    child = os.pidfd_open(pid)
    ended, _, _ = select.select([child, watch_fd], [], [])
    if child not in ended:
        os.killpg(0, signal.SIGKILL)  # the lab is dead: this process and the command's group
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core was the command's to leave
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return os.WEXITSTATUS(status)


def _check(result: int, step: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{step}: {os.strerror(number)}")


if __name__ == "__main__":
    sys.exit(main())
