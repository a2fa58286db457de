"""Activation checkpointing: what backward makes anew instead of keeping, and what it keeps all the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

CHOICES = {"moelm::keep_choice", "moelm::choose", "moelm::gather_choices", "moelm::read_splits"}
EXPENSIVE = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::sort.stable",  # of the rows by expert
    "moelm::counting_sort",
    "moelm::grouped_mm",
    "moelm::expert_mlp",
    "moelm::expert_mlp_arriving",
    "moelm::expert_mlp_leaving",
    "moelm::router_logits",
    "moelm::send",  # and what follows on it: a journey is made again as a whole or not at all
    "moelm::trim",
    "moelm::receive",
    "moelm::send_back",
    "moelm::gather_home",
}
KEPT = {"full": CHOICES, "selective": CHOICES | EXPENSIVE}  # by mode, the ops whose outputs are not recomputed


def run(mode: str, function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs). none: backward finds all that it needs. full: all is recomputed but the routers' choices.
    selective: products of matrices, attention and the order of rows are kept too, what is elementwise is recomputed.

    The policy names ops, and a compiled region hides its own: call this inside what is compiled, where AOTAutograd
    heeds the policy when it splits forward from backward. Random numbers are the same again.
    """
    if mode == "none":
        return function(*inputs)
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, KEPT[mode]))
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


def _policy(kept: set[str], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in kept else CheckpointPolicy.PREFER_RECOMPUTE
