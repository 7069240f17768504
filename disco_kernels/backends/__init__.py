"""Backends register themselves when imported; importing one initialises no device."""

from disco_kernels.backends import cpu as cpu
from disco_kernels.backends import reference as reference
