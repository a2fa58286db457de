"""Rotary position embedding (arXiv 2104.09864) and the ways to stretch it over a longer context.

Half-split layout: dimension i turns with dimension i + Q/2. Interleaved layout: 2i turns with 2i + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moelm.config import ConfigError, setting

_FIELDS_OF = {  # beside kind
    "none": (),
    "yarn": ("factor", "original_context", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"),
    "llama3": ("factor", "original_context", "low_frequency_factor", "high_frequency_factor"),
}


@dataclass
class RopeScalingConfig:
    """How the angles change so that a model reads `factor` times its `original_context`.

    A pair of dimensions that turns r = original_context * frequency / 2 pi times over the original context keeps its
    frequency where r is large, has it divided by `factor` where r is small, and something between in between:

    yarn (arXiv 2309.00071): between r = beta_fast and r = beta_slow, linear in the number of the pair (whose bounds
    `truncate` rounds outward); cos and sin are multiplied by m(factor, 1), or by m(factor, mscale) /
    m(factor, mscale_all_dim) where these are given (DeepSeek-V2), with m(s, c) = 0.1 c ln(s) + 1.
    llama3 (Llama 3.1): between r = high_frequency_factor and r = low_frequency_factor, linear in r.
    """

    kind: str = setting("none", allowed=("none", "yarn", "llama3"))
    factor: float = setting(1.0, ge=1)
    original_context: int | None = setting(None, ge=1)  # tokens
    beta_fast: float = setting(32.0, gt=0)
    beta_slow: float = setting(1.0, gt=0)
    truncate: bool = True
    mscale: float | None = setting(None, gt=0)
    mscale_all_dim: float | None = setting(None, gt=0)
    low_frequency_factor: float = setting(1.0, gt=0)
    high_frequency_factor: float = setting(4.0, gt=0)

    def check(self, key: str) -> None:
        """Raises ConfigError."""
        for field in fields(self):
            value, unused = getattr(self, field.name), field.name not in ("kind", *_FIELDS_OF[self.kind])
            if unused and value != field.default:
                kinds = [kind for kind, names in _FIELDS_OF.items() if field.name in names]
                remedy = f"remove it, or set kind: {' or '.join(kinds)}"
                raise ConfigError(f"{key}.{field.name}", f"{value} has no effect with the kind {self.kind}", remedy)
        if self.kind == "none":
            return
        if self.factor == 1:
            raise ConfigError(f"{key}.factor", "1 stretches nothing", "raise it, or set kind: none")
        if self.original_context is None:
            raise ConfigError(f"{key}.original_context", f"{self.kind} needs it", "give the context before scaling")
        if self.beta_fast <= self.beta_slow:
            problem = f"{self.beta_fast} is not above beta_slow = {self.beta_slow}"
            raise ConfigError(f"{key}.beta_fast", problem, "try 32 and 1")
        if self.high_frequency_factor <= self.low_frequency_factor:
            problem = f"{self.high_frequency_factor} is not above low_frequency_factor = {self.low_frequency_factor}"
            raise ConfigError(f"{key}.high_frequency_factor", problem, "try 4 and 1")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            missing = "mscale" if self.mscale is None else "mscale_all_dim"
            raise ConfigError(f"{key}.{missing}", "is missing", "give both mscale and mscale_all_dim, or neither")

    def magnitude(self, mscale: float = 1.0) -> float:
        """m(factor, mscale) of YaRN; 1 without it."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.kind == "yarn" else 1.0


NO_SCALING = RopeScalingConfig()


def rotation(
    positions_L: Tensor, head_dim: int, theta: float, scaling: RopeScalingConfig = NO_SCALING
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [L, Q/2], of the angles position * frequency, times the magnitude of the scaling."""
    frequencies_Q, magnitude = frequencies(head_dim, theta, scaling, positions_L.device)
    angles = positions_L.float().unsqueeze(-1) * frequencies_Q
    return angles.cos() * magnitude, angles.sin() * magnitude


def frequencies(
    head_dim: int, theta: float, scaling: RopeScalingConfig = NO_SCALING, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """theta^(-2i / Q) for i < Q/2, float32, as `scaling` changes them; and what multiplies cos and sin."""
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    if scaling.kind == "yarn":
        kept = _kept_by_yarn(head_dim, theta, scaling, device)
        magnitude = scaling.magnitude()
        if scaling.mscale is not None and scaling.mscale_all_dim is not None:
            magnitude = scaling.magnitude(scaling.mscale) / scaling.magnitude(scaling.mscale_all_dim)
        return plain / scaling.factor * (1 - kept) + plain * kept, magnitude
    if scaling.kind == "llama3":
        assert scaling.original_context is not None
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        turns = scaling.original_context * plain / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return plain / scaling.factor * (1 - kept) + plain * kept, 1.0
    return plain, 1.0


def _kept_by_yarn(head_dim: int, theta: float, scaling: RopeScalingConfig, device: torch.device | None) -> Tensor:
    """How much of its own frequency each pair keeps, 1 to 0."""
    assert scaling.original_context is not None

    def pair_that_turns(times: float, context: int) -> float:
        return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = pair_that_turns(scaling.beta_fast, scaling.original_context)
    last = pair_that_turns(scaling.beta_slow, scaling.original_context)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    pairs = torch.arange(head_dim // 2, device=device, dtype=torch.float32)
    return 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)


def rotate(x_BLHQ: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x turned by its position's angles, computed in float32, returned in x's dtype and layout.

    Heads come after positions, as a projection writes them: attention gives its output the layout of its queries, so
    the product that follows reads it as it is, where the other order would cost a copy, and that one kept as well.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if interleaved:
        first, second = x_BLHQ.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    else:
        first, second = x_BLHQ.float().chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x_BLHQ.dtype)
