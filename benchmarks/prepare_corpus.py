"""`data_prep.prepare` against the bare `tokenizers` library on the same text and cores.

The corpus is the standard library repeated under different names. The bare side has all texts in memory and only
calls `encode_batch`; ours reads, splits, tokenises, hashes and writes. Both sides run in processes of their own,
alternating, so that their peak memory is their own.

    python benchmarks/prepare_corpus.py --mb 200 --repeats 3 --out benchmarks/results/prepare_corpus.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from moelm.config import CorpusConfig, TokenizerConfig, make_named
from moelm.data.prepare import prepare
from moelm.data.sources import FilesConfig, read_stdlib


def stdlib_documents() -> Iterator[str]:
    parts: list[str] = []
    for piece in read_stdlib(make_named("source", "stdlib")):
        parts.append(piece.text)
        if piece.ends_document:
            yield "".join(parts)
            parts.clear()


def write_corpus(folder: Path, mb: int) -> None:
    documents, written, copy = list(stdlib_documents()), 0, 0
    while written < mb * 1e6:
        for i, text in enumerate(documents):
            file = folder / "text" / f"part{copy % 7}" / f"{copy:03d}_{i:04d}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            written += file.write_text(text, encoding="utf-8")
            if written >= mb * 1e6:
                break
        copy += 1


def corpus(folder: Path, tokenizer: Path | None) -> CorpusConfig:
    return CorpusConfig(
        name="benchmark",
        dir=str(folder / "shards"),
        sources=[FilesConfig("files", str(folder / "text"))],
        tokenizer=TokenizerConfig(file=None if tokenizer is None else str(tokenizer)),
    )


def run_side(side: str, folder: Path) -> None:
    """One side, once, in this process: prints seconds of tokenising and peak memory as JSON."""
    tokenizer_file = folder / "tokenizer.json"
    if side == "bare":
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        texts = [file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.txt"))]
        started = time.perf_counter()
        for i in range(0, len(texts), 1000):  # the encodings of all texts at once would need many GB
            tokenizer.encode_batch(texts[i : i + 1000], add_special_tokens=False)
    else:
        started = time.perf_counter()
        prepare(corpus(folder, tokenizer_file), force=True, progress=False)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "peak_gib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=("bare", "moelm"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder, arguments.mb)
        shards = prepare(corpus(folder, None), progress=False)
        (folder / "tokenizer.json").write_bytes(shards.tokenizer_file.read_bytes())
        results: dict[str, list[dict[str, float]]] = {"bare": [], "moelm": []}
        for _ in range(arguments.repeats):
            for side, runs in results.items():
                command = [sys.executable, __file__, "--side", side, "--folder", name]
                runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    rates = {side: [arguments.mb / run["seconds"] for run in runs] for side, runs in results.items()}
    median = {side: statistics.median(values) for side, values in rates.items()}
    result = {
        "cores": os.cpu_count(),
        "corpus_mb": arguments.mb,
        "mb_per_s": {side: {"median": median[side], "all": rates[side]} for side in rates},
        "ratio": median["moelm"] / median["bare"],
        "peak_gib": max(run["peak_gib"] for run in results["moelm"]),
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
