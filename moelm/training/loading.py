"""A trained model, ready to evaluate or to generate, from a checkpoint folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from moelm.config import Config
from moelm.model.gpt import GPT
from moelm.training.checkpoint_io import CheckpointError, load_checkpoint_config, load_weights


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(folder: Path, device: torch.device) -> tuple[GPT, Config]:
    """The GPT in evaluation mode with the weights of a verified step folder, and its config.

    Raises CheckpointError if the weights are not those of the config.
    """
    config = load_checkpoint_config(folder)
    with torch.device("meta"):
        model = GPT(config.model)
    try:
        model.load_state_dict(load_weights(folder), strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the weights do not fit its config.yaml: {error}") from None
    return model.to(device).eval(), config


def autocast(config: Config, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The precision that the run was trained and validated in."""
    if config.trainer.precision == "bf16-mixed":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
