"""The ready configs of public data sets, on small local sets of the same layout: files, card, subsets, columns."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moelm.config import ConfigError, CorpusConfig, build, check_corpus, from_dict, load_corpus
from moelm.data.prepare import prepare
from moelm.data.sources import DatasetConfig, Piece

ROOT = Path(__file__).parents[2]
STORIES = [f"Once upon a time there were {i} cats.\nThey had fun." for i in range(300)]
ARTICLES = 40


def card(folder: Path, *configurations: tuple[str, str]) -> None:
    lines = [f"- config_name: {n}\n  data_files:\n  - split: train\n    path: {path}" for n, path in configurations]
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(lines) + "\n---\nA card.\n")


def parquet(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def tinystories(folder: Path) -> None:
    for i in range(2):
        parquet(folder / f"data/train-{i:05d}-of-00002.parquet", [{"text": text} for text in STORIES[150 * i :][:150]])
    parquet(folder / "data/validation-00000-of-00001.parquet", [{"text": "of no interest"}])


def wikitext103(folder: Path) -> None:
    rows = []
    for i in range(ARTICLES):
        rows += ["", f" = Article {i} = \n", "", f" The first paragraph of {i} = five . \n", " = = Section = = \n", ""]
        rows += [" = = = Below = = = \n", f" The second paragraph of {i} . \n", ""]
    name = "wikitext-103-raw-v1"
    parquet(folder / name / "train-00000-of-00001.parquet", [{"text": row} for row in rows])
    parquet(folder / "wikitext-2-raw-v1/train-00000-of-00001.parquet", [{"text": " = Wrong set = \n"}])
    card(folder, (name, f"{name}/train-*"), ("wikitext-2-raw-v1", "wikitext-2-raw-v1/train-*"))


def fineweb_edu(folder: Path) -> None:
    others = {"id": "<urn:uuid:0>", "dump": "CC-MAIN-2013-20", "url": "http://a.b", "file_path": "s3://c"}
    scores = {"language": "en", "language_score": 0.9, "token_count": 12, "score": 3.1, "int_score": 3}
    parquet(folder / "sample/10BT/000_00000.parquet", [{"text": text} | others | scores for text in STORIES])
    parquet(folder / "data/CC-MAIN-2013-20/train-00000-of-00001.parquet", [{"text": "wrong set"} | others | scores])
    card(folder, ("default", "data/*/*"), ("sample-10BT", "sample/10BT/*"))


def c4(folder: Path) -> None:
    for language in ("en", "de"):
        (folder / language).mkdir(parents=True)
        rows = [{"text": f"{text} ({language})", "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for text in STORIES]
        packed = gzip.compress("\n".join(map(json.dumps, rows)).encode())
        (folder / language / "c4-train.00000-of-00001.json.gz").write_bytes(packed)
    card(folder, ("en", "en/c4-train.*.json.gz"), ("de", "de/c4-train.*.json.gz"))


SETS = {make.__name__: make for make in (tinystories, wikitext103, fineweb_edu, c4)}
DOCUMENTS = {
    "tinystories": STORIES,
    "wikitext103": [
        f" = Article {i} = \n The first paragraph of {i} = five . \n = = Section = = \n = = = Below = = = \n"
        f" The second paragraph of {i} . \n"
        for i in range(ARTICLES)
    ],
    "fineweb_edu": STORIES,
    "c4": [f"{text} (en)" for text in STORIES],
}


@pytest.fixture(params=SETS)
def corpus(request, tmp_path) -> CorpusConfig:
    """A ready config with the path of a local set, and with smaller numbers."""
    folder = tmp_path / "set"
    folder.mkdir()
    SETS[request.param](folder)
    overrides = [f"sources.0.path={folder}", f"dir={tmp_path / 'prepared'}", "tokenizer.vocab_size=300"]
    return load_corpus(ROOT / f"configs/data/{request.param}.yaml", [*overrides, "val_fraction=0.2"])


def read(corpus: CorpusConfig) -> list[Piece]:
    check_corpus(corpus, "", reads_text=True)
    return list(build("source", corpus.sources[0]))


def documents(pieces: list[Piece]) -> list[str]:
    return "".join(piece.text + "\0" * piece.ends_document for piece in pieces).removesuffix("\0").split("\0")


def test_a_ready_config_prepares_the_documents_of_its_set(corpus):
    expected = DOCUMENTS[corpus.name]
    assert documents(read(corpus)) == expected
    shards = prepare(corpus, progress=False)
    counts = [counts for split in ("train", "val") for counts in shards.split_counts(split).values()]
    assert sum(count.documents for count in counts) == len(expected)
    assert sum(count.bytes for count in counts) == sum(map(len, expected))
    assert len(shards.domains) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("tinystories", ("roneneldan/TinyStories", None, None)),
        ("wikitext103", ("Salesforce/wikitext", "wikitext-103-raw-v1", None)),
        ("fineweb_edu", ("HuggingFaceFW/fineweb-edu", "sample-10BT", 2_000_000_000)),
        ("c4", ("allenai/c4", "en", 2_000_000_000)),
    ],
)
def test_a_ready_config_streams_its_set_by_its_name_and_no_more_than_a_run_can_use(name, source):
    config = load_corpus(ROOT / f"configs/data/{name}.yaml").sources[0]
    assert isinstance(config, DatasetConfig)
    assert (config.path, config.subset, config.max_bytes) == source
    assert (config.split, config.streaming) == ("train", True)


# --------------------------------------------------------------------------------- options of the source


def jsonl(tmp_path: Path, *texts: str, **settings: object) -> CorpusConfig:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = {"name": "dataset", "path": "json", "data_files": [str(file)], "domain": "d"}
    return from_dict(CorpusConfig, {"sources": [source | settings]})


@pytest.mark.parametrize(("max_bytes", "n"), [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3), (100, 3)])
def test_reading_stops_after_the_document_that_reaches_max_bytes(max_bytes, n, tmp_path):
    texts = ["one", "zö", "three"]  # of 3, 3 and 5 bytes
    assert documents(read(jsonl(tmp_path, *texts, max_bytes=max_bytes))) == texts[:n]


def test_a_long_document_is_not_cut_by_max_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("moelm.data.sources.MAX_PIECE", 4)
    pieces = read(jsonl(tmp_path, "a\nb\nc\nd\ne\n", "no more", max_bytes=2))
    assert documents(pieces) == ["a\nb\nc\nd\ne\n"]
    assert len(pieces) == 3


def test_rows_join_to_documents_that_begin_where_the_regex_matches(tmp_path, monkeypatch):
    texts = ["before\n", "# one\n", "", "text # two\n", "# three\n", "# four\n", "end\n"]
    assert documents(read(jsonl(tmp_path, *texts, document_start="# "))) == [
        "before\n",
        "# one\ntext # two\n",
        "# three\n",
        "# four\nend\n",
    ]
    assert documents(read(jsonl(tmp_path, *texts, document_start="# ", max_bytes=8))) == [
        "before\n",
        "# one\ntext # two\n",
    ]
    monkeypatch.setattr("moelm.data.sources.MAX_PIECE", 4)  # a piece within a row is no start
    assert documents(read(jsonl(tmp_path, "abc\n# d\n", "# e", document_start="# "))) == ["abc\n# d\n", "# e"]


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [("max_bytes", 0, "max_bytes"), ("document_start", "(", r"sources\.0\.document_start: '\('")],
)
def test_a_setting_that_means_nothing_is_refused(setting, value, problem, tmp_path):
    with pytest.raises(ConfigError, match=problem):
        read(jsonl(tmp_path, "text", **{setting: value}))


@pytest.mark.parametrize("name", ["files", "jsonl", "parquet"])
def test_a_missing_path_that_a_command_makes_is_told_with_the_command(name, tmp_path):
    source = {"name": name, "path": str(tmp_path / "missing"), "made_by": "python -m recipe"}
    with pytest.raises(
        ConfigError, match="missing': no such file or folder\n  remedy: make it first: python -m recipe"
    ):
        read(from_dict(CorpusConfig, {"sources": [source]}))
