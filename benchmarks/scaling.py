"""Speed over size: one layer over tokens and experts, the training step over sequence length and depth.

The layer is that of `moe_layer.py`, checked at each size before it is timed. Over experts the arithmetic stays the same
and the bytes grow: each weight is read twice in bf16 and its gradient is written once, which takes at least
`weight traffic` at the measured bandwidth, however few operations there are. The step is the bare loop of
`train_step.py` at 16,384 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from typing import Any

import measure
import moe_layer
import torch
import train_step
from measure import spread
from peers import Shape

from moelm import command_line
from moelm.callbacks.throughput import mfu, peak_flops
from moelm.model.size import flops_per_token

BASE = Shape(T=32768, D=2048, E=64, K=8, F=1024)
SIZES = {
    "tokens": [2048, 4096, 8192, 16384, 32768, 65536],
    "experts": [8, 16, 32, 64, 128, 256, 512],
    "seq_len": [512, 1024, 2048, 4096, 8192],
    "depth": [2, 4, 8, 16],
}


def measure_layer(part: str, size: int, names: list[str], device: str, rounds: int, burst_ms: float) -> dict[str, Any]:
    """What `moe_layer.measure_shape` finds, by variant; `bytes` of weights and their gradients over experts."""
    shape = BASE._replace(**{"T" if part == "tokens" else "E": size})
    found = moe_layer.measure_shape(shape, names, device, rounds, burst_ms)
    for variant in found.values():
        if variant.get("errors"):  # a mixture of experts
            variant["bytes"] = TRAFFIC[variant["weights"]] * 3 * shape.E * shape.D * shape.F
    return found


TRAFFIC = {
    "bf16": 6,
    "fp32, bf16 compute": 8,
    "fp32, bf16 compute and gradients": 6,
}  # bytes a weight: two readings in bf16, one gradient in its own dtype


def bandwidth(device: str, n_bytes: int = 2**31) -> float:
    """Bytes a second of a copy within the device, read and written ones counted."""
    source = torch.empty(n_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = measure.time_interleaved({"copy": lambda: target.copy_(source)}, rounds=1, burst_ms=50.0)["copy"][0]
    return 2 * n_bytes / (1e-3 * statistics.median(times))


def measure_step(part: str, size: int, steps: int, folder: str, device: str, overrides: list[str]) -> dict[str, Any]:
    changes = {
        "seq_len": [f"data.seq_len={size}", f"optim.micro_batch_size={train_step.MICRO_TOKENS // size}"],
        "depth": [f"model.n_layers={size}"],
    }[part]
    variant = train_step.VARIANTS["moelm bare"]
    config = train_step.config_of(variant, 1, steps, folder, f"{part}-{size}", [*overrides, *changes])
    found = train_step.measure_run(variant, config, device)
    if "error" not in found:
        rate = found["tokens_per_s"] = spread(found["tokens_per_s"])
        found["ms"] = {
            key: 1e3 * config.optim.batch_tokens / rate[of]
            for key, of in (("median", "median"), ("q1", "q3"), ("q3", "q1"))
        }
        peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
        flops = flops_per_token(config.model, config.data.seq_len)
        found["mfu"] = None if peak is None else mfu(rate["median"], flops, peak, 1)
    return found


def markdown(result: dict[str, Any]) -> str:
    parts = ["# Scaling\n", measure.markdown_facts(result["facts"])]
    layer = moe_layer.describe(BASE._asdict())
    for part, meaning in (("tokens", "T"), ("experts", "E")):
        if part in result:
            parts.append(f"## One layer over {part}\n\nForward + backward; {layer}, but for {meaning}.\n")
            parts.append(layer_table(result[part], meaning, result.get("bandwidth")))
    if "experts" in result:
        parts.append(
            f"Weight traffic: the weights read twice in bf16 and their gradients written once, at the "
            f"{result['bandwidth'] / 1e12:.2f} TB/s that a copy within the device reached.\n"
        )
    for part in ("seq_len", "depth"):
        if part in result:
            parts.append(f"## The training step over {part}\n\n{result['what']}.\n")
            rows = [[f"{int(size):,}", *step_cells(found)] for size, found in result[part].items()]
            parts.append(measure.markdown_table([part, "tokens/s", "ms", "MFU", "peak GiB"], rows))
    return "\n".join(parts)


def layer_table(sizes: dict[str, Any], meaning: str, bytes_per_s: float | None) -> str:
    names = list(dict.fromkeys(name for found in sizes.values() for name in found))
    columns = [meaning, *[f"{name}, ms" for name in names]]
    rows = [
        [f"{int(size):,}", *[measure.number(found.get(name, {}).get("ms")) for name in names]]
        for size, found in sizes.items()
    ]
    ours = next((name for name in names if name.startswith("moelm")), None)
    if ours is not None:
        columns.append(f"{ours}, of the limit")
        for row, found in zip(rows, sizes.values(), strict=True):
            row.append(measure.number(found[ours].get("of_limit"), ".3f"))
        if meaning == "E" and bytes_per_s:
            columns += [f"{ours}, over E = {next(iter(sizes))}", "weight traffic, GB", "ms"]
            first = next(iter(sizes.values()))[ours].get("ms")
            for row, found in zip(rows, sizes.values(), strict=True):
                ms, n_bytes = found[ours].get("ms"), found[ours].get("bytes")
                row.append(f"{ms['median'] / first['median']:.3f}" if ms and first else "-")
                row += [f"{n_bytes / 1e9:.2f}", f"{1e3 * n_bytes / bytes_per_s:.2f}"] if n_bytes else ["-", "-"]
    errors: dict[str, list[str]] = {}
    for size, found in sizes.items():
        for name, variant in found.items():
            if "error" in variant:
                errors.setdefault(f"{name}: {variant['error']}", []).append(f"{int(size):,}")
    lines = [f"{error} ({meaning} = {', '.join(at)})\n" for error, at in errors.items()]
    return "\n".join([measure.markdown_table(columns, rows), *lines])


def step_cells(found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return ["-", "-", "-", found["error"]]
    share = "-" if found["mfu"] is None else f"{found['mfu']:.3f}"
    return [
        measure.number(found["tokens_per_s"], ",.0f"),
        measure.number(found["ms"], ".1f"),
        share,
        f"{found['peak_gib']:.1f}",
    ]


def main() -> None:
    parser = measure.make_parser(__doc__, "python benchmarks/scaling.py --parts experts --variants 'limit,moelm fused'")
    parser.add_argument("--parts", default=",".join(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--sizes", nargs="+", type=int, help="of one part (default: all)")
    parser.add_argument(
        "--variants",
        default="limit,moelm fused,sonicmoe",
        help="of the layer: those of moe_layer.py",
    )
    parser.add_argument("--steps", type=int, default=60, help="of each training run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the training runs' config")
    arguments = parser.parse_args()
    parts = measure.chosen(parser, arguments.parts, SIZES)
    names = measure.chosen(parser, arguments.variants, moe_layer.VARIANTS)
    if arguments.sizes and len(parts) > 1:
        parser.error("--sizes goes with one of --parts")
    measure.require_cuda()
    run(arguments, parts, names, "cuda")


def run(arguments: argparse.Namespace, parts: list[str], names: list[str], device: str) -> dict[str, Any]:
    command_line.import_builtins()
    measure.allow_recompiles()
    rounds, burst_ms = (2, 20.0) if arguments.quick else (5, 100.0)
    base = train_step.load_config(train_step.MOE, arguments.overrides)
    what = f"{train_step.short_name(train_step.model_size(base.model))}, {train_step.MICRO_TOKENS:,} tokens a step"
    result: dict[str, Any] = {"facts": measure.facts(), "what": what}
    if "experts" in parts:
        result["bandwidth"] = bandwidth(device, 2**31 if device == "cuda" else 2**20)
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            sizes = SIZES[part][1:3] if arguments.quick else SIZES[part]
            for size in arguments.sizes or sizes:
                print(f"{part} {size:,}", file=sys.stderr, flush=True)
                measure.free_memory()
                result.setdefault(part, {})[str(size)] = (
                    measure_layer(part, size, names, device, rounds, burst_ms)
                    if part in ("tokens", "experts")
                    else measure_step(part, size, arguments.steps, folder, device, arguments.overrides)
                )
                measure.write(arguments.out, result, markdown(result))
    print(markdown(result))
    return result


if __name__ == "__main__":
    main()
