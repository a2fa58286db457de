"""Callbacks observe and never train. One file each; importing this package registers them all."""

from moelm.callbacks import balance, expert_usage, run_card, throughput

__all__ = ["balance", "expert_usage", "run_card", "throughput"]
