"""Command: text -> token shards, before training, which would else do it itself."""

from __future__ import annotations

import sys

from moelm import command_line
from moelm.config import load_corpus
from moelm.data.prepare import prepare, why_stale
from moelm.data.token_shards import SPLITS, TokenShards

EXAMPLE = """example:
  python -m data_prep.prepare --config configs/data/stdlib.yaml
  python -m data_prep.prepare --config configs/data/stdlib.yaml tokenizer.vocab_size=8192 dir=data/stdlib-8k
"""


def main(arguments: list[str]) -> None:
    parser = command_line.make_parser(
        "data_prep.prepare", "Split, tokenise and store a corpus. What is there already is kept.", EXAMPLE
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="such as configs/data/stdlib.yaml, or of a run")
    parser.add_argument("--force", action="store_true", help="prepare again and replace what is there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a setting of the config")
    options = command_line.parse(parser, arguments)
    corpus = load_corpus(options.config, options.overrides)
    shards = prepare(corpus, force=options.force)
    if stale := why_stale(corpus, shards):
        print(f"note   {stale}", file=sys.stderr)
    print(table(shards))


def table(shards: TokenShards) -> str:
    """Documents, MB of text and tokens, by split and domain."""
    lines = [f"{shards.folder}: {shards.vocab_size:,} tokens in the vocabulary"]
    width = max(len(domain) for domain in ["domain", *shards.domains])
    lines.append(f"{'split':<6} {'domain':<{width}} {'documents':>10} {'MB':>10} {'tokens':>15}")
    for split in SPLITS:
        for domain, counts in shards.split_counts(split).items():
            row = f"{split:<6} {domain:<{width}} {counts.documents:>10,} {counts.bytes / 1e6:>10,.2f}"
            lines.append(f"{row} {counts.tokens:>15,}")
    for name, value in shards.baselines.items():
        if value is not None:
            lines.append(f"{name.split('_')[0]} on the validation text: {value:.3f} bits per byte")
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)
