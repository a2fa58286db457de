"""`moelm.verify` tells a build that keeps its promises from one that does not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import moelm
from moelm.config import UserError
from moelm.verify import __main__ as command
from moelm.verify import kill
from moelm.verify.lab import TINY, Broken, Lab, Row, Run

COUNTS_IN_FORWARD = """
        with torch.no_grad():
            self.count_E += stats.load_BE.sum(0)
        x_TD = chunk_BLD.flatten(0, 1)"""
COUNTS_READ = """self.accumulator.finish(received(self.trainer) is not None)
        from moelm.training.statistics import all_reduce_sums

        counts_ME = torch.stack([layer.count_E for layer in self.model.moe_layers]).double()
        self.last_step.load_ME = all_reduce_sums({"load": counts_ME})["load"]
        for layer in self.model.moe_layers:
            layer.count_E.zero_()"""
COUNTS_MADE = """seed_rank(self.config.run.seed, self.global_rank, first_step)
        for layer in self.model.moe_layers:
            layer.register_buffer("count_E", torch.zeros(layer.experts.gate_up.shape[0]), persistent=False)"""
MODULE = "training/lightning_module.py"
MUTATIONS: dict[str, tuple[str, list[tuple[str, str, str]]]] = {  # subject, and file, what stands there, what instead
    "random numbers are not restored": ("resume", [(MODULE, "set_rng_state(self._rng_to_restore)", "pass")]),
    "the place in the data is forgotten": (
        "resume",
        [("train.py", "data.consumed_samples = (step or 0) * module.batch_samples", "data.consumed_samples = 0")],
    ),
    "counts are buffers": (
        "counters",
        [
            ("moe/layer.py", "\n        x_TD = chunk_BLD.flatten(0, 1)", COUNTS_IN_FORWARD),
            (MODULE, "self.accumulator.finish(received(self.trainer) is not None)", COUNTS_READ),
            (MODULE, "seed_rank(self.config.run.seed, self.global_rank, first_step)", COUNTS_MADE),
            ("training/strategies.py", "broadcast_buffers=False", "broadcast_buffers=True"),
        ],
    ),
    "balancing losses are dropped": ("counters", [(MODULE, "*(aux.weighted for aux in losses.values())", "*()")]),
    "biases are rounded to bfloat16": (
        "counters",
        [(MODULE, "expert_bias.copy_(new_E)", "expert_bias.copy_(new_E.bfloat16())")],
    ),
    "nothing is synced": ("kill", [("training/checkpoint_io.py", "os.fsync(descriptor)", "pass")]),
    "checkpoints are written in place": (
        "kill",
        [
            ("training/saving.py", 'stage = target.with_name(f".{target.name}.tmp-{os.getpid()}")', "stage = target"),
            ("training/saving.py", "[renamed_away(self.target)] if self.target.exists() else []", "list[Path]()"),
            ("training/saving.py", "os.replace(self.stage, self.target)  #", "pass  #"),
        ],
    ),
}
EXPECTED = {  # which rows fail, and how
    "random numbers are not restored": ("the config", "losses of rank 0"),
    "the place in the data is forgotten": ("the config", "got other batches"),
    "counts are buffers": ("counts, recomputed", "says load"),
    "balancing losses are dropped": ("balancing losses", "0.0e+00 of the gradient"),
    "biases are rounded to bfloat16": ("counts", "bias of rank 0"),
    "nothing is synced": ("in place, all synced", "not synced"),
    "checkpoints are written in place": (
        "in place, all synced",
        "0 of 3 checkpoints were renamed into place",
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_program_that_breaks_a_promise_is_found(mutation: str, tmp_path: Path) -> None:
    subject, changes = MUTATIONS[mutation]
    package = tmp_path / "src" / "moelm"
    shutil.copytree(Path(moelm.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in changes:
        text = (package / file).read_text()
        assert text.count(old) == 1, f"{file}: no longer what this test changes: {old}"
        (package / file).write_text(text.replace(old, new))
    config = {**TINY, "data": {**TINY["data"], "corpus": {**TINY["data"]["corpus"], "dir": str(tmp_path / "data")}}}
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    arguments = [subject, "--config", str(tmp_path / "tiny.yaml"), "--devices", "1", "--n", "8", f"run.dir={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}
    verify = [sys.executable, "-m", "moelm.verify", *arguments]
    result = subprocess.run(verify, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    row, how = EXPECTED[mutation]
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert any(row in line and how in line for line in failed), result.stdout + result.stderr[-3000:]
    assert result.returncode == 1


def first(rows: Any, lab: Lab, full: bool) -> Iterator[Row]:
    return islice(rows(lab, False), 1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_promise_of_each_subject_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for subject, rows in command.SUBJECTS.items():
        monkeypatch.setitem(command.SUBJECTS, subject, partial(first, rows))
    command.main(["--n", "2", "data.n_workers=0", f"run.dir={tmp_path}"])
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in told[:-1]] == [["PASS", subject] for subject in command.SUBJECTS]
    assert told[-1].startswith("6 of 6 promises kept")
    assert not list(tmp_path.iterdir())


def test_a_promise_that_is_not_kept_ends_with_1_and_leaves_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> str:
        raise Broken("how it is broken")

    monkeypatch.setitem(command.SUBJECTS, "kill", lambda lab, full: iter([Row("one", broken), Row("two", str)]))
    with pytest.raises(SystemExit, match="1"):
        command.main(["kill", f"run.dir={tmp_path}"])
    told = capsys.readouterr()
    assert told.out.startswith("FAIL  kill        one ")
    assert "1 of 2 promises kept" in told.out
    (folder,) = tmp_path.glob("verify-*")
    assert str(folder) in told.err


def test_runs_hear_an_interrupt_where_a_shell_began_it_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hears() -> str:
        assert signal.getsignal(signal.SIGINT) != signal.SIG_IGN
        return "heard"

    monkeypatch.setitem(command.SUBJECTS, "kill", lambda lab, full: iter([Row("one", hears)]))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        command.main(["kill", f"run.dir={tmp_path}"])
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_that_does_not_go_on_after_a_kill_is_a_promise_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kill, "LIMIT_S", 0.05)
    ended: list[str] = []
    process = SimpleNamespace(pid=7)
    hangs: Any = SimpleNamespace(processes=[process], codes=[None], last_words=": waits", lines=lambda kind: [])
    hangs.kill = lambda: ended.append("killed")
    lab: Any = SimpleNamespace(runs=[])
    with pytest.raises(Broken, match="no step 0 s after it was continued: waits"):
        kill.Trial(lab, asynchronous=False, every=1)._check_start(hangs)
    assert ended == ["killed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["everything"], "everything: no subject"),
        (["all", "--devices", "9"], "--devices: 1 to 8 here"),
        (["model.n_layer=3"], "did you mean n_layers"),
        (["--n", "0"], "--n and --minutes: must be more than 0"),
        (
            ["optim.batch_tokens=192", "data.seq_len=64", "optim.micro_batch_size=1"],
            "3 sequences .* divided among 2 dev",
        ),
        (["counters", "model.moe=null"], "a dense model counts no experts"),
        (["strategies", "model.moe.router=noisy_top_k", "model.moe.balancers=[load]"], "draws numbers on each rank"),
    ],
)
def test_a_mistake_is_said(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        command.main([f"run.dir={tmp_path}", *arguments])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_config_whose_step_is_one_micro_batch_is_divided_among_devices(tmp_path: Path) -> None:
    step = ["data.seq_len=32", "optim.batch_tokens=256", "optim.micro_batch_size=8"]
    lab = Lab(None, [f"run.dir={tmp_path}", *step], devices=[1, 2])
    try:
        assert lab.config.optim.micro_batch_size == 2  # on four as well
        for ranks in (1, 2):
            lab.start(f"of-{ranks}", "trainer.max_steps=3", ranks=ranks).must_end_with(0)
    finally:
        lab.close(keep=False)


def test_the_last_words_of_a_run_are_its_whole_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run: Any = SimpleNamespace(log=log)
    words: Any = Run.last_words
    assert words.fget(run) == ""
    log.write_text("a\nb")
    assert words.fget(run) == ": b"
    log.write_text("a\nerror: key: problem\n  remedy: do\n")
    assert words.fget(run) == ": error: key: problem\n  remedy: do"
