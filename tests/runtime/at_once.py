"""Several ranks in threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable


def at_once(
    *functions: Callable[[], object], timeout_s: float = 30.0
) -> list[BaseException | None]:
    """Run one function a rank, each in its thread; what each raised."""
    errors: list[BaseException | None] = [None] * len(functions)

    def guarded(index: int) -> None:
        try:
            functions[index]()
        except BaseException as error:  # noqa: BLE001 - the caller looks at it
            errors[index] = error

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=timeout_s)
        assert not thread.is_alive(), "a rank hangs"
    return errors
