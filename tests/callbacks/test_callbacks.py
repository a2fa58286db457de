"""What a run shows in TensorBoard."""

from __future__ import annotations

import dataclasses
import io
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import scalars_of

from moelm.callbacks.expert_counts import read_expert_counts
from moelm.callbacks.expert_usage import PER_LAYER as ALL_PER_LAYER
from moelm.callbacks.expert_usage import ExpertUsageConfig, gate_map, load_map, training_numbers
from moelm.callbacks.throughput import Throughput, ThroughputConfig, mfu, peak_flops
from moelm.config import Config, build, load_config
from moelm.model.size import flops_per_token
from moelm.train import train
from moelm.training.lightning_module import MoELightningModule

ROOT = Path(__file__).parent.parent.parent
PER_LAYER = list(ALL_PER_LAYER)
LOSS_FREE = {
    "model.moe.router": {"name": "top_k", "score": "sigmoid", "selection_bias": True},
    "model.moe.balancers": [{"name": "loss_free", "rate": 0.01}, {"name": "switch"}],
}


def test_a_run_stays_within_the_budget_of_curves(tiny: Callable[..., Config]) -> None:
    shipped = load_config(ROOT / "configs/quickstart.yaml").callbacks
    assert [each.name for each in shipped] == [each.name for each in Config().callbacks]
    config = dataclasses.replace(tiny({**LOSS_FREE, "model.moe.dispatch": "capacity"}), callbacks=shipped)
    train(config)
    curves = scalars_of(config.run_folder)
    layers = [tag for tag in curves if re.match(r"moe/layer_\d+/", tag)]
    model = [tag for tag in curves if tag.startswith(("moe/", "aux/")) and tag not in layers]
    assert len(layers) == 6 * len(config.model.moe_layers)
    assert 6 <= len(model) <= 12
    assert len(curves) - len(layers) - len(model) <= 16
    for tag in ("train/tokens", "train/flops"):
        assert [step for step, _ in curves[tag]] == [10, 20, 30, 40, 50, 60]


def test_scalars_are_logged_every_n_steps_and_at_the_last(tiny: Callable[..., Config]) -> None:
    config = tiny({"trainer.max_steps": 17, "trainer.log_every_n_steps": 5, "optim.micro_batch_size": 4})
    train(config)
    curves = scalars_of(config.run_folder)
    for tag in ("train/ce", "moe/max_violation", "aux/switch", "perf/tokens_per_s"):
        assert [step for step, _ in curves[tag]] == [5, 10, 15, 17], tag
    assert curves["train/tokens"] == [(step, 512 * step) for step in (5, 10, 15, 17)]
    flops = 512 * flops_per_token(config.model, 32)
    assert curves["train/flops"] == [(step, pytest.approx(flops * step, rel=1e-6)) for step in (5, 10, 15, 17)]


def test_validation_scalars_are_logged_once_a_validation(tiny: Callable[..., Config]) -> None:
    config = tiny({"data.val_every_n_steps": 20, "callbacks": [{"name": "expert_usage", "per_layer": PER_LAYER}]})
    train(config)
    curves = scalars_of(config.run_folder)
    for tag in ("moe/val_max_violation", "moe/layer_01/val_effective_experts", "moe/layer_00/mutual_information"):
        assert [step for step, _ in curves[tag]] == [20, 40, 60], tag
    assert 1 < curves["moe/layer_01/val_effective_experts"][-1][1] <= 8


def test_the_numbers_are_those_of_the_counts(tiny: Callable[..., Config]) -> None:
    """One step, so that the last batch, the window and the counts of the run are the same."""
    config = tiny({"trainer.max_steps": 1, "model.moe.dispatch": {"name": "capacity", "capacity_factor": 1.0}})
    config = dataclasses.replace(
        config, callbacks=[ExpertUsageConfig("expert_usage", PER_LAYER), *config.callbacks[3:]]
    )
    train(config)
    (interval,) = read_expert_counts(config.run_folder).intervals
    load_ME, kept_ME = np.array(interval.load, dtype=float), np.array(interval.kept, dtype=float)
    curves = {tag: points[-1][1] for tag, points in scalars_of(config.run_folder).items()}
    violation_M = load_ME.max(1) / load_ME.mean(1) - 1
    share_ME = load_ME / load_ME.sum(1, keepdims=True)
    effective_M = np.exp(-(share_ME * np.log(np.maximum(share_ME, 1e-20))).sum(1))
    dropped_M = 1 - kept_ME.sum(1) / load_ME.sum(1)
    assert (dropped_M > 0).all()
    for name, value_M in (
        *(("max_violation", violation_M), ("max_violation_window", violation_M)),
        *(("effective_experts", effective_M), ("dropped", dropped_M)),
    ):
        assert curves[f"moe/{name}"] == pytest.approx(value_M.mean(), rel=1e-5), name
        for i in (0, 1):
            assert curves[f"moe/layer_{i:02d}/{name}"] == pytest.approx(value_M[i], rel=1e-5), name
    assert curves["moe/dead_experts"] == (load_ME == 0).sum()
    validated = np.array(list(read_expert_counts(config.run_folder).validations[1].values()), dtype=float).sum(0)
    expected = (validated.max(1) / validated.mean(1) - 1).mean()
    assert curves["moe/val_max_violation"] == pytest.approx(expected, rel=1e-5)


def test_the_bias_scalars_follow_the_rate(tiny: Callable[..., Config]) -> None:
    usage = {"name": "expert_usage", "per_layer": ["bias_range", "bias_update"]}
    config = tiny({**LOSS_FREE, "trainer.max_steps": 10, "callbacks": [usage]})
    train(config)
    curves = scalars_of(config.run_folder)
    assert 0 < curves["moe/layer_00/bias_update"][-1][1] <= 0.02
    assert 0 < curves["moe/layer_00/bias_range"][-1][1] <= 10 * 2 * 0.01 + 1e-6


@pytest.mark.parametrize("raw", [False, True])
def test_the_raw_loss_is_shown_if_asked_for(raw: bool, tiny: Callable[..., Config]) -> None:
    config = tiny({"trainer.max_steps": 2, "callbacks": [{"name": "balance", "raw": raw}]})
    train(config)
    tags = {tag for tag in scalars_of(config.run_folder) if tag.startswith("aux/")}
    assert tags == ({"aux/switch", "aux/switch_raw"} if raw else {"aux/switch"})


def test_the_curves_of_a_layer_have_the_number_of_the_layer_in_the_model(tiny: Callable[..., Config]) -> None:
    callbacks = ["expert_usage", {"name": "balance", "raw": True, "raw_per_layer": True}]
    layers = {"model.n_layers": 3, "model.moe.first_moe_layer": 1}
    config = tiny({**layers, "trainer.max_steps": 1, "callbacks": callbacks})
    train(config)
    curves = {tag: points[0][1] for tag, points in scalars_of(config.run_folder).items()}
    for prefix in ("aux", "moe"):
        assert {tag.split("/")[1] for tag in curves if tag.startswith(f"{prefix}/layer")} == {"layer_01", "layer_02"}
    by_layer = [curves[f"aux/layer_{layer:02d}/switch_raw"] for layer in (1, 2)]
    assert curves["aux/switch_raw"] == pytest.approx(sum(by_layer) / 2, rel=1e-6)


def test_logits_are_shown_by_their_root_and_biases_by_the_range_that_they_span(tiny: Callable[..., Config]) -> None:
    load_ME = torch.tensor([[3.0, 1.0], [2.0, 2.0]])
    module = SimpleNamespace(
        last_step=SimpleNamespace(load_ME=load_ME, kept_ME=load_ME, observed_M={"logit_sq": torch.tensor([4.0, 2.25])}),
        recent_load=SimpleNamespace(total=lambda: load_ME),
        config=tiny(),
        expert_bias_ME=torch.tensor([[0.25, 1.0], [-0.5, -0.25]]),
        bias_update_ME=torch.tensor([[0.125, -0.5], [0.25, 0.0]]),
    )
    numbers = training_numbers(module)  # type: ignore[arg-type]
    assert numbers["logit_rms"].tolist() == [2.0, 1.5]
    assert numbers["bias_range"].tolist() == [0.75, 0.25]
    assert numbers["bias_update"].tolist() == [0.5, 0.25]
    assert "logit_sq" not in numbers


def test_heat_maps_show_loads_and_combine_weights_over_the_mean_of_their_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, Any]] = []

    def draw(values: Any, **options: Any) -> None:
        shown.append({"values": values, **options})

    monkeypatch.setattr("moelm.callbacks.expert_usage.draw_heat_map", draw)
    load_ME = np.array([[6.0, 2.0, 0.0, 4.0], [30.0, 10.0, 10.0, 10.0]])
    load_map(load_ME, ["0", "1"], 7)
    np.testing.assert_allclose(shown[0]["values"], [[2, 2 / 3, 0, 4 / 3], [2, 2 / 3, 2 / 3, 2 / 3]])
    gate_ME = np.array([[3.0, 0.5, 0.0, 2.5], [6.0, 4.0, 1.0, 1.0]])  # in the mean 6 / 12 and 12 / 60 a choice
    gate_map(gate_ME, load_ME, ["0", "1"], 7)
    expected = [[0.5 / 0.5, 0.25 / 0.5, np.nan, 0.625 / 0.5], [0.2 / 0.2, 0.4 / 0.2, 0.1 / 0.2, 0.1 / 0.2]]
    np.testing.assert_allclose(shown[1]["values"], expected)
    assert shown[1]["row_names"] == ["0: 0.50", "1: 0.20"]


def test_heat_maps_are_drawn_at_the_first_step_every_n_and_the_last(tiny: Callable[..., Config]) -> None:
    usage = {"name": "expert_usage", "image_every_n_steps": 20}
    config = tiny({**LOSS_FREE, "trainer.max_steps": 36, "callbacks": [usage]})
    train(config)
    events = EventAccumulator(str(config.run_folder), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"moe/load", "moe/gate", "moe/bias"}
    for tag in events.Tags()["images"]:
        images = events.Images(tag)
        assert [image.step for image in images] == [10, 20, 36], tag
        pixels = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)))
        assert pixels.shape[1] > 300
        assert pixels.std() > 5, "an empty picture"


def test_a_router_without_logits_shows_what_it_has(tiny: Callable[..., Config]) -> None:
    usage = {"name": "expert_usage", "per_layer": PER_LAYER}
    config = tiny({"model.moe.router": "hash", "model.moe.balancers": [], "trainer.max_steps": 2, "callbacks": [usage]})
    train(config)
    names = {tag.split("/")[2] for tag in scalars_of(config.run_folder) if tag.startswith("moe/layer_00/")}
    training = {"max_violation", "max_violation_window", "effective_experts", "dead_experts"}
    assert names == training | {"val_max_violation", "val_effective_experts", "mutual_information"}
    events = EventAccumulator(str(config.run_folder))
    events.Reload()
    assert events.Tags()["images"] == ["moe/load"]


@pytest.mark.gpu
def test_the_device_is_read_at_log_steps_alone(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny({**LOSS_FREE, "trainer.accelerator": "cuda", "trainer.compile": False, "trainer.max_steps": 25})
    watched: list[int] = []

    def guarded(hook: Callable[..., None]) -> Callable[..., None]:
        def run(self: Any, trainer: Any, module: Any, *arguments: Any) -> None:
            between = module.step > 1 and not module.is_log_step
            watched.append(int(between))
            torch.cuda.set_sync_debug_mode("error" if between else "default")
            try:
                hook(self, trainer, module, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    for each in config.callbacks:
        kind = type(build("callback", each, config))
        monkeypatch.setattr(kind, "on_train_batch_end", guarded(kind.on_train_batch_end))
    train(config)
    assert sum(watched) == len(config.callbacks) * (25 - 4)


def test_mfu_counts_active_parameters_and_is_absent_for_an_unknown_chip(tiny: Callable[..., Config]) -> None:
    flops = flops_per_token(tiny().model, 32)
    assert mfu(1e6, flops, 989e12, 2) == pytest.approx(1e6 * flops / 989e12 / 2)
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GH200 480GB") == 989e12
    for other in (
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H200 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "Some Other Chip",
        "NVIDIA L40",
        "NVIDIA RTX A1000 Laptop GPU",
        "NVIDIA GB200",
    ):
        assert peak_flops(other) is None, other


def test_the_throughput_is_of_the_steps_since_the_last_log(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Module(MoELightningModule):
        step, is_step_end, is_log_step, device = 0, True, True, torch.device("cpu")

        def __init__(self) -> None:
            self.paused_s, self.rates = 0.0, []

        def log_scalars(self, scalars: Any) -> None:
            self.rates.append(scalars["perf/tokens_per_s"])

    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    throughput, module = Throughput(ThroughputConfig("throughput"), tiny()), Module()
    for step, seconds, paused in ((1, 10.0, 0.0), (5, 12.0, 0.0), (10, 15.5, 1.0)):
        Module.step, now[0], module.paused_s = step, seconds, paused
        throughput.on_train_batch_end(None, module, None, None, 0)  # type: ignore[arg-type]
    assert module.rates == [4 * 512 / 2, 5 * 512 / 2.5]


def test_validation_and_saving_are_no_part_of_the_throughput(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MoELightningModule.on_validation_epoch_end

    def slow(self: MoELightningModule) -> None:
        time.sleep(1.5)
        real(self)

    monkeypatch.setattr(MoELightningModule, "on_validation_epoch_end", slow)
    config = tiny({"trainer.max_steps": 20, "data.val_every_n_steps": 10, "trainer.log_every_n_steps": 5})
    train(config)
    rates = dict(scalars_of(config.run_folder)["perf/tokens_per_s"])
    assert rates[15] > 5 * 512 / 1.4, "the 1.5 s of validation were counted as training"
