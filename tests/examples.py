"""How many random cases a costly property is tried on: all in `make test-slow`, a part of them in
`make test`, which draws others every time."""

import os


def examples(count: int) -> int:
    """`count` if DISCO_TEST_ALL_EXAMPLES is set, else two of five."""
    return count if os.environ.get("DISCO_TEST_ALL_EXAMPLES") else max(1, count * 2 // 5)
