"""The `collapse_alarm` callback: says on the console, once, that a router is collapsing, and what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from moelm.callbacks.journal import Record, Shape, append_record, cut_records, read_records
from moelm.callbacks.observer import Observer, saved_state, say, writer_of
from moelm.config import Config, NamedConfig, register, setting
from moelm.moe.load_metrics import dead_experts, effective_experts
from moelm.training.lightning_module import MoELightningModule
from moelm.training.statistics import WINDOW

FILE = "alarms.jsonl"
BALANCE_REMEDY = "raise the coef of a balancing loss (switch) or balance by loss_free; a lower optim.lr helps too"
FIXED_REMEDY = "the router has no weights; fewer experts, or another router"
LOGIT_REMEDY = "add the balancer z_loss (coef 0.001), or lower optim.lr"


@dataclass
class CollapseAlarmConfig(NamedConfig):
    """The defaults are explained in docs/metrics.md."""

    grace_steps: int = setting(200, ge=WINDOW)  # optimizer steps without alarm: early routing is uneven
    dead_share: float = setting(0.1, gt=0, le=1)  # of a layer's experts, without a token in the last 50 steps
    effective_share: float = setting(0.5, gt=0, lt=1)  # effective experts of the last 50 steps below this share of all
    logit_rms: float = setting(30.0, gt=0)
    logit_growth: float = setting(10.0, gt=1)  # times what it was at the end of the grace, or times 1 if it was less
    stop: bool = False  # end the run at the first alarm, with the last validation and checkpoint


@dataclass(frozen=True)
class Alarm:
    step: int
    kind: str  # dead_experts, effective_experts or logits
    layer: int
    message: str
    stopped: bool  # the run ended because of it


SHAPE: Shape = {"step": int, "kind": str, "layer": int, "message": str, "stopped": bool}


def read_alarms(run_folder: Path) -> list[Alarm]:
    return [Alarm(**record) for record in read_records(run_folder / FILE, SHAPE)]


@register("callback", "collapse_alarm", CollapseAlarmConfig)
class CollapseAlarm(Observer):
    """Looks at log steps after the grace. Each kind warns once a run, a resumed one too: on the console, as the text
    `alarm/<kind>` and in `alarms.jsonl`."""

    def __init__(self, config: CollapseAlarmConfig, run: Config) -> None:
        self.config, self.layers, self.file = config, run.model.routed_layers, run.run_folder / FILE
        self.warned: list[str] = []
        self.first_logit_rms: list[float] = []  # by layer, at the end of the grace

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoELightningModule)
        done = pl_module.step

        def keep(record: Record) -> bool:
            return bool(record["step"] <= done)

        if trainer.is_global_zero:
            cut_records(self.file, keep, SHAPE)

    def observe(self, module: MoELightningModule) -> None:
        last = module.last_step
        if module.step < self.config.grace_steps or last is None or last.load_ME is None:
            return
        recent_ME = module.recent_load.total()
        numbers = [dead_experts(recent_ME).double(), effective_experts(recent_ME).double()]
        if "logit_sq" in last.observed_M:
            numbers.append(last.observed_M["logit_sq"].sqrt())
        dead, effective, *logits = torch.stack(numbers).tolist()
        logit_rms = logits[0] if logits else []
        self.first_logit_rms = self.first_logit_rms or logit_rms
        found = judge(self.config, recent_ME.shape[1], dead, effective, logit_rms, self.first_logit_rms)
        for kind, (i, what) in found.items():
            if kind not in self.warned:
                self.warned.append(kind)
                self._warn(module, kind, self.layers[i], what)

    def _warn(self, module: MoELightningModule, kind: str, layer: int, what: str) -> None:
        moe = module.config.model.moe
        balance = BALANCE_REMEDY if moe is not None and moe.router.learned else FIXED_REMEDY
        remedy = LOGIT_REMEDY if kind == "logits" else balance
        message = f"layer {module.config.model.layer_name(layer)}: {what}"
        stopped = self.config.stop and not module.trainer.should_stop
        say(module, f"step {module.step}: collapse alarm, {message}\n  remedy: {remedy}")
        if stopped:
            say(module, f"step {module.step}: collapse_alarm.stop ends the run here")
            module.trainer.should_stop = True
        writer = writer_of(module)
        if writer is not None:
            writer.add_text(f"alarm/{kind}", f"{message}\n\nremedy: {remedy}", module.step)
        if module.trainer.is_global_zero:
            append_record(
                self.file,
                {"step": module.step, "kind": kind, "layer": layer, "message": message, "stopped": stopped},
            )

    def state_dict(self) -> dict[str, Any]:
        return {"warned": list(self.warned), "first_logit_rms": list(self.first_logit_rms)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.warned, self.first_logit_rms = saved_state(state_dict, warned=list, first_logit_rms=list)


def judge(
    config: CollapseAlarmConfig,
    n_experts: int,
    dead: list[float],
    effective: list[float],
    logit_rms: list[float],
    first_logit_rms: list[float],
) -> dict[str, tuple[int, str]]:
    """Kind of alarm -> index of the worst layer, and what is wrong with it. Lists are by layer; no logits: empty."""
    found = {}
    if max(dead) >= config.dead_share * n_experts:
        worst = dead.index(max(dead))
        what = f"{dead[worst]:.0f} of {n_experts} experts got no token in the last {WINDOW} steps"
        found["dead_experts"] = worst, what
    if min(effective) < config.effective_share * n_experts:
        worst = effective.index(min(effective))
        what = f"the load of the last {WINDOW} steps is that of {effective[worst]:.1f} experts of {n_experts}"
        found["effective_experts"] = worst, what
    bounds = [min(config.logit_rms, config.logit_growth * max(first, 1.0)) for first in first_logit_rms]
    pairs = zip(logit_rms, bounds, strict=True)
    excess = [math.inf if math.isnan(now) else now / bound for now, bound in pairs]
    if excess and max(excess) > 1:
        worst = excess.index(max(excess))
        what = f"the router's logits have a root mean square of {logit_rms[worst]:.1f}, more than {bounds[worst]:.1f}"
        found["logits"] = worst, what
    return found
