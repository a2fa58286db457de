"""Routers: tokens -> (routing, statistics). One file each; importing this package registers them all."""

from moelm.moe.routing import top_k

__all__ = ["top_k"]
