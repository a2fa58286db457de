"""`python -m moelm.compare`: the table of finished runs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import scalars_of, summary_of

from moelm import command_line
from moelm.compare import as_table, compare
from moelm.compare import main as compare_main
from moelm.config import UserError
from moelm.train import train

CHANGES = {"trainer.max_steps": 12, "data.val_every_n_steps": 4}


@pytest.fixture
def runs(tiny) -> Path:
    """The folder of two finished runs: one too short and without a balancer, and one dense."""
    layers = {"model.n_layers": 3, "model.moe.first_moe_layer": 1}
    train(tiny(CHANGES | layers | {"run.name": "experts", "trainer.max_steps": 8}))
    dense = tiny(CHANGES | {"run.name": "dense", "model.moe": None, "optim.lr": 1e-2})
    train(dense)
    (Path(dense.run.dir) / "unfinished").mkdir()
    return Path(dense.run.dir)


def test_a_row_holds_the_numbers_of_the_summary_and_of_the_first_validation(runs):
    rows = compare([runs, runs / "dense"])  # named twice, shown once
    assert [row["run"] for row in rows] == ["dense", "experts"]  # the better one first
    for row in rows:
        summary, validations = summary_of(runs / row["run"]), scalars_of(runs / row["run"])["val/ce"]
        assert (row["first_val_step"], row["first_val_ce"]) == validations[0]
        assert row["val_ce"] == summary["val/ce"] == pytest.approx(validations[-1][1], rel=1e-6)
        assert row["first_val_ce"] > row["val_ce"]
        assert row["total_params"] == summary["total_params"]
    dense, experts = rows
    assert (dense["dead_share"], dense["max_violation"]) == (None, None)
    assert [row["active_params"] - row["active_params_no_embeddings"] for row in rows] == [512 * 32] * 2
    assert experts["dead_share"] == experts["dead_experts"] / (8 * 2)


def test_the_share_of_dead_experts_is_of_all_layers_that_have_some(runs):
    file = runs / "experts/summary.json"
    file.write_text(json.dumps(summary_of(runs / "experts") | {"moe/dead_experts": 4}))
    row = next(row for row in compare([runs]) if row["run"] == "experts")
    assert row["dead_share"] == 0.25
    assert " 25.0%" in as_table([row])


def test_it_prints_a_table_markdown_or_json(runs, capsys):
    compare_main([str(runs)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert "CE at step 4" in lines[0]
    compare_main([str(runs), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    compare_main([str(runs), "--json"])
    assert json.loads(capsys.readouterr().out) == compare([runs])


def test_what_is_no_run_is_one_message(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/summary.json").write_text('{"run": "x"}')
    (tmp_path / "broken/config.yaml").write_text("run: {name: x}")
    for folder, problem in ((tmp_path / "nowhere", "no finished run"), (tmp_path / "broken", "not the summary")):
        monkeypatch.setattr("sys.argv", ["moelm.compare", str(folder)])
        with pytest.raises(SystemExit) as ended:
            command_line.run(compare_main)
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, "")
        assert err.startswith("error: ")
        assert problem in err
        assert str(folder) in err


def test_a_run_that_cannot_be_read_takes_no_other_away(runs, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text("{}")
        (tmp_path / name / "config.yaml").write_text("model: {moe: {router: of_a_plugin}}")
    (tmp_path / "three" / "summary.json").mkdir(parents=True)
    assert compare([runs, tmp_path]) == compare([runs])
    said = capsys.readouterr().err
    assert [line.partition(": ")[0] for line in said.splitlines() if line.startswith("left out")] == [
        f"left out {tmp_path / name}" for name in ("one", "three", "two")
    ]
    assert "'of_a_plugin' is not a known router" in said
    with pytest.raises(UserError, match="none of the runs can be read"):
        compare([tmp_path])
