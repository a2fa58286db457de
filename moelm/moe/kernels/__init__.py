"""Triton kernels, one file a duty. Import those files only where `HAS_TRITON`: they need it to be imported at all."""

import os
from importlib.util import find_spec

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, slowly
