"""docs/metrics.md says every tag of the event file, and no other."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moelm.callbacks.expert_usage import PER_LAYER
from moelm.config import Config, registered
from moelm.train import train

DOCUMENT = Path(__file__).parent.parent.parent / "docs/metrics.md"
CUDA_ONLY = {"perf/mfu", "perf/peak_memory_gib"}
NOT_HERE = {"alarm/logits", "train/routing"}  # no tiny run makes its logits explode; one router has a loss of its own

EVERYTHING: list[Any] = [
    {"name": "collapse_alarm", "grace_steps": 50, "effective_share": 0.999, "dead_share": 0.01},
    {"name": "expert_usage", "per_layer": list(PER_LAYER)},
    {"name": "balance", "raw": True, "raw_per_layer": True},
    *("expert_counts", "co_activation", "specialisation", "throughput", "run_card"),
]
RUNS: list[dict[str, Any]] = [
    {
        "model.moe.router": {"name": "top_k", "score": "sigmoid", "selection_bias": True},
        "model.moe.balancers": [{"name": "loss_free", "rate": 0.01}, {"name": "switch"}],
        "model.moe.dispatch": "capacity",
        "model.multi_token_prediction": {"coef": 0.1},
    },
    {"model.moe.router": "expert_choice", "model.moe.balancers": [], "trainer.max_skipped_steps": 1},
    {
        "trainer.max_steps": 80,
        "model.moe.top_k": 1,
        "model.moe.balancers": [],
        "model.init.std": 0.1,
        "optim.lr": 1e-1,
        "optim.schedule": {"name": "constant"},
    },
]


def documented() -> set[str]:
    """What stands in the first column of the tables about tags."""
    rows = re.findall(r"^\| `([\w<>/]+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.M)
    settings = {f.name for f in registered("callback")["collapse_alarm"].__dataclass_fields__.values()}
    assert len(rows) == len(set(rows)), "a tag is documented twice"
    return set(rows) - settings


def shown(run_folder: Path) -> set[str]:
    """The tags of a run as the document writes them."""
    events = EventAccumulator(str(run_folder))
    events.Reload()
    found = events.Tags()
    tags = {*found["scalars"], *found["images"], *(tag.removesuffix("/text_summary") for tag in found["tensors"])}
    tags = {re.sub(r"layer_\d\d", "layer_XX", tag) for tag in tags}
    tags = {re.sub(r"^aux/(layer_XX/)?[a-z_]+?(_raw)?$", r"aux/\1<balancer>\2", tag) for tag in tags}
    return {tag for tag in tags if not tag.startswith(("_hparams_", "custom_scalars"))}


def test_every_tag_is_documented_and_every_documented_tag_exists(tiny: Callable[..., Config]) -> None:
    seen: set[str] = set()
    for i, changes in enumerate(RUNS):
        steps = {"trainer.max_steps": 20, "callbacks": EVERYTHING, "run.name": f"run-{i}"}
        config = tiny({**steps, **changes})
        train(config)
        seen |= shown(config.run_folder)
    assert seen - documented() == set(), "not in docs/metrics.md"
    assert documented() - seen - CUDA_ONLY - NOT_HERE == set(), "in docs/metrics.md, but no run shows it"
