"""The measures of imbalance that the losses share, and the means that they are taken over."""

from __future__ import annotations

from torch import Tensor


def share_product(counts: Tensor, probability: Tensor) -> Tensor:
    """n sum_e f_e P_e over the last dimension, of size n: f_e = counts_e / sum counts, P = `probability`.

    f is a share of all choices, not of the tokens, so the value is 1 for any top_k when either f or P is uniform, and
    n when all lies on one. With top_k choices of each token, E f is the E / (K T) x counts of the papers. Gradient
    flows through P; counts have none. 0 where nothing was counted.
    """
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return counts.shape[-1] * (share * probability).sum(-1)


def squared_variation(values: Tensor) -> Tensor:
    """CV^2 over the last dimension: population variance / mean^2. 0 if all are equal, n - 1 if one has everything, 0 if
    all are 0."""
    mean = values.mean(-1, keepdim=True)
    variance = (values - mean).square().mean(-1)
    return variance / mean.squeeze(-1).square().clamp(min=1e-20)


def mean_over_batch(prob_MBE: Tensor, n_tokens_MB: Tensor) -> Tensor:
    """[M, E]: the mean over the counted tokens of the micro-batch, from those of its sequences; 0 without tokens."""
    weight_MB = n_tokens_MB / n_tokens_MB.sum(-1, keepdim=True).clamp(min=1)
    return (prob_MBE * weight_MB.unsqueeze(-1)).sum(1)


def mean_over_sequences(loss_MB: Tensor, n_tokens_MB: Tensor) -> Tensor:
    """[M]: the mean over sequences that have counted tokens, all weighing the same; the loss of the others is 0."""
    return loss_MB.sum(-1) / (n_tokens_MB > 0).sum(-1).clamp(min=1)
