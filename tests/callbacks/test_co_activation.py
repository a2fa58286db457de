"""Which experts work together: counts by hand, and pictures from a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moelm.callbacks import co_activation
from moelm.callbacks.co_activation import CoActivation, lift_between, lift_within, one_hot
from moelm.config import Config, ConfigError
from moelm.train import train


def images_of(config: Config) -> dict[str, list[int]]:
    events = EventAccumulator(str(config.run_folder), size_guidance={"images": 0})
    events.Reload()
    return {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}


def test_products_of_one_hot_rows_count_pairs_and_leave_none_out() -> None:
    here_TE = one_hot(torch.tensor([[0, 1], [0, 1], [0, 2], [3, 3]]), 3)  # 3 is "none"
    assert (here_TE.T @ here_TE).tolist() == [[3, 2, 1], [2, 2, 0], [1, 0, 1]]


def test_pairs_by_chance_are_1_whatever_the_loads() -> None:
    generator = np.random.default_rng(0)
    first = generator.choice(4, 400_000, p=[0.4, 0.3, 0.2, 0.1])
    second = generator.choice(4, 400_000, p=[0.1, 0.2, 0.3, 0.4])
    a, b = (one_hot(torch.tensor(ids)[:, None], 4) for ids in (first, second))
    assert lift_between((a.T @ b).double().numpy()) == pytest.approx(np.ones((4, 4)), abs=0.03)
    uniform = np.full((4, 4), 100.0) + np.diag([200.0] * 4)  # each expert 300 times, with each other one 100 times
    lift = lift_within(uniform)
    assert np.isnan(np.diag(lift)).all()
    assert lift[~np.eye(4, dtype=bool)] == pytest.approx(1.0)


def test_pairs_that_attract_and_avoid_each_other_by_hand() -> None:
    # 0 always with 1, 2 always with 3: of 12 ordered pairs by chance, 4 take everything
    pairs = np.kron(np.eye(2), np.ones((2, 2))) * 60
    lift = lift_within(pairs)
    assert lift[0, 1] == lift[3, 2] == pytest.approx(3.0)
    assert lift[0, 2] == lift[1, 3] == 0
    # expert 0 is followed by expert 1 always: row sums 10, column sums 10, total 20
    assert lift_between(np.array([[0.0, 10.0], [10.0, 0.0]])).tolist() == [[0, 2], [2, 0]]


def test_few_pairs_are_no_ratio() -> None:
    assert np.isnan(lift_between(np.array([[9.0, 0.0], [0.0, 1.0]]))).tolist() == [[False, True], [True, True]]


def test_a_run_draws_the_layers_asked_for(tiny: Callable[..., Config]) -> None:
    config = tiny({"model.n_layers": 4, "trainer.max_steps": 20, "callbacks": ["co_activation"]})
    train(config)
    tags = {f"moe/co_activation/layer_{layer:02d}" for layer in (0, 2, 3)}
    tags |= {"moe/next_layer/layer_00", "moe/next_layer/layer_02"}
    assert images_of(config) == {tag: [20] for tag in tags}
    one = {"name": "co_activation", "layers": [1]}
    config = tiny({"model.moe.top_k": 1, "trainer.max_steps": 2, "callbacks": [one], "run.name": "one"})
    train(config)
    assert images_of(config) == {}  # one expert a token, and no layer after the last
    with pytest.raises(ConfigError, match="layer 7 has no experts"):
        tiny({"callbacks": [{"name": "co_activation", "layers": [7]}]})
    for layers in ([], [0, 0]):
        with pytest.raises(ConfigError, match="is empty or repeats itself"):
            tiny({"callbacks": [{"name": "specialisation", "layers": layers}]})


def test_experts_that_choose_tokens_are_passed_over(tiny: Callable[..., Config]) -> None:
    changes = {"model.moe.router": "expert_choice", "model.moe.balancers": [], "callbacks": ["co_activation"]}
    config = tiny({**changes, "trainer.max_steps": 2})
    train(config)
    assert images_of(config) == {}


def test_the_pairs_of_a_run_agree_with_its_loads(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def reduce(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(sums)
        return sums

    loads: list[Any] = []

    class Keeper(CoActivation):
        def observe_validation(self, module: Any) -> None:
            loads.append(module.evaluation["all"].load)
            super().observe_validation(module)

    monkeypatch.setattr(co_activation, "all_reduce_sums", reduce)
    monkeypatch.setitem(_factories(), "co_activation", (_factories()["co_activation"][0], Keeper))
    train(tiny({"trainer.max_steps": 20, "callbacks": ["co_activation"]}))
    (pairs,), (load,) = seen, loads
    for i in (0, 1):
        assert pairs[f"together/{i}"].diagonal().tolist() == load[i]
        assert pairs[f"together/{i}"].sum(1).tolist() == [2 * n for n in load[i]]  # itself, and one other
    assert pairs["next/0"].sum(1).tolist() == [2 * n for n in load[0]]
    assert pairs["next/0"].sum(0).tolist() == [2 * n for n in load[1]]


def _factories() -> dict[str, Any]:
    from moelm.config import registry

    return registry._registry["callback"]
