"""A profile on request: which steps, what is written, and how a trace becomes a table."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest

from moelm.callbacks.profile import REST, Profile, as_text, category_of, table_of
from moelm.config import Config
from moelm.train import train


def test_a_run_writes_a_trace_and_a_table_that_adds_up(tiny: Callable[..., Config], capsys: Any) -> None:
    changes = {"trainer.profile": True, "trainer.max_steps": 9, "optim.micro_batch_size": 8, "model.n_layers": 1}
    config = tiny({**changes, "data.val_every_n_steps": 6, "trainer.log_every_n_steps": 6})
    train(config)
    folder = config.run_folder / "profile"
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    marks = {each["name"] for each in events if str(each["name"]).startswith("ProfilerStep")}
    assert len(marks) == 5
    table = json.loads((folder / "table.json").read_text())
    assert (table["first_step"], table["last_step"]) == (5, 9)
    rows = {row["name"]: row for row in table["categories"]}
    assert sum(row["ms"] for row in rows.values()) == pytest.approx(table["ms"], rel=0.05)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, rel=0.05)
    for name in ("expert products", "row movement", "router", "attention", "optimizer", "other matmuls", REST):
        assert rows[name]["ms"] > 0, name
    backward = [each for each in events if each["name"] == "aten::_scaled_dot_product_flash_attention_for_cpu_backward"]
    assert len(backward) == 5 * 2  # one layer, two micro-batches
    text = (folder / "table.txt").read_text()
    assert text == as_text(table)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("profile of steps 5-9")]
    assert len(said) == 1
    assert str(folder / "table.txt") in said[0]


def test_without_the_key_there_is_none(tiny: Callable[..., Config]) -> None:
    config = tiny({"trainer.max_steps": 2})
    train(config)
    assert not (config.run_folder / "profile").exists()


@pytest.mark.parametrize(
    ("steps", "done", "every", "first"),
    [
        (1000, 0, (10, 200, 200), 11),  # 12 to 16: step 10 is logged in what follows it
        (1000, 0, (7, 200, 200), 15),  # 16 to 20: log steps are 14 and 21
        (1000, 0, (2, 200, 200), 10),  # no five steps are free of them
        (1000, 190, (10, 203, 1000), 204),
        (12, 0, (100, 100, 100), 7),
        (3, 0, (100, 100, 100), 0),
    ],
)
def test_the_steps_are_free_of_logging_validation_and_saving(
    tiny: Callable[..., Config], steps: int, done: int, every: tuple[int, int, int], first: int
) -> None:
    log, validate, save = every
    changes = {"trainer.max_steps": steps, "trainer.log_every_n_steps": log, "data.val_every_n_steps": validate}
    callback = Profile(tiny({**changes, "checkpoint.every_n_steps": save}))
    callback.choose_steps(done)
    assert callback.first == first
    assert callback.n_steps == min(5, steps)
    assert callback.warm_up == min(1, first)


KERNELS = {
    "_rows_product": "expert products",
    "_down_backward": "expert products",
    "_row_tiles": "row movement",
    "_weight_gradient": "expert products",
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<GemmUniversal<GroupProblemShape<": (
        "expert products"
    ),
    "_gather_sum": "row movement",
    "_swiglu_backward": "row movement",
    "_sum_blocks": "row movement",
    "_top_k": "router",
    "_grad_weight": "router",
    "_sums": "router",
    "_turn_heads_backward": REST,
    "_cross_entropy": "loss",
    "void (anonymous namespace)::cunn_SoftMaxForward<4, float, at::native::log_softmax": "loss",
    "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>": "router",
    "triton_per_fused__softmax_logsumexp_mul_3": "router",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_cga1x1x1": "attention",
    "_adamw_step": "optimizer",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4": "optimizer",
    "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)": "communication",
    "moelm::send": "row movement",
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopB_TNT": "other matmuls",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "other matmuls",
    "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_2": REST,
    "triton_poi_fused__to_copy_t_7": "copies and casts",
    "Memcpy HtoD (Pinned -> Device)": "copies and casts",
    "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float": REST,
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_known_by_name(kernel: str) -> None:
    assert category_of([kernel]) == KERNELS[kernel]


def test_a_kernel_with_a_common_name_is_known_by_the_ops_around_it() -> None:
    kernel = "void at::native::index_elementwise_kernel<"
    assert category_of([kernel, "aten::index_select", "_Dispatch", "Torch-Compiled Region: 0/0"]) == "row movement"
    assert category_of([kernel, "aten::add", "autograd::engine::evaluate_function: TopkBackward0"]) == REST
    assert category_of([kernel, "aten::mul", "autograd::engine::evaluate_function: MmBackward0"]) == "other matmuls"


def test_kernels_are_counted_from_the_first_launch_of_the_profiled_steps() -> None:
    """Two steps of 100 us; a kernel of the step before still runs when they begin; two kernels overlap."""

    def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": args.pop("tid", 1), "args": args}

    events = [
        event("user_annotation", "ProfilerStep#1", 100, 100),
        event("user_annotation", "ProfilerStep#2", 200, 100),
        event("gpu_user_annotation", "ProfilerStep#1", 130, 100),
        event("cuda_runtime", "cudaLaunchKernel", 90, 5, correlation=1),
        event("cpu_op", "autograd::engine::evaluate_function: AddmmBackward0", 105, 40, tid=2),
        event("cpu_op", "aten::sum", 110, 20, tid=2),
        event("cuda_runtime", "cudaLaunchKernel", 115, 5, correlation=2, tid=2),
        event("cuda_driver", "cuLaunchKernelEx", 150, 5, correlation=3),
        event("cuda_runtime", "cudaMemcpyAsync", 210, 5, correlation=4),
        event("kernel", "nvjet_left_over", 95, 35, correlation=1),
        event("kernel", "nvjet_of_a_launch_that_was_not_traced", 128, 2, correlation=0),
        event("kernel", "reduce_kernel", 130, 40, correlation=2),
        event("kernel", "_rows_product", 180, 100, correlation=3),
        event("gpu_memcpy", "Memcpy DtoD", 260, 70, correlation=4),
    ]
    table = table_of(events, n_steps=2)
    assert table["ms"] == pytest.approx((330 - 130) / 2 / 1e3)
    rows = {row["name"]: (1e3 * row["ms"], row["calls"]) for row in table["categories"]}
    assert rows == {
        "expert products": (50, 0.5),
        "copies and casts": (35, 0.5),
        "other matmuls": (20, 0.5),  # summed in the backward pass of one
        "idle": (5, 0),  # 170 to 180
    }
