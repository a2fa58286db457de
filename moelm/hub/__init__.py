"""Import from and export to transformers: one file an architecture, the map in both directions."""

from moelm.hub.base import Architecture
from moelm.hub.models import (
    ARCHITECTURES,
    architecture_of,
    from_transformers,
    load_weights,
    to_transformers,
    write_config,
)
from moelm.hub.reading import HubError
from moelm.hub.weights import Weight

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "HubError",
    "Weight",
    "architecture_of",
    "from_transformers",
    "load_weights",
    "to_transformers",
    "write_config",
]
