"""Whole runs with the fused experts, and the machines on which there can be none."""

import pytest
from tiny_runs import Recorder, summary_of

from moelm.config import ConfigError, make_named
from moelm.train import train
from moelm.training.checkpoint_io import load_weights, step_folder
from moelm.training.trainer import build_trainer

FUSED = {"model.moe.experts": {"backend": "fused"}, "trainer.precision": "bf16-mixed"}


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
    small = {
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
    losses, saved = [], []
    for backend in ("grouped", "fused"):
        moe = {"n_experts": 4, "top_k": 2, "d_expert": 16, "experts": {"backend": backend}}
        config = tiny({**small, "run.name": backend, "model.n_layers": 1, "model.moe": moe})
        config.callbacks = [make_named("callback", "recorder")]
        train(config)
        losses.append([*Recorder.made[-1].losses, summary_of(config.run_folder)["val/ce"]])
        saved.append(load_weights(step_folder(config.run_folder, 3)))
    assert max(losses[0]) > min(losses[0]) + 0.2
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert {name: value.shape for name, value in saved[0].items()} == {k: v.shape for k, v in saved[1].items()}
