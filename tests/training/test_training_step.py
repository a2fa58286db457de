"""What an optimizer step counts, adds up and leaves alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny_runs import Recorder, scalars_of

from moelm.config import Config, ModelConfig, make_named
from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.train import train
from moelm.training.checkpoint_io import load_training, load_weights, step_folder
from moelm.training.evaluation import forward_batch
from moelm.training.lightning_module import MoELightningModule
from moelm.training.statistics import WINDOW, RecentLoad

LOSS_FREE = {
    "model.moe.router": {"name": "top_k", "score": "sigmoid", "selection_bias": True},
    "model.moe.balancers": [{"name": "loss_free", "rate": 0.01}, {"name": "switch", "coef": 0.02}],
}


def recorded(config: Config, *, keep: bool = True, name: str = "tiny") -> Config:
    callbacks = [*(config.callbacks if keep else []), make_named("callback", "recorder")]
    return dataclasses.replace(config, callbacks=callbacks, run=dataclasses.replace(config.run, name=name))


@pytest.mark.parametrize(
    ("checkpointing", "micro_batch", "top_k"), [("none", 16, 8), ("none", 4, 2), ("full", 16, 2), ("full", 4, 8)]
)
def test_counts_are_exactly_tokens_times_top_k_times_accumulation(
    tiny: Callable[..., Config], checkpointing: str, micro_batch: int, top_k: int
) -> None:
    changes = {"trainer.activation_checkpointing": checkpointing, "optim.micro_batch_size": micro_batch}
    train(recorded(tiny({**changes, "model.moe.top_k": top_k, "trainer.max_steps": 3})))
    loads = Recorder.made[-1].loads
    assert len(loads) == 3
    for load_ME in loads:
        assert load_ME.sum(-1).tolist() == [512 * top_k] * 2


def test_activation_checkpointing_changes_no_count_and_no_weight(tiny: Callable[..., Config]) -> None:
    runs = {}
    for mode in ("none", "full"):
        config = tiny({**LOSS_FREE, "trainer.activation_checkpointing": mode, "trainer.max_steps": 8})
        train(recorded(config, name=mode))
        runs[mode] = (Recorder.made[-1].loads, load_weights(step_folder(config.run_folder.parent / mode, 8)))
    assert all(torch.equal(a, b) for a, b in zip(runs["none"][0], runs["full"][0], strict=True))
    for name, value in runs["none"][1].items():
        torch.testing.assert_close(value, runs["full"][1][name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_bias_follows_a_numpy_copy_of_the_rule_fed_with_the_counts(tiny: Callable[..., Config]) -> None:
    train(recorded(tiny({**LOSS_FREE, "optim.micro_batch_size": 4, "trainer.max_steps": 12})))
    record = Recorder.made[-1]
    bias_ME = np.zeros((2, 8), dtype=np.float32)
    for load_ME, seen_ME in zip(record.loads, record.biases, strict=True):
        load = load_ME.numpy()
        sign = np.sign(load.mean(-1, keepdims=True) - load).astype(np.float32)
        bias_ME = bias_ME + np.float32(0.01) * (sign - sign.mean(-1, keepdims=True, dtype=np.float32))
        assert seen_ME is not None
        assert np.array_equal(bias_ME, seen_ME.numpy())
    assert np.abs(bias_ME).max() > 0.02


def test_from_the_stop_step_on_a_run_keeps_its_bias(tiny: Callable[..., Config]) -> None:
    balancers = [{"name": "loss_free", "rate": 0.01, "stop_step": 2}]
    train(recorded(tiny({**LOSS_FREE, "model.moe.balancers": balancers, "trainer.max_steps": 4})))
    first, second, *later = Recorder.made[-1].biases
    assert not torch.equal(first, second)
    assert len(later) == 2
    assert all(torch.equal(bias_ME, second) for bias_ME in later)


def test_the_recent_load_forgets_what_is_older_than_its_window() -> None:
    recent = RecentLoad()
    for step in range(WINDOW + 5):
        recent.add(torch.tensor([[float(step < 5), 1.0]]), step)
    assert recent.total().tolist() == [[0, WINDOW]]


def test_validation_touches_neither_bias_nor_counters(tiny: Callable[..., Config]) -> None:
    runs = []
    for every in (1, 100):
        name = f"every-{every}"
        train(recorded(tiny({**LOSS_FREE, "data.val_every_n_steps": every, "trainer.max_steps": 6}), name=name))
        runs.append(Recorder.made[-1])
    assert len(runs[0].validations) == 6
    assert len(runs[1].validations) == 1
    assert runs[0].losses == runs[1].losses
    for kind in ("loads", "biases"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(runs[0], kind), getattr(runs[1], kind), strict=True))


def test_the_expert_bias_stays_float32_under_bf16_mixed(tiny: Callable[..., Config]) -> None:
    config = tiny({**LOSS_FREE, "trainer.precision": "bf16-mixed", "trainer.max_steps": 3})
    train(config)
    weights = load_weights(step_folder(config.run_folder, 3))
    biases = [value for name, value in weights.items() if name.endswith("expert_bias")]
    assert len(biases) == 2
    assert all(bias.dtype == torch.float32 and bias.abs().max() > 0 for bias in biases)
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_the_logged_loss_is_the_sum_of_its_parts(tiny: Callable[..., Config]) -> None:
    balancers = [{"name": "switch", "coef": 0.5}, {"name": "z_loss", "coef": 0.1}]
    changes = {"model.moe.balancers": balancers, "trainer.max_steps": 30, "optim.micro_batch_size": 4}
    config = tiny({**changes, "model.moe.router": "reinforce", "callbacks": [{"name": "balance", "raw": True}]})
    train(config)
    curves = {tag: dict(points) for tag, points in scalars_of(config.run_folder).items()}
    steps = curves["train/loss"]
    assert list(steps) == [10, 20, 30]
    for step, loss in steps.items():
        parts = [curves[tag][step] for tag in ("train/ce", "train/routing", "aux/switch", "aux/z_loss")]
        assert all(abs(part) > 0.001 for part in parts)
        assert loss == pytest.approx(sum(parts), abs=1e-6)
        assert curves["aux/switch"][step] == pytest.approx(0.5 * curves["aux/switch_raw"][step], rel=1e-5)


def test_doubling_a_coefficient_doubles_its_part_of_the_router_gradient(tiny: Callable[..., Config]) -> None:
    gradients = []
    for coef in (0.0, 0.3, 0.6):
        module = MoELightningModule(tiny({"model.moe.balancers": [{"name": "switch", "coef": coef}]}), ["x"], 0)
        module.configure_model()
        tokens = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(0))
        module.training_step({"inputs": tokens, "targets": tokens.roll(1, 1)}, 0).backward()
        gradients.append(module.model.moe_layers[0].router.weight.grad.double())
    once, twice = gradients[1] - gradients[0], gradients[2] - gradients[0]
    assert once.norm() > 1e-4
    assert float((twice - 2 * once).norm() / once.norm()) < 1e-3


def test_gradients_go_with_their_step_and_stay_within_it(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    training_step, held = MoELightningModule.training_step, []

    def count(self: MoELightningModule, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        held.append(sum(parameter.grad is not None for parameter in self.model.parameters()))
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(MoELightningModule, "training_step", count)
    train(tiny({"optim.micro_batch_size": 8, "trainer.max_steps": 3}))
    assert held[1] > 0
    assert held == [0, held[1]] * 3


def test_what_cuda_graphs_write_again_is_no_gradient_of_micro_batches_before(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: what autograd hands over as a gradient is lost with the next forward pass."""
    configure_model, training_step = MoELightningModule.configure_model, MoELightningModule.training_step
    handed_over: list[torch.Tensor] = []

    def configure(self: MoELightningModule) -> None:
        configure_model(self)
        self.model.cuda_graphs = True
        for parameter in self.model.blocks.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: handed_over.append(parameter.grad))

    def overwrite(self: MoELightningModule, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx % 4 == 1:
            assert handed_over
            for gradient in handed_over:
                gradient.fill_(torch.nan)
        handed_over.clear()
        return training_step(self, batch, batch_idx)

    config = tiny({"optim.micro_batch_size": 4, "trainer.max_steps": 3})
    train(recorded(config, name="plain"))
    monkeypatch.setattr(MoELightningModule, "configure_model", configure)
    monkeypatch.setattr(MoELightningModule, "training_step", overwrite)
    train(recorded(config, name="overwritten"))
    plain, overwritten = Recorder.made
    assert plain.losses == overwritten.losses


def test_the_loss_curve_is_the_same_to_the_bit_without_any_callback(tiny: Callable[..., Config]) -> None:
    config = tiny({"model.dropout": 0.1, "trainer.max_steps": 25, **LOSS_FREE})
    train(recorded(config, name="with"))
    train(recorded(config, name="without", keep=False))
    watched, alone = Recorder.made
    assert watched.losses == alone.losses
    assert watched.validations == alone.validations
    folder = config.run_folder.parent
    a, b = (load_weights(step_folder(folder / name, 25)) for name in ("with", "without"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "train/ce" in scalars_of(folder / "without")


def test_accumulation_changes_the_gradient_of_the_cross_entropy_by_rounding_only(
    tiny: Callable[..., Config],
) -> None:
    weights = []
    for micro in (16, 4):
        config = tiny({"optim.micro_batch_size": micro, "trainer.max_steps": 3, "model.moe.balancers": []})
        train(recorded(config, name=f"micro-{micro}"))
        weights.append(load_weights(step_folder(config.run_folder.parent / f"micro-{micro}", 3)))
    first, accumulated = (record.losses for record in Recorder.made)
    assert first[0] == pytest.approx(sum(accumulated[:4]), rel=1e-5)  # Lightning divides each by 4
    for name in weights[0]:
        difference = (weights[0][name] - weights[1][name]).norm() / weights[0][name].norm()
        assert difference < 2e-3, name  # three AdamW steps turn rounding into up to a step of lr


def test_the_gradient_norm_is_logged_before_clipping_and_the_step_is_clipped(
    tiny: Callable[..., Config],
) -> None:
    norms = {}
    for limit in (None, 0.05):
        config = tiny({"trainer.gradient_clip_val": limit, "trainer.max_steps": 1, "trainer.log_every_n_steps": 1})
        train(recorded(config, name=f"clip-{limit}"))
        norms[limit] = scalars_of(config.run_folder.parent / f"clip-{limit}")["train/grad_norm"][0][1]
        last = step_folder(config.run_folder.parent / f"clip-{limit}", 1)
        moments = load_training(last)["optimizer_states"][0]["state"]
        # after one AdamW step exp_avg = (1 - beta1) x the clipped gradient
        used = 10 * sum(state["exp_avg"].double().square().sum() for state in moments.values()).sqrt()
        assert float(used) == pytest.approx(limit or norms[limit], rel=1e-4)
    assert norms[None] == pytest.approx(norms[0.05], rel=1e-6)


def test_a_dense_model_trains_and_says_nothing_of_experts(tiny: Callable[..., Config]) -> None:
    config = tiny({"model.moe": None, "trainer.max_steps": 10})
    summary = train(config)
    assert summary["moe/max_violation"] is None
    assert not [tag for tag in scalars_of(config.run_folder) if tag.startswith(("moe/", "aux/"))]


def test_attention_can_stay_within_documents(tiny: Callable[..., Config]) -> None:
    losses = []
    for mask in (False, True):
        train(recorded(tiny({"data.mask_documents": mask, "trainer.max_steps": 5}), name=f"mask-{mask}"))
        losses.append(Recorder.made[-1].losses)
    assert losses[0] != losses[1]
    assert losses[1][-1] < losses[1][0]


def test_a_document_of_a_batch_begins_with_the_token_that_ends_the_one_before(
    tiny_config: Callable[..., ModelConfig],
) -> None:
    model = GPT(tiny_config())
    initialize(model, 0)
    model.eval()
    inputs_BL = torch.tensor([[0, 5, 6, 7, 0, 8, 9]])
    targets_BL = torch.tensor([[5, 6, 7, 0, 8, 9, 0]])
    with torch.no_grad():
        together = forward_batch(model, {"inputs": inputs_BL, "targets": targets_BL}, 0)
        alone = [model(inputs_BL[:, part], targets_BL[:, part]) for part in (slice(4), slice(4, None))]
    expected_BL = torch.cat([output.ce_BL for output in alone], 1)  # RoPE knows distances only
    torch.testing.assert_close(together.ce_BL, expected_BL, rtol=1e-4, atol=1e-4)
