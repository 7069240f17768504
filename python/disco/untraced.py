"""Models that are compiled already, inside of what torch traces. Called by `disco.api`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from disco.errors import InputError

Method = TypeVar("Method", bound=Callable[..., Any])


def untraced(method: Method) -> Method:
    """`method` of a module, whose kernels read memory, which tensors being traced have none of.

    `torch.compile` leaves it as it is, between two graphs; exporting it and recording it with
    `torch.jit.trace` raise InputError. The compiler is imported where it is at work, only.
    """

    @functools.wraps(method)
    def call(self: object, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise InputError(
                f"a {type(self).__name__} cannot be exported: it is bound to this machine's "
                f"kernels; export the model that it was made of"
            )
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return cast(Method, call)
