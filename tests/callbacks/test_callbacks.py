"""What a run shows in TensorBoard."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import scalars_of

from moelm.callbacks.throughput import mfu, peak_flops
from moelm.config import Config
from moelm.model.size import flops_per_token
from moelm.train import train

LOSS_FREE = {
    "model.moe.router": {"name": "top_k", "score": "sigmoid", "selection_bias": True},
    "model.moe.balancers": [{"name": "loss_free", "rate": 0.01}, {"name": "switch"}],
}


def test_the_tags_of_a_run_are_the_documented_ones(tiny: Callable[..., Config]) -> None:
    config = tiny({**LOSS_FREE, "trainer.max_steps": 20})
    train(config)
    per_layer = ("max_violation", "load_entropy", "dead_experts", "bias_range", "bias_update")
    assert set(scalars_of(config.run_folder)) == {
        *("train/ce", "train/loss", "train/grad_norm", "train/lr"),
        *("val/ce", "val/perplexity", "val/bits_per_byte"),
        *("aux/switch", "aux/switch_raw", "moe/max_violation", "moe/dead_experts", "perf/tokens_per_s"),
        *(f"moe/layer_{layer:02d}/{name}" for layer in (0, 1) for name in per_layer),
    }


def test_scalars_are_logged_every_n_steps_and_at_the_last(tiny: Callable[..., Config]) -> None:
    config = tiny({"trainer.max_steps": 17, "trainer.log_every_n_steps": 5, "optim.micro_batch_size": 4})
    train(config)
    curves = scalars_of(config.run_folder)
    for tag in ("train/ce", "moe/max_violation", "aux/switch", "perf/tokens_per_s"):
        assert [step for step, _ in curves[tag]] == [5, 10, 15, 17], tag


def test_the_bias_scalars_follow_the_rate(tiny: Callable[..., Config]) -> None:
    config = tiny({**LOSS_FREE, "trainer.max_steps": 10})
    train(config)
    curves = scalars_of(config.run_folder)
    assert 0 < curves["moe/layer_00/bias_update"][-1][1] <= 0.02
    assert 0 < curves["moe/layer_00/bias_range"][-1][1] <= 10 * 2 * 0.01 + 1e-6


def test_the_heat_map_and_the_run_card_are_there(tiny: Callable[..., Config]) -> None:
    config = tiny(
        {
            "trainer.max_steps": 30,
            "callbacks": [{"name": "expert_usage", "image_every_n_steps": 20}, "run_card"],
        }
    )
    train(config)
    events = EventAccumulator(str(config.run_folder), size_guidance={"images": 0})
    events.Reload()
    images = events.Images("moe/load")
    assert [image.step for image in images] == [10, 20, 30]
    pixels = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)))
    assert pixels.shape[1] > 300
    assert pixels.std() > 5, "an empty picture"
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "n_experts: 8" in texts["run/config/text_summary"]
    assert "active parameters" in texts["run/model/text_summary"]
    assert "| `blocks.*.moe.experts.gate_up` | 8 x 32 x 32 | 2 x |" in texts["run/model/text_summary"]


def test_mfu_counts_active_parameters_and_is_absent_for_an_unknown_chip(tiny: Callable[..., Config]) -> None:
    flops = flops_per_token(tiny().model, 32)
    assert mfu(1e6, flops, 989e12, 2) == pytest.approx(1e6 * flops / 989e12 / 2)
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GH200 480GB") == 989e12
    for other in (
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "Some Other Chip",
        "NVIDIA L40",
        "NVIDIA RTX A1000 Laptop GPU",
        "NVIDIA GB200",
    ):
        assert peak_flops(other) is None, other


def test_validation_and_saving_are_no_part_of_the_throughput(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    from moelm.training.lightning_module import MoELightningModule

    real = MoELightningModule.on_validation_epoch_end

    def slow(self: MoELightningModule) -> None:
        time.sleep(1.5)
        real(self)

    monkeypatch.setattr(MoELightningModule, "on_validation_epoch_end", slow)
    config = tiny({"trainer.max_steps": 20, "data.val_every_n_steps": 10, "trainer.log_every_n_steps": 5})
    train(config)
    rates = dict(scalars_of(config.run_folder)["perf/tokens_per_s"])
    assert rates[15] > 5 * 512 / 1.4, "the 1.5 s of validation were counted as training"
