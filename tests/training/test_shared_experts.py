"""Processes that share the experts are the same run as one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_runs import run_all
from test_fsdp import (  # noqa: F401
    ADAMW,
    DDP,
    FSDP,
    Make,
    Tape,
    assert_close_steps,
    assert_same_steps,
    make,
    tapes,
    worst,
)
from test_saving import make_format_2
from torch.distributed.checkpoint import HuggingFaceStorageReader

from moelm.config import Config
from moelm.model.gpt import GPT
from moelm.moe.kernels import INTERPRETED
from moelm.train import train
from moelm.training.checkpoint_io import load_weights, step_folder, step_folders, weight_files
from moelm.training.strategies import units_of
from moelm.training.weight_files import TensorFiles

EP2 = {**FSDP, "trainer.expert_parallel": 2}
FSDP2_EP2 = {**EP2, "trainer.devices": 4}
REPLICAS = {**FSDP, "trainer.devices": 4, "trainer.replicas": 2}
REPLICAS_EP2 = {**FSDP2_EP2, "trainer.replicas": 2}
EP4 = {**FSDP2_EP2, "trainer.expert_parallel": 4}
SMALL = {"optim.micro_batch_size": 2}  # 8 micro-batches a step on one process, 2 on each of four
# 254 are 127 for each of two, which cannot be dealt out evenly again
IDLE: dict[str, Any] = {
    **{"model.moe.n_experts": 254, "model.moe.top_k": 1, "model.moe.d_expert": 8, "model.moe.n_shared_experts": 1},
    **{"trainer.activation_checkpointing": "full"},
}
# 513 rows are not dealt out evenly
PARTS: dict[str, Any] = {
    **{**ADAMW, "model.vocab_size": 513, "trainer.max_steps": 3, "trainer.limit_val_batches": 1},
    **{"checkpoint.every_n_steps": 1, "checkpoint.keep_last": 9},
}
ASYNCHRONOUS = {"checkpoint.asynchronous": True}
FULL_DISK = {"callbacks": ["full_disk"]}
MUON = {"optim.optimizer": "muon", "optim.lr": 1e-3, "optim.eps": 1e-8, "trainer.max_steps": 2}
BF16 = {"trainer.precision": "bf16-mixed"}


def test_blocks_whose_experts_stay_make_units_together_as_long_as_they_are_small(tiny_config, monkeypatch) -> None:
    with torch.device("meta"):
        model = GPT(tiny_config(n_layers=5, multi_token_prediction={}))
    experts = {parameter for layer in model.moe_layers for parameter in layer.experts.parameters()}
    rest = sum(p.numel() for p in model.blocks[0].parameters() if p not in experts)
    monkeypatch.setattr("moelm.training.strategies.SMALL_UNIT", 2 * rest)
    blocks = [*model.blocks, model.multi_token_prediction[0].block]
    assert units_of(model, experts) == [blocks[:2], blocks[2:4], blocks[4:5], blocks[5:]]
    assert units_of(model, set()) == [[block] for block in blocks]


@pytest.mark.timeout(200)
def test_two_processes_with_half_of_the_experts_each_equal_one(make: Make, tmp_path: Path) -> None:  # noqa: F811
    """Most experts idle, shared ones beside them, blocks recomputed, gradients of two micro-batches summed; that under
    DDP too.

    In the same processes: what they save, beside training or not, continues with another strategy and on one, and what
    one saves continues on them; a part that does not fit on the disk is an error of both.
    """
    short = {"trainer.max_steps": 2, "trainer.limit_val_batches": None}
    one, two, ddp = make("one", IDLE, short), make("two", EP2, IDLE, short), make("ddp", DDP, IDLE, short)
    static = make("static", EP2, IDLE, short, {"trainer.static_exchange": True})
    straight = make("straight", PARTS, {"trainer.max_steps": 4})
    train(one)
    train(straight)
    there = make("there", EP2, PARTS, ASYNCHRONOUS), make("there", FSDP, PARTS, {"trainer.max_steps": 4})
    back = make("back", EP2, PARTS, {"trainer.max_steps": 4})
    shutil.copytree(step_folder(straight.run_folder, 2), step_folder(back.run_folder, 2))
    make_format_2(step_folder(back.run_folder, 2))
    full = [make(f"full-{i}", EP2, PARTS, mode, FULL_DISK) for i, mode in enumerate(({}, ASYNCHRONOUS))]
    run_all([two, static, ddp, *there, back, *full], tmp_path, n_ranks=2)
    alone = make("alone", PARTS, {"trainer.max_steps": 4})
    train(alone, resume=str(step_folder(there[0].run_folder, 2)))

    assert_continued(straight, 3, tapes(there[1], 2))
    assert_continued(straight, 2, tapes(back, 2), tapes(alone))
    assert_read_by_torch(step_folder(there[1].run_folder, 4))
    for config in full:
        assert [folder.name for folder in step_folders(config.run_folder)] == ["step-00000001"]
        assert not list(config.run_folder.glob(".*"))
        for rank in range(2):
            error = (config.run_folder / f"error-{rank}.txt").read_text()
            assert re.search(r"step-00000002: the checkpoint could not be written: .*No space left", error)
    for many in (two, static, ddp):
        assert_same_steps(*tapes(one), tapes(many, 2))
    assert min(step["load"].min() for step in tapes(one)[0]["steps"]) == 0
    assert [tape["val_ce"] for tape in tapes(two, 2)] == pytest.approx([tapes(one)[0]["val_ce"]] * 2)
    for tape in tapes(two, 2):
        assert tape["router"] == {(torch.float32, "not rounded", torch.float32)}
        assert tape["share"] == pytest.approx(0.515, abs=5e-3)


def assert_continued(straight: Config, step: int, *resumed: list[Tape]) -> None:
    """As if never interrupted after `step`."""
    (whole,) = tapes(straight)
    rest = {**whole, "steps": whole["steps"][step:], "samples": [each for each in whole["samples"] if each[0] >= step]}
    assert rest["steps"]
    for each in resumed:
        assert_same_steps(rest, each)


def assert_read_by_torch(folder: Path) -> None:
    """torch.distributed.checkpoint finds in the files what we find."""
    weights = load_weights(folder)
    theirs = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
    torch.distributed.checkpoint.load(theirs, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert any(len(pieces) > 1 for pieces in TensorFiles(weight_files(folder)).pieces.values())
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_processes_equal_one(make: Make, tmp_path: Path) -> None:  # noqa: F811
    """Two times two and four to share the experts, two replicas of two, and what was saved by these continues on
    others."""
    one = {
        name: make(f"one-{name}", changes, SMALL) for name, changes in (("plain", {}), ("idle", IDLE), ("muon", MUON))
    }
    straight, short = make("straight", ADAMW, SMALL), {"trainer.max_steps": 3}
    for config in (*one.values(), straight):
        train(config)
    train(make("from-one", ADAMW, short, SMALL))
    both = {
        name: make(f"both-{name}", FSDP2_EP2, changes, SMALL)
        for name, changes in (("plain", {}), ("idle", IDLE), ("muon", MUON))
    }
    four, unreduced = (
        make("four", EP4, SMALL),
        make("unreduced", FSDP2_EP2, SMALL, {"trainer.accumulate_unreduced": True}),
    )
    replicas = make("replicas", REPLICAS, SMALL), make("replicas-ep", REPLICAS_EP2, SMALL)
    noisy = make(
        "noisy",
        FSDP2_EP2,
        SMALL,
        {"model.moe.router": "noisy_top_k", "model.moe.balancers": [{"name": "switch"}]},
        {"trainer.max_steps": 20, "trainer.activation_checkpointing": "full"},
    )
    first = [make("from-four", EP4, ADAMW, SMALL, short, ASYNCHRONOUS), make("from-one", FSDP2_EP2, ADAMW, SMALL)]
    run_all([*both.values(), four, unreduced, *replicas, noisy, *first], tmp_path, n_ranks=4, timeout=400)
    run_all([make("from-four", EP2, ADAMW, SMALL)], tmp_path, n_ranks=2)

    for name in ("plain", "idle"):
        assert_same_steps(*tapes(one[name]), tapes(both[name], 4))
    for config in (four, unreduced, *replicas):
        assert_same_steps(*tapes(one["plain"]), tapes(config, 4))
    assert tapes(both["plain"], 4)[0]["sent_early"]
    for config in replicas:  # of which one is saved
        saved = [load_weights(step_folder(each.run_folder, 5)) for each in (one["plain"], config)]
        assert worst(*saved) <= 1e-5
        assert tapes(config, 4)[3]["share"] == pytest.approx(0.5, abs=0.01)
    for tape in tapes(both["idle"], 4):
        assert tape["share"] == pytest.approx(0.278, abs=2e-3)  # routers are whole
    (_, a), (before, b) = tapes(one["muon"])[0]["steps"], tapes(both["muon"], 4)[3]["steps"]
    for name, weight in a["weights"].items():
        moved = b["weights"][name] - before["weights"][name]
        assert (weight - b["weights"][name]).norm() <= 0.1 * moved.norm(), name  # bf16 in Newton-Schulz
    assert len(tapes(noisy)[0]["steps"]) == 20

    resumed = make("from-one", FSDP2_EP2, ADAMW, SMALL), make("from-four", EP2, ADAMW, SMALL)
    assert_continued(straight, 3, tapes(resumed[0], 4), tapes(resumed[1], 2))
    ends = [load_weights(step_folder(config.run_folder, 5)) for config in (straight, *resumed)]
    assert ends[0].keys() == ends[1].keys() == ends[2].keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_in_bf16_compiled_and_fused_follow_one(make: Make, tmp_path: Path) -> None:  # noqa: F811
    small = {"data.seq_len": 16, "optim.batch_tokens": 64, "optim.micro_batch_size": 1, "trainer.max_steps": 3}
    fused = {"model.moe.experts": {"backend": "fused"}, **BF16, **small}
    modes = {mode: {"trainer.activation_checkpointing": mode} for mode in ("full", "selective")}
    one, half = make("one"), make("one-bf16", BF16)
    compiled = [make(name, EP2, changes, {"trainer.compile": True}) for name, changes in modes.items()]
    plain = make("bf16", EP2, BF16)
    mixed = [(make("one-fused", fused), make("fused", EP2, fused, modes["selective"]))] if INTERPRETED else []
    for config in (one, half, *(config for config, _ in mixed)):
        train(config)
    run_all([*compiled, plain, *(config for _, config in mixed)], tmp_path, n_ranks=2, timeout=800)
    for config in compiled:
        assert_same_steps(*tapes(one), tapes(config, 2))
    for a, b in [(half, plain), *mixed]:
        assert_close_steps(tapes(a)[0], tapes(b, 2)[1])
    for _, config in mixed:
        assert len(tapes(config)[0]["copies"]) == 4
