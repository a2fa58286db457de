"""What makes runs comparable: texts, the row of HPARAMS, the charts of CUSTOM SCALARS, all in the one event file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tiny_runs import scalars_of

from moelm.callbacks.run_card import METRICS, hyper_parameters
from moelm.config import Config
from moelm.train import train


def events_of(run_folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_folder), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    return events


def hparams_of(events: EventAccumulator, name: str) -> plugin_data_pb2.HParamsPluginData:
    content = events.SummaryMetadata(f"_hparams_/{name}").plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content)


def test_texts_and_the_row_are_in_the_event_file(tiny: Callable[..., Config]) -> None:
    config = tiny({"trainer.max_steps": 20})
    train(config)
    files = [path for path in config.run_folder.rglob("*") if path.name.startswith("events.")]
    assert len(files) == 1
    assert files[0].parent == config.run_folder
    events = events_of(config.run_folder)
    texts = {
        tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in ("run/config/text_summary", "run/model/text_summary")
    }
    assert "n_experts: 8" in texts["run/config/text_summary"]
    assert "active parameters" in texts["run/model/text_summary"]
    assert "| `blocks.*.moe.experts.gate_up` | 8 x 32 x 32 | 2 x |" in texts["run/model/text_summary"]

    row = hparams_of(events, "session_start_info").session_start_info.hparams
    assert len(row) <= 20
    assert (row["n_experts"].number_value, row["router"].string_value) == (8, "top_k")
    assert row["balancers"].string_value == "switch 0.01"
    experiment = hparams_of(events, "experiment").experiment
    assert {info.name for info in experiment.hparam_infos} == set(row)
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert metrics == set(METRICS)
    assert metrics <= scalars_of(config.run_folder).keys(), "a metric that the run does not log"
    assert hparams_of(events, "session_end_info").session_end_info.status


def test_every_chart_finds_its_tags(tiny: Callable[..., Config]) -> None:
    config = tiny({"trainer.max_steps": 20})
    train(config)
    events = events_of(config.run_folder)
    proto = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(proto)
    assert [category.title for category in layout.category] == ["loss", "balance", "speed"]
    tags = scalars_of(config.run_folder)
    for category in layout.category:
        for chart in category.chart:
            for pattern in chart.multiline.tag:
                assert any(re.search(pattern, tag) for tag in tags), pattern


def test_all_runs_have_the_same_columns(tiny: Callable[..., Config]) -> None:
    rows = [
        hyper_parameters(tiny(changes))
        for changes in ({}, {"model.moe": None}, {"model.moe.balancers": []}, {"model.moe.dispatch": "capacity"})
    ]
    for row in rows:
        assert {name: type(value) for name, value in row.items()} == {n: type(v) for n, v in rows[0].items()}
    assert {row["optimizer"] for row in rows} == {"adamw"}
    assert [row["balancers"] for row in rows] == ["switch 0.01", "none", "none", "switch 0.01"]


def shown_steps(run_folder: Path) -> dict[str, list[int]]:
    """Tag -> steps as TensorBoard shows them: it keeps scalars, images and texts alike as tensors."""
    events = plugin_event_accumulator.EventAccumulator(str(run_folder), tensor_size_guidance={})
    events.Reload()
    return {tag: [each.step for each in events.Tensors(tag)] for tag in events.Tags()["tensors"]}


def test_nothing_repeats_or_goes_backward_when_a_run_is_continued_twice(tiny: Callable[..., Config]) -> None:
    changes = {"trainer.max_steps": 30, "checkpoint.every_n_steps": 10}
    train(tiny(changes))
    folder = tiny(changes).run_folder
    first = shown_steps(folder)
    for _ in range(2):
        train(tiny(changes), resume=str(folder / "step-00000020"))
    again = shown_steps(folder)
    assert again == first
    assert {"moe/load", "moe/co_activation/layer_00", "moe/specialisation", "train/ce"} <= first.keys()
    assert all(steps == sorted(set(steps)) for steps in first.values())
    assert [each.step for each in events_of(folder).Tensors("run/config/text_summary")] == [1]
    for max_steps in (35, 35):
        train(tiny({**changes, "trainer.max_steps": max_steps}), resume=str(folder / "step-00000030"))
    longer = shown_steps(folder)
    assert longer["run/config/text_summary"] == longer["_hparams_/session_start_info"] == [1, 31]
    assert all(steps == sorted(set(steps)) for steps in longer.values())
