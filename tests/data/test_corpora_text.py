"""Conversion to text: what of a page, a compressed file or an R package is text, and what is not."""

import gzip
import struct
import zlib

import pytest

from data_prep.corpora import to_text
from data_prep.corpora.to_text import documents, html_to_text
from moelm.config import UserError

# ------------------------------------------------------------------------------------------------- HTML


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<h1>Title</h1><p>One\n  two <b>bold</b>, three.</p><p>Next</p>", "Title\n\nOne two bold, three.\n\nNext"),
        ("<p>a</p>\n\n  <p> b </p>", "a\n\nb"),
        ("<ul><li>one</li><li><p>two</p></li></ul>after", "- one\n- two\n\nafter"),
        ("<dl><dt>term<dd>meaning</dl>", "term\nmeaning"),
        (
            "<p>Run:</p><pre>if a &lt; b:\n    <i>go</i>()\n\nend</pre><p>x  y</p>",
            "Run:\n\nif a < b:\n    go()\n\nend\n\nx y",
        ),
        ("<table><tr><td>a</td><td>b</td></tr></table>", "a\nb"),
        ("one<br>two<hr/>three", "one\ntwo\nthree"),
        ("caf&eacute; &#8211; &amp;amp;", "café – &amp;"),
        ("<p>text<a class='headerlink' href='#x'>¶</a></p>", "text"),
        ("", ""),
    ],
)
def test_a_page_reads_as_its_text(html, text):
    assert html_to_text(html).strip() == text


@pytest.mark.parametrize(
    "noise",
    [
        "<script>if (a < b) { noise() }</script>",
        "<style>p { noise: 1 }</style>",
        "<nav><ul><li>noise</li></ul></nav>",
        "<header>noise <header>noise</header> noise</header>",
        "<div class='sphinxsidebar'><div>noise</div>noise</div>",
        "<div role='navigation' class='x'>noise<img src='n'><br>noise</div>",
        "<table id='navfooter'><tr><td>noise<table><tr><td>noise</table>noise</table>",
        "<div class='sqltoc toc'>noise</div>",
        "<svg><text>noise</text></svg>",
        "<!-- noise -->",
    ],
)
def test_scripts_styles_and_navigation_are_no_text(noise):
    page = f"<html><head><title>noise</title></head><body><p>before</p>{noise}<p>after</p></body></html>"
    assert html_to_text(page).strip() == "before\n\nafter"


@pytest.mark.parametrize("name", ["navigator", "automatic", "protocol", "language", "research"])
def test_a_class_that_only_contains_such_a_word_is_text(name):
    assert html_to_text(f"<div class='{name}'>text</div>") == "text"


def test_a_page_that_is_not_well_formed_is_read_to_its_end():
    assert html_to_text("<p>one</b></div><li>two</pre><p>a < b &bogus; <unknown>three").split() == [
        *["one", "-", "two", "a", "<", "b", "&bogus;", "three"]
    ]


# ------------------------------------------------------------------------------------------ bytes and length


def test_compressed_text_and_other_encodings_and_control_characters_are_understood():
    assert list(documents("a.md.gz", gzip.compress("\ufeffhé \r\nthere\n".encode()), "text")) == ["hé\nthere"]
    assert list(documents("a.txt", "hé\x0c\x08 \n\n".encode("latin-1"), "text")) == ["hé"]
    assert list(documents("a.html", b"<p>a</p><p>b \n</p>", "html")) == ["a\n\nb"]


def test_a_file_that_cannot_be_unpacked_or_unpacks_to_too_much_is_named(monkeypatch):
    packed = gzip.compress(b"text" * 100)
    for damaged in (packed[:-9], b"plain", packed[:20] + b"?" + packed[21:]):
        with pytest.raises(UserError, match=r"a\.dz: cannot be unpacked: .*\n  remedy"):
            list(documents("a.dz", damaged, "text"))
    monkeypatch.setattr(to_text, "MAX_BYTES", 399)
    with pytest.raises(UserError, match=r"a\.dz: unpacks to more than"):
        list(documents("a.dz", packed, "text"))
    with pytest.raises(UserError, match=r"a\.rdb: unpacks to more than"):
        list(documents("a.rdb", bytes(4) + zlib.compress(b"text" * 100), "r_strings"))


def test_a_long_text_is_cut_at_an_empty_line_else_at_a_line_else_hard(monkeypatch):
    monkeypatch.setattr(to_text, "LONGEST_DOCUMENT", 12)
    assert list(documents("a", b"one\n\ntwo\nthree\nfour five\nsix, and seven, seven", "text")) == [
        "one\n\n",
        "two\nthree\n",
        "four five\n",
        "six, and sev",
        "en, seven",
    ]


# -------------------------------------------------------------------------------------------- R's data


def r_string(text: str) -> bytes:
    flags = 0x00040009 if text.isascii() else 0x00008009
    return struct.pack(">ii", flags, len(text.encode())) + text.encode()


def r_vector(*lines: str) -> bytes:
    header = b"X\n" + struct.pack(">iiii", 3, 0x040201, 0x030500, 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines))
    packed = zlib.compress(header + b"".join(map(r_string, lines)))
    return struct.pack(">i", len(header)) + packed


def test_the_character_vectors_of_an_r_package_are_texts_with_a_line_a_string():
    database = r_vector("EMMA", "", "Émile said:", "\x00\x04\x00\x09\x00\x00\x00\x02no") + r_vector("Second", "novel")
    assert list(documents("a.rdb", database, "r_strings")) == ["EMMA\n\nÉmile said:\n\tno", "Second\nnovel"]
    for damaged in (database[:-9], database[:4] + b"?" + database[5:]):
        with pytest.raises(UserError, match=r"a\.rdb: (cannot be unpacked|ends within)"):
            list(documents("a.rdb", damaged, "r_strings"))
