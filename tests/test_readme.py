"""Every command in the README runs; here, with a model so small that it takes seconds."""

from __future__ import annotations

import re
import shlex
import shutil
import sysconfig
from pathlib import Path

import preset_table
import pytest

from data_prep.prepare import main as prepare_main
from moelm.compare import main as compare_main
from moelm.convert import main as convert_main
from moelm.evaluate import main as evaluate_main
from moelm.generate import main as generate_main
from moelm.info import main as info_main
from moelm.train import main as train_main

ROOT = Path(__file__).parent.parent
MAINS = {
    "moelm.train": train_main,
    "moelm.evaluate": evaluate_main,
    "moelm.generate": generate_main,
    "moelm.info": info_main,
    "moelm.compare": compare_main,
    "moelm.convert": convert_main,
    "data_prep.prepare": prepare_main,
}
# run by the slow test of tests/data/test_corpora.py, since it needs a network, and by tests/test_verify.py
ELSEWHERE = ("data_prep.corpora.packages", "moelm.verify")
SMALL = [
    *("trainer.accelerator=cpu", "trainer.devices=1", "trainer.strategy=auto", "trainer.precision=32-true"),
    *("trainer.max_steps=3", "trainer.limit_val_batches=2", "optim.schedule.warmup_steps=0"),
    *("model.n_layers=1", "model.d_model=32", "model.attention.n_heads=2", "model.attention.n_kv_heads=1"),
    *("model.moe.n_experts=4", "model.moe.d_expert=16"),
    *("data.seq_len=256", "optim.batch_tokens=1024", "optim.micro_batch_size=2"),
]


def commands() -> list[list[str]]:
    """The lines of the README's shell blocks, continuation lines joined, comments cut."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_command_of_the_readme_is_of_a_known_kind() -> None:
    kinds = {tuple(words[:3])[: 3 if words[0] == "python" else 1] for words in commands()}
    known = {("python", "-m", module) for module in (*MAINS, *ELSEWHERE)}
    known |= {(name,) for name in ("make", "git", "cd", "tensorboard")}
    assert kinds <= known
    assert {("python", "-m", module) for module in MAINS} <= kinds


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands():
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), words


def test_every_file_that_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"\]\(((?!http)[^)#]+)\)", text)) | set(
        re.findall(r"`((?:moelm|configs|docs|tests|benchmarks|data_prep)/[\w./-]*)`", text)
    )
    assert len(paths) > 10
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_the_table_of_presets_is_that_of_the_presets() -> None:
    """And the parity that was measured is within its limits; `benchmarks/preset_table.py --write` makes all of it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = text.split(preset_table.BEGIN)[1].split(preset_table.END)[0].strip().splitlines()[2:]
    presets = sorted((ROOT / "configs/full").glob("*.yaml"))
    assert len(rows) == len(presets)
    for row, preset in zip(rows, presets, strict=True):
        assert row.startswith(f"| {' | '.join(preset_table.described(preset))} |")
        measured = row.strip("| ").split(" | ")[-3:]
        if preset.stem not in preset_table.WITHOUT_A_CLASS:
            kl, log_probability, gradient = map(float, measured)
            assert kl < 1e-9
            assert log_probability <= 5e-4
            assert gradient <= 2e-4
        else:
            assert measured == ["-"] * 3


@pytest.mark.usefixtures("in_this_process")
def test_the_commands_of_the_readme_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    corpus = tmp_path / "configs/data/stdlib.yaml"  # half a MB instead of its 11
    source = f"- {{name: files, path: {sysconfig.get_path('stdlib')}/asyncio, separator: '', pattern: '**/*.py'}}"
    text = corpus.read_text(encoding="utf-8")
    assert text.count("- name: stdlib") == 1
    corpus.write_text(text.replace("- name: stdlib", source), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    train_main(["--config", "configs/quickstart.yaml", *SMALL])  # what `make quickstart` trains
    ran = 0
    for words in commands():
        module = words[2] if words[:2] == ["python", "-m"] else ""
        if module not in MAINS:
            continue
        arguments = words[3:]
        if module == "moelm.train" and "--print-config" not in arguments:
            changed = {word.split("=")[0] for word in arguments if "=" in word}
            is_mini = any(word.startswith("configs/mini/") for word in arguments)  # its sizes belong together
            sizes = [word for word in SMALL if not (is_mini and word.startswith("model."))]
            kept = [word for word in sizes if word.split("=")[0] not in changed or word.startswith("trainer.")]
            longer = ["trainer.max_steps=5"] if "--resume" in arguments else []
            arguments = [*arguments, *kept, *longer]
        MAINS[module](arguments)
        ran += 1
    assert ran >= 8
    assert "bits/byte" in capsys.readouterr().out
