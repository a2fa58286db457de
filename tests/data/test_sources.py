"""Sources: what counts as a document, which domain it gets, and what a wrong file or key is told."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import moelm.data.sources as sources
from moelm.config import ConfigError, CorpusConfig, UserError, build, check_corpus, from_dict
from moelm.data.sources import Piece


def read(**source: object) -> list[Piece]:
    """Through the whole path that a YAML takes: typed, checked, built."""
    corpus = from_dict(CorpusConfig, {"sources": [source]})
    check_corpus(corpus, "", reads_text=True)
    return list(build("source", corpus.sources[0]))


def documents(pieces: list[Piece]) -> list[tuple[str, str]]:
    joined, text = [], ""
    for piece in pieces:
        text += piece.text
        if piece.ends_document:
            joined.append((piece.domain, text))
            text = ""
    assert not text, "the last document has no end"
    return joined


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())
    return file


# ----------------------------------------------------------------------------------------------- stdlib


def test_stdlib_is_code_and_prose_without_tests_and_packages(tmp_path, monkeypatch):
    for name in ("b.py", "a.py", "json/x.py", "test/t.py", "json/tests/t.py", "idlelib/idle_test/t.py"):
        write(tmp_path / name, name)
    for name in ("site-packages/s.py", "dist-packages/d.py", "pydoc_data/topics.py", "c.txt", "empty.py"):
        write(tmp_path / name, "" if name == "empty.py" else name)
    (tmp_path / "latin.py").write_bytes("é".encode("latin-1"))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    found = documents(read(name="stdlib"))
    assert [text for domain, text in found if domain == "python"] == ["a.py", "b.py", "json/x.py"]
    prose = [text for domain, text in found if domain == "docs"]
    assert len(prose) > 50
    assert any('The "for" statement' in text for text in prose)


def test_stdlib_is_large_enough_to_train_on():
    found = documents(read(name="stdlib"))
    assert {domain for domain, _ in found} == {"python", "docs"}
    assert sum(len(text) for _, text in found) > 5e6


# ------------------------------------------------------------------------------------------------ pieces


def test_a_long_document_is_cut_at_line_ends_and_a_long_line_hard(monkeypatch):
    monkeypatch.setattr(sources, "MAX_PIECE", 10)
    pieces = list(sources.cut("one\ntwo\nthree\nabcdefghijklmnop\nend", "d"))
    assert [piece.text for piece in pieces] == ["one\ntwo\n", "three\n", "abcdefghij", "klmnop\nend"]
    assert [piece.ends_document for piece in pieces] == [False, False, False, True]


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    assert list(sources.cut("a\ud800b", "\ud800x")) == [sources.Piece("a\ufffdb", "\ufffdx", True)]


def test_an_empty_document_is_left_out():
    assert list(sources.cut("", "d")) == []


# ------------------------------------------------------------------------------------------------- files


def test_files_take_their_domain_from_the_first_folder_below(tmp_path):
    write(tmp_path / "corpus/law/deep/a.txt", "a")
    write(tmp_path / "corpus/art/b.txt", "b")
    write(tmp_path / "corpus/c.txt", "c")
    write(tmp_path / "corpus/ignored.md", "d")
    found = documents(read(name="files", path=str(tmp_path / "corpus")))
    assert sorted(found) == [("art", "b"), ("corpus", "c"), ("law", "a")]
    assert documents(read(name="files", path=str(tmp_path / "corpus/c.txt"))) == [("c", "c")]
    assert documents(read(name="files", path=str(tmp_path / "corpus/c.txt"), domain="x")) == [("x", "c")]
    assert documents(read(name="files", path=str(tmp_path / "corpus"), pattern="*.md")) == [("corpus", "d")]


def test_a_separator_line_ends_a_document_and_line_ends_are_kept(tmp_path):
    file = write(tmp_path / "f.txt", "---\none\r\nmore\r\n---\r\n---\ntwo ---\n---x\n---")
    found = documents(read(name="files", path=str(file), separator="---"))
    assert [text for _, text in found] == ["one\r\nmore\r\n", "two ---\n---x\n"]
    file = write(tmp_path / "g.txt", "one\n\n\ntwo\n")
    assert [text for _, text in documents(read(name="files", path=str(file), separator=""))] == [
        "one\n",
        "two\n",
    ]


def test_a_long_file_is_streamed_in_pieces_that_join_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_PIECE", 64)
    text = "".join(f"line {i}\n" for i in range(50)) + "x" * 100 + "---\n" + "y" * 200 + "\n---\nlast"
    file = write(tmp_path / "f.txt", text)
    pieces = read(name="files", path=str(file), separator="---")
    assert max(len(piece.text) for piece in pieces) <= 64
    assert [document for _, document in documents(pieces)] == [text[: text.index("\n---\n") + 1], "last"]
    assert "".join(piece.text for piece in read(name="files", path=str(file))) == text


def test_the_tail_of_a_long_line_is_no_separator(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_PIECE", 8)
    file = write(tmp_path / "f.txt", "x" * 8 + "---\n")
    assert documents(read(name="files", path=str(file), separator="---")) == [("f", "x" * 8 + "---\n")]


def test_compressed_files_and_a_byte_order_mark_are_understood(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\ufeffhé".encode()))
    assert documents(read(name="files", path=str(tmp_path / "a.txt.gz"))) == [("a", "hé")]


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "f.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(UserError, match=r"f\.txt: not UTF-8 text"):
        read(name="files", path=str(tmp_path / "f.txt"))


def test_a_cut_off_archive_is_named(tmp_path):
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])
    with pytest.raises(UserError, match=r"f\.txt\.gz: cannot be read"):
        read(name="files", path=str(tmp_path / "f.txt.gz"))


# ------------------------------------------------------------------------------------------------ checks


@pytest.mark.parametrize("name", ["files", "jsonl", "parquet"])
def test_a_missing_path_is_found_before_anything_is_read(name, tmp_path):
    with pytest.raises(ConfigError, match=r"sources\.0\.path: .*no such file or folder"):
        read(name=name, path=str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"sources\.0\.path: ''"):
        read(name=name)
    with pytest.raises(ConfigError, match="holds no file that matches"):
        read(name=name, path=str(tmp_path))


def test_a_pattern_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"sources\.0\.pattern"):
        read(name="files", path=str(tmp_path), pattern="")


def test_a_domain_beside_a_domain_key_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"sources\.0\.domain: has no effect"):
        read(name="dataset", path="x", domain="a", domain_key="b")


def test_a_dataset_without_a_path_is_refused():
    with pytest.raises(ConfigError, match=r"sources\.0\.path"):
        read(name="dataset")


# ---------------------------------------------------------------------------------------- tables of rows

ROWS = [{"text": "one", "kind": "a"}, {"text": "zwei\nü", "kind": "b"}, {"text": None, "kind": "a"}]


def make_rows(name: str, folder: Path, rows: list[dict[str, object]]) -> dict[str, object]:
    """The same rows in each of the forms that the sources read; returns the source's settings."""
    if name == "jsonl":
        write(folder / "a.jsonl", json.dumps(rows[0]) + "\n\n")
        (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows[1:])).encode()))
    elif name == "parquet":
        folder.mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    elif name == "dataset":
        datasets.Dataset.from_list(rows).save_to_disk(folder)
    elif name == "dataset dict":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(folder)
    else:
        file = write(folder / "a.jsonl", "\n".join(map(json.dumps, rows)))
        return {"name": "dataset", "path": "json", "data_files": [str(file)]}
    return {"name": name.split()[0], "path": str(folder)}


FORMS = pytest.mark.parametrize("form", ["jsonl", "parquet", "dataset", "dataset dict", "dataset files"])


@FORMS
def test_a_row_is_a_document_and_a_column_can_be_its_domain(form, tmp_path):
    source = make_rows(form, tmp_path / "rows", ROWS)
    assert documents(read(**source, domain_key="kind")) == [("a", "one"), ("b", "zwei\nü")]
    default = "json" if form == "dataset files" else "rows"
    assert documents(read(**source)) == [(default, "one"), (default, "zwei\nü")]
    assert documents(read(**source, text_key="kind", domain="x"))[0] == ("x", "a")


@FORMS
def test_a_row_without_a_domain_has_that_of_its_source(form, tmp_path):
    source = make_rows(form, tmp_path / "rows", [{"text": "one", "kind": None}, {"text": "two", "kind": "b"}])
    default = "json" if form == "dataset files" else "rows"
    assert documents(read(**source, domain_key="kind")) == [(default, "one"), ("b", "two")]


@FORMS
def test_a_missing_column_is_named_with_those_that_exist(form, tmp_path):
    source = make_rows(form, tmp_path / "rows", ROWS)
    with pytest.raises(UserError, match=r"no column 'content'\n.*text_key to one of: 'kind', 'text'") as error:
        read(**source, text_key="content")
    assert str(error.value).startswith(f"source {source['name']}, ")
    with pytest.raises(UserError, match=r"no column 'topic'\n.*domain_key to one of: 'kind', 'text'"):
        read(**source, domain_key="topic")


@FORMS
def test_a_column_that_is_not_text_is_named(form, tmp_path):
    source = make_rows(form, tmp_path / "rows", [{"text": 3, "kind": "a"}, {"text": 4, "kind": "a"}])
    others = "one of: 'kind'" if form == "jsonl" else "another column"
    with pytest.raises(UserError, match=rf"'text' is int, not text\n  remedy: set text_key to {others}"):
        read(**source)


def test_a_domain_that_is_no_name_is_named(tmp_path):
    source = make_rows("jsonl", tmp_path / "rows", [{"text": "words", "kind": {"source": "a"}}])
    with pytest.raises(UserError, match="'kind' is dict, not the name of a domain"):
        read(**source, domain_key="kind")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "cut', "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ("[1]", "list, not an object"),
        ('{"tex": ""}', "no column 'text'"),
    ],
)
def test_a_bad_line_of_jsonl_is_named_by_file_and_number(line, problem, tmp_path):
    file = write(tmp_path / "f.jsonl", '{"text": "fine"}\n\n' + line + '\n{"text": "fine"}\n')
    with pytest.raises(UserError, match=rf"f\.jsonl, line 3: {problem}"):
        read(name="jsonl", path=str(file))


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    write(tmp_path / "f.parquet", "not parquet")
    with pytest.raises(UserError, match=r"f\.parquet: cannot be read"):
        read(name="parquet", path=str(tmp_path))


def test_a_data_set_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UserError, match="data set 'json': cannot be read: FileNotFoundError"):
        read(name="dataset", path="json", data_files=[str(tmp_path / "missing.jsonl")])
    source = make_rows("dataset dict", tmp_path / "rows", ROWS)
    with pytest.raises(UserError, match=r"no split 'test'\n  allowed: train"):
        read(**source, split="test")
