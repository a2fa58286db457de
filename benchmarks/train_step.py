"""Training throughput of 1.72 B parameters (0.31 B active) and of its dense twin, beside the peers.

`moelm` and `dense` run through `moelm.train` with its default callbacks: the rates are those that the run itself
logged, over every log interval after the first two (heat maps fall on every 200th step: `--steps 220` has them in it).
`bare` is the same compiled GPT, optimizer and data in a loop of its own, without Lightning, statistics or callbacks.
Peers train on the same tokens in that loop. Runs alternate, so that drifting clocks meet all of them; ratios are taken
within a repeat.

Left out on purpose: saving 20 GB at the end of each run, and drawing the same initial weights more than once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import harmonic_mean, median
from typing import Any, NamedTuple
from unittest.mock import patch

import measure
import peers
import torch
from measure import ROOT, spread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.optim import AdamW

from moelm import command_line
from moelm.callbacks.throughput import mfu, peak_flops
from moelm.config import Config, load_config
from moelm.data.datamodule import TokenDataModule
from moelm.data.prepare import prepare
from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.model.size import flops_per_token, model_size, short_name
from moelm.moe.balancing.base import auxiliary_losses
from moelm.train import train
from moelm.training.evaluation import forward_batch
from moelm.training.gradient_clipping import clip_gradients
from moelm.training.lightning_module import MoELightningModule
from moelm.training.optim import build_optimizer, place_gradients
from moelm.training.saving import FolderCheckpointIO

MOE, DENSE = ROOT / "configs/bench/moe_1_7b.yaml", ROOT / "configs/bench/dense_0_3b.yaml"
MICRO_TOKENS = 16384  # sequence length x micro-batch size of these configs
WARM_INTERVALS = 2
Batch = dict[str, Tensor]


class Interval(NamedTuple):
    """Between two log steps."""

    end: float  # time.time()
    tokens_per_s: float


Run = Callable[[Config, str], list[Interval]]  # of a config on cuda or cpu

# ------------------------------------------------------------------------------------------------ runs


def through_lightning(config: Config, device: str) -> list[Interval]:
    """As `moelm.train` logged them."""
    with (
        patch("moelm.training.lightning_module.initialize", initialize_once),
        patch.object(FolderCheckpointIO, "save_checkpoint", lambda *_, **__: None),
    ):
        train(config)
    events = EventAccumulator(str(config.run_folder))
    events.Reload()
    return [Interval(event.wall_time, event.value) for event in events.Scalars("perf/tokens_per_s")]


def bare_loop(config: Config, device: str) -> list[Interval]:
    """The same GPT, losses, optimizer and clipping."""
    module = MoELightningModule(config, [], 0)
    with torch.device("meta"):
        model = GPT(config.model)
    model.to_empty(device=device)
    initialize_once(model, config.run.seed)
    accumulation = config.optim.batch_tokens // (config.optim.micro_batch_size * config.data.seq_len)
    model.compile_blocks(cuda_graphs=device == "cuda" and config.trainer.compile is not True)  # as the trainer does
    model.activation_checkpointing = config.trainer.activation_checkpointing
    module.model = model
    optimizer = build_optimizer(model, config.optim)
    place_gradients(model, optimizer, accumulation)

    def loss(batch: Batch) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            output = forward_batch(model, batch, None)
            auxiliary = auxiliary_losses(module.balancers, output.stats, None) if output.stats is not None else {}
        assert output.loss is not None
        return output.loss + sum(each.weighted for each in auxiliary.values())

    def step() -> None:
        clip_gradients(optimizer, model.parameters(), config.trainer.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()

    with torch.autograd.set_multithreading_enabled(False):  # as the trainer does
        return loop(config, device, loss, step, model.own_gradients)


def peer_loop(build: Callable[..., peers.Model]) -> Run:
    def run(config: Config, device: str) -> list[Interval]:
        with torch.device(device):
            model = build(config.model, config.data.seq_len)
        try:
            optimizer = AdamW(model.module.parameters(), lr=config.optim.lr, fused=True)

            def step() -> None:
                limit = config.trainer.gradient_clip_val or float("inf")
                torch.nn.utils.clip_grad_norm_(model.module.parameters(), limit, foreach=True)
                optimizer.step()
                optimizer.zero_grad()

            return loop(config, device, lambda batch: model.loss(batch["inputs"], batch["targets"]), step)
        finally:
            model.undo()

    return run


def loop(
    config: Config,
    device: str,
    loss: Callable[[Batch], Tensor],
    step: Callable[[], None],
    before_sums: Callable[[], None] = lambda: None,
) -> list[Interval]:
    """Of `log_every_n_steps` optimizer steps; the device is waited for only between them. `before_sums` comes after the
    first of several micro-batches."""
    micro_tokens = config.optim.micro_batch_size * config.data.seq_len
    accumulation = config.optim.batch_tokens // micro_tokens
    batches = batches_of(config, device)
    intervals, every = [], config.trainer.log_every_n_steps
    started = time.perf_counter()
    for i in range(1, config.trainer.max_steps + 1):
        for micro_batch in range(accumulation):
            (loss(next(batches)) / accumulation).backward()
            if micro_batch == 0 and accumulation > 1:
                before_sums()
        step()
        if i % every == 0:
            if device == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            intervals.append(Interval(time.time(), every * config.optim.batch_tokens / (now - started)))
            started = now
    return intervals


def batches_of(config: Config, device: str) -> Iterator[Batch]:
    """What `moelm.train` would read, each batch sent to the device one ahead."""
    shards = prepare(config.data.corpus, progress=False)
    loader = iter(TokenDataModule(config, shards).train_dataloader())
    ahead: Batch = {}
    while True:
        batch = {key: value.to(device, non_blocking=True) for key, value in next(loader).items()}
        if ahead:
            yield ahead
        ahead = batch


_initial: dict[str, dict[str, Tensor]] = {}


def initialize_once(model: GPT, seed: int, *_: Any) -> None:
    """`initialize`, whose values are kept on the host: drawing 1.7 B of them takes longer than a run."""
    key = str([seed, *((name, tuple(value.shape)) for name, value in model.state_dict().items())])
    if key not in _initial:
        initialize(model, seed)
        _initial[key] = {name: value.cpu() for name, value in model.state_dict().items()}
    model.load_state_dict(_initial[key])


# --------------------------------------------------------------------------------------------- variants


class Variant(NamedTuple):
    config: Path
    run: Run
    limit: str | None  # the dense variant that it is compared with
    overrides: tuple[str, ...] = ()


VARIANTS = {
    "dense": Variant(DENSE, through_lightning, None),
    "dense bare": Variant(DENSE, bare_loop, None),
    "moelm": Variant(MOE, through_lightning, "dense"),
    "moelm bare": Variant(MOE, bare_loop, "dense bare"),
    "moelm grouped": Variant(MOE, through_lightning, "dense", ("model.moe.experts.backend=grouped",)),
    "torchtitan": Variant(MOE, peer_loop(peers.torchtitan_model), "dense bare"),
    "torchtitan dense": Variant(DENSE, peer_loop(peers.torchtitan_model), "dense bare"),
    "transformers bf16": Variant(MOE, peer_loop(peers.transformers_model), "dense bare"),
    "transformers bf16 dense": Variant(DENSE, peer_loop(peers.transformers_model), "dense bare"),
}
BARE = {"dense": "dense bare", "moelm": "moelm bare"}  # through Lightning -> the same without
DEFAULT = [name for name in VARIANTS if name not in ("moelm grouped", "transformers bf16 dense")]
OURS = [name for name in VARIANTS if name.startswith(("dense", "moelm"))]


def config_of(variant: Variant, accumulation: int, steps: int, folder: str, name: str, overrides: list[str]) -> Config:
    ours = [
        f"optim.batch_tokens={accumulation * MICRO_TOKENS}",
        f"trainer.max_steps={steps}",
        "trainer.limit_val_batches=0",  # compiled once more, and not timed
        "trainer.enable_progress_bar=false",
        f"run.name={name}",
        f"run.dir={folder}/runs",
    ]
    return load_config(variant.config, [*variant.overrides, f"data.corpus.dir={folder}/data", *overrides, *ours])


def measure_run(variant: Variant, config: Config, device: str) -> dict[str, Any]:
    """`error`, or rates of the settled log intervals, compilations after the first, peak of allocated memory."""
    measure.free_memory()  # that of recorded graphs too
    compiled_at: list[float] = []
    torch._dynamo.on_compile_start(lambda _: compiled_at.append(time.time()))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        intervals = variant.run(config, device)
    except ImportError as error:
        return {"error": f"not installed: {error}"}
    except Exception as error:
        return {"error": f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    recompiled = sum(intervals[0].end < moment < intervals[-1].end for moment in compiled_at)
    rates = [interval.tokens_per_s for interval in intervals[WARM_INTERVALS:]]
    return {"tokens_per_s": rates, "recompiled": recompiled, "peak_gib": peak}


# ---------------------------------------------------------------------------------------------- summary


Rates = dict[tuple[str, int, int], list[float]]  # tokens a second by variant, accumulation and repeat


def summarise(runs: list[dict[str, Any]], device_name: str) -> list[dict[str, Any]]:
    """One row for each variant and accumulation, over all repeats.

    `of_limit`: median tokens/s over those of the dense variant; `over_bare`: the time that Lightning and the callbacks
    add, as a share, over all settled intervals. Both by repeat.
    """
    rates = {_key(run): run["tokens_per_s"] for run in runs if "error" not in run}
    rows = []
    for name, accumulation in dict.fromkeys(_key(run)[:2] for run in runs):
        row: dict[str, Any] = {"variant": name, "accumulation": accumulation}
        rows.append(row)
        ours = [run for run in runs if _key(run)[:2] == (name, accumulation)]
        row |= next(({"error": run["error"]} for run in ours if "error" in run), {})
        ours = [run for run in ours if "error" not in run]
        if not ours:
            continue
        row["tokens_per_s"] = spread([rate for run in ours for rate in run["tokens_per_s"]])
        rate, peak = row["tokens_per_s"]["median"], peak_flops(device_name)
        row["ms"] = 1e3 * ours[0]["batch_tokens"] / rate
        row["mfu"] = None if peak is None else mfu(rate, ours[0]["flops_per_token"], peak, 1)
        row |= {key: max(run[key] for run in ours) for key in ("recompiled", "peak_gib")}
        row["of_limit"] = _by_repeat(rates, (name, VARIANTS[name].limit), accumulation, _speed)
        row["over_bare"] = _by_repeat(rates, (name, BARE.get(name)), accumulation, _added_time)
    return rows


def _key(run: dict[str, Any]) -> tuple[str, int, int]:
    return run["variant"], run["accumulation"], run["repeat"]


def _by_repeat(
    rates: Rates,
    pair: tuple[str, str | None],
    accumulation: int,
    compare: Callable[[list[float], list[float]], float],
) -> dict[str, float] | None:
    """The spread over the repeats that have both of `pair`; None if none has."""
    repeats = {key[2] for key in rates}
    pairs = [[rates.get((name or "", accumulation, repeat)) for name in pair] for repeat in sorted(repeats)]
    found = [compare(ours, other) for ours, other in pairs if ours and other]
    return spread(found) if found else None


def _speed(ours: list[float], limit: list[float]) -> float:
    return median(ours) / median(limit)


def _added_time(ours: list[float], bare: list[float]) -> float:
    """Of means, so that what happens in few intervals counts."""
    return harmonic_mean(bare) / harmonic_mean(ours) - 1


def markdown(result: dict[str, Any]) -> str:
    parts = ["# A whole training step\n", measure.markdown_facts(result["facts"])]
    parts.append(
        f"{result['models']['moe']} and its dense twin {result['models']['dense']}; {result['what']}. Tokens/s: median "
        "(quartiles) of the log intervals after the first two. `of dense`: tokens/s over those of the dense twin, both "
        "through Lightning or both in a bare loop. `over bare`: time added by Lightning and the callbacks. "
        "`recompiled`: compilations after the first log interval. Peak of the allocated memory.\n"
    )
    columns = ["variant", "micro-batches", "tokens/s", "ms", "MFU", "peak GiB", "recompiled", "of dense", "over bare"]
    parts.append(measure.markdown_table(columns, [table_row(row) for row in result["rows"]]))
    errors = [f"{row['variant']}: {row['error']}\n" for row in result["rows"] if "error" in row]
    return "\n".join([*parts, *dict.fromkeys(errors)])


def table_row(row: dict[str, Any]) -> list[str]:
    first = [row["variant"], str(row["accumulation"])]
    if "tokens_per_s" not in row:
        return [*first, *["-"] * 7]
    return [
        *first,
        measure.number(row["tokens_per_s"], ",.0f"),
        f"{row['ms']:.1f}",
        "-" if row["mfu"] is None else f"{row['mfu']:.3f}",
        f"{row['peak_gib']:.1f}",
        str(row["recompiled"]),
        measure.number(row["of_limit"], ".3f"),
        measure.number(row["over_bare"], ".2%"),
    ]


def main() -> None:
    parser = measure.make_parser(__doc__, "python benchmarks/train_step.py --variants 'dense,moelm' --accumulation 1")
    parser.add_argument("--variants", default=",".join(DEFAULT), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--accumulation", default="1,4", help="micro-batches a step; peers run the first of them only")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=120, help="of one micro-batch; with more, as many as cost the same"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configs, for all variants")
    arguments = parser.parse_args()
    names = measure.chosen(parser, arguments.variants, VARIANTS)
    measure.require_cuda()
    if arguments.quick:
        arguments.repeats, arguments.steps = 1, 40
    run(arguments, names, "cuda")


def run(arguments: argparse.Namespace, names: list[str], device: str) -> dict[str, Any]:
    command_line.import_builtins()
    measure.allow_recompiles()
    accumulations = [int(number) for number in arguments.accumulation.split(",")]
    base = load_config(MOE, arguments.overrides)
    models = {
        kind: short_name(model_size(load_config(file, arguments.overrides).model))
        for kind, file in (("moe", MOE), ("dense", DENSE))
    }
    what = (
        f"micro-batches of {base.optim.micro_batch_size} x {base.data.seq_len} tokens, {base.trainer.precision}, "
        f"AdamW, clip {base.trainer.gradient_clip_val}"
    )
    facts = measure.facts()
    result: dict[str, Any] = {"facts": facts, "models": models, "what": what, "runs": [], "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(arguments.repeats):
            for accumulation in accumulations:
                for name in names:
                    if name not in OURS and accumulation != accumulations[0]:
                        continue
                    result["runs"].append(one_run(arguments, name, accumulation, repeat, folder, device))
                    result["rows"] = summarise(result["runs"], facts["device"])
                    measure.write(arguments.out, result, markdown(result))
    print(markdown(result))
    return result


def one_run(
    arguments: argparse.Namespace, name: str, accumulation: int, repeat: int, folder: str, device: str
) -> dict[str, Any]:
    variant = VARIANTS[name]
    run_name = f"{name}-{accumulation}-{repeat}".replace(" ", "_")
    every = load_config(variant.config, arguments.overrides).trainer.log_every_n_steps
    # at least two settled intervals
    steps = max((WARM_INTERVALS + 2) * every, arguments.steps // (accumulation if name in OURS else 2))
    config = config_of(variant, accumulation, steps, folder, run_name, arguments.overrides)
    found = measure_run(variant, config, device)
    rate = f"{median(found['tokens_per_s']):,.0f} tokens/s" if "error" not in found else found["error"]
    print(f"{run_name}: {rate}", file=sys.stderr, flush=True)
    return {
        "variant": name,
        "accumulation": accumulation,
        "repeat": repeat,
        "batch_tokens": config.optim.batch_tokens,
        "flops_per_token": flops_per_token(config.model, config.data.seq_len),
        **found,
    }


if __name__ == "__main__":
    main()
