"""A trained model, ready to evaluate or to generate, from a checkpoint folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from moelm.config import Config
from moelm.data.token_shards import DataError, TokenShards, hash_file
from moelm.model.gpt import GPT
from moelm.model.size import shapes_of
from moelm.training.checkpoint_io import load_checkpoint_config, load_weights
from moelm.training.weight_files import CheckpointError


def load_model(folder: Path) -> tuple[GPT, Config, torch.device]:
    """The GPT in evaluation mode with the weights of a verified step folder, its config, and the device it is on.

    A GPU is used if there is one and the run did not ask for the CPU. Raises CheckpointError if the weights are not
    those of the config.
    """
    config = load_checkpoint_config(folder)
    model = shapes_of(config.model)
    try:
        model.load_state_dict(load_weights(folder), strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the weights do not fit its config.yaml: {error}") from None
    torch.set_float32_matmul_precision(config.trainer.float32_matmul_precision)
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    return model.to(device).eval(), config, device


def autocast(config: Config, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The precision that the run was trained and validated in."""
    if config.trainer.precision == "bf16-mixed":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def check_tokenizer(folder: Path, shards: TokenShards, remedy: str) -> None:
    """Token ids mean something to one tokenizer only. Raises DataError."""
    if hash_file(folder / "tokenizer.json") != hash_file(shards.tokenizer_file):
        problem = f"{shards.tokenizer_file}: not the tokenizer that {folder} was trained with"
        raise DataError(f"{problem}\n  remedy: {remedy}")
