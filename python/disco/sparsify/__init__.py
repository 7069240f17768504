"""Giving a dense model the structure that makes its exchange small."""

from disco.sparsify.one_shot import GROUP_SIZES, check_density, sparsify_weights_

__all__ = ["GROUP_SIZES", "check_density", "sparsify_weights_"]
