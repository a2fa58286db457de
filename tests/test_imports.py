"""Imports point downward only: commands -> training, callbacks, data -> model -> moe -> config."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

RUN = {"training", "callbacks", "analysis", "hub"}
PURE = {"model", "moe"}
MAY_IMPORT = {
    "config": {"config"},
    "moe": {"moe", "config"},
    "model": PURE | {"config"},
    "data": {"data", "config"},
    **dict.fromkeys(RUN, RUN | PURE | {"data", "config"}),
    "command": RUN | PURE | {"data", "config", "command"},
    "verify": RUN | PURE | {"data", "config", "command", "verify"},
    "data_prep": RUN | PURE | {"data", "config", "data_prep"},
}
STRANGERS = {"routing", "dispatch", "balancing"}  # the folders of moe/ that never import each other
RUN_TIME_ONLY = ("lightning", "pytorch_lightning", "tensorboard", "torch.utils.tensorboard", "torch.distributed")


def violations(root: Path) -> list[str]:
    """What breaks the layering among the modules of root/moelm and root/data_prep, one line each."""
    found = []
    for folder in ("moelm", "data_prep"):
        for file in sorted((root / folder).rglob("*.py")):
            module = file.relative_to(root).with_suffix("").parts
            for line, target in imports(ast.parse(file.read_text(encoding="utf-8")), module):
                reason = why_not(root, module, target)
                if reason is not None:
                    found.append(f"{file.relative_to(root)}:{line} imports {target}: {reason}")
    return found


def imports(tree: ast.Module, module: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that is imported anywhere in a module, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [*module[: -node.level]] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"  # needs only `import torch`
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield node.lineno, ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "?"


def why_not(root: Path, module: tuple[str, ...], target: str) -> str | None:
    """The rule that `module` breaks by importing `target`; None if it may."""
    source, imported = layer(root, module), tuple(target.split("."))
    if source is None:
        return None if len(module) == 2 else f"moelm/{module[1]} has no place in the layering yet: give it one"
    if imported[0] not in ("moelm", "data_prep"):
        if source == "config" and imported[0] in ("torch", "lightning"):
            return "a config is checked before torch is there"
        at_run_time = any(f"{target}.".startswith(f"{name}.") for name in RUN_TIME_ONLY)
        allowed = source not in PURE or (target.startswith("torch.distributed") and module[1:3] == ("moe", "dispatch"))
        if at_run_time and not allowed:
            return f"{source}/ is pure PyTorch"
        return None
    destination = layer(root, imported)
    if destination is None:  # `import moelm`, or an attribute of it
        return None
    command_line = imported[:2] == ("moelm", "command_line") and source == "data_prep"
    if destination not in MAY_IMPORT[source] and not command_line:
        return f"{source} imports only {', '.join(sorted(MAY_IMPORT[source]))}"
    folders = {path[2] for path in (module, imported) if path[:2] == ("moelm", "moe") and len(path) > 2}
    if len(folders) == 2 and folders <= STRANGERS:
        return "routing, dispatch and balancing share moe/types.py only"
    return None


def layer(root: Path, module: tuple[str, ...]) -> str | None:
    if module[0] == "data_prep":
        return "data_prep"
    name = module[1] if len(module) > 1 else "__init__"
    if name in MAY_IMPORT and name not in ("command", "data_prep"):
        return name
    return "command" if (root / "moelm" / f"{name}.py").is_file() and name != "__init__" else None


def test_imports_point_downward_only():
    assert violations(ROOT) == []


def test_the_walk_sees_the_imports_that_are_there():
    tree = ast.parse((ROOT / "moelm/command_line.py").read_text(encoding="utf-8"))
    assert "moelm.moe.routing" in [name for _, name in imports(tree, ("moelm", "command_line"))]
    modules = [path for folder in ("moelm", "data_prep") for path in (ROOT / folder).rglob("*.py")]
    layers = {layer(ROOT, path.relative_to(ROOT).with_suffix("").parts) for path in modules}
    assert layers >= {"config", "moe", "model", "data", "training", "callbacks", "command", "data_prep"}


PLANTED = [
    ("moe/layer.py", "from moelm.model.gpt import GPT", "moe imports only config, moe"),
    ("moe/layer.py", "from moelm import training", "moe imports only config, moe"),
    ("moe/layer.py", "from ..model import gpt", "moe imports only config, moe"),
    ("moe/layer.py", "def f():\n    import moelm.data.sources", "moe imports only config, moe"),
    ("moe/layer.py", "from importlib import import_module\nimport_module('moelm.data')", "moe imports only"),
    ("moe/routing/a.py", "from moelm.moe.balancing.switch import SwitchBalancer", "share moe/types.py only"),
    ("moe/balancing/a.py", "from moelm.moe import dispatch", "share moe/types.py only"),
    ("moe/dispatch/a.py", "from ..routing.top_k import TopKRouter", "share moe/types.py only"),
    ("moe/layer.py", "import lightning.pytorch as pl", "pure PyTorch"),
    ("moe/layer.py", "import torch.distributed as dist", "pure PyTorch"),
    ("moe/routing/a.py", "from torch import distributed", "pure PyTorch"),
    ("moe/routing/a.py", "import torch\ntorch.distributed.is_initialized()", "pure PyTorch"),
    ("model/gpt.py", "from torch.utils.tensorboard import SummaryWriter", "pure PyTorch"),
    ("model/gpt.py", "from tensorboard import program", "pure PyTorch"),
    ("model/gpt.py", "from moelm.data.prepare import prepare", "model imports only config, model, moe"),
    ("data/prepare.py", "from moelm.model.gpt import GPT", "data imports only config, data"),
    ("data/prepare.py", "from moelm.training import optim", "data imports only config, data"),
    ("training/optim.py", "from moelm.train import train", "training imports only"),
    ("training/optim.py", "from moelm import command_line", "training imports only"),
    ("callbacks/a.py", "import moelm.train", "callbacks imports only"),
    ("config/checks.py", "from moelm.moe.types import RouterStats", "config imports only config"),
    ("config/checks.py", "import torch", "before torch"),
    ("data/prepare.py", "import data_prep.prepare", "data imports only config, data"),
    ("train.py", "from data_prep import prepare", "command imports only"),
    ("../data_prep/prepare.py", "from moelm.train import train", "data_prep imports only"),
    ("shelf/a.py", "import os", "no place in the layering"),
]


@pytest.mark.parametrize(("file", "source", "reason"), PLANTED)
def test_a_planted_violation_is_found(tmp_path, file, source, reason):
    plant(tmp_path, file, source)
    found = violations(tmp_path)
    assert found
    assert all(reason in line for line in found)


ALLOWED = [
    ("moe/dispatch/a.py", "import torch.distributed as dist\nfrom moelm.moe.types import TokenChoice"),
    ("model/gpt.py", "import torch\nfrom moelm.moe.layer import MoELayer\nfrom moelm.config import build"),
    ("training/trainer.py", "import moelm\nimport lightning\nfrom moelm.callbacks.progress_bar import StepProgressBar"),
    (
        "callbacks/a.py",
        "from moelm.training.statistics import WINDOW\nfrom torch.utils.tensorboard import SummaryWriter",
    ),
    ("data/a.py", "from lightning.pytorch import LightningDataModule\nfrom moelm import __version__"),
    ("train.py", "from moelm import command_line\nfrom moelm.training.trainer import build_trainer"),
    ("../data_prep/prepare.py", "from moelm.command_line import run\nimport moelm.data.sources"),
]


@pytest.mark.parametrize(("file", "source"), ALLOWED)
def test_what_the_design_allows_is_no_violation(tmp_path, file, source):
    plant(tmp_path, file, source)
    assert violations(tmp_path) == []


def plant(root: Path, file: str, source: str) -> None:
    for name in ("train.py", "command_line.py", file):
        path = root / "moelm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source if name == file else "", encoding="utf-8")


@pytest.mark.parametrize("module", ["moelm", "moelm.config"])
def test_importing_it_starts_nothing_heavy(module):
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'lightning', 'numpy', 'tensorboard') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
