"""Giving a dense model the structure that makes its exchange small."""

from disco.sparsify.one_shot import sparsify_weights_

__all__ = ["sparsify_weights_"]
