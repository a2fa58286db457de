"""The `co_activation` callback: which experts work together, within a layer and from one MoE layer to the next."""

# ruff: noqa: RUF009  (setting returns a dataclass field)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moelm.callbacks.heat_map import draw_heat_map
from moelm.callbacks.observer import (
    Observer,
    check_layers,
    ratio_to_chance,
    spread,
    validation_image_is_due,
    write_image,
    writer_of,
)
from moelm.config import Config, NamedConfig, register, setting
from moelm.training.lightning_module import MoELightningModule
from moelm.training.statistics import all_reduce_sums

Matrix = npt.NDArray[np.float64]


@dataclass
class CoActivationConfig(NamedConfig):
    layers: list[int] | None = setting(None, ge=0)  # which to draw; null: the first, the middle and the last MoE layer
    image_every_n_steps: int = setting(500, ge=1)  # optimizer steps; counted and drawn at the next validation

    def check(self, key: str, config: Config) -> None:
        check_layers(key, self.layers, config)


@register("callback", "co_activation", CoActivationConfig)
class CoActivation(Observer):
    """Counted on validation data. `moe/co_activation/layer_XX`: pairs of experts of one token in that layer (top_k of
    2 or more); `moe/next_layer/layer_XX`: its experts there against its experts in the next MoE layer. Both as the
    ratio to what chance would give, since a share alone shows little but which experts are popular.

    Routers whose experts choose the tokens have no choices by token, and are passed over.
    """

    def __init__(self, config: CoActivationConfig, run: Config) -> None:
        moe = run.model.moe
        self.layers = run.model.routed_layers
        self.n_experts, self.top_k = (moe.n_experts, moe.top_k) if moe is not None else (0, 0)
        token_choice = moe is not None and moe.router.routing == "token_choice"
        self.every = config.image_every_n_steps
        wanted = spread(run.model.moe_layers, 3) if config.layers is None else config.layers
        self.shown = [self.layers.index(layer) for layer in wanted] if token_choice else []
        self.pairs: dict[str, Tensor] = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoELightningModule)
        E, device = self.n_experts, pl_module.device
        due = validation_image_is_due(pl_module, self.every)
        names = [f"{kind}/{i}" for i in self.shown for kind in ("together", "next")] if due else []
        self.pairs = {name: torch.zeros(E, E, dtype=torch.float64, device=device) for name in names}

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        stats = outputs["output"].stats
        if not self.pairs or stats is None or "expert_ids_BLK" not in stats.extra:
            return
        ids_MTK = stats.extra["expert_ids_BLK"].flatten(1, 2)
        for i in self.shown:
            here_TE = one_hot(ids_MTK[i], self.n_experts)
            if self.top_k > 1:
                self.pairs[f"together/{i}"] += here_TE.T @ here_TE
            if i + 1 < len(self.layers):
                self.pairs[f"next/{i}"] += here_TE.T @ one_hot(ids_MTK[i + 1], self.n_experts)

    def observe_validation(self, module: MoELightningModule) -> None:
        if not self.pairs:
            return
        counts = {name: pairs_EE.cpu().numpy() for name, pairs_EE in all_reduce_sums(self.pairs).items()}
        self.pairs = {}
        writer = writer_of(module)
        if writer is None:
            return
        for i in self.shown:
            layer, name = self.layers[i], module.config.model.layer_name
            here = name(layer)
            together, following = counts[f"together/{i}"], counts[f"next/{i}"]
            if self.top_k > 1 and together.any():
                image = draw_heat_map(
                    lift_within(together),
                    low=0.0,
                    high=2.0,
                    title=f"Experts of one token in layer {here}, 1 = as often as by chance (step {module.step})",
                    row_label="expert",
                    marks="never",
                    no_data="itself, or too few to say",
                )
                write_image(writer, f"moe/co_activation/layer_{layer:02d}", image, module.step)
            if following.any():
                after = name(self.layers[i + 1])
                image = draw_heat_map(
                    lift_between(following),
                    low=0.0,
                    high=2.0,
                    title=f"From layer {here} to layer {after}, 1 = as often as by chance (step {module.step})",
                    row_label=f"expert of layer {here}",
                    column_label=f"expert of layer {after}",
                    marks="never",
                    no_data="too few to say",
                )
                write_image(writer, f"moe/next_layer/layer_{layer:02d}", image, module.step)


def one_hot(expert_ids_TK: Tensor, n_experts: int) -> Tensor:
    """float32 [T, E]: 1 where a token chose an expert. Products of two are counts, exact to 2^24 tokens in any
    precision of the product, since 0 and 1 are exact in all of them and sums are float32."""
    ones_TE = torch.zeros(expert_ids_TK.shape[0], n_experts + 1, device=expert_ids_TK.device)
    return ones_TE.scatter_(1, expert_ids_TK, 1.0)[:, :n_experts]


def lift_within(pairs_EE: Matrix) -> Matrix:
    """Pairs of different experts against chance, which is proportional to the product of both experts' loads (the
    diagonal), the total being that of the pairs seen. NaN on the diagonal, and where chance expects fewer than 5."""
    load_E = np.diag(pairs_EE)
    others_EE = 1.0 - np.eye(len(load_E))
    chance_EE = np.outer(load_E, load_E) * others_EE
    seen_EE = pairs_EE * others_EE
    return ratio_to_chance(seen_EE, chance_EE * (seen_EE.sum() / max(chance_EE.sum(), 1.0)))


def lift_between(pairs_EE: Matrix) -> Matrix:
    """Pairs (expert of one layer, expert of the next) against independence: row sum x column sum / total."""
    chance_EE = np.outer(pairs_EE.sum(1), pairs_EE.sum(0)) / max(pairs_EE.sum(), 1.0)
    return ratio_to_chance(pairs_EE, chance_EE)
