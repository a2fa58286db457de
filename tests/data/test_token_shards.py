"""Token shards: what a window holds, and that damage is named instead of trained on."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

import moelm.data.token_shards as token_shards
from data_prep.verify import main as verify_main
from moelm import command_line
from moelm.data.token_shards import (
    FORMAT_VERSION,
    NO_TARGET,
    DataError,
    StreamWriter,
    TokenShards,
    hash_file,
    sealed,
    slug,
)

END = 0
VOCAB = 100


def write_shards(folder: Path, splits: dict, shard_tokens: int = 1000, vocab: int = VOCAB) -> Path:
    """A corpus folder with these token streams: {split: {domain: ids}}."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    dtype = np.dtype("<u2" if vocab <= 2**16 else "<u4")
    entries: dict = {"train": {}, "val": {}}
    for split, streams in splits.items():
        for domain, ids in streams.items():
            writer = StreamWriter(folder, split, domain, dtype, shard_tokens)
            for part in np.array_split(np.asarray(ids), 3):  # shards do not follow the batches of the writer
                writer.append(part, documents=1, n_bytes=2 * len(part))
            entries[split][domain] = writer.entry()
    manifest = {
        "format_version": FORMAT_VERSION,
        "tokenizer_sha256": hash_file(folder / "tokenizer.json"),
        "vocab_size": vocab,
        "dtype": dtype.str,
        "end_of_text_id": END,
        "splits": entries,
        "baselines": {"gzip_bits_per_byte": None, "xz_bits_per_byte": None},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def ids(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCAB, n)


@pytest.fixture
def folder(tmp_path):
    return write_shards(
        tmp_path / "corpus",
        {"train": {"b": ids(50, 1), "a": ids(23, 2)}, "val": {"b": ids(17, 3), "c": ids(8, 4)}},
        shard_tokens=7,
    )


# ----------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("seq_len", [1, 2, 3, 7, 8, 16, 17, 18, 100])
def test_validation_predicts_every_token_exactly_once(folder, seq_len):
    shards = TokenShards(folder)
    predicted: dict[str, list[int]] = {domain: [] for domain in shards.domains}
    for index in range(shards.n_windows("val", seq_len)):
        window = shards.window("val", index, seq_len)
        assert (window.targets[window.n_valid :] == NO_TARGET).all()
        assert (window.inputs[window.n_valid :] == END).all()
        assert len(window.inputs) == len(window.targets) == seq_len
        predicted[shards.domains[window.domain]] += window.targets[: window.n_valid].tolist()
    assert predicted == {"a": [], "b": ids(17, 3).tolist(), "c": ids(8, 4).tolist()}


@pytest.mark.parametrize("seq_len", [1, 3, 7, 23, 24])
def test_training_windows_are_whole_and_follow_each_other(folder, seq_len):
    shards = TokenShards(folder)
    read: dict[str, list[int]] = {domain: [] for domain in shards.domains}
    for index in range(shards.n_windows("train", seq_len)):
        window = shards.window("train", index, seq_len)
        assert window.n_valid == seq_len
        read[shards.domains[window.domain]] += window.targets.tolist()
    for domain, stream in (("a", ids(23, 2)), ("b", ids(50, 1))):
        assert read[domain] == stream[: len(stream) // seq_len * seq_len].tolist()


def test_inputs_are_the_tokens_before_the_targets(folder):
    shards = TokenShards(folder)
    stream = [END, *ids(17, 3).tolist()]
    for index in range(4):
        window = shards.window("val", index, 5)
        assert window.inputs[: window.n_valid].tolist() == stream[index * 5 :][: window.n_valid]
        assert window.inputs.dtype == window.targets.dtype == np.int64
    assert [shards.window("val", index, 5).inputs[0] for index in (0, 4)] == [END, END]


def test_an_index_beyond_the_split_is_refused(folder):
    shards = TokenShards(folder)
    for index in (-1, shards.n_windows("val", 5)):
        with pytest.raises(IndexError):
            shards.window("val", index, 5)


def test_counts_and_domains_are_those_of_the_manifest(folder):
    shards = TokenShards(folder)
    assert shards.domains == ["a", "b", "c"]
    assert shards.split_counts("val") == {"b": (3, 17, 34), "c": (3, 8, 16)}
    assert (shards.vocab_size, shards.end_of_text_id, shards.tokenizer_file.name) == (
        VOCAB,
        END,
        "tokenizer.json",
    )


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    stream = np.array([1, 65_535, 65_536, 99_999])
    shards = TokenShards(write_shards(tmp_path / "corpus", {"train": {"a": stream}, "val": {"a": [1]}}, vocab=10**5))
    assert shards.window("train", 0, 4).targets.tolist() == stream.tolist()


def test_shards_hold_at_most_shard_tokens(folder):
    sizes = {file.name: file.stat().st_size // 2 for file in folder.glob("*.bin")}
    assert [sizes[f"val.b.{i:05d}.bin"] for i in range(3)] == [7, 7, 3]
    assert sum(sizes.values()) == 50 + 23 + 17 + 8


def test_a_copy_in_another_process_reads_the_same(folder):
    shards = TokenShards(folder)
    expected = shards.window("train", 3, 5)
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.window("train", 3, 5).targets.tolist() == expected.targets.tolist()
    assert copy.n_windows("val", 5) == shards.n_windows("val", 5)


def test_few_shards_are_open_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(token_shards, "_MAX_OPEN_SHARDS", 2)
    shards = TokenShards(folder)
    read = [token for index in range(10) for token in shards.window("train", 4 + index, 5).targets]
    assert read == ids(50, 1).tolist()
    assert len(shards._maps) == 2


# ------------------------------------------------------------------------------------------------ damage


def flip_byte(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def test_a_flipped_byte_is_found_and_its_file_named(folder):
    flip_byte(folder / "train.b.00002.bin", 5)
    with pytest.raises(DataError, match=r"train\.b\.00002\.bin: is damaged .*\n  remedy: prepare again.*--force"):
        TokenShards(folder)


@pytest.mark.parametrize("large", [False, True])
def test_the_command_names_the_first_file_that_is_not_what_was_written(folder, monkeypatch, capsys, large):
    if large:
        monkeypatch.setattr(token_shards, "_VERIFY_AT_OPEN", 10)
    verify_main([str(folder)])
    assert "98 tokens of 12 documents are as in manifest.json" in capsys.readouterr().out
    for name in ("val.c.00001.bin", "train.a.00003.bin", "train.b.00002.bin"):
        flip_byte(folder / name, 1)
    with pytest.raises(SystemExit, match=r"error: .*train\.b\.00002\.bin: is damaged") as stop:
        verify_main([str(folder)])
    assert stop.value.code != 0
    (folder / "manifest.json").unlink()
    for missing, message in ((folder / "none", "no such folder"), (folder, "has no manifest.json")):
        monkeypatch.setattr("sys.argv", ["verify", str(missing)])
        with pytest.raises(SystemExit) as stop:
            command_line.run(verify_main)
        assert stop.value.code == 2
        assert f"error: {missing}: {message}\n  remedy: " in capsys.readouterr().err


def test_a_manifest_names_no_file_outside_its_folder(folder):
    (folder / "val.b.00001.bin").rename(folder.parent / "val.b.00001.bin")
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace('"val.b.00001.bin"', '"../val.b.00001.bin"'))
    with pytest.raises(DataError, match=r"manifest\.json: names '\.\./val\.b\.00001\.bin'"):
        TokenShards(folder)


def test_checksums_of_large_data_wait_for_verify(folder, monkeypatch):
    monkeypatch.setattr(token_shards, "_VERIFY_AT_OPEN", 10)
    flip_byte(folder / "val.b.00001.bin", 0)
    shards = TokenShards(folder)
    with pytest.raises(DataError, match=r"val\.b\.00001\.bin"):
        shards.verify()


def test_a_missing_or_truncated_shard_is_named(folder):
    file = folder / "train.a.00001.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"train\.a\.00001\.bin: 12 bytes, but manifest\.json says 14"):
        TokenShards(folder)
    file.unlink()
    with pytest.raises(DataError, match=r"train\.a\.00001\.bin: no such file"):
        TokenShards(folder)


def test_another_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{ }")
    with pytest.raises(DataError, match=r"tokenizer\.json: not the tokenizer"):
        TokenShards(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file"):
        TokenShards(folder)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "no such file"),
        ("{", "cannot be read"),
        ("[]", "format version None"),
        ('{"format_version": 99}', "format version 99, but this moelm reads version"),
        (json.dumps({"format_version": FORMAT_VERSION}), "is damaged: KeyError"),
    ],
)
def test_a_bad_manifest_is_named(folder, text, problem):
    (folder / "manifest.json").unlink()
    if text is not None:
        (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=rf"manifest\.json: {problem}"):
        TokenShards(folder)


def test_a_manifest_that_was_changed_is_named(folder):
    """Numbers that no shard could contradict are under the manifest's own checksum."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    TokenShards(folder)
    (folder / "manifest.json").write_text(json.dumps({**sealed(manifest), "end_of_text_id": 1}))
    with pytest.raises(DataError, match=r"manifest\.json: is damaged \(its content does not match its own sha256\)"):
        TokenShards(folder)


def test_an_id_outside_the_vocabulary_is_named_by_file_and_offset(tmp_path):
    stream = ids(30)
    stream[17] = VOCAB
    shards = TokenShards(write_shards(tmp_path / "corpus", {"train": {"a": stream}, "val": {}}, shard_tokens=12))
    shards.window("train", 1, 8)
    where = rf"train\.a\.00001\.bin: token id {VOCAB} at token offset 5 is outside the vocabulary of {VOCAB}"
    with pytest.raises(DataError, match=where):
        shards.window("train", 2, 8)
    with pytest.raises(DataError, match=where):
        shards.window("train", 6, 3)  # as the input of the first target


# ------------------------------------------------------------------------------------------------- slugs


def test_every_domain_gets_a_file_name_of_its_own():
    names = ["a", "A", "a/b", "a b", "..", "", "ä", "日本", "x" * 300, "x" * 301, "a-b", "con\n", "ok_1"]
    slugs = [slug(name) for name in names]
    assert len({one.lower() for one in slugs}) == len(names)
    for one in slugs:
        assert one == "".join(c for c in one if c.isascii() and (c.isalnum() or c in "-_"))
        assert 0 < len(one) < 60
    assert slug("ok_1") == "ok_1"
