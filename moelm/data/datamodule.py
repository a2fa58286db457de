"""Batches for training and validation out of token shards.

Training reads an endless sequence of windows, of which each rank takes its part (`sampler.py`); validation
reads each token of the split exactly once, over all ranks together.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moelm.config import Config, UserError
from moelm.data.sampler import GlobalBatchSampler, shuffled
from moelm.data.token_shards import NO_TARGET, DataError, TokenShards

_VALIDATION_SEED = 0  # the same windows whatever the seed of the run: runs are compared on them


class TokenDataModule(LightningDataModule):
    """`consumed_samples` is where the training order starts: set it before `fit` to resume."""

    def __init__(self, config: Config, shards: TokenShards) -> None:
        super().__init__()
        self.config = config
        self.shards = shards
        self.consumed_samples = 0
        self._loaders: list[BatchLoader] = []
        self.batch_size = config.optim.batch_tokens // config.data.seq_len  # sequences, over all ranks
        if shards.vocab_size > config.model.vocab_size:
            raise UserError(
                f"model.vocab_size: {config.model.vocab_size} is less than the {shards.vocab_size} tokens of "
                f"{shards.tokenizer_file}\n  remedy: set model.vocab_size={shards.vocab_size} or more"
            )
        n_windows = shards.n_windows("train", config.data.seq_len)
        if n_windows < self.batch_size:
            raise UserError(
                f"optim.batch_tokens: a batch takes {self.batch_size} windows of {config.data.seq_len} "
                f"tokens, but the training text fills {n_windows}\n"
                "  remedy: lower optim.batch_tokens or data.seq_len, or add text"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.shards.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises DataError: position p of the order of samples would be another text."""
        if state_dict["fingerprint"] != self.shards.fingerprint:
            raise DataError(
                f"{self.shards.folder}: not the data that the checkpoint was trained on\n"
                "  remedy: put that back, or start another run.name"
            )

    def train_dataloader(self) -> BatchLoader:
        """Endless. Batches of inputs [B, L], targets [B, L] and sample_ids [B], all int64; a sample id is the
        position in the global order of samples."""
        rank, world_size = self._rank_and_world_size()
        config = self.config
        loader = BatchLoader(
            _TrainingWindows(self.shards, config.data.seq_len, config.run.seed),
            batch_sampler=GlobalBatchSampler(
                self.consumed_samples,
                self.batch_size,
                config.optim.micro_batch_size,
                rank,
                world_size,
            ),
            **_loader_arguments(config.data.n_workers),
        )
        self._loaders.append(loader)
        return loader

    def val_dataloader(self) -> BatchLoader:
        loader = validation_loader(
            self.shards,
            self.config.data.seq_len,
            self.config.optim.micro_batch_size,
            *self._rank_and_world_size(),
            n_workers=self.config.data.n_workers,
        )
        self._loaders.append(loader)
        return loader

    def teardown(self, stage: str) -> None:
        for loader in self._loaders:
            loader.end_workers()

    def on_exception(self, exception: BaseException) -> None:
        self.teardown("fit")

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def validation_loader(
    shards: TokenShards, seq_len: int, batch_size: int, rank: int = 0, world_size: int = 1, n_workers: int = 0
) -> BatchLoader:
    """This rank's share of the validation split, in an order that is shuffled once and for all, so that a
    limited number of batches covers all domains.

    Batches of inputs and targets [B, L] int64 (targets NO_TARGET where there is none), mask [B, L] bool (a
    real token), domain [B] int64 (index in `shards.domains`) and n_bytes [B] float64: the text behind the
    row in UTF-8 bytes, from the mean of its domain, so that nats / n_bytes / ln 2 are bits per byte. All
    ranks get the same number of full batches; rows beyond the split are masked throughout.
    """
    return BatchLoader(
        _ValidationWindows(shards, seq_len, batch_size, rank, world_size),
        batch_size=batch_size,
        **_loader_arguments(n_workers),
    )


# ----------------------------------------------------------------------------------------------- loading


Row = dict[str, npt.NDArray[Any] | np.generic]
Batch = dict[str, Tensor]


class BatchLoader(DataLoader[Any]):
    """Raises in this process, as the one message that it is, what a worker found wrong with the data; torch
    would put the worker's traceback into the message."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                self.end_workers()
                raise batch
            yield batch

    def end_workers(self) -> None:
        """Or, while the frames of an exception refer to this loader, Python on its way out sends them a SIGTERM, which
        they leave to it (`_leave_signals`), and waits for ever."""
        if self._iterator is not None and self.num_workers:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._iterator = None


class _Windows(Dataset[Row]):
    """Makes whole batches where the rows are read; an error is a result, which `BatchLoader` raises."""

    def __getitem__(self, index: int) -> Row:
        raise NotImplementedError

    def __getitems__(self, indices: list[int]) -> Batch | DataError:
        try:
            rows = [self[index] for index in indices]
        except DataError as error:
            return error
        return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}


class _TrainingWindows(_Windows):
    def __init__(self, shards: TokenShards, seq_len: int, seed: int) -> None:
        self.shards = shards
        self.seq_len = seq_len
        self.seed = seed
        self.n_windows = shards.n_windows("train", seq_len)

    def __getitem__(self, position: int) -> Row:
        index = shuffled(position, self.n_windows, self.seed)
        window = self.shards.window("train", index, self.seq_len)
        return {"inputs": window.inputs, "targets": window.targets, "sample_ids": np.int64(position)}


class _ValidationWindows(_Windows):
    def __init__(self, shards: TokenShards, seq_len: int, batch_size: int, rank: int, world_size: int) -> None:
        self.shards = shards
        self.seq_len = seq_len
        self.rank = rank
        self.world_size = world_size
        self.n_windows = shards.n_windows("val", seq_len)
        self.n_rows = -(-self.n_windows // (world_size * batch_size)) * batch_size
        counts = shards.split_counts("val")
        self.bytes_per_token = [
            counts[domain].bytes / counts[domain].tokens if domain in counts else 0.0 for domain in shards.domains
        ]

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, row: int) -> Row:
        position = row * self.world_size + self.rank
        if position < self.n_windows:
            index = shuffled(position, self.n_windows, _VALIDATION_SEED)
            inputs, targets, n_valid, domain = self.shards.window("val", index, self.seq_len)
        else:
            inputs = np.full(self.seq_len, self.shards.end_of_text_id, dtype=np.int64)
            targets, n_valid, domain = np.full(self.seq_len, NO_TARGET, dtype=np.int64), 0, 0
        return {
            "inputs": inputs,
            "targets": targets,
            "mask": np.arange(self.seq_len) < n_valid,
            "domain": np.int64(domain),
            "n_bytes": np.float64(n_valid * self.bytes_per_token[domain]),
        }


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _leave_signals(worker: int) -> None:
    """To the parent, when the whole group is told to end: it needs its workers for as long as it goes on, and they end
    with it."""
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)


def _loader_arguments(n_workers: int) -> dict[str, Any]:
    """A generator of its own keeps a loader from drawing its workers' seeds from the global one, where that
    would change the dropout of the training around it."""
    return {
        "collate_fn": _as_it_is,
        "num_workers": n_workers,
        "persistent_workers": n_workers > 0,
        "worker_init_fn": _leave_signals,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),
    }
