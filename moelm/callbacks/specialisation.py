"""The `specialisation` callback: which experts a domain of the validation data prefers."""

# ruff: noqa: RUF009  (setting returns a dataclass field)
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moelm.callbacks.heat_map import draw_heat_map
from moelm.callbacks.observer import (
    Observer,
    check_layers,
    domain_loads,
    ratio_to_chance,
    say,
    spread,
    validation_image_is_due,
    write_image,
    writer_of,
)
from moelm.config import Config, NamedConfig, register, setting
from moelm.moe.load_metrics import mutual_information
from moelm.training.lightning_module import MoELightningModule


@dataclass
class SpecialisationConfig(NamedConfig):
    layers: list[int] | None = setting(None, ge=0)  # which to draw; null: up to eight at even distances
    image_every_n_steps: int = setting(500, ge=1)  # optimizer steps; drawn at the next validation

    def check(self, key: str, config: Config) -> None:
        check_layers(key, self.layers, config)


@register("callback", "specialisation", SpecialisationConfig)
class Specialisation(Observer):
    """`moe/mutual_information`, the mean over layers, and the picture `moe/specialisation`: an expert's share of a
    domain's choices over its share of all choices. Domains weigh what they have in choices."""

    def __init__(self, config: SpecialisationConfig, run: Config) -> None:
        self.layers = run.model.routed_layers
        self.shown = spread(self.layers, 8) if config.layers is None else config.layers
        self.every = config.image_every_n_steps
        self.said = False

    def observe_validation(self, module: MoELightningModule) -> None:
        domains = domain_loads(module)
        if len(domains) < 2:
            if self.layers and not self.said:
                say(module, "specialisation: the validation data has one domain, so there is nothing to compare")
                self.said = True
            return
        counts_MDE = torch.tensor(list(domains.values()), dtype=torch.float64).transpose(0, 1)
        module.log_scalars({"moe/mutual_information": float(mutual_information(counts_MDE).mean())})
        writer = writer_of(module)
        if writer is None or not validation_image_is_due(module, self.every):
            return
        counts_SDE = counts_MDE[[self.layers.index(layer) for layer in self.shown]].numpy()
        chance_SDE = counts_SDE.sum(2, keepdims=True) * counts_SDE.sum(1, keepdims=True)
        chance_SDE = chance_SDE / np.maximum(counts_SDE.sum((1, 2), keepdims=True), 1)
        preference_SDE = ratio_to_chance(counts_SDE, chance_SDE)
        name = module.config.model.layer_name
        image = draw_heat_map(
            preference_SDE.reshape(-1, counts_SDE.shape[2]),
            low=0.0,
            high=2.0,
            title=f"Load of an expert by domain, 1 = as over all domains (validation, step {module.step})",
            row_label="layer and domain",
            row_names=[f"{name(layer)} {domain}" for layer in self.shown for domain in domains],
            marks="never",
            no_data="too few to say",
            group_rows=len(domains),
        )
        write_image(writer, "moe/specialisation", image, module.step)
