"""Domains and experts: the information by hand, the picture and the number of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import scalars_of

from moelm.callbacks.expert_counts import read_expert_counts
from moelm.callbacks.heat_map import draw_heat_map
from moelm.callbacks.observer import LEAST_EXPECTED
from moelm.config import Config
from moelm.moe.load_metrics import mutual_information
from moelm.train import train

COUNTS = {  # counts by domain and expert: nats
    "independent": ([[10, 20, 30], [100, 200, 300]], 0.0),
    "each domain its expert": ([[7, 0], [0, 7]], math.log(2)),
    "each domain its two experts": ([[3, 5, 0, 0], [0, 0, 4, 4]], math.log(2)),
    "a rare domain": ([[90, 0], [0, 10]], -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))),
    "half told": ([[2, 1, 1], [0, 2, 2]], 0.25 * math.log(2) + 0.25 * math.log(2 / 3) + 0.5 * math.log(4 / 3)),
    "nothing": ([[0, 0], [0, 0]], 0.0),
}


@pytest.mark.parametrize(("counts", "nats"), COUNTS.values(), ids=COUNTS)
def test_mutual_information_by_hand(counts: list[list[int]], nats: float) -> None:
    assert mutual_information(torch.tensor(counts)).item() == pytest.approx(nats, abs=1e-12)


def test_each_layer_is_measured_for_itself() -> None:
    both = torch.tensor([COUNTS["each domain its expert"][0], COUNTS["a rare domain"][0]])
    assert mutual_information(both).tolist() == pytest.approx([math.log(2), COUNTS["a rare domain"][1]])


def test_a_run_shows_what_its_counts_say(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def draw(values: Any, **options: Any) -> Any:
        drawn.append((values, options["row_names"]))
        return draw_heat_map(values, **options)

    monkeypatch.setattr("moelm.callbacks.specialisation.draw_heat_map", draw)
    config = tiny({"trainer.max_steps": 20, "callbacks": ["specialisation", "expert_counts"]})
    train(config)
    counts = torch.tensor(list(read_expert_counts(config.run_folder).validations[20].values())).double()
    by_layer = [float(mutual_information(counts[:, i])) for i in (0, 1)]
    ((step, value),) = scalars_of(config.run_folder)["moe/mutual_information"]
    assert (step, value) == (20, pytest.approx(sum(by_layer) / 2, rel=1e-5))
    events = EventAccumulator(str(config.run_folder))
    events.Reload()
    assert [image.step for image in events.Images("moe/specialisation")] == [20]
    ((shown, names),) = drawn
    assert names == ["0 code", "0 more", "1 code", "1 more"]
    counts_SDE = counts.transpose(0, 1).numpy()
    share_SDE = counts_SDE / counts_SDE.sum(2, keepdims=True)
    everywhere_SE = counts_SDE.sum(1) / counts_SDE.sum((1, 2))[:, None]
    preference_SDE = share_SDE / everywhere_SE[:, None]
    enough = everywhere_SE[:, None] * counts_SDE.sum(2, keepdims=True) >= LEAST_EXPECTED
    np.testing.assert_allclose(shown, np.where(enough, preference_SDE, np.nan).reshape(4, 8))
    assert enough.any()


def test_one_domain_is_said_once(
    tiny: Callable[..., Config], corpus: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    source = {**corpus["sources"][0], "path": corpus["sources"][0]["path"] + "/code"}
    one = {**corpus, "dir": corpus["dir"] + "-one", "sources": [source]}
    config = tiny({"data.corpus": one, "callbacks": ["specialisation"]})
    train(config)
    assert capfd.readouterr().err.count("one domain") == 1
    assert "moe/mutual_information" not in scalars_of(config.run_folder)
