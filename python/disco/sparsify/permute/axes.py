"""Axes: what the dimensions of values and weights are made of, and which of them are the same.

A dimension is an axis. An axis is plain, a product of axes (a view that splits it; the first varies
slowest) or axes behind each other (a concatenation). What an op demands is written as `unify`: two
axes are one and the same, so that their entries change places together. Axes that meet cut
differently are cut finer until they agree; where they cannot, all that they are made of is fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Kind = Literal["plain", "product", "joined"]


@dataclass
class _Node:
    size: int
    kind: Kind = "plain"
    parts: tuple[int, ...] = ()
    reason: str = ""
    same_as: int | None = None


class Axes:
    """All axes of one program, by number."""

    def __init__(self) -> None:
        self._nodes: list[_Node] = []

    def plain(self, size: int, reason: str = "") -> int:
        """A new axis; a reason fixes it."""
        self._nodes.append(_Node(size, reason=reason))
        return len(self._nodes) - 1

    def product(self, parts: Sequence[int]) -> int:
        """The axis that a view makes of several dimensions."""
        factors = [part for part in parts if self.size(part) != 1]
        size = prod(self.size(part) for part in factors)
        return self._made("product", factors, size)

    def joined(self, parts: Sequence[int]) -> int:
        """The axis of several ones behind each other."""
        terms = [part for part in parts if self.size(part) != 0]
        return self._made("joined", terms, sum(self.size(part) for part in terms))

    def _made(self, kind: Kind, parts: Sequence[int], size: int) -> int:
        # One part is the axis itself; so parts are always smaller than the whole.
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return self.plain(size)
        self._nodes.append(_Node(size, kind, tuple(parts)))
        return len(self._nodes) - 1

    def find(self, axis: int) -> int:
        """The one that stands for all that are the same."""
        while (up := self._nodes[axis].same_as) is not None:
            axis = up
        return axis

    def size(self, axis: int) -> int:
        return self._nodes[self.find(axis)].size

    def reason(self, axis: int) -> str:
        """Why a plain axis is fixed; empty if it is not."""
        return self._nodes[self.find(axis)].reason

    def plain_axes(self, axis: int) -> list[int]:
        """What an axis is made of, in order, with repetitions."""
        root = self.find(axis)
        node = self._nodes[root]
        if node.kind == "plain":
            return [root]
        return [found for part in node.parts for found in self.plain_axes(part)]

    def fix(self, axis: int, reason: str) -> None:
        """Its entries stay where they are; the first reason given is kept."""
        for plain in self.plain_axes(axis):
            node = self._nodes[plain]
            node.reason = node.reason or reason

    def unify(self, a: int, b: int, reason: str) -> None:
        """Let two axes be one; `reason` is given where they have to be fixed for that."""
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        first, second = self._nodes[a], self._nodes[b]
        if first.size != second.size or not self._agree(a, b, reason):
            self.fix(a, reason)
            self.fix(b, reason)

    def _agree(self, a: int, b: int, reason: str) -> bool:
        first, second = self._nodes[a], self._nodes[b]
        if second.kind == "plain" and first.kind != "plain":
            return self._agree(b, a, reason)
        if first.kind == "plain":
            if first.reason:
                self.fix(b, first.reason)
        elif first.kind == second.kind:
            if not self._align(a, b, first.kind, reason):
                return False
        elif not self._equal_terms(*((a, b) if first.kind == "product" else (b, a)), reason):
            return False
        # Parts may have been joined with other axes meanwhile, never with these: they are smaller.
        first.same_as = b
        return True

    def _align(self, a: int, b: int, kind: Kind, reason: str) -> bool:
        left, right = [a], [b]
        while left and right:
            one, other = self._first(left, kind), self._first(right, kind)
            small, large = sorted((one, other), key=self.size)
            if self.size(small) != self.size(large):
                if not self._cut(large, self.size(small), kind):
                    return False
                continue
            self.unify(one, other, reason)
            del left[0], right[0]
        return not left and not right

    def _first(self, parts: list[int], kind: Kind) -> int:
        """The first part, itself not made of parts of this kind."""
        while (node := self._nodes[self.find(parts[0])]).kind == kind:
            parts[:1] = node.parts
        return self.find(parts[0])

    def _cut(self, axis: int, first: int, kind: Kind) -> bool:
        """Make a plain axis of two, the first of this size."""
        node = self._nodes[axis]
        if node.kind != "plain" or (kind == "product" and node.size % first):
            return False
        rest = node.size // first if kind == "product" else node.size - first
        node.parts = (self.plain(first, node.reason), self.plain(rest, node.reason))
        node.kind, node.reason = kind, ""
        return True

    def _equal_terms(self, product: int, joined: int, reason: str) -> bool:
        """Equal axes behind each other, seen as a product: they change places alike."""
        terms = [joined]
        found: list[int] = []
        while terms:
            found.append(self._first(terms, "joined"))
            del terms[0]
        if len({self.size(term) for term in found}) != 1:
            return False
        factors = [product]
        outer = self._first(factors, "product")
        if self.size(outer) != len(found):
            if self.size(outer) < len(found) or not self._cut(outer, len(found), "product"):
                return False
            outer = self._first(factors, "product")
        self.fix(outer, reason)
        rest = self.product(factors[1:])
        for term in found:
            self.unify(rest, term, reason)
        return True

    def order(self, axis: int, orders: Mapping[int, Indices]) -> Indices:
        """Old places of a dimension's entries, by new place, where plain axes are reordered so."""
        root = self.find(axis)
        node = self._nodes[root]
        if node.kind == "plain":
            return orders.get(root, np.arange(node.size))
        if node.kind == "joined":
            starts = np.cumsum([0, *(self.size(part) for part in node.parts)])
            pieces = [
                start + self.order(part, orders)
                for start, part in zip(starts, node.parts, strict=False)
            ]
            return np.concatenate(pieces)
        found = np.zeros(1, dtype=np.int64)
        for part in node.parts:
            found = (found[:, None] * self.size(part) + self.order(part, orders)).reshape(-1)
        return found

    def places(self, axis: int, plain: int) -> Indices:
        """Per entry of a dimension its place along one plain axis; -1 where that has no part."""
        root = self.find(axis)
        node = self._nodes[root]
        if root == plain:
            return np.arange(node.size)
        if node.kind == "plain":
            return np.full(node.size, -1)
        pieces = [self.places(part, plain) for part in node.parts]
        if node.kind == "joined":
            return np.concatenate(pieces)
        sizes = [len(piece) for piece in pieces]
        found = np.full(sizes, -1)
        for dim, piece in enumerate(pieces):
            shape = [1] * len(sizes)
            shape[dim] = -1
            found = np.maximum(found, piece.reshape(shape))
        return found.reshape(-1)

    def repeats(self, axis: int) -> list[int]:
        """Plain axes that a product has in more than one factor."""
        node = self._nodes[self.find(axis)]
        found = [plain for part in node.parts for plain in self.repeats(part)]
        if node.kind == "product":
            seen: set[int] = set()
            for part in node.parts:
                own = set(self.plain_axes(part))
                found += sorted(own & seen)
                seen |= own
        return found
