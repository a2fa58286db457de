"""Multi-token prediction through the real entry points: it learns, is balanced, labelled and resumed as any layer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_runs import Recorder, scalars_of
from torch import nn

from moelm import evaluate, info
from moelm.callbacks import co_activation, expert_usage, specialisation
from moelm.callbacks.co_activation import CoActivation
from moelm.callbacks.expert_counts import read_expert_counts
from moelm.callbacks.expert_usage import ExpertUsage
from moelm.callbacks.run_card import model_table
from moelm.config import Config, ConfigError, make_named
from moelm.config import check as check_config
from moelm.model.block import Block
from moelm.model.size import model_size
from moelm.train import train
from moelm.training.checkpoint_io import load_weights, step_folder
from moelm.training.lightning_module import MoELightningModule

STEPS = 40
CHANGES: dict[str, Any] = {
    "model.multi_token_prediction": {"coef": 0.5},
    "model.moe.router": {"name": "top_k", "score": "sigmoid", "selection_bias": True},
    "model.moe.balancers": [{"name": "loss_free", "rate": 0.01}],
    "trainer.max_steps": STEPS,
    "trainer.log_every_n_steps": 5,
    "checkpoint.every_n_steps": 10,
}


def named(config: Config, name: str) -> Config:
    callbacks = [*config.callbacks, make_named("callback", "recorder")]
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name), callbacks=callbacks)


def test_a_run_learns_balances_labels_and_resumes_bitwise(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: dict[str, list[str]] = {}

    def note(name: str) -> Callable[..., Any]:
        def draw(values: Any, **options: Any) -> Any:
            rows[name] = options.get("row_names") or [options["title"]]
            return original(values, **options)

        return draw

    original = expert_usage.draw_heat_map
    for module in (expert_usage, co_activation, specialisation):
        monkeypatch.setattr(module, "draw_heat_map", note(module.__name__.rpartition(".")[2]))
    config = tiny(CHANGES)
    straight, broken = named(config, "straight"), named(config, "broken")
    train(straight)
    record = Recorder.made[-1]

    # it learns: the loss of the modules falls, and is in the total
    curves = scalars_of(straight.run_folder)
    further = [value for _, value in curves["train/multi_token_prediction"]]
    assert further[0] == pytest.approx(0.5 * 6.24, rel=0.05)  # near ln 512 at first
    assert further[-1] < 0.9 * further[0]
    for (_, loss), (_, ce), value in zip(curves["train/loss"], curves["train/ce"], further, strict=True):
        assert loss == pytest.approx(ce + value, rel=1e-5)

    # it is counted without the last position of each of 16 sequences, and balanced
    assert [load_ME.sum(-1).tolist() for load_ME in record.loads] == [[1024, 1024, 992]] * STEPS
    bias_ME = record.biases[-1]
    assert bias_ME is not None
    assert (bias_ME.abs().amax(-1) > 0.01).all()
    weights = load_weights(step_folder(straight.run_folder, STEPS))
    assert torch.equal(weights["multi_token_prediction.0.block.moe.router.expert_bias"], bias_ME[2])

    # it is labelled
    for tag in ("max_violation", "bias_range", "logit_rms"):
        layers = [name for name in curves if name.startswith("moe/layer_") and name.endswith(f"/{tag}")]
        assert sorted(layers) == [f"moe/layer_{layer}/{tag}" for layer in ("00", "01", "02")]
    assert rows["expert_usage"] == ["0", "1", "2 (MTP 1)"]
    assert [name for name in rows["specialisation"] if "MTP" in name] == ["2 (MTP 1) code", "2 (MTP 1) more"]
    assert "From layer 1 to layer 2 (MTP 1)" in rows["co_activation"][0]
    counts = read_expert_counts(straight.run_folder)
    assert [sum(row) for row in counts.intervals[0].load] == [STEPS * 1024, STEPS * 1024, STEPS * 992]
    evaluate.main(["--checkpoint", str(straight.run_folder)])
    table = capsys.readouterr().out.splitlines()
    labels = [line[16:26].strip() for line in table[table.index("") + 2 :]]
    assert labels == ["0", "1", "2 (MTP 1)"] * 3

    # it resumes
    Recorder.raise_after = 33
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(broken)
    Recorder.raise_after = None
    train(broken, resume="auto")
    assert Recorder.made[-1].losses == record.losses[30:]
    resumed = load_weights(step_folder(broken.run_folder, STEPS))
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


def test_validation_is_the_next_token_alone(tiny: Callable[..., Config]) -> None:
    """One step at a rate of nothing: the weights of the main model are the same with and without."""
    values = {}
    for name, section in (("with", {"n_modules": 2, "coef": 5.0}), ("without", None)):
        config = tiny({"model.multi_token_prediction": section, "trainer.max_steps": 1, "optim.lr": 1e-30})
        train(named(config, name))
        curves = scalars_of(named(config, name).run_folder)
        values[name] = [curves[tag] for tag in ("val/ce", "val/bits_per_byte", "train/ce")]
    assert values["with"] == values["without"]


def test_every_block_is_compiled(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    module = MoELightningModule(tiny(CHANGES | {"trainer.compile": True}), ["code"], 0)
    module.configure_model()
    assert compiled == [block for block in module.model.modules() if isinstance(block, Block)]
    assert len(compiled) == 3


def test_callbacks_draw_its_layer_if_asked_and_the_main_ones_if_not(tiny: Callable[..., Config]) -> None:
    config = tiny(CHANGES | {"callbacks": [{"name": "co_activation", "layers": [2]}]})
    assert CoActivation(config.callbacks[0], config).shown == [2]  # type: ignore[arg-type]
    assert CoActivation(make_named("callback", "co_activation"), config).shown == [0, 1]  # type: ignore[arg-type]
    assert ExpertUsage(make_named("callback", "expert_usage"), config).layers == [0, 1, 2]  # type: ignore[arg-type]
    config.model.multi_token_prediction = None
    with pytest.raises(ConfigError, match="layer 2 has no experts"):
        check_config(config)
    dense = tiny({"model.multi_token_prediction": {}, "model.moe": None})
    assert dense.model.routed_layers == []


def test_info_and_the_run_card_say_what_the_modules_cost(tiny: Callable[..., Config]) -> None:
    config = tiny({"model.multi_token_prediction": {"n_modules": 2}})
    count = model_size(config.model).multi_token_prediction
    facts = info.info(config)
    assert json.loads(json.dumps(facts))["multi_token_prediction_params"] == count > 0
    assert f"{count:,} in 2 modules, not counted above" in info.as_table(config, facts)
    card = model_table(config)
    assert f"| multi-token prediction | {count:,} |" in card
    assert "| `multi_token_prediction.*.projection.weight` | 32 x 64 | 2 x |" in card
    plain = tiny()
    assert info.info(plain)["total_params"] == facts["total_params"]
    assert info.info(plain)["multi_token_prediction_params"] == 0
    assert "multi-token" not in info.as_table(plain, info.info(plain)) + model_table(plain)
