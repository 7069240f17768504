"""What the lab needs of a machine, and plain words for what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from functools import cache

from disco.errors import InputError

# The folders that `ip` and `tc` are in are not on every user's PATH.
_SYSTEM_FOLDERS = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")
# <linux/capability.h>: bits of CapEff
_RIGHTS = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
WITHOUT = "or give --loopback to run without namespaces and without a rate"


class LabUnavailable(InputError):
    """This machine, or this user, cannot have a lab. The message says what is missing."""


def check_requirements() -> None:
    """Check what can be known before anything is made.

    Raises:
        LabUnavailable: with everything that is missing, and what to do.
    """
    problems = missing_requirements()
    if problems:
        raise LabUnavailable(f"no network lab here: {'; '.join(problems)}; {WITHOUT}")


def check_linux() -> None:
    """Check what the lab and its stand-in on loopback both need.

    Raises:
        LabUnavailable: this is no Linux, or one before 5.3.
    """
    if platform.system() != "Linux":
        raise LabUnavailable(
            f"the lab needs Linux, also with --loopback: this is {platform.system()}"
        )
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        raise LabUnavailable(
            "the lab needs Linux 5.3 or newer, also with --loopback, or a sandbox that allows "
            f"pidfd_open: this is {platform.release()} ({error.strerror})"
        ) from error


def missing_requirements() -> list[str]:
    """What is missing, each with its remedy; empty if a lab can be tried."""
    problems = []
    tools = [name for name in ("ip", "tc") if find_tool(name) is None]
    if tools:
        problems.append(
            f"{' and '.join(tools)} not found: install iproute2 (apt-get install iproute2)"
        )
    rights = _missing_rights()
    if rights:
        problems.append(
            f"user {os.geteuid()} lacks {' and '.join(rights)}: run it as root, in a container "
            "that has both (--cap-add), or under `unshare --user --map-root-user`"
        )
    return problems


@cache
def find_tool(name: str) -> str | None:
    """Path of a program of the system, on PATH or in the system's folders."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *_SYSTEM_FOLDERS])
    return shutil.which(name, path=path)


def _missing_rights() -> list[str]:
    with open("/proc/self/status", encoding="utf-8") as file:
        words = next(line for line in file if line.startswith("CapEff:")).split()
    effective = int(words[1], 16)
    return [name for name, bit in _RIGHTS.items() if not effective >> bit & 1]
