"""Queries and keys as attention takes them, made of one projection: normed head by head, and turned by RoPE."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moelm.model.rope import rotate
from moelm.moe.ops import op


class TurnedHeads(torch.autograd.Function):
    """(q, k, v) [B, L, heads, Q] of qkv [B, L, (H + 2 H_kv) Q]: q and k as `turn_heads` has them, v a view of qkv.

    One op each way, since compiled it would be seven kernels backward, some of which write float32 for the next. Keeps
    qkv, or without norms nothing but the angles.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv_BLW: Tensor,
        weights_2Q: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        n_heads: int,
        n_kv_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q_BLHQ, k_BLHQ = turn_heads(qkv_BLW, weights_2Q, cos, sin, n_heads, n_kv_heads, eps)
        ctx.eps = eps
        ctx.save_for_backward(None if weights_2Q is None else qkv_BLW, weights_2Q, cos, sin)
        return q_BLHQ, k_BLHQ, qkv_BLW.unflatten(-1, (n_heads + 2 * n_kv_heads, -1))[:, :, n_heads + n_kv_heads :]

    @staticmethod
    def backward(ctx: Any, grad_q_BLHQ: Tensor, grad_k_BLHQ: Tensor, grad_v_BLHQ: Tensor) -> tuple[Tensor | None, ...]:
        qkv_BLW, weights_2Q, cos, sin = ctx.saved_tensors
        grads = grad_q_BLHQ, grad_k_BLHQ, grad_v_BLHQ
        grad_qkv_BLW, grad_weights_2Q = turn_heads_backward(*grads, qkv_BLW, weights_2Q, cos, sin, ctx.eps)
        return grad_qkv_BLW, None if weights_2Q is None else grad_weights_2Q, None, None, None, None, None


def _empty_heads(
    qkv_BLW: Tensor, weights_2Q: Tensor | None, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    B, L, _ = qkv_BLW.shape
    Q = 2 * cos.shape[1]
    return qkv_BLW.new_empty(B, L, n_heads, Q), qkv_BLW.new_empty(B, L, n_kv_heads, Q)


def _empty_gradients(
    grad_q_BLHQ: Tensor,
    grad_k_BLHQ: Tensor,
    grad_v_BLHQ: Tensor,
    qkv_BLW: Tensor | None,
    weights_2Q: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    B, L, H, Q = grad_q_BLHQ.shape
    width = (H + 2 * grad_k_BLHQ.shape[2]) * Q
    return grad_q_BLHQ.new_empty(B, L, width), cos.new_empty(2, Q, dtype=torch.float32)


@op("moelm::turn_heads", fake=_empty_heads)
def turn_heads(
    qkv_BLW: Tensor, weights_2Q: Tensor | None, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(q [B, L, H, Q], k [B, L, H_kv, Q]): RoPE(RMSNorm(head)) of each head of q and k, the norms' weights float32, q's
    and k's; without weights RoPE(head). cos and sin float32 [L, Q/2]. float32 inside, rounded once, to qkv's dtype.
    """
    from moelm.model.attention import heads_kernel  # here, since triton need not be installed

    return heads_kernel.turn_heads(qkv_BLW, weights_2Q, cos, sin, n_heads, n_kv_heads, eps)


@op("moelm::turn_heads_backward", fake=_empty_gradients)
def turn_heads_backward(
    grad_q_BLHQ: Tensor,
    grad_k_BLHQ: Tensor,
    grad_v_BLHQ: Tensor,
    qkv_BLW: Tensor | None,
    weights_2Q: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv, that of v copied into it, and of the weights, float32 [2, Q], 0 without norms.

    With c, s the angles' cos and sin, x_r = head / rms(head) and w the weight, of halves 1 and 2:
    g_1 = c grad_1 + s grad_2, g_2 = c grad_2 - s grad_1;  grad_w = sum g x_r;
    grad_head = (w g - x_r mean(w g x_r)) / rms(head).
    """
    from moelm.model.attention import heads_kernel

    grads = grad_q_BLHQ, grad_k_BLHQ, grad_v_BLHQ
    return heads_kernel.turn_heads_backward(*grads, qkv_BLW, weights_2Q, cos, sin, eps)


def turned_heads_reference(
    qkv_BLW: Tensor,
    weights_2Q: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`TurnedHeads` in plain PyTorch."""
    heads_BLHQ = qkv_BLW.unflatten(-1, (n_heads + 2 * n_kv_heads, -1))
    q_BLHQ, k_BLHQ, v_BLHQ = heads_BLHQ.split((n_heads, n_kv_heads, n_kv_heads), 2)
    turned = []
    for n, x_BLHQ in enumerate((q_BLHQ.float(), k_BLHQ.float())):
        if weights_2Q is not None:
            x_BLHQ = F.rms_norm(x_BLHQ, x_BLHQ.shape[-1:], weights_2Q[n], eps)
        turned.append(rotate(x_BLHQ, cos, sin).to(qkv_BLW.dtype))
    return turned[0], turned[1], v_BLHQ
