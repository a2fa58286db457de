"""Training on several GPUs of a host: tokens a second as devices are added, each with the tokens that one has alone.

Each strategy is one launch through `moelm.train`, Lightning starts the ranks; rates are those that the run logged, over
every log interval after the first two. `--check` adds one device with the batch of all of them, by accumulation, and
compares the loss and the gradient norm of each step with that run's. `--profile` traces five steps of rank 0 and tells
how much of the communication ran beside other kernels; traces lie beside the results.

`--check` needs no second GPU: with NCCL 2.30 or newer, NCCL_MULTI_RANK_GPU_ENABLE=1 and CUDA's MPS all ranks run on the
only one there is. Their rates then say nothing.

Left out on purpose: saving.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import measure
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import Callback
from measure import ROOT, spread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moelm import command_line
from moelm.callbacks.profile import union
from moelm.callbacks.throughput import mfu, peak_flops
from moelm.config import Config, NamedConfig, load_config, register, to_yaml
from moelm.data.prepare import prepare
from moelm.model.devices import on_devices
from moelm.model.size import flops_per_token, model_size, short_name, training_memory
from moelm.train import train
from moelm.training.saving import FolderCheckpointIO

WARM_INTERVALS = 2
CHECKED = 5  # steps; then rounding differences grow by themselves
# of the loss, nats; of the norm, relative: right ones were at most 1e-3 apart, with wrong gradients of gates 2.4e-3
BOUNDS = {"bf16-mixed": (1e-3, 2e-3), "32-true": (1e-5, 1e-4)}

# ------------------------------------------------------------------------------------------------ strategies


def strategies(n: int) -> dict[str, list[str]]:
    """Name -> overrides, on `n` devices; `one` and `one, same batch` on one."""
    fsdp = [f"trainer.devices={n}", "trainer.strategy=fsdp"]
    found = {"one": ["trainer.devices=1"], "one, same batch": ["trainer.devices=1"]}
    found |= {"ddp": [f"trainer.devices={n}", "trainer.strategy=ddp"]}
    degrees = [degree for degree in range(2, n + 1) if n % degree == 0]
    sharded = {"fsdp": fsdp}
    for degree in degrees:
        shared = [*fsdp, f"trainer.expert_parallel={degree}"]
        sharded |= {f"fsdp, expert_parallel={degree}": shared}
        sharded |= {f"fsdp, expert_parallel={degree}, static_exchange=true": [*shared, "trainer.static_exchange=true"]}
    for name, overrides in sharded.items():
        found |= {name: overrides}
        found |= {f"{name}, reshard_after_forward=false": [*overrides, "trainer.reshard_after_forward=false"]}
    return found


def config_of(name: str, arguments: argparse.Namespace, folder: str) -> Config:
    base = load_config(arguments.config, arguments.overrides)
    n = 1 if name == "one" else arguments.devices
    ours = [
        *strategies(arguments.devices)[name],
        f"optim.batch_tokens={n * arguments.accumulate * base.optim.micro_batch_size * base.data.seq_len}",
        f"trainer.max_steps={arguments.steps}",
        "trainer.log_every_n_steps=5",
        "trainer.limit_val_batches=0",  # compiled once more, and not timed
        "trainer.enable_progress_bar=false",
        f"trainer.profile={str(arguments.profile and not name.startswith('one')).lower()}",
        "callbacks=[throughput, every_step]",
        f"run.name={name.replace(', ', '-').replace('=', '-').replace(' ', '_')}",
        f"run.dir={folder}",
    ]
    return load_config(arguments.config, [*arguments.overrides, *ours])


# ---------------------------------------------------------------------------------------------- in each rank


@register("callback", "every_step", NamedConfig)
class EveryStep(Callback):
    """Loss and gradient norm of each step, read at the end, when nothing is timed."""

    def __init__(self, config: NamedConfig, run: Config) -> None:
        self.folder = run.run_folder
        self.losses: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.is_step_end:
            self.losses.append(pl_module.last_step.loss)
            self.norms.append(pl_module.grad_norm)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        found: dict[str, Any] = {"losses": [*map(float, self.losses)], "norms": [*map(float, self.norms)]}
        if pl_module.device.type == "cuda":
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        (self.folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(found))


def share_a_gpu(n_ranks: int) -> bool:
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" and torch.cuda.device_count() == 1 < n_ranks


@contextmanager
def all_on_one_gpu(n_ranks: int) -> Iterator[None]:
    """Lightning would give each rank a GPU of its own, and so would a mesh of devices.

    NCCL's kernels stay on their multiprocessors until those of the other ranks have come: if each took as many as on a
    GPU of its own, those of four ranks and two groups would not all find room, and wait for ever.
    """
    only, set_device = torch.device("cuda", 0), torch.cuda.set_device
    with (
        patch.dict(os.environ, {"NCCL_MAX_CTAS": os.environ.get("NCCL_MAX_CTAS", "4")}),
        patch("lightning.fabric.accelerators.cuda.num_cuda_devices", lambda: n_ranks),
        patch.object(CUDAAccelerator, "get_parallel_devices", staticmethod(lambda devices: [only] * len(devices))),
        patch("torch.cuda.set_device", lambda _: set_device(only)),
    ):
        yield


def run_rank(file: str) -> None:
    """Called in the launched process and, by Lightning, in those of the other ranks."""
    command_line.import_builtins()
    measure.allow_recompiles()
    compiled_at: list[float] = []
    torch._dynamo.on_compile_start(lambda _: compiled_at.append(time.time()))
    config = load_config(file, [])
    n_ranks = int(config.trainer.devices)
    with (
        patch.object(FolderCheckpointIO, "save_checkpoint", lambda *_, **__: None),
        all_on_one_gpu(n_ranks) if share_a_gpu(n_ranks) else nullcontext(),
    ):
        train(config)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        (config.run_folder / "compiled.json").write_text(json.dumps(compiled_at))


# --------------------------------------------------------------------------------------------- measurement


def measure_run(name: str, arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """`error`, or what the ranks left behind."""
    config = config_of(name, arguments, folder)
    found: dict[str, Any] = {"name": name, "n_devices": 1 if name.startswith("one") else arguments.devices}
    file = Path(folder, f"{config.run_name}.yaml")
    file.write_text(to_yaml(config))
    started = time.perf_counter()
    command = [sys.executable, __file__, "--rank", str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout, check=False)
    except subprocess.TimeoutExpired:
        return found | {"error": f"not done after {arguments.timeout:.0f} s"}
    if done.returncode:
        return found | {"error": f"exit code {done.returncode}: {done.stderr[-1500:]}"}
    events = EventAccumulator(str(config.run_folder), size_guidance={"scalars": 0})
    events.Reload()
    intervals = events.Scalars("perf/tokens_per_s")
    ranks = [json.loads(each.read_text()) for each in sorted(config.run_folder.glob("rank-*.json"))]
    compiled_at = json.loads((config.run_folder / "compiled.json").read_text())
    found |= {
        # the profile lies in the first of the others
        "tokens_per_s": [event.value for event in intervals[WARM_INTERVALS + config.trainer.profile :]],
        "batch_tokens": config.optim.batch_tokens,
        "flops_per_token": flops_per_token(config.model, config.data.seq_len),
        "precision": config.trainer.precision,
        "recompiled": sum(intervals[0].wall_time < moment < intervals[-1].wall_time for moment in compiled_at),
        "launch_s": time.perf_counter() - started,
        "losses": ranks[0]["losses"],
        "norms": ranks[0]["norms"],
    }
    found |= {key: max(rank[key] for rank in ranks) for key in ("peak_gib", "reserved_gib") if key in ranks[0]}
    predicted = {each.strategy: each.memory for each in on_devices(config, found["n_devices"])}
    found["info_gib"] = predicted.get(name, training_memory(config).total) / 2**30
    if config.trainer.profile:
        trace = config.run_folder / "profile/trace.json.gz"
        with gzip.open(trace, "rt", encoding="utf-8") as stream:
            found["communication"] = overlap(json.load(stream)["traceEvents"])
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(trace, arguments.out.with_name(f"{arguments.out.name}_{config.run_name}_trace.json.gz"))
    return found


def overlap(events: list[dict[str, Any]]) -> dict[str, float] | None:
    """Of the kernels of a trace: ms a step in which NCCL's ran, and the share of that time in which others did too."""
    steps = {each["name"] for each in events if str(each.get("name")).startswith("ProfilerStep#")}
    kernels = [each for each in events if each.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for each in kernels:
        spans[each["name"].startswith("nccl")].append((each["ts"], each["ts"] + each["dur"]))
    if not spans[True]:
        return None
    communicating, computing, either = (union(part) for part in (spans[True], spans[False], spans[True] + spans[False]))
    hidden = (communicating + computing - either) / communicating
    return {"ms": communicating / 1e3 / max(1, len(steps)), "hidden": hidden}


def compare(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """The largest differences of the first steps: of the loss in nats, `first` that of step 1; of the norm, a share."""
    losses = [abs(a - b) for a, b in zip(found["losses"][:CHECKED], wanted["losses"][:CHECKED], strict=True)]
    norms = [abs(a / b - 1) for a, b in zip(found["norms"][:CHECKED], wanted["norms"][:CHECKED], strict=True)]
    return {"first": losses[0], "loss": max(losses), "norm": max(norms)}


def rows_of(runs: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """`efficiency`: tokens/s over those of one device times their number; `within`: are the differences small?"""
    done = {run["name"]: run for run in runs if "error" not in run}
    one, same = done.get("one"), done.get("one, same batch")
    rows = []
    for run in runs:
        row = {"name": run["name"], "n_devices": run["n_devices"]}
        rows.append(row)
        if "error" in run:
            row["error"] = run["error"]
            continue
        rate, peak = median(run["tokens_per_s"]), peak_flops(device)
        row |= {"tokens_per_s": spread(run["tokens_per_s"]), "ms": 1e3 * run["batch_tokens"] / rate}
        row["mfu"] = None if peak is None else mfu(rate, run["flops_per_token"], peak, run["n_devices"])
        if one is not None and run["n_devices"] > 1 and not share_a_gpu(run["n_devices"]):
            row["efficiency"] = rate / run["n_devices"] / median(one["tokens_per_s"])
        row |= {key: run[key] for key in ("peak_gib", "info_gib", "recompiled", "communication") if key in run}
        if same is not None and run["n_devices"] > 1:
            row["differences"] = compare(run, same)
            loss, norm = BOUNDS[run["precision"]]
            row["within"] = row["differences"]["loss"] <= loss and row["differences"]["norm"] <= norm
    return rows


# ------------------------------------------------------------------------------------------------- results

COLUMNS = ["strategy", "devices", "tokens/s", "ms", "MFU", "efficiency", "peak GiB", "moelm.info", "recompiled"]
COLUMNS += ["communication ms", "hidden", "loss apart", "norm apart"]


def markdown(result: dict[str, Any]) -> str:
    parts = ["# Several GPUs\n", measure.markdown_facts(result["facts"])]
    parts.append(
        f"{result['model']}; {result['what']}. Tokens/s: median (quartiles) of the log intervals after the first two. "
        "Efficiency: tokens/s over those of one device times their number. Peak of the allocated memory, the largest "
        "of the ranks, beside what `moelm.info` says. `communication`: time a step in which NCCL's kernels ran, and "
        f"the share of it in which others did. `apart`: the largest differences in the first {CHECKED} steps from one "
        "device with the same batch, loss in nats, norm relative.\n"
    )
    parts.append(measure.markdown_table(COLUMNS, [table_row(row) for row in result["rows"]]))
    return "\n".join([*parts, *(f"{row['name']}: {row['error']}\n" for row in result["rows"] if "error" in row)])


def table_row(row: dict[str, Any]) -> list[str]:
    def show(value: float | None, form: str) -> str:
        return "-" if value is None else f"{value:{form}}"

    talk, apart = row.get("communication") or {}, row.get("differences") or {}
    return [
        row["name"],
        str(row["n_devices"]),
        measure.number(row.get("tokens_per_s"), ",.0f"),
        show(row.get("ms"), ".1f"),
        show(row.get("mfu"), ".3f"),
        show(row.get("efficiency"), ".3f"),
        show(row.get("peak_gib"), ".1f"),
        show(row.get("info_gib"), ".1f"),
        show(row.get("recompiled"), "d"),
        show(talk.get("ms"), ".1f"),
        show(talk.get("hidden"), ".2f"),
        show(apart.get("loss"), ".1e"),
        show(apart.get("norm"), ".1e"),
    ]


def main() -> None:
    parser = measure.make_parser(__doc__, "python benchmarks/parallel.py --devices 2 --check --profile --out PREFIX")
    parser.add_argument("--config", default=str(ROOT / "configs/bench/moe_1_7b.yaml"))
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--strategies", help="names as in the table, separated by ';' (default: all)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches of a device and step")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a run is not that of one device")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="for each run")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config, for all runs")
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(arguments.rank)
        return
    if not arguments.quick:
        measure.require_cuda()
    known = strategies(arguments.devices)
    names = arguments.strategies.split(";") if arguments.strategies else [name for name in known if "same" not in name]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{unknown[0]!r} is not one of {'; '.join(known)}")
    if arguments.quick:
        arguments.steps = 5 * (WARM_INTERVALS + 3)
    if arguments.check:
        names = [*dict.fromkeys(["one, same batch", *names])]
    result = run(arguments, names)
    if arguments.check and not all(row.get("within", "error" not in row) for row in result["rows"]):
        sys.exit(1)


def run(arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    command_line.import_builtins()
    base = load_config(arguments.config, arguments.overrides)
    micro_batch = f"{base.optim.micro_batch_size} x {base.data.seq_len} tokens"
    if arguments.accumulate > 1:
        micro_batch = f"{arguments.accumulate} micro-batches of {micro_batch}"
    what = f"{micro_batch} a device and step, {base.trainer.precision}"
    if share_a_gpu(arguments.devices):
        what += ", all ranks on one GPU (only differences and memory count)"
    facts = measure.facts()
    result: dict[str, Any] = {"facts": facts, "model": short_name(model_size(base.model)), "what": what, "runs": []}
    prepare(base.data.corpus)  # once, and not by each run
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found = measure_run(name, arguments, folder)
            result["runs"].append(found)
            result["rows"] = rows_of(result["runs"], facts["device"])
            measure.write(arguments.out, result, markdown(result))
            said = found.get("error") or f"{median(found['tokens_per_s']):,.0f} tokens/s, {found['launch_s']:.0f} s"
            print(f"{name}: {said}", file=sys.stderr, flush=True)
    print(markdown(result))
    return result


if __name__ == "__main__":
    main()
