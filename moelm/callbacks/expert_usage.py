"""The `expert_usage` callback: how the tokens of each MoE layer spread over its experts."""

from __future__ import annotations

from dataclasses import dataclass

from moelm.callbacks.heat_map import draw_heat_map
from moelm.callbacks.observer import Observer, writer_of
from moelm.config import Config, NamedConfig, register, setting
from moelm.moe.load_metrics import dead_experts, load_entropy, max_violation, relative_load
from moelm.training.lightning_module import MoELightningModule
from moelm.training.statistics import WINDOW


@dataclass
class ExpertUsageConfig(NamedConfig):
    image_every_n_steps: int = setting(100, ge=1)  # optimizer steps; drawn at the next log step


@register("callback", "expert_usage", ExpertUsageConfig)
class ExpertUsage(Observer):
    """Scalars of the last batch, by layer and for the model; a heat map of the last WINDOW steps."""

    def __init__(self, config: ExpertUsageConfig, run: Config) -> None:
        self.every = config.image_every_n_steps
        self.last_step = run.trainer.max_steps
        self._next_image = 0

    def observe(self, module: MoELightningModule) -> None:
        if module.last_step is None or module.last_step.load_ME is None:
            return
        load_ME, recent_ME = module.last_step.load_ME, module.recent_load.total()
        violation_M, dead_M, entropy_M = (
            max_violation(load_ME),
            dead_experts(recent_ME),
            load_entropy(load_ME),
        )
        scalars = {"moe/max_violation": violation_M.mean(), "moe/dead_experts": dead_M.sum()}
        for i, layer in enumerate(module.config.model.moe_layers):
            scalars[f"moe/layer_{layer:02d}/max_violation"] = violation_M[i]
            scalars[f"moe/layer_{layer:02d}/load_entropy"] = entropy_M[i]
            scalars[f"moe/layer_{layer:02d}/dead_experts"] = dead_M[i]
        module.log_scalars(scalars)
        writer = writer_of(module)
        if writer is not None and (module.step >= self._next_image or module.step == self.last_step):
            self._next_image = module.step - module.step % self.every + self.every
            image = draw_heat_map(
                relative_load(recent_ME).cpu().numpy(),
                low=0.0,
                high=2.0,
                title=f"Expert load of the last {min(WINDOW, module.step)} steps, 1 = uniform (step {module.step})",
                row_names=[str(layer) for layer in module.config.model.moe_layers],
                marks="dead",
            )
            writer.add_image("moe/load", image, module.step, dataformats="HWC")
