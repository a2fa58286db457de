"""Command: is prepared data what was written? Training itself hashes data of at most 1 GiB when it opens it."""

from __future__ import annotations

import sys
from pathlib import Path

from moelm import command_line
from moelm.config import UserError
from moelm.data.token_shards import SPLITS, DataError, TokenShards

EXAMPLE = """example:
  python -m data_prep.verify data/stdlib
"""


def main(arguments: list[str]) -> None:
    parser = command_line.make_parser(
        "data_prep.verify",
        "Compare tokenizer and shards with the manifest, sizes and sha256; name the first bad file and exit with 1 "
        "(2: nothing to verify there).",
        EXAMPLE,
    )
    parser.add_argument("folder", metavar="DIR", help="what data_prep.prepare made")
    options = command_line.parse(parser, arguments)
    if not (Path(options.folder) / "manifest.json").is_file():
        problem = "has no manifest.json" if Path(options.folder).is_dir() else "no such folder"
        raise UserError(f"{options.folder}: {problem}\n  remedy: give a folder that data_prep.prepare made")
    try:
        shards = TokenShards(options.folder)
        shards.verify()
    except DataError as error:
        sys.exit(f"error: {error}")
    counts = [counts for split in SPLITS for counts in shards.split_counts(split).values()]
    tokens, documents = sum(each.tokens for each in counts), sum(each.documents for each in counts)
    print(f"{shards.folder}: {tokens:,} tokens of {documents:,} documents are as in manifest.json")


if __name__ == "__main__":
    command_line.run(main)
