"""Draw results from their JSON: speeds of `moe_layer.py` and `scaling.py`, losses of `loss_curves.py` and
`parallel.py`; and from the trace of a profile what ran beside what in a step. Needs no GPU, but matplotlib
(`pip install moelm[bench]`)."""

from __future__ import annotations

import argparse
import gzip
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from moelm.callbacks.profile import category_of

LIMIT, OURS = "limit", "moelm fused"
SCALING = {
    "tokens": "layer, tokens",
    "experts": "layer, experts",
    "seq_len": "training step, sequence length",
    "depth": "training step, layers",
}
COLOURS = {LIMIT: "#999999", OURS: "#d1495b", "sonicmoe": "#00798c", "moelm grouped": "#edae49"}


def layer_bars(result: dict[str, Any]) -> tuple[list[str], dict[str, list[float]]]:
    """The shapes, and by variant its share of the limit's speed in each; NaN where it was not timed."""
    shapes = list(result["layer"])
    names = [name for name in dict.fromkeys(n for found in result["layer"].values() for n in found) if is_a_layer(name)]
    share = {
        name: [result["layer"][shape].get(name, {}).get("of_limit", {}).get("median", math.nan) for shape in shapes]
        for name in names
    }
    shown = {name: values for name, values in share.items() if not all(math.isnan(value) for value in values)}
    return shapes, dict(sorted(shown.items(), key=lambda item: -_mean(item[1])))


def is_a_layer(name: str) -> bool:
    return not name.startswith(LIMIT) and name != "matrix products alone"


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known)


def curves(sizes: dict[str, Any]) -> dict[str, tuple[list[int], list[float]]]:
    """By variant the sizes and milliseconds of one part of a scaling result; a training step has one curve."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for size, variants in sizes.items():
        for name, variant in (variants if "ms" not in variants else {OURS: variants}).items():
            if isinstance(variant, dict) and "ms" in variant and name != "matrix products alone":
                x, y = found.setdefault(name, ([], []))
                x.append(int(size))
                y.append(variant["ms"]["median"])
    return found


def draw_layer(result: dict[str, Any], out: Path) -> None:
    import matplotlib.pyplot as plt

    shapes, share = layer_bars(result)
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    width = 0.8 / len(share)
    for i, (name, values) in enumerate(share.items()):
        x = [shape + (i - (len(share) - 1) / 2) * width for shape in range(len(shapes))]
        axes.bar(x, values, width, label=name, color=COLOURS.get(name))
    axes.axhline(1.0, color=COLOURS[LIMIT], linewidth=1)
    axes.set_xticks(range(len(shapes)), [f"{shape}\n{_short(result['shapes'][shape])}" for shape in shapes])
    axes.set_ylabel("speed / dense limit")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _finish(figure, axes, f"One MoE layer, forward + backward, {result['facts']['device']}", out)


def _short(shape: dict[str, int]) -> str:
    return f"D {shape['D']}, {shape['K']} of {shape['E']} x {shape['F']}"


def draw_scaling(result: dict[str, Any], out: Path) -> None:
    import matplotlib.pyplot as plt

    parts = [part for part in SCALING if part in result]
    figure, axes = plt.subplots(1, len(parts), figsize=(3.2 * len(parts), 3.2), layout="constrained", squeeze=False)
    for panel, part in zip(axes[0], parts, strict=True):
        for name, (x, y) in curves(result[part]).items():
            panel.plot(x, y, marker="o", markersize=3, label=name, color=COLOURS.get(name))
        if part == "experts":
            traffic = [(int(size), found.get(OURS, {}).get("bytes")) for size, found in result[part].items()]
            known = [(size, 1e3 * n_bytes / result["bandwidth"]) for size, n_bytes in traffic if n_bytes]
            panel.plot(*zip(*known, strict=True), linestyle=":", color="#555555", label="weight traffic alone")
        if part in ("tokens", "experts"):
            panel.legend(fontsize=7)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes := [int(size) for size in result[part]], [f"{size}" for size in sizes], fontsize=7)
        panel.set_ylim(bottom=0)
        panel.set_ylabel("ms")
        panel.set_title(SCALING[part], fontsize=9)
    _finish(figure, None, result["facts"]["device"], out)


def losses(result: dict[str, Any]) -> dict[str, list[float]]:
    """By run the cross-entropy of each step, in nats a token; of equal names the first, and none of one that failed."""
    runs = result.get("runs", [])
    if isinstance(runs, dict):  # of loss_curves.py
        return {name: run["train"] for name, run in runs.items()}
    found: dict[str, list[float]] = {}
    for run in runs:
        if "losses" in run:
            found.setdefault(run["name"], run["losses"])
    return found


def draw_losses(result: dict[str, Any], out: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, values in losses(result).items():
        axes.plot(range(1, len(values) + 1), values, linewidth=1, label=name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy, nats a token")
    axes.legend(fontsize=8, frameon=False)
    facts = result["facts"] if isinstance(result["facts"], list) else [result["facts"]]  # of several commands
    _finish(figure, axes, ", ".join(filter(None, (result.get("model"), facts[0]["device"]))), out)


LANES = {
    "communication": "#d1495b",
    "expert products": "#00798c",
    "attention": "#edae49",
    "other matmuls": "#66a182",
    "row movement": "#2e4057",
    "optimizer": "#8d96a3",
}


def updates_of(events: list[dict[str, Any]]) -> list[float]:
    """When the last kernel of each update by AdamW began, in microseconds."""
    kernels = [each for each in events if each.get("cat") == "kernel" and "adam" in each["name"].lower()]
    starts = sorted(each["ts"] for each in kernels)
    gaps = [end - begin for begin, end in pairwise(starts)]  # between kernels of one update, or of two
    step = 0.2 * max(gaps, default=0.0)
    return [start for start, gap in zip(starts, gaps, strict=False) if gap > step] + starts[-1:]


def lanes(events: list[dict[str, Any]]) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """By lane the kernels of a trace's middle step as (start, length) in ms; and how long that took. A step on the GPU
    is from the end of one update by AdamW to that of the next; `the rest` is of all other categories."""
    kernels = sorted((each for each in events if each.get("cat") == "kernel"), key=lambda each: each["ts"])
    known = {each["name"]: category_of([each["name"]]) for each in kernels}
    ends = updates_of(events)
    begin, end = ends[len(ends) // 2 - 1], ends[len(ends) // 2]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in [*LANES, "the rest"]}
    for each in kernels:
        if begin < each["ts"] <= end:
            name = known[each["name"]]
            found[name if name in LANES else "the rest"].append(((each["ts"] - begin) / 1e3, each["dur"] / 1e3))
    return found, (end - begin) / 1e3


def draw_lanes(events: list[dict[str, Any]], name: str, out: Path) -> None:
    import matplotlib.pyplot as plt

    found, length = lanes(events)
    figure, axes = plt.subplots(figsize=(10, 2.6), layout="constrained")
    for i, (lane, spans) in enumerate(found.items()):
        axes.broken_barh(spans, (-i - 0.4, 0.8), color=LANES.get(lane, "#bbbbbb"))
    axes.set_yticks([-i for i in range(len(found))], list(found), fontsize=8)
    axes.set_xlim(0, length)
    axes.set_xlabel("ms")
    _finish(figure, axes, f"{name}: the kernels of one step", out)


def _finish(figure: Any, axes: Any, title: str, out: Path) -> None:
    if axes is not None:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(title, fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python benchmarks/plot.py benchmarks/results/2026-11-22_h100_moe_layer.json "
        "--out docs/images/layer_speed.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", type=Path, help="one of these JSON files, or a trace.json.gz")
    parser.add_argument("--out", type=Path, required=True, help="a .png")
    arguments = parser.parse_args()
    if not arguments.result.is_file():
        parser.error(f"{arguments.result}: there is no such file")
    if arguments.result.suffix == ".gz":
        with gzip.open(arguments.result, "rt", encoding="utf-8") as stream:
            events = json.load(stream)["traceEvents"]
        n_steps = sum(
            "ProfilerStep#" in str(each.get("name")) for each in events if each.get("cat") == "user_annotation"
        )
        if n_steps < 2 or len(updates_of(events)) < 2:
            parser.error(f"{arguments.result}: needs two optimizer steps or more, with AdamW on a GPU")
        draw_lanes(events, arguments.result.name.removesuffix(".json.gz"), arguments.out)
        return
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    if "layer" in result:
        draw_layer(result, arguments.out)
    elif losses(result):
        draw_losses(result, arguments.out)
    elif result.keys() & SCALING.keys():
        draw_scaling(result, arguments.out)
    else:
        parser.error(f"{arguments.result}: has neither speeds of layers, nor scaling, nor losses of runs")


if __name__ == "__main__":
    main()
