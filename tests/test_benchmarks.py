"""The benchmarks' own correctness: what they accept, what loads they make, and the arithmetic of their tables."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import loss_curves
import measure
import moe_layer
import parallel
import plot
import pytest
import scaling
import torch
import train_step
from lightning.pytorch.accelerators import CUDAAccelerator
from peers import Layer, Shape
from torch.optim import Optimizer

from moelm import command_line
from moelm.config import Config
from moelm.model.gpt import GPT
from moelm.moe.kernels import INTERPRETED
from moelm.training.optim import build_optimizer

command_line.import_builtins()
SHAPE = Shape(T=64, D=32, E=8, K=2, F=16)
FACTS = {"device": "GPU", "date": "2026-01-01", "commit": "abc", "python": "3", "versions": {}, "command": "python x"}


def grouped(shape: Shape) -> Layer:
    return moe_layer.moelm_layer(shape, "grouped", compiled=False)


def test_a_right_variant_passes_the_check_and_one_with_gate_and_up_exchanged_fails() -> None:
    problem = moe_layer.make_problem(SHAPE, moe_layer.make_weights(SHAPE, "cpu"))
    wanted = moe_layer.reference(problem, tokens_at_once=24)
    layer = grouped(SHAPE)
    layer.load(problem.weights)
    errors = moe_layer.check(layer, problem, wanted)
    assert set(errors) == {"y", "x", "router", "gate", "up", "down"}
    assert all(1e-4 < error["all"] < 0.01 for error in errors.values())
    layer.load({**problem.weights, "gate": problem.weights["up"], "up": problem.weights["gate"]})
    with pytest.raises(moe_layer.WrongError, match="relative error of y"):
        moe_layer.check(layer, problem, wanted)


@pytest.mark.parametrize("load", moe_layer.LOADS)
def test_tokens_are_routed_as_the_load_says(load: str) -> None:
    T, _, E, K, _ = SHAPE
    problem = moe_layer.make_problem(SHAPE, moe_layer.make_weights(SHAPE, "cpu"), load)
    logits_TE = problem.x_TD.float() @ problem.weights["router"].float().T
    best = logits_TE.topk(K + 1).values
    assert (best[:, K - 1] - best[:, K]).min() > 1  # no near tie, whatever rounds
    counts = torch.bincount(logits_TE.topk(K).indices.flatten(), minlength=E).tolist()
    assert counts[0] == {"one": T, "same": T, "single": 1}.get(load, counts[0])
    assert sum(counts) == T * K
    assert sum(count == 0 for count in counts) == {"same": E - K, "half": E // 2}.get(load, 0)


def test_an_error_counts_where_one_row_alone_is_wrong_and_where_anything_is_nan() -> None:
    reference = torch.ones(100, 4)
    value = reference.clone()
    value[7] = 3.0
    error = measure.relative_error(value, reference)
    assert error["all"] == pytest.approx(0.2)
    assert error["worst"] == pytest.approx(2.0)
    value[7, 0] = math.nan
    assert all(math.isnan(each) for each in measure.relative_error(value, reference).values())


def test_a_variant_that_cannot_be_built_or_is_wrong_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(shape: Shape) -> Layer:
        layer = grouped(shape)
        return layer._replace(run=lambda x_TD: 2 * layer.run(x_TD))

    def missing(shape: Shape) -> Layer:
        raise ImportError("no peer")

    variants = {"limit": partial(moe_layer.dense, compiled=False), "ours": grouped, "wrong": wrong, "missing": missing}
    monkeypatch.setattr(moe_layer, "VARIANTS", variants)
    found = moe_layer.measure_shape(SHAPE, list(variants), "cpu", rounds=2, burst_ms=0.1)
    assert found["ours"]["of_limit"]["n"] == 2
    assert "ms" not in found["wrong"]
    assert found["wrong"]["error"].startswith("FAILED: relative error of y")
    assert found["missing"]["error"] == "not installed: no peer"
    text = moe_layer.markdown({"facts": FACTS, "shapes": {"tiny": SHAPE._asdict()}, "layer": {"tiny": found}})
    assert "| wrong | - |" in text
    assert "| ours | fp32, bf16 compute |" in text
    assert plot.layer_bars({"layer": {"tiny": found}}) == (["tiny"], {"ours": [found["ours"]["of_limit"]["median"]]})


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_products_are_timed_if_they_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    import products

    monkeypatch.setitem(moe_layer.SHAPES, "tiny", SHAPE)
    quick = argparse.Namespace(quick=True, out=None)
    found = products.run(quick, ["tiny"], "cpu")["products"]["tiny"]
    assert sum(part["operations"] for part in found.values()) == SHAPE.flops
    assert all(part["variants"]["torch"]["ms"]["n"] >= 4 for part in found.values())
    assert all(1e-4 < part["variants"]["torch"]["relative_error"] < products.MOST for part in found.values())
    monkeypatch.setattr(products, "MOST", 1e-4)
    wrong = products.run(quick, ["tiny"], "cpu")
    assert all("ms" not in part["variants"]["torch"] for part in wrong["products"]["tiny"].values())
    assert "| down | - | relative error 1." in products.markdown(wrong)


def test_the_lanes_of_a_trace_are_those_of_the_step_in_its_middle():
    events: list[dict[str, Any]] = []
    for step in range(3):
        begin = 1000.0 * step
        kernels = {"_up_product": 100, "ncclAllReduce": 150, "odd": 300, "_adamw": 500, "_adamw ": 510}
        events += [{"cat": "kernel", "name": n, "ts": begin + at, "dur": 10.0 + step} for n, at in kernels.items()]
    found, length = plot.lanes(events)
    assert length == pytest.approx(1.0)
    assert found["expert products"] == [(pytest.approx(0.59), pytest.approx(0.011))]
    assert found["communication"] == [(pytest.approx(0.64), pytest.approx(0.011))]
    assert found["the rest"] == [(pytest.approx(0.79), pytest.approx(0.011))]
    assert [start for start, _ in found["optimizer"]] == pytest.approx([0.99, 1.0])


def a_run(variant: str, repeat: int, *rates: float) -> dict[str, Any]:
    sizes = {"batch_tokens": 1000, "flops_per_token": 10, "recompiled": 0, "peak_gib": 1.0 + repeat}
    return {"variant": variant, "accumulation": 1, "repeat": repeat, "tokens_per_s": list(rates), **sizes}


def test_the_step_is_compared_with_the_dense_twin_and_the_bare_loop_within_a_repeat() -> None:
    runs = [
        a_run("dense", 0, 100.0, 102.0, 104.0),
        a_run("moelm", 0, 81.6, 40.0, 81.6),
        a_run("moelm bare", 0, 85.0),
        a_run("dense", 1, 200.0),
        a_run("moelm", 1, 180.0),
        {"variant": "torchtitan", "accumulation": 1, "repeat": 0, "error": "not installed"},
    ]
    rows = {row["variant"]: row for row in train_step.summarise(runs, "NVIDIA H100")}
    assert rows["moelm"]["of_limit"] == pytest.approx({"median": 0.85, "q1": 0.825, "q3": 0.875, "n": 2})
    seconds = 2 / 81.6 + 1 / 40  # the slow interval counts
    assert rows["moelm"]["over_bare"]["median"] == pytest.approx(seconds / 3 * 85 - 1)
    assert rows["moelm"]["peak_gib"] == 2.0
    assert rows["moelm"]["ms"] == pytest.approx(1e6 / 81.6)
    text = train_step.markdown(
        {"facts": FACTS, "models": {"moe": "A", "dense": "B"}, "what": "", "rows": [*rows.values()]}
    )
    assert "| torchtitan | 1 | - |" in text
    assert "torchtitan: not installed" in text


def test_weight_traffic_is_shown_beside_the_time_over_experts() -> None:
    ms = {"median": 2.0, "q1": 2.0, "q3": 2.0, "n": 1}
    sizes = {"8": {"moelm fused": {"ms": ms, "bytes": 3e9}}, "16": {"moelm fused": {"error": "FAILED"}}}
    step = {"ms": ms, "mfu": 0.5, "tokens_per_s": ms, "peak_gib": 1.0}
    result = {"facts": FACTS, "bandwidth": 3e12, "experts": sizes, "depth": {"2": step}, "what": "A"}
    text = scaling.markdown(result)
    assert "| 8 | 2.00 (2.00 to 2.00) | - | 1.000 | 3.00 | 1.00 |" in text
    assert "moelm fused: FAILED (E = 16)" in text
    assert "| 2 | 2 (2 to 2) | 2.0 (2.0 to 2.0) | 0.500 | 1.0 |" in text
    assert plot.curves(sizes) == {"moelm fused": ([8], [2.0])}
    assert plot.curves({"2": step}) == {"moelm fused": ([2], [2.0])}


def test_a_run_that_takes_too_long_is_a_row_like_others(tiny: Callable[..., Config], tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        timeout=0.05, devices=1, steps=1, accumulate=1, profile=False, overrides=[], out=None
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "config_of", lambda *_: tiny())
        found = parallel.measure_run("one", arguments, str(tmp_path))
    assert found == {"name": "one", "n_devices": 1, "error": "not done after 0 s"}


def test_losses_are_drawn_of_runs_that_have_some() -> None:
    runs = [{"name": "ddp", "losses": [2.0, 1.0]}, {"name": "fsdp", "error": "lost"}, {"name": "ddp", "losses": [3.0]}]
    assert plot.losses({"runs": runs}) == {"ddp": [2.0, 1.0]}
    assert plot.losses({"runs": {"fast-0": {"train": [2.0, 1.0], "val": [1.5]}}}) == {"fast-0": [2.0, 1.0]}


@pytest.mark.parametrize(
    ("text", "problem"), [(None, "no such file"), ('{"runs": [{"name": "dense"}]}', "has neither")]
)
def test_what_cannot_be_drawn_is_one_message(
    text: str | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr("sys.argv", ["plot.py", str(file), "--out", str(tmp_path / "out.png")])
    with pytest.raises(SystemExit) as ended:
        plot.main()
    assert ended.value.code == 2
    assert f"{file}: " in (said := capsys.readouterr().err)
    assert problem in said


@pytest.mark.parametrize("benchmark", [moe_layer, train_step, scaling, parallel])
def test_without_a_gpu_a_benchmark_says_so_and_ends_with_exit_code_2(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmark"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2
    assert "measures an NVIDIA GPU" in capsys.readouterr().err


def test_communication_is_hidden_while_other_kernels_run() -> None:
    step: dict[str, Any] = {"name": "ProfilerStep#7", "cat": "user_annotation", "ts": 0, "dur": 10_000}
    spans = [("nccl_a", 0, 4000), ("nccl_b", 3000, 3000), ("gemm", 5000, 4000)]
    kernels = [{"name": name, "cat": "kernel", "ts": ts, "dur": dur} for name, ts, dur in spans]
    assert parallel.overlap([step, *kernels]) == pytest.approx({"ms": 6.0, "hidden": 1 / 6})
    assert parallel.overlap([step, kernels[2]]) is None


def test_all_ranks_are_given_the_only_gpu_if_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert not parallel.share_a_gpu(2)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    monkeypatch.delenv("NCCL_MAX_CTAS", raising=False)
    assert [parallel.share_a_gpu(n) for n in (1, 2)] == [False, True]
    chosen: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    with parallel.all_on_one_gpu(2):
        devices = CUDAAccelerator.get_parallel_devices(CUDAAccelerator.parse_devices(2))
        torch.cuda.set_device(1)
        assert os.environ["NCCL_MAX_CTAS"] == "4"
    assert "NCCL_MAX_CTAS" not in os.environ
    assert devices == [torch.device("cuda", 0)] * 2
    assert chosen == [torch.device("cuda", 0)]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert not parallel.share_a_gpu(2)


def test_strategies_are_compared_with_one_device_by_tokens_and_with_its_steps_by_loss_and_norm() -> None:
    sizes = {"batch_tokens": 1000, "flops_per_token": 10, "precision": "bf16-mixed", "recompiled": 0, "info_gib": 2.0}
    one = {"name": "one", "n_devices": 1, "tokens_per_s": [100.0], "losses": [9.0], "norms": [9.0], **sizes}
    same = {**one, "name": "one, same batch", "losses": [3.0, 2.0], "norms": [1.0, 2.0]}
    ddp = {**same, "name": "ddp", "n_devices": 2, "tokens_per_s": [180.0], "losses": [3.0005, 2.0005]}
    fsdp = {**ddp, "name": "fsdp", "norms": [1.0, 2.1]}
    broken = {"name": "fsdp, expert_parallel=2", "n_devices": 2, "error": "exit code 1"}
    rows = {row["name"]: row for row in parallel.rows_of([same, one, ddp, fsdp, broken], "NVIDIA H200")}
    assert rows["ddp"]["efficiency"] == pytest.approx(0.9)
    assert rows["ddp"]["differences"] == pytest.approx({"first": 0.0005, "loss": 0.0005, "norm": 0.0})
    assert rows["ddp"]["within"]
    assert not rows["fsdp"]["within"]
    text = parallel.markdown({"facts": FACTS, "model": "A", "what": "", "rows": [*rows.values()]})
    assert "| ddp | 2 | 180 (180 to 180) |" in text
    assert "fsdp, expert_parallel=2: exit code 1" in text


def test_the_distance_of_loss_curves_is_that_of_their_moving_means_late_in_the_run() -> None:
    n = 2 * loss_curves.WINDOW
    runs = {f"{path}-{seed}": {"train": [3.0] * n, "val": 2.0} for path in loss_curves.PATHS for seed in (0, 1)}
    runs["plain-0"] = {"train": [9.0] + [3.5] * (n - 1), "val": 2.25}
    runs["fast-1"] = {"error": "out of memory"}
    found = loss_curves.distances(runs)
    assert set(found) == {"fast and plain, seed 0", "seeds 0 and 1, plain"}
    assert found["fast and plain, seed 0"]["train"] == pytest.approx(0.5)
    assert found["fast and plain, seed 0"]["bias"] == pytest.approx(-0.5)
    assert found["fast and plain, seed 0"]["val"] == 0.25


def test_the_bare_loop_trains(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Optimizer] = []

    def watched(*args: Any) -> Optimizer:
        made.append(build_optimizer(*args))
        return made[0]

    monkeypatch.setattr(train_step, "build_optimizer", watched)
    monkeypatch.setattr(GPT, "compile_blocks", lambda model, cuda_graphs: None)
    config = tiny({"optim.micro_batch_size": 8, "trainer.max_steps": 2, "trainer.log_every_n_steps": 1})
    intervals = train_step.bare_loop(config, "cpu")
    assert [interval.tokens_per_s > 0 for interval in intervals] == [True, True]
    for group in made[0].param_groups:
        for parameter in group["params"]:
            assert made[0].state[parameter]["step"] == 2
            assert parameter.isfinite().all()
