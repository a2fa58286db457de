"""Attentions. One file each; importing this package registers them all."""

from moelm.model.attention import gqa, mla

__all__ = ["gqa", "mla"]
