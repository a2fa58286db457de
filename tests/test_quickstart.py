"""The promise of `make quickstart`, kept for real: minutes long, so only in `make test-all`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prepare_corpus import write_corpus
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent


def python(*arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two would wait for each other where other tests run beside
    result = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_quickstart_beats_gzip_and_xz_without_a_dead_expert(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shown = python("-m", "moelm.train", "--config", "configs/quickstart.yaml", cwd=tmp_path)
    summary = json.loads((tmp_path / "checkpoints/quickstart/summary.json").read_text())
    assert summary["val/bits_per_byte"] < summary["val/xz_bits_per_byte"] < summary["val/gzip_bits_per_byte"]
    assert summary["moe/dead_experts"] == 0
    assert summary["moe/max_violation"] < 1
    assert summary["alarms"] == []
    events = EventAccumulator(str(tmp_path / "checkpoints/quickstart"))
    events.Reload()
    tags = events.Tags()["scalars"]
    experts = [tag for tag in tags if tag.startswith(("moe/", "aux/"))]
    assert sum("layer_" not in tag for tag in experts) <= 12
    assert all(sum(f"layer_0{layer}/" in tag for tag in experts) <= 6 for layer in range(4))
    assert len(tags) - len(experts) <= 16
    steps = [event.step for event in events.Scalars("train/ce")]
    for tag in ("train/tokens", "train/flops"):
        assert [event.step for event in events.Scalars(tag)] == steps
    for words in ("gzip -9", "xz -9", "dead experts"):
        assert words in shown
    run = "checkpoints/quickstart"
    evaluated = json.loads(python("-m", "moelm.evaluate", "--checkpoint", run, "--json", cwd=tmp_path))
    assert evaluated["all"]["ce"] == pytest.approx(summary["val/ce"], abs=1e-6)
    assert evaluated["all"]["dead_experts"] == [0] * len(evaluated["all"]["dead_experts"])
    prompt = "class Reader:\n    def __init__(self, path):\n        self."
    options = ("--checkpoint", run, "--prompt", prompt, "--temperature", "0.6")
    texts = [python("-m", "moelm.generate", *options, "--seed", seed, cwd=tmp_path) for seed in "012"]
    written = "".join(text.removeprefix(prompt) for text in texts)  # one alone may be a long list
    assert written.count("self") >= 15, written
    assert written.count("\n    ") >= 8, written


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reinforce_and_base_learn_more_in_200_steps_than_random_routing(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    ce = {}
    for router in ("random", "reinforce", "base"):
        changes = [f"run.name={router}", f"model.moe.router={router}", "trainer.max_steps=200", "callbacks=[]"]
        changes += ["model.moe.balancers=[none]"] if router != "reinforce" else []
        python("-m", "moelm.train", "--config", "configs/quickstart.yaml", *changes, cwd=tmp_path)
        ce[router] = json.loads((tmp_path / f"checkpoints/{router}/summary.json").read_text())["val/ce"]
    assert ce["reinforce"] < ce["random"] - 0.01, ce
    assert ce["base"] < ce["random"] - 0.1, ce


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_corpus_of_200_mb_is_prepared_in_less_than_a_gibibyte(tmp_path: Path) -> None:
    write_corpus(tmp_path, 200)
    (tmp_path / "corpus.yaml").write_text(
        f"dir: {tmp_path}/shards\nsources: [{{name: files, path: {tmp_path}/text}}]\n"
    )
    code = (
        "import sys, resource\nfrom data_prep.prepare import main\nmain(['--config', sys.argv[1]])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peak_kib = int(python("-c", code, str(tmp_path / "corpus.yaml"), cwd=tmp_path).splitlines()[-1])
    assert peak_kib < 2**20, f"{peak_kib / 2**20:.2f} GiB"
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    n_bytes = sum(counts["bytes"] for split in manifest["splits"].values() for counts in split.values())
    assert n_bytes >= 199e6
