"""Is `training.pt` what a run saved? Its checksum says that nothing changed since; this, that it can be continued from,
before anything reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moelm.training.bad_steps import WINDOW
from moelm.training.rng import is_rng_state
from moelm.training.weight_files import CheckpointError

KINDS: dict[tuple[str, ...], type] = {
    ("moelm",): dict,
    ("moelm", "step"): int,
    ("moelm", "rng_by_rank"): list,
    ("TokenDataModule",): dict,
    ("TokenDataModule", "fingerprint"): str,
    ("callbacks",): dict,
    ("optimizer_states",): list,
}
STATES = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum"})  # of a parameter in an optimizer


def check_training(checkpoint: Mapping[str, Any], step: int, version: str, where: str) -> None:
    """`step` and Lightning's `version` as the manifest says. Raises CheckpointError."""
    for path, kind in KINDS.items():
        found: Any = checkpoint
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if type(found) is not kind:
            raise CheckpointError(f"{where}: {'.'.join(path)} is {type(found).__name__}, not {kind.__name__}")
    own, states = checkpoint["moelm"], checkpoint["optimizer_states"]
    if own["step"] != step:
        raise CheckpointError(f"{where}: is of step {own['step']}, manifest.json says {step}")
    if checkpoint.get("pytorch-lightning_version") != version:
        raise CheckpointError(f"{where}: is of another version of Lightning than manifest.json says")
    if not all(map(is_rng_state, own["rng_by_rank"])):
        raise CheckpointError(f"{where}: moelm.rng_by_rank holds what is no state of the random generators")
    load = own.get("recent_load")  # None: a dense model
    if not (load is None or (isinstance(load, Tensor) and load.ndim == 3)):
        raise CheckpointError(f"{where}: moelm.recent_load has no right shape")
    losses = own.get("recent_losses")
    if not (
        losses is None or (isinstance(losses, Tensor) and losses.shape == (WINDOW,) and losses.is_floating_point())
    ):
        raise CheckpointError(f"{where}: moelm.recent_losses has no right shape")
    if type(own.get("n_skipped", 0)) is not int or type(own.get("validation_due", False)) is not bool:
        raise CheckpointError(f"{where}: moelm.n_skipped is no number, or moelm.validation_due is not true or false")
    if not all(isinstance(state, dict) for state in (*checkpoint["callbacks"].values(), *states)):
        raise CheckpointError(f"{where}: a state of an optimizer or a callback is no dict")
    if len(states) != 1 or not isinstance(states[0].get("state"), dict):
        raise CheckpointError(f"{where}: holds no state of one optimizer")
    groups, names = states[0].get("param_groups"), own.get("parameters")  # no names: format 2
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise CheckpointError(f"{where}: holds no parameter groups")
    numbers = [i for group in groups for i in group["params"]]
    right_names = names is None or (
        isinstance(names, list) and len(names) == len(numbers) and all(isinstance(name, str) for name in names)
    )
    if numbers != list(range(len(numbers))) or not right_names:
        raise CheckpointError(f"{where}: its parameter groups do not hold its parameters")


def check_moments(states: Mapping[Any, Any], n_parameters: int, where: str) -> None:
    """Of `states` by number of the parameter, once the moments are in it. Raises CheckpointError."""
    for i, state in states.items():
        if type(i) is not int or not 0 <= i < n_parameters or not isinstance(state, dict):
            raise CheckpointError(f"{where}: its optimizer has a state of {i!r}, which is no parameter")
        if set(state) not in STATES or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{where}: the optimizer's state of parameter {i} is {', '.join(map(str, state))}")
        if "step" in state and state["step"].ndim:
            raise CheckpointError(f"{where}: the optimizer's step of parameter {i} is no number")
