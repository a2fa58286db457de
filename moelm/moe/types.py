"""What crosses the seams of a mixture of experts: routing decisions and their statistics.

Shape suffixes, used on every tensor in `model/` and `moe/`:

    B batch (sequences)    L sequence length     T = B * L tokens    D d_model
    H query heads          F d_expert or d_ff    V vocabulary        M MoE layers
    E routed experts       K top_k               R = T * K rows after dispatch
    C expert capacity      Q head dimension      G groups of experts
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moelm.moe.kernels import HAS_TRITON

if HAS_TRITON:
    from moelm.moe.kernels import counting


class TokenChoice(NamedTuple):
    """Tokens choose experts. Tuples, so that checkpointing, compile and FSDP2 carry them as they are."""

    expert_ids_TK: Tensor  # int64; the id n_experts means "none" (a masked token, a choice not taken)
    gates_TK: Tensor  # float32 combine weights; the router's gradient flows here


class ExpertChoice(NamedTuple):
    """Experts choose tokens."""

    token_ids_EC: Tensor  # int64, flat over the batch; the id T means "none" (a slot that no token filled)
    gates_EC: Tensor  # float32 combine weights; the router's gradient flows here


Routing = TokenChoice | ExpertChoice


class RouteContext(NamedTuple):
    """What a router may look at beside the tokens' vectors. Where those are split into chunks, L counts chunks."""

    token_ids_BL: Tensor  # int64
    token_mask_BL: Tensor | None  # bool, True = counted and dispatched; None = all
    training: bool


class RouterStats(NamedTuple):
    """What one MoE layer did with its tokens: a few kB, returned from forward and never stored by it.

    `GPT` stacks them over MoE layers, which puts an M before every shape.
    """

    load_BE: Tensor  # float32 choices as made, per sequence and expert, before capacity; no gradient
    kept_BE: Tensor  # float32, the same after capacity
    first_choice_BE: Tensor  # float32 counts of the first choice only (GShard)
    unbiased_load_BE: Tensor  # float32 counts had there been no selection bias (DeepSeek-V3 eq. 18)
    prob_BE: Tensor  # float32 mean router probability over the sequence's counted tokens; with gradient
    gate_BE: Tensor  # float32 sum of combine weights (importance); with gradient
    n_tokens_B: Tensor  # float32 counted tokens
    log_z_sq: Tensor  # float32 scalar, mean of logsumexp(logits)^2 over counted tokens; with gradient
    extra: dict[str, Tensor]  # what only some routers have, by the names below


# Keys of RouterStats.extra. Scalars, detached, means over counted tokens, for the callbacks:
OBSERVED = (
    "prob_entropy",  # entropy of a token's router probabilities, nats
    "top1_margin",  # difference of its two largest probabilities
    "logit_sq",  # mean square of its logits
    "unchosen",  # share of tokens that no expert chose (expert_choice)
)
# For who asks what went wrong, in training only:
#   logit_max        float32 scalar, the largest absolute logit of a counted token; no gradient
# For balancers and losses, where a router has them:
#   sent_BG          float32 tokens that were sent to each group of experts (routers with n_groups > 1)
#   smooth_load_BE   float32 expected load under the router's noise; with gradient (noisy_top_k)
#   log_prob_BL      float32 log-probability of the sampled choice; with gradient (reinforce)
#   baseline_BL      float32 predicted cross-entropy of the token; with gradient (reinforce)
# For callbacks, in evaluation only:
#   expert_ids_BLK   int64 choices, by token


def stack_stats(layers: list[RouterStats]) -> RouterStats:
    """One RouterStats with a leading dimension M from those of M layers. Raises IndexError for none."""
    *columns, extras = zip(*layers, strict=True)
    extra = {key: torch.stack([each[key] for each in extras]) for key in extras[0]}
    return RouterStats._make([*(torch.stack(column) for column in columns), extra])


def count_per_sequence(expert_ids_TK: Tensor, n_sequences: int, n_experts: int) -> Tensor:
    """float32 [B, E]: how often each expert was chosen in each sequence; "none" is not counted."""
    if HAS_TRITON and expert_ids_TK.is_cuda:  # where scatter_add is atomic
        counts_BE: Tensor = counting.sums_of_choices(expert_ids_TK, None, n_sequences, n_experts)[0]
        return counts_BE
    ids_Bx = expert_ids_TK.reshape(n_sequences, -1)
    ones_Bx = torch.ones_like(ids_Bx, dtype=torch.float32)
    return ones_Bx.new_zeros(n_sequences, n_experts + 1).scatter_add(1, ids_Bx, ones_Bx)[:, :n_experts]
