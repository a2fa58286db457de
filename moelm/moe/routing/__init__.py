"""Routers: tokens -> (routing, statistics). One file each; importing this package registers them all."""

from moelm.moe.routing import (
    balanced_assignment,
    cosine,
    expert_choice,
    gshard,
    hash,
    multi_head,
    noisy_top_k,
    random,
    reinforce,
    round_robin,
    switch,
    top_k,
)

__all__ = [
    "balanced_assignment",
    "cosine",
    "expert_choice",
    "gshard",
    "hash",
    "multi_head",
    "noisy_top_k",
    "random",
    "reinforce",
    "round_robin",
    "switch",
    "top_k",
]
