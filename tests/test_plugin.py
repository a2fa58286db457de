"""A router in one file outside the package, named from YAML by `--plugin`, trains, evaluates and generates."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import summary_of

from moelm import command_line
from moelm.config import Config, UserError, to_yaml

PAGE = Path(__file__).parent.parent / "docs" / "add_a_router.md"
ROUTER = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.slow
def test_a_router_in_a_file_outside_the_package_trains(tiny: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "least_router.py").write_text(ROUTER)
    config = tiny({"trainer.max_steps": 4})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    train = ["moelm.train", "--config", "config.yaml", "model.moe.router={name: least, sharpness: 2.0}"]
    unknown = run(tmp_path, *train)
    assert unknown.returncode == 2
    assert "'least' is not a known router" in unknown.stderr
    assert "--plugin" in unknown.stderr
    by_module = run(tmp_path, *train, "--plugin", "least_router")
    assert by_module.returncode == 0, by_module.stderr[-2000:]
    assert summary_of(config.run_folder)["step"] == 4
    file = str(tmp_path / "least_router.py")
    checkpoint = ["--checkpoint", str(config.run_folder), "--plugin", file]
    (tmp_path / "use.py").write_text(
        f"from moelm import evaluate, generate\nevaluate.main({checkpoint})\n"
        f"generate.main({[*checkpoint, '--max-new-tokens', '3']})\n"
    )
    used = run(tmp_path, "use")
    assert used.returncode == 0, used.stderr[-2000:]


@pytest.mark.parametrize(
    ("name", "content"),
    [("nowhere", None), ("missing.py", None), ("wrong.py", "import nothing_of_this_name"), ("bad.py", "def")],
)
def test_a_plugin_that_cannot_be_imported_is_one_message(tmp_path, name, content):
    plugin = str(tmp_path / name) if name.endswith(".py") else name
    if content is not None:
        Path(plugin).write_text(content)
    with pytest.raises(UserError, match=r"--plugin .*cannot be imported(.|\n)*remedy"):
        command_line.import_plugins([plugin])


def test_installed_packages_offer_plugins_by_entry_point(tmp_path, monkeypatch):
    (tmp_path / "offered.py").write_text("WAS_IMPORTED = []\nWAS_IMPORTED.append(1)\n")
    info = tmp_path / "offered-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[moelm.plugins]\nofferer = offered\n")
    monkeypatch.syspath_prepend(tmp_path)
    command_line.import_plugins()
    assert "offered" in sys.modules
