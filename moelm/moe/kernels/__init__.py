"""Triton kernels, one file a duty. The files import triton, so import them only where `HAS_TRITON`."""

import os
from importlib.util import find_spec

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, slowly

# Multiprocessors without a block of the products, whose blocks run until all tiles are done: where others have taken
# some, as NCCL's do, the blocks that find none begin when the rest have ended, and the product takes twice the time.
processors_left_free = 0
