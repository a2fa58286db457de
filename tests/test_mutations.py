"""Whatever a config or a file holds, a command runs as it says or ends with one clear message: no traceback, no hang,
no memory taken that is not there, nothing executed, and no result that is not that of the undamaged files."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from mutations import Enough, bases, damage, dumped, mutate, mutate_text, outcome, unsaid

from data_prep.verify import main as verify_main
from moelm import convert
from moelm.compare import main as compare_main
from moelm.config import Config, from_dict
from moelm.data.prepare import prepare
from moelm.data.token_shards import hash_file
from moelm.evaluate import main as evaluate_main
from moelm.generate import main as generate_main
from moelm.train import main as train_main
from moelm.training import memory
from moelm.training.checkpoint_io import step_folder, write_manifest
from moelm.training.lightning_module import MoELightningModule

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The `data.corpus` section of a little text, prepared."""
    folder = tmp_path_factory.mktemp("mutations")
    (folder / "text").mkdir()
    for name in ("types.py", "shelve.py", "copy.py"):
        shutil.copy(Path(sysconfig.get_path("stdlib"), name), folder / "text" / name)
    source = {"name": "files", "path": str(folder / "text"), "pattern": "**/*.py", "separator": ""}
    corpus = {"name": "little", "dir": str(folder / "shards"), "sources": [source]}
    corpus |= {"tokenizer": {"vocab_size": 320}, "val_fraction": 0.1}
    prepare(from_dict(Config, {"data": {"corpus": corpus}}).data.corpus, progress=False)
    return corpus


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder to run in, on a small machine, where a run that would go on is stopped and starts no process."""
    step = MoELightningModule.training_step

    def counted(self: MoELightningModule, batch: Any, batch_idx: int) -> Any:
        self.n_begun = getattr(self, "n_begun", 0) + 1
        if self.n_begun > 16:
            raise Enough
        return step(self, batch, batch_idx)

    def begun(self: Any) -> None:
        raise Enough

    monkeypatch.setattr(MoELightningModule, "training_step", counted)
    monkeypatch.setattr(_SubprocessScriptLauncher, "_call_children_scripts", begun)
    monkeypatch.setattr(memory, "device_memory", lambda device: 2**29)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------- configs


def mutated_config(seed: int, corpus: dict[str, Any], folder: Path) -> tuple[str, bytes, Any]:
    """What was changed, the YAML, and what it says (None: is no YAML)."""
    rng = random.Random(seed)
    tree = copy.deepcopy(rng.choice(bases(corpus, folder)))
    if rng.random() < 0.2:
        content = mutate_text(dumped(tree), rng)
        try:
            return "text", content, yaml.load(content.decode("utf-8-sig"), Loader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError):
            return "text", content, None
    changes = [mutate(tree, rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    if any("corpus" in change for change in changes) and isinstance(tree.get("data"), dict):
        section = tree["data"].get("corpus")
        if isinstance(section, dict) and isinstance(section.get("dir"), str) and rng.random() < 0.8:
            section["dir"] = str(folder / "other")  # which is prepared
    return ", ".join(changes), dumped(tree).encode("utf-8", "surrogatepass"), tree


def check_config(seed: int, corpus: dict[str, Any], folder: Path) -> str:
    what, content, said = mutated_config(seed, corpus, folder)
    file = folder / "mutated.yaml"
    file.write_bytes(content)
    result, message = outcome(train_main, ["--config", str(file)])
    assert result != "fault", f"seed {seed}, {what}:\n{message}"
    if result == "ran":
        found = [each for each in folder.glob("**/config.yaml") if not each.parent.name.startswith("step-")]
        if found:  # else one that would start other processes
            resolved = yaml.load(found[0].read_text(), Loader)
            assert unsaid(said, resolved) == [], f"seed {seed}, {what}"
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    return result


def check_configs(seeds: range, corpus: dict[str, Any], folder: Path) -> None:
    results = [check_config(seed, corpus, folder) for seed in seeds]
    assert {"ran", "refused"} <= set(results)


def test_mutated_configs_run_as_they_say_or_are_refused(text: dict[str, Any], bounded: Path) -> None:
    check_configs(range(10), text, bounded)


@pytest.mark.slow
def test_many_mutated_configs_run_as_they_say_or_are_refused(text: dict[str, Any], bounded: Path) -> None:
    check_configs(range(100, 500), text, bounded)


FOUND = {  # what was not refused once, or only after memory or time were taken
    "model.moe.n_experts=1000000000": "model: a step takes about",
    "model.d_model=1048576": "model: a step takes about",
    "model.n_layers=1000000": "it must be <= 10000",
    "model.moe.d_expert=4611686018427387904": "model: the sizes in the config do not make a model",
    "model.moe.n_experts=4611686018427387904": "model: the sizes in the config do not make a model",
    "optim.micro_batch_size=1000000000 optim.batch_tokens=16000000000": "optim.micro_batch_size: a step takes about",
    "data.n_workers=1000000000": "it must be <= 256",
    "trainer.devices=1000000000": "at most 4096",
    "trainer.devices=100 optim.batch_tokens=3200": "trainer.devices: a step takes about 0.25 GiB on each of",
    "trainer.num_nodes=2": "trainer.num_nodes: 2, but no launcher started this process",
    "trainer.stop_within_s=1e300": "it must be <= 1000000",
    "model.moe.router=base model.moe.router.n_iterations=1000000000": "it must be <= 10000",
    "extends=/dev/zero": "has more than 1,000,000 characters",
}


def test_what_no_machine_has_is_refused_before_it_is_taken(text: dict[str, Any], bounded: Path) -> None:
    for overrides, message in FOUND.items():
        tree = bases(text, bounded)[0]
        if overrides.startswith("extends="):
            tree, overrides = {"extends": overrides.removeprefix("extends=")}, ""
        (bounded / "base.yaml").write_text(dumped(tree))
        result, said = outcome(train_main, ["--config", "base.yaml", *overrides.split()], 10)
        assert (result, message in said) == ("refused", True), f"{overrides}: {said}"


# ------------------------------------------------------------------------------------------------ files

STEPS = 4


@pytest.fixture(scope="module")
def whole(text: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, shards, config and a run of four steps; what a command prints of each step, and the weights
    that training ends with."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(text["dir"], folder / "shards")
    tree = bases(text | {"dir": "shards"}, Path())[0]
    tree["model"]["moe"] |= {"router": {"name": "top_k", "normalize_gates": "after_top_k"}, "balancers": ["switch"]}
    tree["trainer"]["max_steps"] = STEPS
    tree["checkpoint"]["keep_last"] = STEPS
    tree["run"] = {"name": "run", "dir": "runs"}
    (folder / "run.yaml").write_text(dumped(tree))
    (folder / "corpus.yaml").write_text(dumped(tree["data"]["corpus"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert outcome(train_main, ["--config", "run.yaml"])[0] == "ran"
        patch.setattr(convert, "verify_in_a_fresh_process", lambda *_: 0)
        trained = [hash_file(step_folder(Path("runs/run"), STEPS) / "model.safetensors")]
        steps = [str(step_folder(Path("runs/run"), step)) for step in (1, 2)]
        right = {name: [made_by(name, step)[1] for step in steps] for name in MODELS}
        (folder / "right.json").write_text(json.dumps(right | {"train": trained}))
        for step in range(3, STEPS + 1):
            shutil.rmtree(step_folder(folder / "runs" / "run", step))
    return folder


COMMANDS: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
    "train": (train_main, ["--config", "run.yaml", "--resume"]),
    "evaluate": (evaluate_main, ["--json", "--checkpoint"]),
    "evaluate --data": (evaluate_main, ["--json", "--data", "corpus.yaml", "--checkpoint"]),
    "generate": (generate_main, ["--max-new-tokens", "8", "--checkpoint"]),
    "to-hf": (convert.main, ["to-hf", "--out", "out", "--checkpoint"]),
    "join": (convert.main, ["join", "--out", "out", "--checkpoint"]),
    "compare": (compare_main, ["--json"]),
    "verify": (verify_main, []),
}
MODELS = ("evaluate", "evaluate --data", "generate", "to-hf", "join")  # what reads a model and must put out the same


def made_by(name: str, target: str) -> tuple[str, str]:
    """The outcome of a command, and of one that ran what must be right of it."""
    main, arguments = COMMANDS[name]
    try:
        result, said = outcome(main, [*arguments, target])
        if result == "ran" and name == "train":
            said = hash_file(step_folder(Path("runs/run"), STEPS) / "model.safetensors")
        elif result == "ran" and name in ("to-hf", "join"):
            said = hash_file(Path("out/model.safetensors"))
        return result, said
    finally:
        shutil.rmtree("out", ignore_errors=True)


def check_file(seed: int, whole: Path, folder: Path) -> list[str]:
    rng = random.Random(seed)
    for name in ("runs", "shards"):
        shutil.rmtree(folder / name, ignore_errors=True)
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    allowed = json.loads((folder / "right.json").read_text())
    run, shards = folder / "runs" / "run", sorted((folder / "shards").iterdir())
    steps = sorted(file for file in run.rglob("*") if file.parent.name.startswith("step-"))
    file = rng.choice(
        rng.choice([steps, steps, steps, shards, [each for each in sorted(run.iterdir()) if each.is_file()]])
    )
    what = damage(file, [*steps, *shards], folder / "executed", rng)
    forged = file.parent != run and file.is_file() and not file.is_symlink() and rng.random() < 0.5 and forge(file)
    step = file.parent if file in steps else step_folder(run, 2)
    commands = ["verify"] if file in shards else ["compare"] if file.parent == run else []
    commands += [*rng.sample(MODELS, 2), "train"]
    results = []
    for name in commands:
        target = {"verify": "shards", "compare": "runs", "train": rng.choice(["auto", str(step)])}.get(name)
        result, said = made_by(name, target or str(rng.choice([run, step])))
        case = f"seed {seed}, {file.relative_to(folder)}, {what}{', forged' * forged}, {name}: {said}"
        assert result != "fault", case
        assert not (folder / "executed").exists(), case
        if not forged and name in allowed:
            named = file.name in said or "was prepared with another config" in said  # by evaluate --data, just before
            assert said in allowed[name] if result == "ran" else named, case
        results.append(result)
    return results


def forge(file: Path) -> bool:
    """Make the checksums right again, as one would who means harm; whether they were there to make."""
    manifest = file.with_name("manifest.json")
    if file == manifest:
        try:
            content = json.loads(manifest.read_bytes())
            content.pop("sha256", None)
        except (ValueError, AttributeError, TypeError):
            return False
    elif file.parent.name.startswith("step-"):
        manifest.unlink()
        write_manifest(file.parent, int(file.parent.name[-8:]))
        return True
    else:
        content = json.loads(manifest.read_text())
        del content["sha256"]
        shards = [shard for split in content["splits"].values() for one in split.values() for shard in one["shards"]]
        for shard in shards:
            if shard["file"] == file.name:
                shard["sha256"] = hash_file(file)
        if file.name == "tokenizer.json":
            content["tokenizer_sha256"] = hash_file(file)
    manifest.write_text(json.dumps(content))
    return True


def check_files(seeds: range, whole: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(convert, "verify_in_a_fresh_process", lambda a, made: convert.verify(convert.source_of(a), made))
    results = [result for seed in seeds for result in check_file(seed, whole, folder)]
    assert {"ran", "refused"} <= set(results)


def test_mutated_files_are_refused_or_passed_over(whole: Path, bounded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_files(range(5), whole, bounded, monkeypatch)


@pytest.mark.slow
def test_many_mutated_files_are_refused_or_passed_over(
    whole: Path, bounded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_files(range(100, 250), whole, bounded, monkeypatch)


# ------------------------------------------------------------------------------------- as real processes


def end_of(module: str, arguments: list[str], folder: Path) -> str:
    """What a process said; it must have ended as a command does."""
    ended = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(convert.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode in (0, 2), f"{module} {arguments} exit {ended.returncode}: {ended.stderr}"
    assert "Traceback" not in ended.stderr
    assert ("error: " in ended.stderr) == (ended.returncode == 2), ended.stderr
    assert not (folder / "executed").exists()
    return ended.stderr if ended.returncode else ended.stdout


@pytest.mark.slow
def test_mutated_configs_and_files_end_real_processes_as_they_end_here(
    text: dict[str, Any], whole: Path, bounded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time."""

    def config(seed: int) -> None:
        folder = bounded / f"config{seed}"
        folder.mkdir()
        (folder / "mutated.yaml").write_bytes(mutated_config(seed, text, folder)[1])
        end_of("moelm.train", ["--config", "mutated.yaml"], folder)

    def file(seed: int) -> None:
        rng, folder = random.Random(seed), bounded / f"file{seed}"
        shutil.copytree(whole, folder)
        step = step_folder(folder / "runs" / "run", 2)
        damaged = rng.choice(sorted(step.iterdir()))
        others = sorted(step.iterdir())
        damage(damaged, others, folder / "executed", rng)
        module, arguments = rng.choice(
            [
                ("moelm.train", ["--config", "run.yaml", "--resume", "auto"]),
                ("moelm.evaluate", ["--json", "--checkpoint", "runs/run"]),
                ("moelm.generate", ["--max-new-tokens", "8", "--checkpoint", "runs/run"]),
                ("moelm.convert", ["join", "--out", "out", "--checkpoint", "runs/run"]),
            ]
        )
        end_of(module, arguments, folder)

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(config, seed) for seed in range(1000, 1012)]
        waiting += [pool.submit(file, seed) for seed in range(1000, 1008)]
        for each in waiting:
            each.result()
