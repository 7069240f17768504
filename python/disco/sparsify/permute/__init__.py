"""Which channels of a model can change places, read off the captured program."""

from disco.sparsify.permute.apply import permute_
from disco.sparsify.permute.classes import Axis, Permutable, find_permutable, permutable_in

__all__ = ["Axis", "Permutable", "find_permutable", "permutable_in", "permute_"]
