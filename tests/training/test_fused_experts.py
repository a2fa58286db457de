"""Whole runs with the fused experts, and the machines on which there can be none."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_resume import assert_same_state, named
from tiny_runs import Recorder, summary_of

from moelm.config import ConfigError, NamedConfig, make_named, register
from moelm.model.gpt import GPT
from moelm.train import train
from moelm.training import adamw
from moelm.training.checkpoint_io import load_weights, step_folder
from moelm.training.lightning_module import MoELightningModule
from moelm.training.trainer import build_trainer

FUSED = {"model.moe.experts": {"backend": "fused"}, "trainer.precision": "bf16-mixed"}
SMALL = {
    "model.n_layers": 1,
    "data.seq_len": 16,
    "data.val_every_n_steps": 3,
    "optim.batch_tokens": 32,
    "optim.micro_batch_size": 1,
    "trainer.max_steps": 3,
    "trainer.limit_val_batches": 1,
    "trainer.precision": "bf16-mixed",
    "trainer.accelerator": "auto",
    "trainer.compile": False,
}


@pytest.mark.parametrize(
    ("triton", "accelerator", "problem"), [(True, "cpu", "a CUDA device"), (False, "cuda", "triton, which is not")]
)
def test_fused_is_refused_where_its_kernels_cannot_run(tiny, monkeypatch, triton, accelerator, problem):
    monkeypatch.setattr("moelm.training.trainer.INTERPRETED", False)
    monkeypatch.setattr("moelm.training.trainer.HAS_TRITON", triton)
    with pytest.raises(ConfigError, match=problem) as error:
        build_trainer(tiny({**FUSED, "trainer.accelerator": accelerator}))
    assert "model.moe.experts.backend" in str(error.value)
    assert "use auto" in str(error.value)


def test_a_run_with_fused_experts_follows_the_one_with_grouped_and_saves_the_same_tensors(tiny):
    pytest.importorskip("triton")
    losses, saved = [], []
    for backend in ("grouped", "fused"):
        moe = {"n_experts": 4, "top_k": 2, "d_expert": 16, "experts": {"backend": backend}}
        config = tiny({**SMALL, "run.name": backend, "model.moe": moe})
        config.callbacks = [make_named("callback", "recorder")]
        train(config)
        losses.append([*Recorder.made[-1].losses, summary_of(config.run_folder)["val/ce"]])
        saved.append(load_weights(step_folder(config.run_folder, 3)))
    assert max(losses[0]) > min(losses[0]) + 0.2
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert {name: value.shape for name, value in saved[0].items()} == {k: v.shape for k, v in saved[1].items()}


@register("callback", "gradient_dtypes", NamedConfig)
class GradientDtypes(Callback):
    """Those of the experts' gradients, in every optimizer step; of all others they are float32."""

    seen: set[torch.dtype] = set()  # noqa: RUF012

    def __init__(self, config, run):
        pass

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, parameter in pl_module.model.named_parameters():
            if name.endswith((".experts.gate_up", ".experts.down")):
                GradientDtypes.seen.add(parameter.grad.dtype)
            else:
                assert parameter.grad.dtype == torch.float32, name


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Tensors of 2048 elements count as large; not by the kernel, since the interpreter cuts off where a GPU rounds."""
    pytest.importorskip("triton")
    monkeypatch.setattr(adamw, "LARGE", 2048)
    monkeypatch.setattr(adamw, "has_kernel", lambda parameter: True)
    monkeypatch.setattr(adamw, "adamw_kernel", adamw.adamw_reference)


TINY_EXPERTS = {"n_experts": 4, "top_k": 2, "d_expert": 16}
ONE = {"optim.micro_batch_size": 2}  # one micro-batch a step
SWITCH = {
    "one_micro_batch": (ONE, "fused", "bfloat16"),
    "two_micro_batches": ({}, "fused", "in place"),
    "two_devices": ({"trainer.devices": 2}, "fused", "bfloat16"),
    "nine_devices": ({"trainer.devices": 9, "optim.batch_tokens": 9 * 16}, "fused", ""),
    "fsdp": ({"trainer.devices": 2, "trainer.strategy": "fsdp"}, "fused", ""),
    "muon": ({**ONE, "optim.optimizer": "muon"}, "fused", ""),
    "float32": ({**ONE, "trainer.precision": "32-true"}, "fused", ""),
    "grouped": (ONE, "grouped", ""),
    "small": ({**ONE, "model.moe": {**TINY_EXPERTS, "d_expert": 8}}, "fused", ""),  # of the two, down alone
}


@pytest.mark.parametrize(("changes", "backend", "way"), SWITCH.values(), ids=SWITCH)
def test_gradients_are_bfloat16_only_where_a_step_takes_one_of_large_fused_experts(
    tiny, as_on_a_gpu, changes, backend, way
):
    config = tiny({**SMALL, "trainer.accelerator": "cpu", "model.moe": TINY_EXPERTS, **changes})
    module = MoELightningModule(config, [], 0)
    module.trainer = build_trainer(config)
    if changes.get("trainer.strategy") != "fsdp":  # which needs the other ranks for that
        module.configure_model()
    else:
        module.model = GPT(config.model)
    for layer in module.model.moe_layers:
        layer.experts.backend = backend
    module.configure_optimizers()
    short = {name for name, parameter in module.model.named_parameters() if parameter.grad_dtype == torch.bfloat16}
    both = {"blocks.0.moe.experts.gate_up", "blocks.0.moe.experts.down"}
    assert short == (both if way == "bfloat16" else set())
    assert module.model.moe_layers[0].experts.sums_in_place == (way == "in place")


def test_experts_get_their_gradients_before_the_blocks_below_are_differentiated(tiny, as_on_a_gpu):
    config = tiny({**SMALL, **ONE, "trainer.accelerator": "cpu", "model.n_layers": 2, "model.moe": TINY_EXPERTS})
    module = MoELightningModule(config, [], 0)
    module.trainer = build_trainer(config)
    module.configure_model()
    for layer in module.model.moe_layers:
        layer.experts.backend = "fused"
    module.configure_optimizers()
    module.model.compile_blocks(backend="aot_eager")
    order = []
    for name, parameter in module.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    tokens_BL = torch.arange(32).view(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        module.model(tokens_BL, tokens_BL).loss.backward()
    assert order.index("blocks.1.moe.experts.gate_up") < order.index("blocks.0.feed_forward_norm.weight")


def test_a_run_with_bfloat16_gradients_follows_one_with_float32_and_resumes_bitwise(tiny, as_on_a_gpu, monkeypatch):
    options = {**SMALL, **ONE, "trainer.max_steps": 7, "checkpoint.every_n_steps": 2, "optim.lr": 0.03}
    options["callbacks"] = ["gradient_dtypes"]
    config = tiny({**options, "model.moe": {**TINY_EXPERTS, "experts": {"backend": "fused"}}})
    losses = []
    for name, dtype in (("long", torch.float32), ("short", torch.bfloat16)):
        GradientDtypes.seen.clear()
        with monkeypatch.context() as patch:
            if dtype == torch.float32:
                patch.setattr(adamw.AdamW, "reads_bfloat16", lambda self, parameter: False)
            train(named(config, name))
        assert GradientDtypes.seen == {dtype}
        losses.append(Recorder.made[-1].losses)
    assert losses[0][0] == losses[1][0] > losses[1][-1] + 0.2
    assert losses[1] == pytest.approx(losses[0], abs=0.01)
    Recorder.raise_after = 3
    broken = named(config, "broken")
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(broken)
    Recorder.raise_after = None
    train(broken, resume="auto")
    assert Recorder.made[-1].losses == losses[1][2:]
    assert_same_state(*(step_folder(each.run_folder, 7) for each in (named(config, "short"), broken)))
