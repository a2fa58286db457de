"""Batches: the same samples whatever the ranks, each validation token once, no draw from the global RNG."""

import json
from itertools import islice
from multiprocessing import active_children
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from moelm.command_line import import_builtins
from moelm.config import Config, UserError, from_dict
from moelm.data.datamodule import TokenDataModule, validation_loader
from moelm.data.sampler import shuffled
from moelm.data.token_shards import FORMAT_VERSION, NO_TARGET, DataError, StreamWriter, TokenShards, hash_file

VOCAB = 64
SEQ_LEN = 8
N_TOKENS = {"train": {"a": 900, "b": 300}, "val": {"a": 203, "b": 51, "c": 5}}


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    splits: dict = {}
    for split, domains in N_TOKENS.items():
        splits[split] = {}
        for i, (domain, n) in enumerate(domains.items()):
            writer = StreamWriter(tmp_path, split, domain, np.dtype("<u2"), 100)
            writer.append(np.random.default_rng(i).integers(1, VOCAB, n), 1, n * (i + 2))
            splits[split][domain] = writer.entry()
    manifest = {
        "format_version": FORMAT_VERSION,
        "tokenizer_sha256": hash_file(tmp_path / "tokenizer.json"),
        "vocab_size": VOCAB,
        "dtype": "<u2",
        "end_of_text_id": 0,
        "splits": splits,
        "baselines": {},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return TokenShards(tmp_path)


def make(shards, rank=0, world=1, consumed=0, *, micro=2, n_workers=0, seed=0, **optim) -> TokenDataModule:
    import_builtins()
    raw = {
        "run": {"seed": seed},
        "model": {"vocab_size": VOCAB},
        "data": {"seq_len": SEQ_LEN, "n_workers": n_workers},
        "optim": {"batch_tokens": 12 * SEQ_LEN, "micro_batch_size": micro} | optim,
    }
    data = TokenDataModule(from_dict(Config, raw), shards)
    data.consumed_samples = consumed
    if world > 1:
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return data


# ---------------------------------------------------------------------------------------------- training


def test_a_training_batch_holds_the_windows_of_its_positions(shards):
    data = make(shards, seed=3, consumed=5)
    n_windows = shards.n_windows("train", SEQ_LEN)
    for i, batch in enumerate(islice(data.train_dataloader(), 80)):
        assert batch["sample_ids"].tolist() == [5 + 2 * i, 6 + 2 * i]
        for row, position in enumerate(batch["sample_ids"].tolist()):
            window = shards.window("train", shuffled(position, n_windows, 3), SEQ_LEN)
            assert batch["inputs"][row].tolist() == window.inputs.tolist()
            assert batch["targets"][row].tolist() == window.targets.tolist()
        assert {value.dtype for value in batch.values()} == {torch.int64}
    assert n_windows < 160  # it went past the end of an epoch


@pytest.mark.parametrize(("micro", "world"), [(12, 1), (3, 2), (1, 4), (2, 6)])
def test_an_optimizer_step_trains_on_the_same_windows_whatever_the_ranks(shards, micro, world):
    def step_rows(micro: int, world: int, consumed: int = 0) -> set[tuple]:
        rows = []
        for rank in range(world):
            loader = make(shards, rank, world, consumed, micro=micro).train_dataloader()
            for batch in islice(loader, 12 // (micro * world)):
                ids = batch["sample_ids"].tolist()
                rows += [(i, *row) for i, row in zip(ids, batch["targets"].tolist(), strict=True)]
        assert len(rows) == 12
        return set(rows)

    assert step_rows(micro, world) == step_rows(2, 1)
    assert step_rows(micro, world, consumed=12) == step_rows(1, 1, consumed=12) != step_rows(1, 1)


def test_every_epoch_trains_on_every_window_once(shards):
    n = shards.n_windows("train", SEQ_LEN)
    assert n == 149
    batches = islice(make(shards, micro=1).train_dataloader(), n)
    assert len({tuple(batch["targets"][0].tolist()) for batch in batches}) == n


# -------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(("world", "batch_size"), [(1, 1), (1, 4), (2, 4), (3, 11), (8, 16)])
def test_validation_over_all_ranks_predicts_every_token_once(shards, world, batch_size):
    seen = {domain: [] for domain in shards.domains}
    n_bytes = dict.fromkeys(shards.domains, 0.0)
    n_batches = set()
    for rank in range(world):
        batches = list(validation_loader(shards, SEQ_LEN, batch_size, rank, world))
        n_batches.add(len(batches))
        for batch in batches:
            assert batch["inputs"].shape == batch["targets"].shape == batch["mask"].shape == (batch_size, SEQ_LEN)
            assert torch.equal(batch["mask"], batch["targets"] != NO_TARGET)
            assert batch["mask"].dtype == torch.bool
            assert batch["n_bytes"].dtype == torch.float64
            for row in range(batch_size):
                domain = shards.domains[batch["domain"][row]]
                seen[domain] += batch["targets"][row][batch["mask"][row]].tolist()
                n_bytes[domain] += float(batch["n_bytes"][row])
    assert len(n_batches) == 1
    for i, (domain, n) in enumerate(N_TOKENS["val"].items()):
        assert sorted(seen[domain]) == sorted(np.random.default_rng(i).integers(1, VOCAB, n).tolist())
        assert n_bytes[domain] == pytest.approx(n * (i + 2))


def test_the_first_validation_batches_mix_the_domains_in_an_order_that_stays(shards):
    first = [next(iter(make(shards, micro=12, seed=seed).val_dataloader())) for seed in (0, 1)]
    assert len(first[0]["domain"].unique()) > 1
    assert torch.equal(first[0]["targets"], first[1]["targets"])


# --------------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("n_workers", [0, 1])
def test_reading_never_draws_from_the_global_generator(shards, n_workers):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    data = make(shards, n_workers=n_workers)
    train = list(islice(data.train_dataloader(), 2))
    assert len(train) == 2
    next(iter(data.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_exception_ends_the_workers(shards):
    """Python would wait for them, since they heed no signal."""
    data = make(shards, n_workers=1)
    loaders = data.train_dataloader(), data.val_dataloader()
    batches = [iter(loader) for loader in loaders]
    assert all(next(each) for each in batches)
    assert len(active_children()) == 2
    data.on_exception(RuntimeError())
    assert not active_children()


@pytest.mark.parametrize("n_workers", [0, 1])
def test_damage_that_is_found_while_reading_is_one_message(shards, n_workers):
    file = shards.folder / "train.a.00003.bin"
    content = np.fromfile(file, dtype="<u2")
    content[:] = VOCAB
    content.tofile(file)
    with pytest.raises(DataError, match="outside the vocabulary") as error:
        list(islice(make(shards, n_workers=n_workers).train_dataloader(), 80))
    assert len(str(error.value).splitlines()) == 2
    assert "Traceback" not in str(error.value)


def test_a_vocabulary_larger_than_the_models_is_refused(shards):
    shards.vocab_size = VOCAB + 1
    with pytest.raises(UserError, match=r"model\.vocab_size: 64 is less than the 65 tokens .*\n  remedy"):
        make(shards)


def test_less_text_than_one_batch_is_refused(shards):
    make(shards, batch_tokens=149 * SEQ_LEN, micro=149)
    with pytest.raises(UserError, match=r"takes 150 windows of 8 tokens, but the training text fills 149\n  remedy"):
        make(shards, batch_tokens=150 * SEQ_LEN, micro=150)


class Recorder(pl.LightningModule):
    """Just enough of a model for the Trainer to run both loaders."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.sample_ids: list[int] = []
        self.n_validated = 0

    def training_step(self, batch, _):
        self.sample_ids += batch["sample_ids"].tolist()
        return self.weight * batch["targets"].float().mean()

    def validation_step(self, batch, _):
        self.n_validated += int(batch["mask"].sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_trainer_takes_both_loaders(shards, tmp_path):
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=90,  # 180 samples: more than an epoch of windows, and still one epoch of the Trainer
        val_check_interval=45,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=make(shards, consumed=24))
    assert module.sample_ids == list(range(24, 24 + 180))
    assert module.n_validated == 2 * sum(N_TOKENS["val"].values())
