"""python -m moelm.train --config F [key=value ...] [--resume auto|PATH]: train the model that a YAML describes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only

from moelm import command_line
from moelm.callbacks.collapse_alarm import read_alarms
from moelm.config import Config, ConfigError, UserError, differences, load_config, to_dict, to_yaml
from moelm.data.datamodule import TokenDataModule
from moelm.data.prepare import prepare, why_stale
from moelm.data.token_shards import TokenShards
from moelm.model.size import flops_per_token, model_size, short_name
from moelm.training.bad_steps import BadStepError
from moelm.training.checkpoint_io import (
    find_checkpoint,
    finish_rename,
    load_checkpoint_config,
    newest_checkpoint,
    set_aside_later,
    step_folders,
    step_of,
    training_state,
    validation_is_due,
)
from moelm.training.lightning_module import MoELightningModule
from moelm.training.loading import check_tokenizer
from moelm.training.memory import check_memory, out_of_memory
from moelm.training.preemption import Preempted, exit_code
from moelm.training.run_lock import run_lock
from moelm.training.trainer import build_trainer, hardware
from moelm.training.weight_files import CheckpointError

EPILOG = """example:
  python -m moelm.train --config configs/quickstart.yaml trainer.max_steps=200 run.name=short
  python -m moelm.train --config configs/quickstart.yaml --resume auto
"""


def main(argv: list[str]) -> None:
    parser = command_line.make_parser(
        "moelm.train",
        "Train the model that a YAML describes; everything it leaves is in <run.dir>/<run.name>/.",
        EPILOG,
    )
    parser.add_argument("--config", required=True, metavar="F", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key, e.g. optim.lr=1e-3")
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="continue: auto = the newest valid checkpoint of this run, if any",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    arguments = command_line.parse(parser, argv)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return
    try:
        train(config, resume=arguments.resume)
    except Preempted as stop:
        sys.exit(stop.exit_code)


def train(config: Config, resume: str | None = None) -> dict[str, Any]:
    """Prepare missing data, train, validate, save; returns what `summary.json` holds.

    `resume`: None refuses a run folder with checkpoints or events in it; "auto" continues its newest valid
    checkpoint or starts; a path continues that checkpoint. Raises UserError, and Preempted once a run that was told to
    end is saved.
    """
    with run_lock(config.run_folder) if _is_first_rank() else nullcontext():
        return _train(config, resume)


def _is_first_rank() -> bool:
    """By the launcher's environment, before there are process groups."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _train(config: Config, resume: str | None) -> dict[str, Any]:
    checkpoint = _checkpoint_to_resume(config, resume)
    step = None if checkpoint is None else step_of(checkpoint)
    changed: list[str] = []
    if checkpoint is not None:
        training_state(checkpoint)  # or there is nothing to continue
        changed = check_same_run(config, checkpoint)
    trainer = build_trainer(config, step)  # refuses what this machine cannot do before the data is prepared
    check_memory(config, trainer)
    shards = prepare(config.data.corpus)
    if checkpoint is not None:
        check_tokenizer(checkpoint, shards, "put the data of that run back, or start another run.name")
    data = TokenDataModule(config, shards)
    module = MoELightningModule(config, shards.domains, shards.end_of_text_id)
    module.continued = checkpoint
    only_validates = checkpoint is not None and step == config.trainer.max_steps and validation_is_due(checkpoint)
    if step is not None and step >= config.trainer.max_steps and not only_validates:
        raise ConfigError(
            "trainer.max_steps",
            f"{config.trainer.max_steps} steps are done already: {checkpoint} is of step {step}",
            f"set more than {step}, or --resume an earlier checkpoint",
        )
    data.consumed_samples = (step or 0) * module.batch_samples
    if trainer.is_global_zero:
        set_aside_later(config.run_folder, step or 0)
        _write(config.run_folder / "config.yaml", to_yaml(config))
        _say_start(config, shards, trainer, checkpoint, changed)
    if only_validates:  # or the loop would not begin; `on_train_start` ends it
        trainer.fit_loop.epoch_loop.max_steps = config.trainer.max_steps + 1
    started = time.perf_counter()
    try:
        trainer.fit(module, data, ckpt_path=checkpoint)
    except MisconfigurationException as error:
        raise ConfigError("trainer", f"Lightning refuses it: {' '.join(str(error).split())}") from error
    except OSError as error:  # of a log; a checkpoint says it by itself
        if error.filename is not None or error.errno not in DISK_ERRORS:
            raise
        raise UserError(f"{config.run_folder}: cannot be written: {error.strerror}") from error
    except BadStepError:  # on all ranks
        if trainer.is_global_zero:
            raise
        code = exit_code(trainer, 2)
        time.sleep(bool(code))  # torchrun or SLURM may end the first rank for it, which has something to say
        sys.exit(code)
    except RuntimeError as error:
        if (said := out_of_memory(error)) is not None:
            raise said from error
        raise
    except Preempted as stop:
        if trainer.is_global_zero:
            print(stop, file=sys.stderr, flush=True)
        time.sleep(bool(stop.exit_code) and not trainer.is_global_zero)  # or the first would be ended for it
        raise
    summary = _summary(config, module, shards, time.perf_counter() - started, step or 0)
    if trainer.is_global_zero:
        _write(config.run_folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        _say_summary(summary, config, step)
    return summary


def _checkpoint_to_resume(config: Config, resume: str | None) -> Path | None:
    folder = config.run_folder
    is_first = _is_first_rank()
    if (folder / "manifest.json").exists():  # an imported model, whose config.yaml a run would write over
        problem = f"{folder} is itself a checkpoint, not the folder of a run"
        raise ConfigError("run.name", problem, "choose another run.name or run.dir")
    continues = resume == "auto" or (resume is not None and Path(resume).resolve().is_relative_to(folder.resolve()))
    trained = [*folder.glob("step-*"), *folder.glob("events.*"), *folder.glob("summary.json")]
    if trained and not continues and is_first:  # the others may come after rank 0 has begun
        raise ConfigError(
            "run.name",
            f"the run {folder} exists" + (f", and {resume} is not of it" if resume else ""),
            "continue it with --resume auto, choose another run.name, or delete the folder",
        )
    if resume is None:
        return None
    if is_first:
        finish_rename(folder)
    share = slice(None) if is_first else None  # the others read theirs together, once they can talk
    checkpoint = newest_checkpoint(folder, share) if resume == "auto" else find_checkpoint(resume, share)
    if checkpoint is None and is_first:
        if damaged := step_folders(folder):
            problem = f"none of its {len(damaged)} checkpoints is valid, the newest is {damaged[-1].name}"
            remedy = "put a copy in its place, or start another run.name: this one would begin anew over its logs"
            raise CheckpointError(f"{folder}: {problem}\n  remedy: {remedy}")
        print(f"no checkpoint in {folder} yet: starting from step 0", file=sys.stderr)
    return checkpoint


def check_same_run(config: Config, checkpoint: Path) -> list[str]:
    """A run is continued as it was: model, data, batch and seed are those of the checkpoint. How long it is, where and
    how fast it runs and what it shows may change, and so may the numbers that the optimizer is given. Raises
    ConfigError; returns what is trained otherwise from here on, in words."""
    saved, wanted = (to_dict(each) for each in (load_checkpoint_config(checkpoint), config))
    changed = {
        f"{section}.{key}": values
        for section in ("run", "model", "data", "optim", "trainer")
        for key, values in differences(saved[section], wanted[section], MAY_CHANGE.get(section, ())).items()
    }
    allowed = {key for key in changed if key.startswith(MAY_CHANGE_AND_IS_SAID)}
    refused = [key for key in changed if key not in allowed]
    if refused:
        before, now = changed[refused[0]]
        others = [f"\n  {key}: {changed[key][1]!r} instead of {changed[key][0]!r}" for key in refused[1:]]
        raise ConfigError(
            refused[0],
            f"{now!r}, but {checkpoint} was trained with {before!r}" + "".join(others),
            "continue with " + ("those values" if others else "that value") + ", or start another run.name",
        )
    return [f"{key} {changed[key][0]} -> {changed[key][1]}" for key in sorted(allowed)]


MAY_CHANGE = {
    "run": ("name", "dir", "preset"),
    "data": ("corpus.dir", "corpus.tokenizer.start_of_text", "n_workers", "val_every_n_steps"),
    "optim": ("micro_batch_size",),
}
MAY_CHANGE_AND_IS_SAID = (
    *("optim.lr", "optim.betas.", "optim.momentum", "optim.eps", "optim.weight_decay", "optim.schedule."),
    *("model.moe.dispatch.eval_", "trainer."),
)


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


def _write(file: Path, text: str) -> None:
    stage = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        stage.write_text(text, encoding="utf-8")
        os.replace(stage, file)
    except OSError as error:
        stage.unlink(missing_ok=True)
        raise UserError(f"{file}: cannot be written: {error}") from error


def _say_start(
    config: Config, shards: TokenShards, trainer: pl.Trainer, checkpoint: Path | None, changed: list[str]
) -> None:
    size = model_size(config.model)
    caution = config.model.moe.router.caution if config.model.moe is not None else ""
    texts = shards.split_counts("train")
    tokens = sum(counts.tokens for counts in texts.values())
    seq_len = config.data.seq_len
    short = [name for name in shards.domains if name not in texts or texts[name].tokens < seq_len]
    notes = [note for note in (caution, why_stale(config.data.corpus, shards)) if note]
    tokenizer, moe = config.data.corpus.tokenizer, config.model.moe
    if tokenizer.file is None and shards.vocab_size < tokenizer.vocab_size:
        notes.append(f"the text gave a tokenizer of {shards.vocab_size:,} tokens, not of {tokenizer.vocab_size:,}")
    if moe is not None and moe.dispatch.no_generation:
        notes.append(f"moelm.generate will refuse it: {moe.dispatch.no_generation}")
    if short:  # of each domain training takes whole sequences
        notes.append(f"less than one sequence of {seq_len} tokens, so never trained on: {', '.join(short)}")
    accumulation = int(trainer.accumulate_grad_batches)
    print(
        f"run    {config.run_folder}" + (f", continuing {checkpoint.name}" if checkpoint else "") + "\n"
        f"model  {short_name(size)}: {size.total:,} parameters, {size.active:,} active a token\n"
        f"data   {config.data.corpus.path}: {tokens / 1e6:.1f} M training tokens\n"
        f"steps  {config.trainer.max_steps:,} of {config.optim.batch_tokens:,} tokens "
        f"({accumulation} micro-batch{'es' * (accumulation > 1)} on each device)\n"
        f"device {hardware(trainer)}, {config.trainer.precision}"
        + (f"\nchange {', '.join(changed)}" if changed else "")
        + "".join(f"\nnote   {note}" for note in notes),
        file=sys.stderr,
        flush=True,
    )


def _summary(
    config: Config, module: MoELightningModule, shards: TokenShards, wall_s: float, first_step: int
) -> dict[str, Any]:
    size = model_size(config.model)
    everything = module.evaluation.get("all")
    tokens = module.step * config.optim.batch_tokens
    tokens_here = (module.step - first_step) * config.optim.batch_tokens
    return {
        "run": config.run_name,
        "step": module.step,
        "tokens": tokens,
        "wall_s": round(wall_s, 1),
        "tokens_per_s": round(tokens_here / wall_s, 1) if tokens_here else None,
        "total_params": size.total,
        "active_params": size.active,
        "train_flops": tokens * flops_per_token(config.model, config.data.seq_len),
        "train/ce": None if module.last_step is None else float(module.last_step.ce),
        "val/ce": everything and everything.ce,
        "val/bits_per_byte": everything and everything.bits_per_byte,
        **module.load_summary(),
        "alarms": [dataclasses.asdict(alarm) for alarm in read_alarms(config.run_folder)],
        **{f"val/{name}": value for name, value in shards.baselines.items()},
    }


def _say_summary(summary: dict[str, Any], config: Config, continued: int | None) -> None:
    """`continued`: the step that this process went on from."""

    def number(key: str, form: str) -> str:
        value = summary[key]
        return "-" if value is None else format(value, form)

    since = "" if continued is None else f" since step {continued:,}"
    rows = [
        ("steps", f"{summary['step']:,} ({summary['tokens']:,} tokens, {summary['train_flops']:.2e} FLOPs)"),
        ("time", f"{summary['wall_s']:.0f} s{since} with validation ({number('tokens_per_s', ',.0f')} tokens/s)"),
        ("parameters", f"{summary['total_params']:,} total, {summary['active_params']:,} active"),
        ("training cross-entropy", f"{number('train/ce', '.4f')} nats/token (last batch)"),
        ("validation cross-entropy", f"{number('val/ce', '.4f')} nats/token"),
        ("validation bits per byte", number("val/bits_per_byte", ".4f")),
        ("  gzip -9 on the same text", number("val/gzip_bits_per_byte", ".4f")),
        ("  xz -9 on the same text", number("val/xz_bits_per_byte", ".4f")),
        (
            "expert load",
            f"MaxVio {number('moe/max_violation', '.3f')}, {number('moe/dead_experts', 'd')} dead experts",
        ),
        *[("alarm", f"step {alarm['step']}, {alarm['message']}") for alarm in summary["alarms"]],
        ("folder", f"{config.run_folder}  (tensorboard --logdir {config.run.dir})"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


if __name__ == "__main__":
    command_line.run(main, outlives_console=True)
