"""Balancers: what keeps the experts evenly loaded. One file each; importing this package registers them all."""

from moelm.moe.balancing import (
    communication,
    device,
    global_batch,
    importance,
    load,
    loss_free,
    none,
    sequence,
    switch,
    z_loss,
)

__all__ = [
    "communication",
    "device",
    "global_batch",
    "importance",
    "load",
    "loss_free",
    "none",
    "sequence",
    "switch",
    "z_loss",
]
