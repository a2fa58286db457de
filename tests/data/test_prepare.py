"""Preparation: what ends up on disk is the text, nothing is half done, and a mistake is one message."""

import gzip
import json
import lzma
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import data_prep.prepare as command
import moelm.data.prepare as preparation
from moelm.command_line import run
from moelm.config import ConfigError, CorpusConfig, UserError, check_corpus, from_dict, load_corpus
from moelm.data.prepare import Sample, prepare, why_stale
from moelm.data.token_shards import TokenShards

ROOT = Path(__file__).parents[2]
END = "<|endoftext|>"


def texts(n: int = 40) -> list[str]:
    return [f"document {i}: " + "some words and 数字 " * (i % 7) + f"\nend {END} of {i * i}" for i in range(n)]


def write_corpus(folder: Path, documents: dict[str, list[str]]) -> Path:
    for domain, domain_texts in documents.items():
        (folder / domain).mkdir(parents=True, exist_ok=True)
        for i, text in enumerate(domain_texts):
            (folder / domain / f"{i:05d}.txt").write_text(text, encoding="utf-8")
    return folder


def corpus_of(folder: Path, **settings: object) -> CorpusConfig:
    raw = {
        "name": "c",
        "dir": str(folder.parent / "prepared"),
        "sources": [{"name": "files", "path": str(folder)}],
        "tokenizer": {"vocab_size": 300},
        "val_fraction": 0.2,
    }
    corpus = from_dict(CorpusConfig, raw | settings)
    check_corpus(corpus, "")
    return corpus


@pytest.fixture
def corpus(tmp_path):
    return corpus_of(write_corpus(tmp_path / "text", {"a": texts(30), "b": texts(12)}))


def stored_documents(shards: TokenShards) -> dict[tuple[str, str], list[str]]:
    """What the shards decode to, by split and domain."""
    tokenizer = Tokenizer.from_file(str(shards.tokenizer_file))
    stored = {}
    for split in ("train", "val"):
        for domain, counts in shards.split_counts(split).items():
            stream = _stream(shards, split, domain)
            assert len(stream) == counts.tokens
            assert stream[-1] == shards.end_of_text_id
            found, document = [], []
            for token in stream:
                if token == shards.end_of_text_id:
                    found.append(tokenizer.decode(document))
                    document = []
                else:
                    document.append(token)
            assert len(found) == counts.documents
            assert sum(len(text.encode()) for text in found) == counts.bytes
            stored[split, domain] = found
    return stored


def _stream(shards: TokenShards, split: str, domain: str) -> list[int]:
    windows = (shards.window(split, i, 1) for i in range(shards.n_windows(split, 1)))
    return [int(window.targets[0]) for window in windows if shards.domains[window.domain] == domain]


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def beside(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.parent.iterdir() if file.name.startswith(folder.name))


# ----------------------------------------------------------------------------------------------- content


def test_the_shards_hold_every_document_once_and_decode_to_its_text(corpus):
    stored = stored_documents(prepare(corpus, progress=False))
    for domain, n in (("a", 30), ("b", 12)):
        assert sorted(stored["train", domain] + stored.get(("val", domain), [])) == sorted(texts(n))
        assert stored["train", domain] == [text for text in texts(n) if text in stored["train", domain]]


def test_text_that_spells_the_end_of_text_token_is_only_text(corpus):
    shards = prepare(corpus, progress=False)
    counts = shards.split_counts("train")["a"]
    assert _stream(shards, "train", "a").count(shards.end_of_text_id) == counts.documents
    assert all(END in text for text in stored_documents(shards)["train", "a"])


def test_the_manifest_says_what_is_there(corpus):
    shards = prepare(corpus, progress=False)
    manifest = json.loads((corpus.path / "manifest.json").read_text())
    assert manifest["corpus"]["sources"][0]["name"] == "files"
    assert manifest["dtype"] == "<u2"
    tokenizer = Tokenizer.from_file(str(shards.tokenizer_file))
    assert shards.vocab_size == tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id(END) == shards.end_of_text_id
    assert set(shards.domains) == {"a", "b"}


def test_long_documents_and_small_batches_and_shards_change_nothing(corpus, monkeypatch):
    expected = stored_documents(prepare(corpus, progress=False))
    monkeypatch.setattr("moelm.data.sources.MAX_PIECE", 16)
    monkeypatch.setattr(preparation, "_BATCH_BYTES", 50)
    corpus.shard_tokens = 37
    assert stored_documents(prepare(corpus, force=True, progress=False)) == expected
    assert {file.stat().st_size for file in corpus.path.glob("train.a.*.bin")} >= {2 * 37}


def test_preparing_twice_gives_the_same_bytes(corpus, tmp_path):
    prepare(corpus, progress=False)
    first = files_of(corpus.path)
    prepare(corpus, force=True, progress=False)
    assert files_of(corpus.path) == first


def test_the_split_of_a_document_does_not_depend_on_later_ones(tmp_path):
    small = corpus_of(write_corpus(tmp_path / "small" / "text", {"a": texts(40)}))
    large = corpus_of(write_corpus(tmp_path / "large" / "text", {"a": texts(80)}))
    held_out = [stored_documents(prepare(c, progress=False))["val", "a"] for c in (small, large)]
    assert held_out[1][: len(held_out[0])] == held_out[0]
    assert 2 <= len(held_out[0]) <= 20
    large.seed = 1
    assert stored_documents(prepare(large, force=True, progress=False))["val", "a"] != held_out[1]


def test_baselines_are_those_of_the_validation_text(corpus, monkeypatch):
    shards = prepare(corpus, progress=False)
    stored = stored_documents(shards)
    text = "".join(text for (split, _), found in stored.items() if split == "val" for text in found).encode()
    assert shards.baselines["gzip_bits_per_byte"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert shards.baselines["xz_bits_per_byte"] == pytest.approx(
        8 * len(lzma.compress(text, preset=9)) / len(text), rel=0.02
    )
    monkeypatch.setattr(preparation, "_MAX_BASELINE_BYTES", 100)
    shards = prepare(corpus, force=True, progress=False)
    assert shards.baselines == {"gzip_bits_per_byte": None, "xz_bits_per_byte": None}


# --------------------------------------------------------------------------------------------- tokenizer


def test_a_given_tokenizer_is_used_without_its_truncation_and_its_special_tokens_in_text(corpus, tmp_path):
    expected = stored_documents(prepare(corpus, progress=False))
    tokenizer = Tokenizer.from_file(str(corpus.path / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.add_tokens([AddedToken("<end>", special=False)])
    tokenizer.save(str(tmp_path / "mine.json"))
    corpus.dir = str(tmp_path / "other")
    corpus.tokenizer.file = str(tmp_path / "mine.json")
    assert stored_documents(prepare(corpus, progress=False)) == expected
    write_corpus(tmp_path / "text", {"a": ["an <end> in the text"] * 30})
    corpus.tokenizer.end_of_text = "<end>"
    stored = stored_documents(prepare(corpus, force=True, progress=False))
    assert set(stored["train", "a"]) == {"an <end> in the text"}


def test_a_tokenizer_that_loses_a_part_of_the_text_is_said(corpus, tmp_path, capsys):
    prepare(corpus, progress=False)
    whole = Tokenizer.from_file(str(corpus.path / "tokenizer.json"))
    words = Tokenizer(WordLevel({"[UNK]": 0, "<|endoftext|>": 1, "the": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    for name, tokenizer in (("whole", whole), ("words", words)):
        tokenizer.save(str(tmp_path / f"{name}.json"))
        prepare(
            corpus_of(tmp_path / "text", dir=str(tmp_path / name), tokenizer={"file": str(tmp_path / f"{name}.json")})
        )
        assert ("% of the characters of the text not back" in capsys.readouterr().err) == (name == "words")


def test_a_tokenizer_without_the_end_of_text_token_is_refused(corpus, tmp_path):
    prepare(corpus, progress=False)
    corpus.tokenizer.file = str(corpus.path / "tokenizer.json")
    corpus.tokenizer.end_of_text = "</s>"
    corpus.dir = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"tokenizer\.json: has no token '</s>'\n  remedy"):
        prepare(corpus, progress=False)
    corpus.tokenizer.end_of_text = "<|endoftext|>"
    corpus.tokenizer.start_of_text = "<s>"
    for _ in range(2):  # to make it, and to open what is made
        with pytest.raises(UserError, match=r"has no token '<s>'\n  remedy: set data.corpus.tokenizer.start_of_text"):
            prepare(corpus, progress=False)
        corpus.tokenizer.start_of_text = None
        prepare(corpus, progress=False)
        corpus.tokenizer.start_of_text = "<s>"
    (tmp_path / "bad.json").write_text("{}")
    corpus.dir = str(tmp_path / "bad")
    corpus.tokenizer.file = str(tmp_path / "bad.json")
    with pytest.raises(UserError, match=r"bad\.json: not a tokenizer"):
        prepare(corpus, progress=False)


@pytest.mark.parametrize(
    ("n_words", "end_of_text_id", "dtype"),
    [(2**16 - 1, 2**16 - 1, "<u2"), (2**16, 2**16, "<u4"), (9, 14, "<u2"), (9, 2**16, "<u4")],
)
def test_ids_are_stored_as_the_largest_of_them_needs_whatever_is_left_out_below_it(
    corpus, tmp_path, n_words, end_of_text_id, dtype
):
    words = {f"word{i}": i for i in range(n_words)} | {END: end_of_text_id}
    writer = preparation._Writer(corpus, tmp_path, Tokenizer(WordLevel(words, unk_token="word0")))
    assert writer.dtype == np.dtype(dtype)
    assert writer.vocab_size == writer.end_of_text_id + 1 == end_of_text_id + 1


def test_the_sample_covers_all_domains_over_their_whole_length_within_its_budget():
    sample = Sample(budget=10_000, seed=0)
    for i in range(5000):
        sample.add(f"large {i}", "large", 10)
        if i % 250 == 0:
            sample.add(f"small {i}", "small", 10)
    sample.add("huge", "huge", 1000)
    numbers = [int(text.split()[1]) for text in sample.texts() if text.startswith("large")]
    assert sum(text.startswith("small") for text in sample.texts()) == 20
    assert "huge" in sample.texts()
    assert 300 <= len(numbers) <= 880
    for quarter in range(4):
        assert 60 < sum(number * 4 // 5000 == quarter for number in numbers) < 250


def test_a_domain_of_one_large_piece_stays_in_the_sample():
    sample = Sample(budget=100, seed=0)
    for i in range(50):
        sample.add(f"a {i}", "a", 60)
        sample.add(f"b {i}", "b", 60)
    assert sorted(text[0] for text in sample.texts()) == ["a", "b"]


def test_held_out_documents_take_no_part_in_the_training_of_the_tokenizer(corpus, monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(Sample, "add", lambda self, text, domain, n_bytes: seen.append(text))
    monkeypatch.setattr(Sample, "texts", lambda self: iter(seen))
    stored = stored_documents(prepare(corpus, progress=False))
    trained_on = [text for (split, _), found in stored.items() if split == "train" for text in found]
    assert sorted(seen) == sorted(trained_on)


# ------------------------------------------------------------------------------------ what is there already


def test_prepared_data_is_opened_and_not_made_again(corpus, monkeypatch):
    prepare(corpus, progress=False)
    monkeypatch.setattr(preparation, "_build", None)
    assert prepare(corpus, progress=False).split_counts("train")["a"].documents > 0


def test_text_or_a_tokenizer_that_has_changed_since_is_said(corpus, tmp_path):
    shards = prepare(corpus, progress=False)
    assert why_stale(corpus, shards) is None
    file = tmp_path / "text/a/00000.txt"
    before = file.read_text()
    file.write_text(before + "more")
    assert "made of other files than are there now" in why_stale(corpus, shards)
    file.write_text(before)
    (tmp_path / "text/a/new.txt").write_text("more")
    assert "--force makes it again" in why_stale(corpus, shards)
    assert why_stale(corpus, prepare(corpus, force=True, progress=False)) is None
    shutil.rmtree(tmp_path / "text")
    assert why_stale(corpus, TokenShards(corpus.path)) is None

    shutil.copy(corpus.path / "tokenizer.json", tmp_path / "mine.json")
    given = corpus_of(write_corpus(tmp_path / "text", {"a": texts(30)}), dir=str(tmp_path / "given"))
    given.tokenizer.file = str(tmp_path / "mine.json")
    shards = prepare(given, progress=False)
    assert why_stale(given, shards) is None
    (tmp_path / "mine.json").write_text((tmp_path / "mine.json").read_text() + " ")
    assert why_stale(given, shards) is not None
    shutil.rmtree(tmp_path / "text")
    assert why_stale(given, shards) is None


def test_prepared_data_goes_where_its_text_does_not(corpus):
    prepare(corpus, progress=False)
    shutil.rmtree(corpus.sources[0].path)
    check_corpus(corpus, "data.corpus")
    assert prepare(corpus, progress=False).domains
    with pytest.raises(ConfigError, match=r"data\.corpus\.sources\.0\.path: .*no such file or folder"):
        prepare(corpus, force=True, progress=False)
    assert TokenShards(corpus.path).domains


def test_the_place_of_the_data_is_not_part_of_what_it_is(corpus, tmp_path, monkeypatch):
    prepare(corpus, progress=False)
    corpus.path.rename(tmp_path / "moved")
    corpus.dir = str(tmp_path / "moved")
    monkeypatch.setattr(preparation, "_build", None)
    prepare(corpus, progress=False)


def test_data_of_another_config_is_refused_with_the_keys_that_differ(corpus):
    prepare(corpus, progress=False)
    before = files_of(corpus.path)
    corpus.val_fraction = 0.3
    corpus.tokenizer.vocab_size = 320
    corpus.sources[0].domain = "x"
    with pytest.raises(UserError, match="another config") as error:
        prepare(corpus, progress=False)
    differing = [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:-1]]
    assert differing == ["sources.0.domain", "tokenizer.vocab_size", "val_fraction"]
    assert "300 on disk, 320 in the config" in str(error.value)
    assert "remedy" in str(error.value)
    assert files_of(corpus.path) == before
    assert prepare(corpus, force=True, progress=False).vocab_size == 320
    assert beside(corpus.path) == ["prepared", "prepared.lock"]


def test_force_repairs_damaged_data(corpus):
    prepare(corpus, progress=False)
    (corpus.path / "manifest.json").write_text("damaged")
    with pytest.raises(UserError, match=r"manifest\.json"):
        prepare(corpus, progress=False)
    prepare(corpus, force=True, progress=False)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_with_other_things_is_left_alone(corpus, force):
    corpus.path.mkdir()
    (corpus.path / "thesis.tex").write_text("years of work")
    (corpus.path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="left alone"):
        prepare(corpus, force=force, progress=False)
    assert (corpus.path / "thesis.tex").read_text() == "years of work"


# ----------------------------------------------------------------------------------------------- mistakes


def test_a_corpus_that_cannot_be_split_is_refused_and_leaves_nothing(tmp_path):
    one = corpus_of(write_corpus(tmp_path / "text", {"a": [texts()[3] * 9]}))
    with pytest.raises(UserError, match=r"the val split gets 0 tokens of 1 documents .*\n  remedy: .*separator"):
        prepare(one, progress=False)
    assert beside(one.path) == ["prepared.lock"]


def test_a_corpus_without_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no text"):
        prepare(corpus_of(write_corpus(tmp_path / "text", {"a": [""]})), progress=False)


def test_too_many_domains_are_refused_with_the_remedy(tmp_path):
    text = write_corpus(tmp_path / "text", {f"d{i}": ["some text"] for i in range(257)})
    with pytest.raises(UserError, match=r"more than 256 domains.*\n  remedy: set `domain`"):
        prepare(corpus_of(text), progress=False)


def test_a_place_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    corpus.dir = str(tmp_path / "file" / "data")
    with pytest.raises(UserError, match=r"file/data.*\n  remedy: set data\.corpus\.dir"):
        prepare(corpus, progress=False)


def test_a_full_disk_is_one_message_and_leaves_nothing(corpus, monkeypatch):
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moelm.data.token_shards.StreamWriter.append", no_room)
    with pytest.raises(UserError, match="No space left on device"):
        prepare(corpus, progress=False)
    assert beside(corpus.path) == ["prepared.lock"]


# ---------------------------------------------------------------------------------- kills and other processes

SLOW_SOURCE = """
import sys, time
from pathlib import Path
from moelm.config import CorpusConfig, NamedConfig, TokenizerConfig, register
from moelm.data.prepare import prepare
from moelm.data.sources import Piece

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])

@register("source", "slow", NamedConfig)
def read(config):
    with open(folder / "reads", "a") as log:
        log.write("x")
    for i in range(20):
        yield Piece(f"document {i} of some length", "d", True)
    time.sleep(seconds)

tokenizer = TokenizerConfig(file=str(folder / "tokenizer.json"))
corpus = CorpusConfig("c", str(folder / "data"), [NamedConfig("slow")], tokenizer, val_fraction=0.3)
prepare(corpus, progress=False)
"""


def start(folder: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SLOW_SOURCE, str(folder), str(seconds)], cwd=ROOT)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} never came"
        time.sleep(0.02)


@pytest.fixture
def shared(corpus, tmp_path):
    """A folder in which several processes can prepare with a tokenizer that is there."""
    prepare(corpus, progress=False)
    folder = tmp_path / "shared"
    folder.mkdir()
    (corpus.path / "tokenizer.json").rename(folder / "tokenizer.json")
    return folder


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_data(shared):
    killed = start(shared, 60)
    wait_for(shared / "reads")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (shared / "data").exists()
    assert f"data.tmp-{killed.pid}" in beside(shared / "data")
    assert start(shared, 0).wait() == 0
    assert beside(shared / "data") == ["data", "data.lock"]
    assert len(TokenShards(shared / "data").split_counts("train")) == 1


def test_of_two_processes_that_prepare_at_once_one_waits_and_reuses(shared):
    first = start(shared, 3)
    wait_for(shared / "reads")
    second = start(shared, 0)
    assert (first.wait(), second.wait()) == (0, 0)
    assert (shared / "reads").read_text() == "x"
    assert beside(shared / "data") == ["data", "data.lock"]


def test_data_whose_replacement_was_killed_between_two_renames_comes_back(corpus, monkeypatch):
    prepare(corpus, progress=False)
    corpus.path.rename(corpus.path.with_name("prepared.old-1"))
    corpus.path.with_name("prepared.tmp-1").mkdir()
    monkeypatch.setattr(preparation, "_build", None)
    prepare(corpus, progress=False)
    assert beside(corpus.path) == ["prepared", "prepared.lock"]


def test_what_a_user_keeps_beside_the_folder_is_left_alone(corpus):
    kept = [corpus.path.with_name(f"prepared.{name}") for name in ("old-8k", "old-", "tmp-mine", "old-1.bak")]
    for folder in kept:
        folder.mkdir(parents=True)
        (folder / "file").touch()
    prepare(corpus, progress=False)
    prepare(corpus, progress=False, force=True)
    assert all((folder / "file").exists() for folder in kept)
    assert corpus.path.exists()


# ----------------------------------------------------------------------------------------------- command


def test_the_command_prints_a_table_and_ends_with_code_2_on_a_mistake(corpus, tmp_path, capsys, monkeypatch):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"sources: [{{name: files, path: {tmp_path / 'text'}}}]\ntokenizer: {{vocab_size: 300}}\nval_fraction: 0.2\n"
    )
    data = tmp_path / "from-command"
    command.main(["--config", str(config), f"dir={data}", "seed=3"])
    printed = capsys.readouterr()
    assert [line.split()[:2] for line in printed.out.splitlines()[2:4]] == [["train", "a"], ["train", "b"]]
    assert "42 documents" in printed.err
    assert "MB/s" in printed.err
    monkeypatch.setattr(sys, "argv", ["prepare", "--config", str(config), f"dir={data}", "seed=4"])
    with pytest.raises(SystemExit) as end:
        run(command.main)
    assert end.value.code == 2
    assert "seed: 3 on disk, 4 in the config" in capsys.readouterr().err
    command.main(["--force", "--config", str(config), f"dir={data}", "seed=4"])


def test_the_embedded_corpus_is_a_valid_config():
    corpus = load_corpus(ROOT / "configs/data/stdlib.yaml")
    assert (corpus.name, [source.name for source in corpus.sources]) == ("stdlib", ["stdlib"])
    assert corpus.path == Path("data/stdlib")
