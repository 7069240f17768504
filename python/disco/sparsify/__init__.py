"""Giving a dense model the structure that makes its exchange small."""

from disco.sparsify.one_shot import check_density, sparsify_weights_

__all__ = ["check_density", "sparsify_weights_"]
