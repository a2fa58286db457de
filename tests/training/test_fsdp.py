"""Two FSDP2 processes are the same run as two DDP processes and as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_runs import run_all

from moelm.config import Config
from moelm.moe.kernels import INTERPRETED
from moelm.train import train
from moelm.training.checkpoint_io import load_weights, step_folder
from moelm.training.rng import seed_rank

Make = Callable[..., Config]
Tape = dict[str, Any]

# With this eps the second moment counts for nothing: plain SGD with a learning rate of 0.3
SGD = {"optim.betas": [0.0, 0.95], "optim.eps": 1e4, "optim.lr": 3e3, "optim.weight_decay": 0.0}
CHANGES = {
    **SGD,
    "model.moe.router": {"name": "top_k", "score": "sigmoid", "selection_bias": True},
    "model.moe.balancers": [{"name": "loss_free", "rate": 0.01}, {"name": "z_loss", "coef": 0.01}],
    "optim.micro_batch_size": 4,  # 4 micro-batches a step on one process, 2 on each of two
    "optim.schedule": {"name": "constant"},
    "trainer.max_steps": 5,
    "trainer.gradient_clip_val": 0.3,  # below every norm here
    "trainer.limit_val_batches": 1,
    "checkpoint.every_n_steps": 3,
    "callbacks": ["tape"],
}
TWO = {"trainer.devices": 2}
DDP, FSDP = {**TWO, "trainer.strategy": "ddp"}, {**TWO, "trainer.strategy": "fsdp"}
KEPT = {**FSDP, "trainer.reshard_after_forward": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"trainer.limit_val_batches": None},
    # 255 experts and 513 words are not dealt out evenly to two
    "idle experts, recomputation": {
        **{"model.moe.n_experts": 255, "model.moe.top_k": 1, "model.moe.d_expert": 8, "model.vocab_size": 513},
        **{"model.tied_embeddings": False, "trainer.activation_checkpointing": "full"},
    },
    "bf16": {"trainer.precision": "bf16-mixed"},
    "muon": {"optim.optimizer": "muon", "optim.lr": 1e-3, "optim.eps": 1e-8, "trainer.max_steps": 2},
}
ADAMW = {"optim.betas": [0.9, 0.95], "optim.eps": 1e-8, "optim.lr": 1e-3}


@pytest.fixture
def make(tiny: Make) -> Make:
    return lambda name, *changes: tiny({**CHANGES, "run.name": name, **{k: v for c in changes for k, v in c.items()}})


def tapes(config: Config, n_ranks: int = 1) -> list[Tape]:
    return [torch.load(config.run_folder / f"tape-{rank}.pt", weights_only=False) for rank in range(n_ranks)]


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of a tensor, in relative L2."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / a[name].norm()) for name in a)


def assert_same_steps(one: Tape, many: list[Tape]) -> None:
    """In float32: what the ranks did together is what one process did, and all of them know it."""
    for tape in many:
        assert len(tape["steps"]) == len(one["steps"])
        for i, (a, b) in enumerate(zip(one["steps"], tape["steps"], strict=True)):
            bound = 2e-6 if i == 0 else 1e-5
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-6), i
            assert b["norm"] == pytest.approx(a["norm"], rel=1e-6), i
            assert a["norm"] > CHANGES["trainer.gradient_clip_val"]
            assert worst(a["gradients"], b["gradients"]) <= bound, i
            assert worst(a["weights"], b["weights"]) <= bound, i
            assert torch.equal(a["load"], b["load"]), i
            assert torch.equal(a["bias"], b["bias"]), i
            assert torch.equal(b["bias"], many[0]["steps"][i]["bias"])
    assert samples([one]) == samples(many)


def samples(tapes: list[Tape]) -> dict[int, list[int]]:
    """Step -> the samples in its batch, over all ranks."""
    by_step: dict[int, list[int]] = {}
    for tape in tapes:
        for step, ids in tape["samples"]:
            by_step[step] = sorted([*by_step.get(step, []), *ids])
    return by_step


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes_equal_one(make: Make, tmp_path: Path) -> None:
    """With DDP and FSDP2, and what was saved by two continues on one and the other way round."""
    one = {name: make(f"one-{i}", changes) for i, (name, changes) in enumerate(VARIANTS.items())}
    for config in one.values():
        train(config)
    fsdp = {name: make(f"fsdp-{i}", FSDP, changes) for i, (name, changes) in enumerate(VARIANTS.items())}
    ddp, unreduced = make("ddp", DDP), make("unreduced", FSDP, {"trainer.accumulate_unreduced": True})
    kept, kept_bf16 = make("kept", KEPT, VARIANTS["plain"]), make("kept-bf16", KEPT, VARIANTS["bf16"])
    short_sums = make("short-sums", FSDP, VARIANTS["bf16"], {"trainer.reduce_dtype": "bfloat16"})
    kept_short = make("kept-short-sums", KEPT, VARIANTS["bf16"], {"trainer.reduce_dtype": "bfloat16"})
    straight, short = make("straight", ADAMW), {"trainer.max_steps": 3}
    train(straight)
    train(make("back", ADAMW, short))
    run_all(
        [
            *fsdp.values(),
            ddp,
            unreduced,
            kept,
            kept_bf16,
            short_sums,
            kept_short,
            make("there", ADAMW, FSDP, short),
            make("back", ADAMW, KEPT),
        ],
        tmp_path,
        n_ranks=2,
    )
    there = make("there", ADAMW)
    train(there, resume="auto")

    for config, n_ranks in ((one["bf16"], 1), (fsdp["bf16"], 2), (fsdp["plain"], 2), (ddp, 2)):
        for tape in tapes(config, n_ranks):
            assert tape["router"] == {(torch.float32, "not rounded", torch.float32)}
    for name in ("plain", "idle experts, recomputation"):
        assert_same_steps(*tapes(one[name]), tapes(fsdp[name], 2))
    assert_same_steps(*tapes(one["plain"]), tapes(ddp, 2))
    assert_same_steps(*tapes(one["plain"]), tapes(unreduced, 2))
    assert_same_steps(*tapes(one["plain"]), tapes(kept, 2))
    assert tapes(fsdp["plain"])[0]["bytes_left"] == 0 < tapes(kept)[0]["bytes_left"]
    assert tapes(fsdp["plain"])[0]["sent_early"]
    assert not tapes(unreduced)[0]["sent_early"]
    assert min(step["load"].min() for step in tapes(one["idle experts, recomputation"])[0]["steps"]) == 0
    shares = (ddp, 1.0), (fsdp["plain"], 0.505), (kept, 0.505), (fsdp["idle experts, recomputation"], 0.519)
    for config, share in shares:
        assert [tape["share"] for tape in tapes(config, 2)] == pytest.approx([share] * 2, abs=2e-3)
    for many in (fsdp["plain"], kept):
        assert [tape["val_ce"] for tape in tapes(many, 2)] == pytest.approx([tapes(one["plain"])[0]["val_ce"]] * 2)

    assert_close_steps(tapes(one["bf16"])[0], tapes(fsdp["bf16"], 2)[1])
    first = tapes(fsdp["bf16"], 2)[1]["steps"][0]["gradients"]
    assert worst(first, tapes(kept_bf16, 2)[1]["steps"][0]["gradients"]) == 0
    for config in (short_sums, kept_short):
        assert_close_steps(tapes(one["bf16"])[0], tapes(config, 2)[1])
        summed_short = tapes(config, 2)[1]["steps"][0]["gradients"]
        rounded = {name for name in first if not torch.equal(first[name], summed_short[name])}
        assert rounded == {name for name in first if name.startswith("blocks.") and ".router." not in name}

    (_, a), (before, b) = tapes(one["muon"])[0]["steps"], tapes(fsdp["muon"], 2)[1]["steps"]
    moved = {name: b["weights"][name] - before["weights"][name] for name in b["weights"]}
    for name, weight in a["weights"].items():  # bf16 in the orthogonalisation makes noise of what differs by an ulp
        assert (weight - b["weights"][name]).norm() <= 0.02 * moved[name].norm(), name

    whole = tapes(straight)[0]
    rest = {**whole, "steps": whole["steps"][3:], "samples": [each for each in whole["samples"] if each[0] >= 3]}
    assert len(rest["steps"]) == 2
    assert_same_steps(rest, tapes(there))
    back = tapes(make("back", ADAMW), 2)
    assert_same_steps(rest, back)
    for rank, tape in enumerate(back):  # their checkpoint is of one rank, whose numbers are not theirs
        with torch.random.fork_rng(devices=[]):
            seed_rank(one["plain"].run.seed, rank, 3)
            assert tape["seed"] == torch.initial_seed()
    ends = [load_weights(step_folder(config.run_folder, 5)) for config in (straight, there, make("back", ADAMW))]
    assert ends[0].keys() == ends[1].keys() == ends[2].keys()


def assert_close_steps(one: Tape, two: Tape) -> None:
    """In bf16: gradients of a micro-batch are rounded on their way."""
    for a, b in zip(one["steps"], two["steps"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert b["norm"] == pytest.approx(a["norm"], rel=1e-3)
        assert worst(a["weights"], b["weights"]) < 1e-3
        assert worst(a["gradients"], b["gradients"]) < 0.1


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_fused_experts_of_two_processes_follow_those_of_one(make: Make, tmp_path: Path) -> None:
    small = {"data.seq_len": 16, "optim.batch_tokens": 64, "optim.micro_batch_size": 1, "trainer.max_steps": 3}
    fused = {"model.moe.experts": {"backend": "fused"}, "trainer.precision": "bf16-mixed", **small}
    one, two = make("one", fused), make("two", FSDP, fused, {"trainer.activation_checkpointing": "selective"})
    ddp = make("ddp", DDP, fused)  # two micro-batches each, the second's gradients added in place
    kept = [make(f"kept-{dtype}", KEPT, fused, {"trainer.reduce_dtype": dtype}) for dtype in ("float32", "bfloat16")]
    train(one)
    run_all([two, ddp, *kept], tmp_path, n_ranks=2)
    for many in (two, ddp, *kept):
        assert_close_steps(tapes(one)[0], tapes(many, 2)[1])
        assert len(tapes(many)[0]["copies"]) == (0 if many is two else 4)
    assert len(tapes(one)[0]["copies"]) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_and_recomputed_under_fsdp_equals_one_process(make: Make, tmp_path: Path) -> None:
    modes = {f"{mode}-{i}": {"trainer.activation_checkpointing": mode} for i, mode in enumerate(("full", "selective"))}
    one = make("one")
    train(one)
    compiled = [make(name, FSDP, changes, {"trainer.compile": True}) for name, changes in modes.items()]
    compiled.append(make("kept", KEPT, modes["full-0"], {"trainer.compile": True}))
    run_all(compiled, tmp_path, n_ranks=2, timeout=800)
    for config in compiled:
        assert_same_steps(*tapes(one), tapes(config, 2))
