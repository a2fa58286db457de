"""The `run_card` callback: what this run is, beside its curves, and what makes runs comparable in TensorBoard."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.tensorboard.summary import custom_scalars, hparams

from moelm.callbacks.observer import saved_state, writer_of
from moelm.config import Config, NamedConfig, register, to_yaml
from moelm.model.gpt import GPT
from moelm.model.size import flops_per_token, model_size, short_name
from moelm.training.lightning_module import MoELightningModule

METRICS = ("val/ce", "val/bits_per_byte", "train/ce", "moe/max_violation", "moe/dead_experts", "perf/tokens_per_s")
LAYOUT = {  # of CUSTOM SCALARS: category -> chart -> tags, as regular expressions
    "loss": {
        "cross-entropy, nats a token": ["Multiline", ["^train/ce$", "^val/ce$"]],
        "balancing losses": ["Multiline", ["^aux/"]],
    },
    "balance": {
        "MaxVio, mean over layers": ["Multiline", ["^moe/max_violation", "^moe/val_max_violation"]],
        "MaxVio by layer": ["Multiline", [r"^moe/layer_\d+/max_violation$"]],
        "effective experts by layer": ["Multiline", [r"^moe/layer_\d+/effective_experts$"]],
        "dead experts": ["Multiline", ["^moe/dead_experts$"]],
    },
    "speed": {"tokens a second": ["Multiline", ["^perf/tokens_per_s$"]]},
}


@dataclass
class RunCardConfig(NamedConfig):
    pass


@register("callback", "run_card", RunCardConfig)
class RunCard(Callback):
    """Under TensorBoard's TEXT the resolved config and the parameter table; a row of HPARAMS; charts of CUSTOM SCALARS.

    All of it stands at the first step that was trained with it; a resumed run writes it again only if it has changed.
    """

    def __init__(self, config: RunCardConfig, run: Config) -> None:
        self.run = run
        self.written = ""  # the config that stands there already

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoELightningModule)
        writer = writer_of(pl_module)
        if writer is None:
            return
        experiment, start, self._end = hparams(hyper_parameters(self.run), dict.fromkeys(METRICS))
        text, step = to_yaml(self.run), pl_module.step + 1
        if text != self.written:
            writer.add_text("run/config", f"```yaml\n{text}```", step)
            writer.add_text("run/model", model_table(self.run), step)
            for summary in (custom_scalars(LAYOUT), experiment, start):
                writer._get_file_writer().add_summary(summary, step)
        self.written = text

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoELightningModule)
        writer = writer_of(pl_module)
        if writer is not None:
            writer._get_file_writer().add_summary(self._end, pl_module.step)

    def state_dict(self) -> dict[str, Any]:
        return {"written": self.written}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        (self.written,) = saved_state(state_dict, written=str | None)


def hyper_parameters(run: Config) -> dict[str, str | float]:
    """The same names and types for every run: TensorBoard takes the columns of its table from one of them."""
    size, moe = model_size(run.model), run.model.moe
    return {
        "run": run.run_name,
        "preset": run.run.preset or run.run_name,
        "n_layers": run.model.n_layers,
        "d_model": run.model.d_model,
        "n_experts": moe.n_experts if moe else 0,
        "top_k": moe.top_k if moe else 0,
        "d_expert": moe.d_expert if moe else 0,
        "n_shared_experts": moe.n_shared_experts if moe else 0,
        "router": moe.router.name if moe else "none",
        "dispatch": moe.dispatch.name if moe else "none",
        "balancers": " + ".join(_balancer(each) for each in moe.balancers) or "none" if moe else "none",
        "total_params": size.total,
        "active_params": size.active,
        "optimizer": run.optim.optimizer,
        "lr": run.optim.lr,
        "schedule": run.optim.schedule.name,
        "batch_tokens": run.optim.batch_tokens,
        "seq_len": run.data.seq_len,
        "precision": run.trainer.precision,
        "seed": run.run.seed,
    }


def _balancer(config: NamedConfig) -> str:
    """`switch 0.01`: the name, and the strength where it has one."""
    strength = getattr(config, "coef", getattr(config, "rate", None))
    return config.name if strength is None else f"{config.name} {strength:g}"


def model_table(run: Config) -> str:
    """Markdown: the model's size, then every parameter's shape by name, the layers that share it folded together."""
    size = model_size(run.model)
    rows = [
        ("name", short_name(size), ""),
        ("total parameters", f"{size.total:,}", ""),
        ("active parameters", f"{size.active:,}", ""),
        *(
            [("multi-token prediction", f"{size.multi_token_prediction:,}", "")]
            if run.model.n_prediction_modules
            else []
        ),
        ("training FLOPs a token", f"{flops_per_token(run.model, run.data.seq_len):,}", ""),
    ]
    with torch.device("meta"):
        model = GPT(run.model)
    folded: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, parameter in model.named_parameters():
        key = (re.sub(r"^(blocks|multi_token_prediction)\.\d+", r"\1.*", name), tuple(parameter.shape))
        folded[key] = folded.get(key, 0) + 1
    rows += [(f"`{name}`", " x ".join(map(str, shape)), f"{n} x") for (name, shape), n in folded.items()]
    return "\n".join(
        ["| what | value or shape | times |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    )
