"""Triton kernels, one file a duty. Import those files only where `HAS_TRITON`: they need it to be imported at all."""

from importlib.util import find_spec

HAS_TRITON = find_spec("triton") is not None
