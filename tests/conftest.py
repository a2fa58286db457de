"""What all tests share: few threads, a filled registry, the devices, and small models."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels then run on CPU tensors; Lightning imports it, which reads this
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tiny_runs import corpus, fresh_recorders, tiny  # noqa: F401  fixtures for whole runs

from moelm.command_line import import_builtins
from moelm.config import ModelConfig, check_model, from_dict

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, for long where cores are shared
import_builtins()  # before collection, so that tests can be parametrised over the registry

TINY_MOE = {"n_experts": 8, "top_k": 2, "d_expert": 16}
TINY_MODEL = {
    "n_layers": 2,
    "d_model": 32,
    "vocab_size": 64,
    "attention": {"name": "gqa", "n_heads": 4},
    "feed_forward": {"d_ff": 48},
    "init": {"std": 0.2},  # large enough that a wrong term shows
}


# Files of a few long tests: begun first, so that no process is left alone with one of them at the end
LONGEST = (
    "test_quickstart",
    "test_verify",
    "test_readme",
    "test_distributed",
    "test_aux_invariance",
    "test_resume",
    "test_plugin",
    "test_expert_counts",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where Triton's kernels run: on the GPU, or without one in the interpreter on CPU tensors."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """`tiny_config(n_layers=3, moe={"top_k": 1})`: a checked ModelConfig of a few thousand parameters.

    Sections are given as YAML would give them; `moe` is merged into the tiny one, None makes the model dense.
    """

    def make(*, moe: dict[str, Any] | None = TINY_MOE, **changes: Any) -> ModelConfig:
        raw = TINY_MODEL | {"moe": None if moe is None else TINY_MOE | moe} | changes
        config = from_dict(ModelConfig, raw, "model")
        check_model(config)
        return config

    return make


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`moelm.convert` verifies without a process of its own, which takes seconds to start."""

    from moelm import convert

    def verify(arguments: Namespace, folder: Path) -> int:
        return convert.verify(convert.source_of(arguments), folder)

    monkeypatch.setattr(convert, "verify_in_a_fresh_process", verify)
