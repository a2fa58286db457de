"""Callbacks observe and never train. One file each; importing this package registers them all."""

from moelm.callbacks import (
    balance,
    co_activation,
    collapse_alarm,
    expert_counts,
    expert_usage,
    run_card,
    specialisation,
    throughput,
)

__all__ = [
    "balance",
    "co_activation",
    "collapse_alarm",
    "expert_counts",
    "expert_usage",
    "run_card",
    "specialisation",
    "throughput",
]
