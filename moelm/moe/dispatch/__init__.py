"""Dispatchers: rows sorted by expert, and back. One file each; importing this package registers them all."""

from moelm.moe.dispatch import capacity, dropless

__all__ = ["capacity", "dropless"]
