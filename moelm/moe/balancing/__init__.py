"""Balancers: what keeps the experts evenly loaded. One file each; importing this package registers them all."""

from moelm.moe.balancing import loss_free, switch, z_loss

__all__ = ["loss_free", "switch", "z_loss"]
