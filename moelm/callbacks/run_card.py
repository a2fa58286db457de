"""The `run_card` callback: what this run is, as text beside its curves."""

from __future__ import annotations

import re
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from moelm.callbacks.observer import writer_of
from moelm.config import Config, NamedConfig, register, to_yaml
from moelm.model.gpt import GPT
from moelm.model.size import flops_per_token, model_size, short_name
from moelm.training.lightning_module import MoELightningModule


@dataclass
class RunCardConfig(NamedConfig):
    pass


@register("callback", "run_card", RunCardConfig)
class RunCard(Callback):
    """The resolved config and the parameter table under TensorBoard's TEXT."""

    def __init__(self, config: RunCardConfig, run: Config) -> None:
        self.run = run

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoELightningModule)
        writer = writer_of(pl_module)
        if writer is not None:
            writer.add_text("run/config", "```yaml\n" + to_yaml(self.run) + "```", pl_module.step)
            writer.add_text("run/model", model_table(self.run), pl_module.step)


def model_table(run: Config) -> str:
    """Markdown: the model's size, then every parameter's shape by name, the layers that share it folded together."""
    size = model_size(run.model)
    rows = [
        ("name", short_name(size), ""),
        ("total parameters", f"{size.total:,}", ""),
        ("active parameters", f"{size.active:,}", ""),
        ("training FLOPs a token", f"{flops_per_token(run.model, run.data.seq_len):,}", ""),
    ]
    with torch.device("meta"):
        model = GPT(run.model)
    folded: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, parameter in model.named_parameters():
        key = (re.sub(r"blocks\.\d+", "blocks.*", name), tuple(parameter.shape))
        folded[key] = folded.get(key, 0) + 1
    rows += [(f"`{name}`", " x ".join(map(str, shape)), f"{n} x") for (name, shape), n in folded.items()]
    return "\n".join(
        ["| what | value or shape | times |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    )
