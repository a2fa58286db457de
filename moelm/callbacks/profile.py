"""A profile on request (`trainer.profile: true`): a trace of a few optimizer steps, and a table of where they went."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, schedule

from moelm.callbacks.observer import say
from moelm.config import Config
from moelm.training.lightning_module import MoELightningModule

WARM_UP, N_STEPS = 10, 5  # optimizer steps before the profile (kernels are compiled and tuned), and in it

REST = "norms and elementwise"
CATEGORIES = (  # the first whose pattern a name has; a kernel is asked first, then the ops that it was launched by
    ("communication", r"^(nccl|gloo:|c10d::|fsdp::)|^moelm::(gather_choices|read_splits|return_gates)$"),
    ("expert products", r"^_(rows_product|up_product|down_backward|weight_gradient)|[Gg]rouped|GroupProblem"),
    (
        "row movement",
        r"^_(spread|row_tiles|gather_sum|swiglu|count|sum_blocks|place)|sort|sum_by_|^_?(Dispatch|Combine|Spread)",
    ),
    ("row movement", r"^moelm::(send|receive|send_back|gather_home|trim)$"),
    ("row movement", r"^moelm::expert_mlp_(arriving|leaving|backward_around)$"),
    ("router", r"^_(top_k|sums|write_parts|logits|grad_x|grad_weight)|topk|TopK|router|sums_of_choices"),
    ("router", r"^moelm::(keep_choice|choose|best_ids)|^triton_.*(softmax|logsumexp|scatter)"),
    ("loss", r"^_(cross_entropy)|CrossEntropy|log_softmax|nll_loss"),
    ("attention", r"flash|fmha|[Aa]ttention|sdpa|^void cudnn::fusion"),
    ("optimizer", r"[Aa]dam|multi_tensor_apply|_foreach|[Mm]uon|clip"),
    ("copies and casts", r"^triton_poi_fused__to_copy(_(t|view|clone|permute|transpose))*_\d+$"),
    (REST, r"^triton_|^_turn_heads"),
    ("other matmuls", r"gemm|nvjet|cublas|cutlass|xmma|splitK|^aten::(mm|addmm|bmm|linear)$|^(Mm|Addmm|Bmm)Backward"),
    ("copies and casts", r"[Mm]emcpy|[Mm]emset|copy_|FillFunctor|^aten::(to|_to_copy|copy_|cat|clone|zero_|fill_)$"),
)


class Work(NamedTuple):
    """A kernel, or on the CPU an op without those that it calls."""

    names: list[str]  # its own, then those of the ops around it, inside out
    start: float  # microseconds
    end: float
    busy: float  # end - start, less the ops inside it


class Profile(Callback):
    """Writes profile/trace.json.gz (for ui.perfetto.dev), table.txt and table.json into the run's folder; rank zero
    alone is profiled. The steps are the first ones after warm-up between which nothing is logged, validated or saved,
    or else simply the first ones."""

    def __init__(self, config: Config) -> None:
        self.folder = config.run_folder / "profile"
        self.n_steps, self.max_steps = N_STEPS, config.trainer.max_steps
        self.events = (config.trainer.log_every_n_steps, config.data.val_every_n_steps, config.checkpoint.every_n_steps)
        self.profiler: profile | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MoELightningModule)
        self.choose_steps(pl_module.step)

    def choose_steps(self, done: int) -> None:
        """`done`: optimizer steps that a resumed run has behind it."""
        self.n_steps = min(N_STEPS, self.max_steps - done)
        last = self.max_steps - self.n_steps
        candidates = range(min(done + WARM_UP, last), last + 1)
        self.first = next((step for step in candidates if self._is_quiet(step)), candidates[0])  # steps done before it
        self.warm_up = min(1, self.first - done)  # of the profiler itself

    def _is_quiet(self, step: int) -> bool:
        """Of the steps after `step`: what is logged of that one itself is written in the first of them."""
        return all(each % every for each in range(step, step + self.n_steps) for every in self.events)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MoELightningModule)
        if trainer.is_global_zero and self.profiler is None and pl_module.step == self.first - self.warm_up:
            on_cuda = pl_module.device.type == "cuda"
            self.profiler = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])],
                schedule=schedule(wait=0, warmup=self.warm_up, active=self.n_steps, repeat=1),
            )
            self.profiler.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MoELightningModule)
        if self.profiler is None or not pl_module.is_step_end or pl_module.step > self.first + self.n_steps:
            return
        started = time.perf_counter()
        self.profiler.step()
        if pl_module.step == self.first + self.n_steps:
            self._write(pl_module, self.profiler)
            pl_module.paused_s += time.perf_counter() - started

    def _write(self, module: MoELightningModule, profiler: profile) -> None:
        self.folder.mkdir(exist_ok=True)
        trace = self.folder / "trace.json.gz"
        profiler.stop()
        profiler.export_chrome_trace(str(trace))
        with gzip.open(trace, "rt", encoding="utf-8") as stream:
            table = table_of(json.load(stream)["traceEvents"], self.n_steps)
        device = module.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        table = {"device": name, "first_step": self.first + 1, "last_step": self.first + self.n_steps, **table}
        (self.folder / "table.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        (self.folder / "table.txt").write_text(as_text(table), encoding="utf-8")
        steps = f"steps {table['first_step']}-{table['last_step']}"
        say(module, f"profile of {steps}: {table['ms']:.1f} ms a step, in {self.folder / 'table.txt'} and {trace.name}")


# ---------------------------------------------------------------------------------------- from trace to table


def table_of(events: list[dict[str, Any]], n_steps: int) -> dict[str, Any]:
    """ms a step by category, longest first, of a Chrome trace of `n_steps` optimizer steps.

    With a GPU its kernels are counted, from the first one that these steps launched to the last one's end; without,
    the ops of the CPU. The rest of that span, in which nothing of this ran, is `idle`; kernels that run at the same
    time are counted each, so shares can add up to more than 1.
    """
    steps = [each for each in events if str(each.get("name")).startswith("ProfilerStep#") and each.get("dur")]
    steps = [each for each in steps if each["cat"] == "user_annotation"]
    begin, end = min(each["ts"] for each in steps), max(each["ts"] + each["dur"] for each in steps)
    ops, launches = _ops_and_launches(events)
    kernels = [each for each in events if each.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if kernels:
        work = []
        for each in kernels:
            launched, names = launches.get(each["args"].get("correlation"), (0.0, []))
            if launched >= begin:  # else it belongs to the step before, and its launch may not even be in the trace
                work.append(Work([each["name"], *names], each["ts"], each["ts"] + each["dur"], each["dur"]))
        begin, end = min(piece.start for piece in work), max(piece.end for piece in work)
    else:
        work = [piece for piece in ops if begin <= piece.start < end]
    by_category, by_name = defaultdict(list), defaultdict(list)
    for piece in work:
        by_category[category_of(piece.names)].append(piece.busy)
        by_name[piece.names[0]].append(piece.busy)
    idle = end - begin - union((piece.start, piece.end) for piece in work)
    rows = [(name, sum(times), len(times)) for name, times in by_category.items()]
    rows = [*sorted(rows, key=lambda row: -row[1]), ("idle" if kernels else "between ops", idle, 0)]
    longest = sorted(((name, sum(times), len(times)) for name, times in by_name.items()), key=lambda row: -row[1])[:25]

    def shown(name: str, microseconds: float, count: int) -> dict[str, Any]:
        share = microseconds / (end - begin)
        return {"name": name, "ms": microseconds / n_steps / 1e3, "share": share, "calls": count / n_steps}

    return {
        "ms": (end - begin) / n_steps / 1e3,
        "categories": [shown(*row) for row in rows],
        "longest": [shown(*row) for row in longest],
    }


def _ops_and_launches(events: list[dict[str, Any]]) -> tuple[list[Work], dict[int, tuple[float, list[str]]]]:
    """All ops of the CPU; and for each launch of a kernel, by its correlation id, when it was and the ops around it."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for each in events:
        if each.get("cat") in ("cpu_op", "cuda_runtime", "cuda_driver"):
            threads[each["tid"]].append(each)
    ops: list[Work] = []
    launches: dict[int, tuple[float, list[str]]] = {}
    for thread in threads.values():
        around: list[int] = []  # the open ops, outside in, as places in `ops`
        for each in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            while around and ops[around[-1]].end <= each["ts"]:
                around.pop()
            names = ops[around[-1]].names if around else []
            if each["cat"] != "cpu_op":
                launches[each["args"].get("correlation")] = (each["ts"], names)
                continue
            if around:
                outer = ops[around[-1]]
                ops[around[-1]] = outer._replace(busy=outer.busy - each["dur"])
            around.append(len(ops))
            ops.append(Work([each["name"], *names], each["ts"], each["ts"] + each["dur"], each["dur"]))
    return ops, launches


def category_of(names: Iterable[str]) -> str:
    for name in names:
        for category, pattern in CATEGORIES:
            if re.search(pattern, name.removeprefix("autograd::engine::evaluate_function: ")):
                return category
    return REST


def union(spans: Iterable[tuple[float, float]]) -> float:
    """The time in which at least one of them lasts."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def as_text(table: dict[str, Any]) -> str:
    steps = f"steps {table['first_step']} to {table['last_step']}"
    lines = [f"{table['device']}, {steps}: {table['ms']:.3f} ms a step"]
    for title in ("categories", "longest"):
        lines += ["", f"{'ms a step':>10} {'share':>7} {'calls':>7}  {title}"]
        for row in table[title]:
            lines.append(f"{row['ms']:10.3f} {row['share']:7.1%} {row['calls']:7.1f}  {row['name'][:160]}")
    return "\n".join(lines) + "\n"
