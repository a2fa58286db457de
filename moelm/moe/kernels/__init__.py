"""Triton kernels, one file a duty. The files import triton, so import them only where `HAS_TRITON`."""

import os
from importlib.util import find_spec

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, slowly

# In how many rounds the blocks of a product run. One: a block for each multiprocessor, until all tiles are done; where
# others, as NCCL's kernels, have taken some, its last blocks begin when the first end, and it takes twice the time.
rounds = 1
