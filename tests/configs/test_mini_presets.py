"""The minis: what each keeps of its full preset, that they compare fairly, and that each trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from published import CONFIG_JSON

from moelm.config import Config, NamedConfig, check, differences, from_dict, load_config, read_yaml, register, to_dict
from moelm.hub import write_config
from moelm.model.size import model_size
from moelm.train import train

CONFIGS = Path(__file__).parents[2] / "configs"
MINIS = {file.stem: file for file in sorted((CONFIGS / "mini").glob("*.yaml"))}
FULL = {file.stem: file for file in sorted((CONFIGS / "full").glob("*.yaml"))}

MAY_BE_LOWER = {
    *("n_layers", "d_model", "vocab_size", "feed_forward.d_ff", "moe.n_experts", "moe.d_expert"),
    *("attention.n_heads", "attention.n_kv_heads", "attention.head_dim", "attention.sliding_window"),
    *("attention.q_latent_dim", "attention.kv_latent_dim"),
    *("attention.nope_head_dim", "attention.rope_head_dim", "attention.v_head_dim"),
}
IS_OF_THE_RUN = {"init.std", "init.truncate_sigmas", "init.scale_residual"}


def as_pair(name: str) -> tuple[Config, Config]:
    return load_config(MINIS[name]), load_config(FULL[name])


def test_there_is_a_mini_for_every_full_preset_and_a_dense_one() -> None:
    assert set(MINIS) == {*FULL, "dense"}


@pytest.mark.parametrize("name", FULL)
def test_a_mini_keeps_everything_but_sizes(name: str) -> None:
    mini, full = (to_dict(config.model) for config in as_pair(name))
    for key, (small, large) in differences(mini, full).items():
        key = key.replace("attention.0.", "attention.").replace("attention.1.", "attention.")
        assert key in MAY_BE_LOWER | IS_OF_THE_RUN, key
        if key in MAY_BE_LOWER:
            assert small is not None, key
            assert 0 < small < large, key


@pytest.mark.parametrize("name", FULL)
def test_experts_of_a_mini_are_as_many_and_as_wide_as_the_rules_ask(name: str) -> None:
    mini, full = (config.model for config in as_pair(name))
    assert mini.moe is not None
    assert full.moe is not None
    assert mini.moe.top_k == full.moe.top_k
    assert mini.moe.n_experts >= 4 * mini.moe.top_k
    assert mini.moe.d_expert / mini.d_model == pytest.approx(full.moe.d_expert / full.d_model, rel=0.25)
    assert mini.moe.shared_width * full.moe.d_expert == full.moe.shared_width * mini.moe.d_expert
    dense_layers = full.moe.first_moe_layer
    assert len(mini.moe_layers) == mini.n_layers - dense_layers > 0
    if dense_layers:
        assert mini.feed_forward.d_ff / mini.d_model == pytest.approx(full.feed_forward.d_ff / full.d_model, rel=0.25)


@pytest.mark.parametrize("name", MINIS)
def test_a_mini_is_small_and_its_widths_are_multiples_of_eight(name: str) -> None:
    config = load_config(MINIS[name])
    model = config.model
    assert model_size(model).total <= 60e6
    widths = [model.d_model]
    if model.moe is None or model.moe.first_moe_layer:
        widths.append(model.feed_forward.d_ff)
    if model.moe is not None:
        widths.append(model.moe.d_expert)
    for attention in model.attentions:
        widths += [width for key, width in vars(attention).items() if key.endswith("_dim") and width is not None]
        assert (vars(attention).get("sliding_window") or 0) < config.data.seq_len
    assert [width for width in widths if width % 8] == []


def test_all_minis_use_as_many_parameters_for_a_token() -> None:
    active = {name: model_size(load_config(file).model).active_no_embeddings for name, file in MINIS.items()}
    assert max(active.values()) <= 1.03 * min(active.values()), active
    assert sum(active.values()) / len(active) == pytest.approx(2.0e6, rel=0.01)


def test_all_minis_are_trained_alike() -> None:
    first, *others = (to_dict(load_config(file)) for file in MINIS.values())
    for other in others:
        for section in ("data", "optim", "trainer", "checkpoint", "callbacks"):
            assert differences(first[section], other[section]) == {}
        assert differences(first["model"]["init"], other["model"]["init"]) == {}
        assert other["model"]["vocab_size"] == first["model"]["vocab_size"]


@pytest.mark.parametrize("name", CONFIG_JSON)
def test_a_mini_exports_to_the_architecture_of_its_model(name: str) -> None:
    architecture, hf = write_config(load_config(MINIS[name]).model)
    assert architecture.model_type == hf["model_type"] == CONFIG_JSON[name]["model_type"]


@register("callback", "gradients", NamedConfig)
class Gradients(Callback):
    """Keeps the loss of each micro-batch, and of each parameter whether a step had a gradient for it."""

    losses: list[float] = []  # noqa: RUF012 the test reads the latest
    without: set[str] = set()  # noqa: RUF012

    def __init__(self, config: NamedConfig, run: Config) -> None:
        Gradients.losses, Gradients.without = [], set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        Gradients.losses.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            gradient = parameter.grad
            if gradient is None or not gradient.isfinite().all() or not gradient.any():
                Gradients.without.add(name)


@pytest.mark.parametrize("name", MINIS)
def test_a_mini_trains_and_every_parameter_learns(name: str, corpus: dict[str, Any], tmp_path: Path) -> None:
    raw = read_yaml(MINIS[name])
    raw["run"] |= {"dir": str(tmp_path), "name": name}
    raw["model"]["vocab_size"] = 512  # of the small corpus
    raw["data"] |= {"corpus": corpus, "seq_len": 48}
    raw["optim"] |= {"batch_tokens": 192, "micro_batch_size": 2}
    raw["optim"]["schedule"] |= {"warmup_steps": 0}
    raw["trainer"] |= {"max_steps": 2, "limit_val_batches": 1, "accelerator": "cpu", "enable_progress_bar": False}
    raw["callbacks"] = [{"name": "gradients"}]
    config = from_dict(Config, raw)
    check(config)
    summary = train(config)
    assert summary["step"] == 2
    assert len(Gradients.losses) == 4
    assert torch.tensor(Gradients.losses).isfinite().all()
    assert Gradients.without == set()
