"""Triton kernels, one file a duty. The files import triton, so import them only where `HAS_TRITON`."""

import os
from importlib.util import find_spec

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, slowly
