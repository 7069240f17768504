"""When masks change, and how dense the exchange is then."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """From everything at `begin_step` to the budget at `end_step` (Zhu and Gupta, "To prune, or
    not to prune", 2017, section 3, with an initial sparsity of 0).

    Attributes:
        begin_step, end_step: numbers of optimizer steps, begin_step <= end_step.
        every: steps from one change to the next; there is one at `end_step` in any case.
    """

    begin_step: int
    end_step: int
    every: int

    def excess_at(self, step: int) -> float:
        """Of what is to go, the share that is still there: (1 - (step - begin) / (end - begin))^3,
        1 before and 0 after."""
        if step >= self.end_step:
            return 0.0
        if step <= self.begin_step:
            return 1.0
        return (1.0 - (step - self.begin_step) / (self.end_step - self.begin_step)) ** 3

    def changes_at(self, step: int) -> bool:
        """Whether masks change after this step, before the end."""
        within = self.begin_step <= step < self.end_step
        return within and (step - self.begin_step) % self.every == 0
