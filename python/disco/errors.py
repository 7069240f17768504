"""Errors of the framework. Messages say what was given, what is allowed and what to do."""

from __future__ import annotations


class InputError(ValueError):
    """A mistake in what the user gave: a model, a file, an argument. The command exits with 2."""


class TransportError(RuntimeError):
    """The exchange with another rank failed: a peer is gone, a link is cut, a message is wrong."""


class DeadlineError(TransportError, TimeoutError):
    """A message did not arrive, or was not taken, before the deadline."""
