"""Files of packages as plain text. Nothing in them is run, and what they unpack to is bounded."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from gzip import GzipFile
from html.parser import HTMLParser

from moelm.config import UserError

MAX_BYTES = 2**26  # of one file, unpacked; the largest in the recipe has 40 MB
LONGEST_DOCUMENT = 2**16  # characters


def documents(path: str, data: bytes, form: str) -> Iterator[str]:
    """The text of one file. What is longer than `LONGEST_DOCUMENT` becomes several documents, cut at an empty line
    where there is one, so that some of every domain can be held out."""
    if path.endswith((".gz", ".dz")):
        data = _gunzip(path, data)
    if form == "r_strings":
        for text in _r_texts(path, data):
            yield from _parts(_clean(text))
    else:
        text = _decode(data)
        yield from _parts(_clean(html_to_text(text) if form == "html" else text))


def _gunzip(path: str, data: bytes) -> bytes:
    try:
        with GzipFile(fileobj=io.BytesIO(data)) as stream:
            unpacked = stream.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be unpacked: {error}\n  remedy: leave the package out") from None
    return _bounded(path, unpacked)


def _bounded(path: str, data: bytes) -> bytes:
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: unpacks to more than {MAX_BYTES >> 20} MiB\n  remedy: leave the package out")
    return data


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")  # what older documentation is written in; any bytes are valid


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # all but tab and line feed
_SPACE_AT_LINE_END = re.compile(r"[^\S\n]+$", re.MULTILINE)


def _clean(text: str) -> str:
    text = _CONTROL.sub("", text.replace("\r\n", "\n"))
    return _SPACE_AT_LINE_END.sub("", text).strip("\n")


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > LONGEST_DOCUMENT:
        limit = start + LONGEST_DOCUMENT
        end = next(
            (found + len(at) for at in ("\n\n", "\n") if (found := text.rfind(at, start, limit)) > start),
            limit,
        )
        yield text[start:end]
        start = end
    yield text[start:]


# ------------------------------------------------------------------------------------------------- HTML

_BLOCKS = re.compile("address|article|blockquote|dl|fieldset|figure|h[1-6]|main|ol|p|pre|section|table|ul")
_LINES = re.compile("br|caption|dd|div|dt|figcaption|hr|li|tbody|td|th|thead|tr")
_NOT_TEXT = re.compile("aside|button|footer|head|header|nav|noscript|script|select|style|svg|template|title")
_VOID = re.compile("area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr")  # have no end tag
_NAVIGATION = re.compile(
    r"(^|[\s_-])(nav|navigation|navheader|navfooter|leftnav|breadcrumbs?|topbar|menu|toc|toc_.*|sphinxsidebar|sidebar"
    r"|related|headerlink|mark|pagination|search|quickview|toplang|bottomlang|lang)($|[\s_-])"
)


class _Reader(HTMLParser):
    """Text in the order of the page. Blocks are set apart by an empty line; `pre` keeps its spaces."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._newlines = 0  # to write before the next text
        self._pre = 0
        self._skipped: list[str] = []  # the element that is left out, and those of its name inside it

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if self._skipped:
            if tag == self._skipped[0]:
                self._skipped.append(tag)
            return
        if not _VOID.fullmatch(tag) and (_NOT_TEXT.fullmatch(tag) or _is_navigation(attributes)):
            self._skipped.append(tag)
            return
        self._break(tag)
        if tag == "pre":
            self._pre += 1
        elif tag == "li":
            self._add("- ")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            if tag == self._skipped[0]:
                self._skipped.pop()
            return
        self._break(tag)
        if tag == "pre":
            self._pre = max(0, self._pre - 1)

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._add(data if self._pre else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        self._newlines = max(self._newlines, 2 if _BLOCKS.fullmatch(tag) else 1 if _LINES.fullmatch(tag) else 0)

    def _add(self, text: str) -> None:
        at_line_start = self._newlines > 0 or not self.parts or self.parts[-1].endswith((" ", "\n"))
        if not self._pre and at_line_start:
            text = text.lstrip(" ")
        if not text:
            return
        if self._newlines and self.parts and self.parts[-1] != "- ":
            self.parts.append("\n" * self._newlines)
        self._newlines = 0
        self.parts.append(text)


def _is_navigation(attributes: list[tuple[str, str | None]]) -> bool:
    return any(
        name in ("class", "id", "role") and value is not None and _NAVIGATION.search(value.lower()) is not None
        for name, value in attributes
    )


def html_to_text(html: str) -> str:
    """Without scripts, styles, navigation, and what else on a page is not its text."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return "".join(reader.parts)


# ---------------------------------------------------------------------------------------- data of R packages

_R_STRING = re.compile(rb"\x00(?:\x04\x00|\x00[\x40\x80])\x09(....)", re.DOTALL)  # ASCII, Latin-1 or UTF-8; length


def _r_texts(path: str, data: bytes) -> Iterator[str]:
    """The character vectors of an R package's lazy-load database, each as a text with a string a line.

    The database is a row of compressed objects, each after its length in four bytes.
    """
    while data:
        unpacker = zlib.decompressobj()
        try:
            serialized = _bounded(path, unpacker.decompress(data[4:], MAX_BYTES + 1))
        except zlib.error as error:
            raise UserError(f"{path}: cannot be unpacked: {error}\n  remedy: leave the package out") from None
        if not unpacker.eof:
            raise UserError(f"{path}: ends within an object\n  remedy: leave the package out")
        data = unpacker.unused_data
        lines, position = [], 0
        while (found := _R_STRING.search(serialized, position)) is not None:
            position = found.end() + int.from_bytes(found[1], "big")
            lines.append(_decode(serialized[found.end() : position]))
        yield "\n".join(lines)
