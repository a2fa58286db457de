"""The promise: a broken config is one readable message and exit code 2, before torch touches a device."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

import moelm.train
from moelm import command_line
from moelm.config import (
    MANAGED_TRAINER_ARGUMENTS,
    OWN_TRAINER_KEYS,
    Config,
    ConfigError,
    CorpusConfig,
    ScheduleConfig,
    TrainerConfig,
    from_dict,
    load_config,
    load_corpus,
    to_yaml,
)

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "data")
CORPORA = sorted((ROOT / "configs/data").rglob("*.yaml"))

BASE = """
run: {name: base}
model:
  n_layers: 2
  d_model: 32
  vocab_size: 512
  attention: {name: gqa, n_heads: 4}
  moe: {n_experts: 8, top_k: 2, d_expert: 16, router: {name: top_k}, balancers: [{name: switch, coef: 0.02}]}
data: {corpus: {name: tiny, tokenizer: {vocab_size: 512}}, seq_len: 32}
optim: {batch_tokens: 512, micro_batch_size: 4, schedule: {name: cosine, warmup_steps: 2}}
trainer: {max_steps: 10, accelerator: cpu, devices: 1}
callbacks: [{name: expert_usage, image_every_n_steps: 5}]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the command runs, with base.yaml in it; the first thing after the checks would be the data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE, encoding="utf-8")

    def prepare(corpus):
        raise AssertionError("the config was accepted")

    monkeypatch.setattr(moelm.train, "prepare", prepare)
    return tmp_path


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    """`refused("--config", "f.yaml", ...)`: the message, after a check that it is all there is."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["moelm.train", *arguments])
        files, cuda = sorted(folder.rglob("*")), torch.cuda.is_initialized()
        with pytest.raises(SystemExit) as exit_:
            command_line.run(moelm.train.main)
        out, err = capsys.readouterr()
        assert (exit_.value.code, out) == (2, "")
        assert torch.cuda.is_initialized() == cuda
        assert sorted(folder.rglob("*")) == files
        assert_readable(err)
        return err

    return call


def assert_readable(message: str) -> None:
    """One error with its remedy, no traceback, and no word of Python or OmegaConf."""
    assert re.match(r"error: \S.*\n  remedy: \S.*\n\Z", message), message
    for jargon in ("Traceback", "None", "True", "False", "<class", "NoneType", "str |", "object_type", "Warning"):
        assert jargon not in message
    assert len(message) < 1200


def write(text: str, file: str = "broken.yaml") -> str:
    Path(file).write_text(text, encoding="utf-8")
    return file


def test_the_unbroken_config_is_accepted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moelm.train", "--config", write("extends: base.yaml\nrun: {seed: 1}")])
    with pytest.raises(AssertionError, match="the config was accepted"):
        command_line.run(moelm.train.main)


TYPOS = [
    ("optm", "optm: {lr: 1.0}", "optim"),
    ("run.nme", "run: {nme: x}", "name"),
    ("model.n_layer", "model: {n_layer: 2}", "n_layers"),
    ("model.attention.n_head", "model: {attention: {n_head: 2}}", "n_heads"),
    ("model.feed_forward.dff", "model: {feed_forward: {dff: 2}}", "d_ff"),
    ("model.init.sdt", "model: {init: {sdt: 2}}", "std"),
    ("model.moe.topk", "model: {moe: {topk: 2}}", "top_k"),
    ("model.moe.experts.backnd", "model: {moe: {experts: {backnd: loop}}}", "backend"),
    ("model.moe.router.scores", "model: {moe: {router: {scores: sigmoid}}}", "score"),
    ("model.moe.balancers.0.coeff", "model: {moe: {balancers: {0: {coeff: 0.1}}}}", "coef"),
    ("data.seqlen", "data: {seqlen: 8}", "seq_len"),
    ("data.corpus.source", "data: {corpus: {source: []}}", "sources"),
    ("data.corpus.tokenizer.vocabsize", "data: {corpus: {tokenizer: {vocabsize: 300}}}", "vocab_size"),
    ("data.corpus.sources.0.patern", "data: {corpus: {sources: [{name: files, patern: x}]}}", "pattern"),
    ("optim.weigth_decay", "optim: {weigth_decay: 0}", "weight_decay"),
    ("optim.schedule.warmup_step", "optim: {schedule: {warmup_step: 3}}", "warmup_steps"),
    ("trainer.max_step", "trainer: {max_step: 3}", "max_steps"),
    ("checkpoint.keep_lst", "checkpoint: {keep_lst: 3}", "keep_last"),
    ("callbacks.0.image_every_n_step", "callbacks: {0: {image_every_n_step: 3}}", "image_every_n_steps"),
    # names of things and of choices
    ("model.attention.name", "model: {attention: {name: gqqa}}", "gqa"),
    ("model.moe.router.name", "model: {moe: {router: {name: topk}}}", "top_k"),
    ("model.moe.balancers.1.name", "model: {moe: {balancers: [switch, {name: zloss}]}}", "z_loss"),
    ("model.moe.dispatch.name", "model: {moe: {dispatch: droples}}", "dropless"),
    ("data.corpus.sources.0.name", "data: {corpus: {sources: [{name: stdlb}]}}", "stdlib"),
    ("callbacks.1.name", "callbacks: [balance, expert_use]", "expert_usage"),
    ("optim.schedule.name", "optim: {schedule: {name: cosin}}", "cosine"),
    ("optim.no_decay", "optim: {no_decay: [norms]}", "norm"),
    ("trainer.precision", "trainer: {precision: bf16-mix}", "bf16-mixed"),
]


@pytest.mark.parametrize(("key", "change", "meant"), TYPOS, ids=[key for key, *_ in TYPOS])
def test_a_typo_is_refused_with_the_name_that_was_meant(refused, key, change, meant):
    message = refused("--config", write(f"extends: base.yaml\n{change}"))
    assert message.startswith(f"error: {key}: ")
    assert f"did you mean {meant}?" in message
    assert re.search(rf"allowed: .*\b{meant}\b", message)


# (change to the base, the key that the message begins with, words that it holds: the value, the remedy)
WRONG = [
    # types
    ("model: {moe: {top_k: lots}}", "model.moe.top_k", ["'lots'", "whole number"]),
    ("model: {n_layers: 3.5}", "model.n_layers", ["3.5", "whole number"]),
    ("model: {n_layers: true}", "model.n_layers", ["true", "whole number"]),
    ("model: {n_layers: null}", "model.n_layers", ["null", "whole number"]),
    ("model: {n_layers: [2]}", "model.n_layers", ["[2]", "whole number"]),
    ("model: {n_layers: .inf}", "model.n_layers", ["inf", "whole number"]),
    ("model: {d_model: 99999999999999999999}", "model.d_model", ["out of range"]),
    ("model: {tied_embeddings: 1}", "model.tied_embeddings", ["1 ", "true or false"]),
    ("model: {tied_embeddings: 'yes'}", "model.tied_embeddings", ["'yes'", "true or false"]),
    ("model: []", "model", ["[] ", "not a mapping", "n_layers"]),
    ("model: gqa", "model", ["'gqa'", "not a mapping"]),
    ("model: null", "model", ["null", "not a mapping", "n_layers"]),
    ("run: null", "run", ["null", "not a mapping", "seed"]),
    ("run: [name]", "run", ["not a mapping"]),
    ("run: {name: [a]}", "run.name", ["text or null"]),
    ("run: {name: true}", "run.name", ["true", "text or null"]),
    ("run: {seed: {a: 1}}", "run.seed", ["{'a': 1}", "whole number"]),
    ("model: {attention: null}", "model.attention", ["null", "name", "gqa"]),
    ("model: {attention: {n_heads: 4, name: null}}", "model.attention.name", ["null", "gqa"]),
    ("model: {moe: {router: [top_k]}}", "model.moe.router", ["['top_k']", "name"]),
    ("model: {moe: {router: {name: [top_k]}}}", "model.moe.router.name", ["['top_k']", "allowed: base, cosine"]),
    ("model: {moe: {balancers: switch}}", "model.moe.balancers", ["'switch'", "not a list", "[{name: ...}]"]),
    ("model: {moe: {balancers: null}}", "model.moe.balancers", ["null", "not a list"]),
    ("model: {moe: {balancers: [null]}}", "model.moe.balancers.0", ["null", "name"]),
    ("model: {moe: {balancers: [{coef: 0.1}]}}", "model.moe.balancers.0", ["coef", "name"]),
    ("model: {moe: {experts: loop}}", "model.moe.experts", ["'loop'", "backend"]),
    ("data: {corpus: 3}", "data.corpus", ["3 ", "sources"]),
    ("data: {corpus: {sources: {name: stdlib}}}", "data.corpus.sources", ["not a list"]),
    ("data: {corpus: {tokenizer: null}}", "data.corpus.tokenizer", ["null", "vocab_size"]),
    ("optim: {betas: 0.9}", "optim.betas", ["0.9", "a list"]),
    ("optim: {betas: [0.9, null]}", "optim.betas", ["a list"]),
    ("optim: {betas: [a, b]}", "optim.betas", ["'a'", "a list"]),
    ("optim: {betas: [true, 0.9]}", "optim.betas", ["a list"]),
    ("optim: {no_decay: norm}", "optim.no_decay", ["'norm'", "a list"]),
    ("optim: {schedule: cosine}", "optim.schedule", ["'cosine'", "name, warmup_steps"]),
    ("optim: {optimizer: 3}", "optim.optimizer", ["'3'", "allowed: adamw"]),
    ("callbacks: {}", "callbacks", ["{} ", "not a list"]),
    ("trainer: {strategy: null}", "trainer.strategy", ["null", "allowed: auto, ddp, fsdp"]),
    ("trainer: {compile: [true]}", "trainer.compile", ["true or false or text"]),
    ("trainer: {compile: maybe}", "trainer.compile", ["'maybe'", "allowed: auto, true, false"]),
    ("trainer: {deterministic: 1}", "trainer.deterministic", ["'1'", "null, true, false, warn"]),
    ("trainer: {profile: some}", "trainer.profile", ["'some'", "true or false"]),
    ("trainer: {devices: 1.5}", "trainer.devices", ["1.5", "whole number"]),
    ("trainer: {deterministic: some}", "trainer.deterministic", ["'some'", "null, true, false, warn"]),
    # values
    ("run: {name: ../x}", "run.name", ["'../x'", "letters"]),
    ("run: {name: ''}", "run.name", ["''", "letters"]),
    ("run: {name: -x}", "run.name", ["'-x'", "letters"]),
    (f"run: {{name: {'x' * 300}}}", "run.name", ["...", "at most 80 letters"]),
    ("run: {dir: ''}", "run.dir", ["''", "not empty"]),
    ('run: {dir: "a\\0b"}', "run.dir", ["a\\x00b", "text"]),
    ("run: {dir: '\\${x}'}", "run.dir", ["'${x}'", "text"]),
    ("run: {seed: -1}", "run.seed", ["-1", ">= 0"]),
    ("optim: {lr: -0.1}", "optim.lr", ["-0.1", "> 0"]),
    ("optim: {lr: 0}", "optim.lr", ["0.0", "> 0"]),
    ("optim: {lr: .nan}", "optim.lr", ["nan", "finite"]),
    ("optim: {lr: .inf}", "optim.lr", ["inf", "finite"]),
    ("optim: {lr: 1e999}", "optim.lr", ["inf", "finite"]),
    ("optim: {betas: []}", "optim.betas", ["[] ", "[0.9, 0.95]"]),
    ("optim: {betas: [0.9, 1.0]}", "optim.betas", ["[0.9, 1.0]", "[0, 1)"]),
    ("model: {moe: {n_experts: 0}}", "model.moe.n_experts", ["0 ", ">= 1"]),
    ("model: {moe: {balancers: {0: {coef: -1}}}}", "model.moe.balancers.0.coef", ["-1.0", ">= 0"]),
    ("model: {dropout: 1.0}", "model.dropout", ["1.0", "< 1"]),
    ("model: {vocab_size: 300}", "model.vocab_size", ["300", "512", "raise it"]),
    ("data: {corpus: {name: ..}}", "data.corpus.name", ["'..'", "letters"]),
    ("data: {corpus: {sources: []}}", "data.corpus.sources", ["empty", "stdlib"]),
    ("data: {corpus: {tokenizer: {vocab_size: 100}}}", "data.corpus.tokenizer.vocab_size", ["100", ">= 257"]),
    ("data: {corpus: {tokenizer: {end_of_text: ''}}}", "data.corpus.tokenizer.end_of_text", ["not empty"]),
    ("optim: {schedule: {name: step, milestones: []}}", "optim.schedule.milestones", ["[] ", "[0.8, 0.9]"]),
    ("optim: {schedule: {name: step, milestones: [0.9, 0.8]}}", "optim.schedule.milestones", ["rising"]),
    ("trainer: {devices: 0}", "trainer.devices", ["0 ", "auto"]),
    ("trainer: {devices: -2}", "trainer.devices", ["-2", "-1 or auto"]),
    ("trainer: {devices: [0, 0]}", "trainer.devices", ["[0, 0]", "indices"]),
    ("trainer: {devices: [-1, 0]}", "trainer.devices", ["[-1, 0]", "indices"]),
    ("trainer: {devices: []}", "trainer.devices", ["[] ", "indices"]),
    ("trainer: {devices: some}", "trainer.devices", ["'some'", "auto"]),
    ("trainer: {limit_val_batches: 1.5}", "trainer.limit_val_batches", ["1.5", "at most 1.0"]),
    ("trainer: {precision: bf16-true}", "trainer.precision", ["'bf16-true'", "expert bias", "bf16-mixed"]),
    ("trainer: {precision: 16-mixed}", "trainer.precision", ["'16-mixed'", "use bf16-mixed"]),
    ("trainer: {strategy: fsdp1}", "trainer.strategy", ["'fsdp1'", "fsdp is FSDP2"]),
    ("trainer: {strategy: fsdp_cpu_offload}", "trainer.strategy", ["FSDP1 is not offered"]),
    ("trainer: {reshard_after_forward: false}", "trainer.reshard_after_forward", ["no effect", "strategy=fsdp"]),
    (
        "trainer: {reduce_dtype: bfloat16, strategy: fsdp}",
        "trainer.reduce_dtype",
        ["no effect", "precision=bf16-mixed"],
    ),
    (
        "trainer: {reduce_dtype: bfloat16, strategy: fsdp, precision: bf16-mixed, accumulate_unreduced: true}",
        "trainer.reduce_dtype",
        ["add up micro-batches", "set one of the two"],
    ),
    ("trainer: {reduce_dtype: float16}", "trainer.reduce_dtype", ["'float16'", "bfloat16"]),
    ("trainer: {accumulate_unreduced: true}", "trainer.accumulate_unreduced", ["no effect", "trainer.strategy=fsdp"]),
    ("trainer: {expert_parallel: 2}", "trainer.expert_parallel", ["strategy = auto", "trainer.strategy=fsdp"]),
    ("trainer: {static_exchange: true}", "trainer.static_exchange", ["no effect", "trainer.expert_parallel to 2"]),
    ("trainer: {replicas: 2, strategy: ddp}", "trainer.replicas", ["strategy = ddp", "trainer.strategy=fsdp"]),
    (
        "model: {moe: null}\ntrainer: {expert_parallel: 2, strategy: fsdp}",
        "trainer.expert_parallel",
        ["no effect in a dense model", "remove it"],
    ),
    (
        "model: {moe: {router: expert_choice, balancers: []}}\ntrainer: {expert_parallel: 2, strategy: fsdp}",
        "trainer.expert_parallel",
        ["tokens choose", "expert_choice makes expert_choice"],
    ),
    (
        "model: {moe: {n_experts: 6}}\ntrainer: {expert_parallel: 4, strategy: fsdp}",
        "trainer.expert_parallel",
        ["4 does not divide", "n_experts = 6", "2, 3, 6"],
    ),
    # combinations
    ("model: {moe: {top_k: 9}}", "model.moe.top_k", ["9 ", "n_experts = 8", "lower top_k"]),
    (
        "model: {moe: {top_k: 1, router: {normalize_gates: after_top_k}}}",
        "model.moe.router.normalize_gates",
        ["no gradient", "top_k >= 2"],
    ),
    ("model: {moe: {balancers: [loss_free]}}", "model.moe.balancers.0", ["loss_free", "selection_bias=true"]),
    ("model: {moe: {router: {selection_bias: true}}}", "model.moe.router.selection_bias", ["no effect", "loss_free"]),
    (
        "model: {moe: {router: reinforce, balancers: [importance]}}",
        "model.moe.balancers.0",
        ["reinforce gives all gates the same value", "use switch"],
    ),
    ("model: {moe: {balancers: [switch, {name: switch}]}}", "model.moe.balancers.1", ["twice", "remove"]),
    ("callbacks: [balance, balance]", "callbacks.1", ["'balance'", "twice", "remove"]),
    (
        "model: {d_model: 20, attention: {n_heads: 2}, moe: {experts: {backend: grouped}}}",
        "model.moe.experts.backend",
        ["d_model = 20", "multiples of 8", "auto or loop"],
    ),
    *(
        (f"model: {{moe: {{{moe}}}}}", "model.moe.experts.backend", ["fused", *parts, "use auto"])
        for moe, parts in (
            ("experts: {backend: fused}, d_expert: 20", ["multiples of 8", "d_expert = 20"]),
            ("experts: {backend: fused, bias: true}", ["biases", "grouped or loop"]),
            ("experts: {backend: fused, activation: clamped_swiglu}", ["clamped_swiglu", "grouped or loop"]),
            ("experts: {backend: fused}, router: expert_choice, balancers: []", ["expert_choice", "grouped or loop"]),
            ("experts: {backend: fused}", ["32-true", "trainer.precision=bf16-mixed"]),
        )
    ),
    ("model: {moe: {first_moe_layer: 2}}", "model.moe.first_moe_layer", ["n_layers = 2", "moe: null"]),
    ("model: {moe: {shared_gate: true}}", "model.moe.shared_gate", ["no effect", "n_shared_experts"]),
    ("model: {norm: batchnorm}", "model.norm", ["'batchnorm'", "rmsnorm, layernorm"]),
    ("model: {moe: {experts: {activation: relu}}}", "model.moe.experts.activation", ["'relu'", "clamped_swiglu"]),
    ("model: {moe: {experts: {clamp_limit: 5.0}}}", "model.moe.experts.clamp_limit", ["5.0", "no effect", "clamped_"]),
    ("model: {moe: {experts: {clamp_alpha: 1.0}}}", "model.moe.experts.clamp_alpha", ["1.0", "no effect", "clamped_"]),
    ("model: {moe: {d_shared: 64}}", "model.moe.d_shared", ["no effect", "n_shared_experts"]),
    ("model: {attention: {n_heads: 3}}", "model.attention.n_heads", ["3 ", "d_model = 32", "head_dim"]),
    ("model: {attention: []}", "model.attention", ["0 attentions", "n_layers = 2", "at least one"]),
    ("model: {attention: [gqa, gqa, mla]}", "model.attention", ["3 attentions", "n_layers = 2", "at most"]),
    ("model: {attention: [gqa, {n_heads: 2}]}", "model.attention.1", ["has no `name`", "gqa, mla"]),
    (
        "model: {attention: [{name: gqa, n_heads: 4}, {name: gqa, n_heads: 3}]}",
        "model.attention.1.n_heads",
        ["d_model"],
    ),
    *(
        (f"model: {{attention: {{n_heads: 4, {options}}}}}", f"model.attention.{key}", parts)
        for options, key, parts in (
            ("qk_norm: whole", "qk_norm", ["'whole'", "none, head, full"]),
            ("clip_qkv: 0", "clip_qkv", ["> 0"]),
            ("sliding_window: 0", "sliding_window", [">= 1"]),
            ("rope_scaling: {factor: 2}", "rope_scaling.factor", ["no effect", "none", "yarn or llama3"]),
            ("rope_scaling: {kind: llama3, factor: 2, mscale: 1}", "rope_scaling.mscale", ["no effect", "yarn"]),
            (
                "rope_scaling: {kind: yarn, factor: 2, original_context: 8, low_frequency_factor: 2}",
                "rope_scaling.low_frequency_factor",
                ["no effect", "llama3"],
            ),
            ("rope_scaling: {kind: yarn, original_context: 8}", "rope_scaling.factor", ["stretches nothing"]),
            ("rope_scaling: {kind: yarn, factor: 2}", "rope_scaling.original_context", ["needs it"]),
            (
                "rope_scaling: {kind: yarn, factor: 2, original_context: 8, beta_fast: 1}",
                "rope_scaling.beta_fast",
                ["beta_slow = 1.0"],
            ),
            (
                "rope_scaling: {kind: llama3, factor: 2, original_context: 8, high_frequency_factor: 1}",
                "rope_scaling.high_frequency_factor",
                ["low_frequency_factor = 1.0"],
            ),
            (
                "rope_scaling: {kind: yarn, factor: 2, original_context: 8, mscale: 1}",
                "rope_scaling.mscale_all_dim",
                ["missing", "both"],
            ),
            ("name: mla, rope_head_dim: 7", "rope_head_dim", ["7 is odd", "pairs"]),
            ("name: mla, rope_scaling: {factor: 2}", "rope_scaling.factor", ["no effect", "yarn or llama3"]),
        )
    ),
    ("optim: {batch_tokens: 500}", "optim.batch_tokens", ["500", "128", "try 512"]),
    ("optim: {schedule: {warmup_steps: 10}}", "optim.schedule.warmup_steps", ["10 ", "max_steps = 10"]),
    ("optim: {schedule: {decay_steps: 3}}", "optim.schedule.decay_steps", ["3 ", "no effect", "wsd"]),
    ("optim: {schedule: {milestones: [0.5]}}", "optim.schedule.milestones", ["no effect", "step"]),
    (
        "optim: {schedule: {name: wsd, warmup_steps: 9, decay_steps: 2}}",
        "optim.schedule.decay_steps",
        ["max_steps = 10", "lower"],
    ),
    *((f"trainer: {{{name}: 1}}", f"trainer.{name}", ["managed", "remedy"]) for name in MANAGED_TRAINER_ARGUMENTS),
    # keys and references
    ("1: 2", "1", ["unknown key", "allowed: run, model"]),
    ("model: {1: 2}", "model.1", ["unknown key", "n_layers"]),
    ("'': 2", "''", ["unknown key", "allowed: run, model"]),
    ("run.name: x", "'run.name'", ["unknown key", "allowed: run, model"]),
    ("model: {moe: {dispatch: {name: dropless, capacity: 1}}}", "model.moe.dispatch.capacity", ["allowed: none"]),
    ("run: {seed: '${nowhere}'}", "run.seed", ["nowhere", "${model.d_model}"]),
    ("run: {seed: '${run.seed}'}", "run.seed", ["remedy"]),
    ("run: {seed: '${oc.env:MOELM_IS_NOT_SET}'}", "run.seed", ["MOELM_IS_NOT_SET"]),
    ("run: {dir: '???'}", "run.dir", ["??? is a value to fill in"]),
    ("model: {moe: {balancers: {0: {coef: '${nowhere}'}}}}", "model.moe.balancers.0.coef", ["nowhere"]),
    ("model: {moe: {balancers: {1: {coef: 0.1}}}}", "model.moe.balancers.1", ["1 elements", "count from 0"]),
    # files
    ("data: {corpus: nowhere.yaml}", "data.corpus: nowhere.yaml", ["no such file", "YAML file"]),
    ("data: {corpus: .}", "data.corpus: .", ["directory", "YAML file"]),
    ("data: {corpus: broken.yaml}", "data.corpus: broken.yaml", ["part of itself"]),
    ("data: {corpus: {tokenizer: {file: nowhere.json}}}", "data.corpus.tokenizer.file", ["'nowhere.json'", "no such"]),
    ("data: {corpus: {sources: [{name: files, path: nowhere}]}}", "data.corpus.sources.0.path", ["'nowhere'"]),
]


@pytest.mark.parametrize(("change", "key", "words"), WRONG, ids=[change[:60] for change, *_ in WRONG])
def test_a_wrong_value_is_refused_with_the_key_the_value_and_the_remedy(refused, change, key, words):
    message = refused("--config", write(f"extends: base.yaml\n{change}"))
    assert message.startswith(f"error: {key}: ")
    for word in words:
        assert word in message


FILES = {
    "not valid YAML": ("run: {name: x", ["broken.yaml", "not valid YAML", "line 1"]),
    "a tab": ("run:\n\tname: x", ["not valid YAML", "line 2"]),
    "a duplicate section": ("run: {seed: 1}\nmodel: {}\nrun: {seed: 2}", ["duplicate key run", "line 3"]),
    "a duplicate key": ("run: {seed: 1, seed: 2}", ["duplicate key seed", "line 1"]),
    "a second document": ("run: {seed: 1}\n---\nrun: {seed: 2}", ["single document"]),
    "an object of Python": ("run: !!python/object/apply:os.getcwd []", ["not valid YAML", "os.getcwd"]),
    "an alias of itself": ("run: &a\n  name: *a", ["not valid YAML", "aliases"]),
    "too deep": ("run: " + "{a: " * 2000 + "1" + "}" * 2000, ["not valid YAML"]),
    "a control sign": ("run: {name: \x01}", ["not valid YAML"]),
    "an unclosed reference": ("run: {name: '${'}", ["not valid YAML", "run.name"]),
    "a list": ("- run", ["not a mapping"]),
    "empty": ("", ["broken.yaml: is empty"]),
    "only comments": ("# run:", ["broken.yaml: is empty"]),
    "a number": ("3", ["broken.yaml"]),
    "a word": ("hello", ["hello: unknown key"]),
    "its own parent": ("extends: broken.yaml", ["extends: broken.yaml: is part of itself"]),
    "no parent": ("extends: nowhere.yaml", ["extends: nowhere.yaml: no such file"]),
    "a folder as parent": ("extends: .", ["extends: .: cannot be read: Is a directory"]),
    "a number among the parents": ("extends: [base.yaml, 3]", ["extends: 3 is not a path", "a list of them"]),
    "itself among the parents": ("extends: [base.yaml, broken.yaml]", ["extends: broken.yaml: is part of itself"]),
    "a zero byte in a path": ('extends: "a\\0b"', ["null byte"]),
}


@pytest.mark.parametrize(("text", "words"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_config_is_refused(refused, text, words):
    message = refused("--config", write(text))
    for word in words:
        assert word in message


def test_a_cycle_of_parents_is_refused(refused):
    write("extends: b.yaml", "a.yaml")
    write("extends: a.yaml", "b.yaml")
    assert refused("--config", "a.yaml").startswith("error: extends: a.yaml: is part of itself")


@pytest.mark.parametrize("content", [b"\x7fELF\x02\x01\x01\x00\xd0\xff", "run: {name: x}".encode("utf-16")])
def test_a_binary_file_is_refused(refused, folder, content):
    (folder / "binary.yaml").write_bytes(content)
    assert refused("--config", "binary.yaml").startswith("error: binary.yaml: is not valid YAML: 'utf-8' codec")


def test_a_missing_file_and_a_folder_are_refused(refused):
    assert refused("--config", "nowhere.yaml").startswith("error: nowhere.yaml: no such file")
    assert refused("--config", ".").startswith("error: .: cannot be read: Is a directory")
    assert "cannot be read" in refused("--config", "x" * 300)


OVERRIDES = [
    ("trainer.max_steps", "trainer.max_steps: is not of the form key=value"),
    ("=3", "=3: is not of the form key=value"),
    ("trainer.max_steps =3", "trainer.max_steps =3: is not of the form key=value"),
    (".a=3", ".a=3: is not of the form key=value"),
    ("model..d_model=3", "model..d_model=3: is not of the form key=value"),
    ("model.moe.balancers[0].coef=1", "model.moe.balancers[0].coef=1: is not of the form key=value"),
    ("run.name=[x", "run.name=[x: cannot be parsed"),
    ("run={seed: 1, seed: 2}", "run={seed: 1, seed: 2}: cannot be parsed"),
    ("run.name=a: b", "run.name: {'a': 'b'} is not text or null"),
    ("run.name=${x", "run.name=${x: cannot be parsed"),
    ("run.name=a b", "run.name: 'a b' is not allowed"),
    ("trainer.max_step=3", "trainer.max_step: unknown key"),
    ("trainer=3", "trainer: 3 is not a mapping"),
    ("model.moe=none", "model.moe: 'none' is not a mapping\n  remedy: give null, or its keys, of: n_experts"),
    ("moe.top_k=3", "moe: unknown key\n  remedy: did you mean model.moe? allowed: run"),
    ("lr=3", "lr: unknown key\n  remedy: did you mean optim.lr? allowed: run"),
    ("model=null", "model: null is not a mapping"),
    ("extends=base.yaml", "extends: unknown key"),
    ("optim.lr=fast", "optim.lr: 'fast' is not a finite number"),
    ("optim.betas=[]", "optim.betas: [] is not two numbers"),
    ("model.moe.balancers.7.coef=1", "model.moe.balancers.7: the list has 1 elements"),
    ("model.moe.balancers.²=1", "model.moe.balancers: is a list of 1 here"),
    ("model.moe.balancers.first.coef=1", "model.moe.balancers: is a list of 1 here"),
    (
        "model.moe.balancers.coef=1",
        "model.moe.balancers: is a list of 1 here\n  remedy: number them, model.moe.balancers.0.coef for",
    ),
    ("data.corpus=nowhere.yaml", "data.corpus: nowhere.yaml: no such file"),
]


@pytest.mark.parametrize(("override", "start"), OVERRIDES, ids=ascii)
def test_a_wrong_override_is_refused(refused, override, start):
    assert refused("--config", "base.yaml", override).startswith(f"error: {start}")


def test_a_checkpoint_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moelm.train", "--config", "base.yaml", "--resume", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        command_line.run(moelm.train.main)
    assert capsys.readouterr().err.startswith("error: nowhere: no such folder")
    assert [path.name for path in Path().iterdir()] == ["base.yaml"]


def test_a_folder_that_cannot_be_made_is_one_message_too(capsys):
    def main(arguments):
        write("", "file")
        Path("file/run").mkdir(parents=True)

    with pytest.raises(SystemExit, match="2"):
        command_line.run(main)
    assert capsys.readouterr().err == "error: file/run: Not a directory\n"


def test_the_real_command_says_one_thing_and_exits_with_2(folder):
    files = sorted(folder.rglob("*"))
    command = [sys.executable, "-m", "moelm.train", "--config", "base.yaml", "model.moe.topk=4", "optim.weight_decay=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: model.moe.topk: unknown key")
    assert_readable(done.stderr)
    assert sorted(folder.rglob("*")) == files


# -------------------------------------------------------------------------------------------- what loads


def load(change: str = "", *overrides: str) -> Config:
    return load_config(write(f"extends: base.yaml\n{change}", "child.yaml"), overrides)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_config_in_the_repository_loads_and_prints_what_loads_again(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moelm.train", "--config", str(file), "--print-config"])
    command_line.run(moelm.train.main)
    out, err = capsys.readouterr()
    assert err == ""
    assert load_config(write(out, "printed.yaml")) == load_config(file)


@pytest.mark.parametrize("file", CORPORA, ids=lambda file: file.name)
def test_every_corpus_in_the_repository_loads(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nothing has been built yet
    if file.name == "packages.yaml":
        with pytest.raises(ConfigError, match=r"make it first: python -m data_prep\.corpora\.packages"):
            load_corpus(file)
        (tmp_path / "data/packages-text").mkdir(parents=True)
        (tmp_path / "data/packages-text/python.jsonl").touch()
    corpus = load_corpus(file)
    assert from_dict(CorpusConfig, yaml.safe_load(to_yaml(corpus))) == corpus
    assert load_corpus(file, ["name=another"]).sources == corpus.sources


def test_a_child_says_only_what_differs_and_an_override_comes_last():
    config = load("model: {d_model: 64}\noptim: {lr: 2e-3}", "optim.lr=4e-3", "trainer.max_steps=20")
    assert (config.model.d_model, config.optim.lr, config.trainer.max_steps) == (64, 4e-3, 20)
    assert (config.model.n_layers, config.model.attention.n_heads, config.optim.schedule.warmup_steps) == (2, 4, 2)
    write("extends: child.yaml\nmodel: {n_layers: 3}", "grandchild.yaml")
    grandchild = load_config("grandchild.yaml")
    assert (grandchild.model.n_layers, grandchild.model.d_model, grandchild.optim.lr) == (3, 64, 2e-3)


def test_a_parent_and_a_corpus_file_are_found_beside_the_file_that_names_them(folder, monkeypatch):
    (folder / "sub").mkdir()
    write("name: mine\nval_fraction: 0.5\ntokenizer: {vocab_size: 300}", "sub/texts.yaml")
    write("extends: ../base.yaml\ndata: {corpus: texts.yaml}", "sub/child.yaml")
    assert load_config("sub/child.yaml").data.corpus.val_fraction == 0.5
    assert load_config("base.yaml", ["data.corpus=sub/texts.yaml"]).data.corpus.name == "mine"
    monkeypatch.chdir(folder / "sub")
    assert load_config("child.yaml").data.corpus.name == "mine"


def test_a_corpus_file_replaces_the_corpus_of_the_parent_whole():
    write("data: {corpus: {name: texts, val_fraction: 0.5}}", "parent.yaml")
    write("seed: 3", "texts.yaml")
    write("extends: parent.yaml\ndata: {corpus: texts.yaml}", "child.yaml")
    for config in (load_config("child.yaml"), load_config("parent.yaml", ["data.corpus=texts.yaml"])):
        assert config.data.corpus == CorpusConfig(name="texts", seed=3)
    changed = load_config("child.yaml", ["data.corpus.val_fraction=0.3"])
    assert changed.data.corpus == CorpusConfig(name="texts", seed=3, val_fraction=0.3)


def test_of_several_parents_the_later_one_wins(folder):
    (folder / "sub").mkdir()
    write("seed: 3", "sub/texts.yaml")
    write("data: {corpus: {val_fraction: 0.5}, n_workers: 2}\noptim: {eps: 1e-6, lr: 0.5}", "first.yaml")
    write("extends: ../first.yaml\ndata: {corpus: texts.yaml}\noptim: {lr: 0.25}", "sub/second.yaml")
    write("extends: [base.yaml, sub/second.yaml]\nmodel: {n_layers: 3, vocab_size: 4096}", "child.yaml")
    config = load_config("child.yaml")
    assert (config.optim.lr, config.optim.eps, config.data.n_workers) == (0.25, 1e-6, 2)
    assert (config.model.d_model, config.model.n_layers) == (load_config("base.yaml").model.d_model, 3)
    assert config.data.corpus == CorpusConfig(name="texts", seed=3)  # a corpus file replaces those before it


def test_what_two_parents_have_in_common_undoes_nothing():
    write("extends: base.yaml\noptim: {weight_decay: 0.7, schedule: {warmup_steps: 1}}", "a.yaml")
    write("extends: base.yaml\nmodel: {n_layers: 3}", "b.yaml")
    write("extends: [a.yaml, b.yaml]\nrun: {seed: 1}", "c.yaml")
    config = load_config("c.yaml")
    assert (config.optim.weight_decay, config.optim.schedule.warmup_steps, config.model.n_layers) == (0.7, 1, 3)


def test_a_section_that_names_another_thing_replaces_the_old_one_whole_but_for_the_warm_up_of_schedules():
    linear = ScheduleConfig(name="linear", warmup_steps=2)
    assert load("optim: {schedule: {name: linear}}").optim.schedule == linear
    assert load("", "optim.schedule.name=linear").optim.schedule == linear
    router = load("", "model.moe.router.name=hash", "model.moe.balancers=[]").model.moe.router
    assert not hasattr(router, "score")
    kept = load("optim: {schedule: {name: cosine, min_lr_ratio: 0.5}}").optim.schedule
    assert kept == ScheduleConfig(name="cosine", warmup_steps=2, min_lr_ratio=0.5)


def test_what_an_override_says_of_a_thing_holds_wherever_another_names_the_thing():
    schedule = ["optim.schedule.warmup_steps=1", "optim.schedule.min_lr_ratio=0.25", "optim.schedule.name=linear"]
    assert load("", *schedule).optim.schedule == ScheduleConfig(name="linear", warmup_steps=1, min_lr_ratio=0.25)
    router = ["model.moe.router.jitter=0.5", "model.moe.balancers.0.coef=0.5", "model.moe.router=switch"]
    moe = load("", *router, "model.moe.top_k=1", "model.moe.balancers=[switch]").model.moe
    assert (moe.router.name, moe.router.jitter, moe.balancers[0].coef) == ("switch", 0.5, 0.5)


def test_the_name_of_a_run_or_of_a_corpus_replaces_nothing_else():
    config = load("run: {seed: 3}\ndata: {corpus: {val_fraction: 0.5}}", "run.name=other", "data.corpus.name=other")
    assert (config.run.name, config.run.seed) == ("other", 3)
    assert (config.data.corpus.name, config.data.corpus.val_fraction) == ("other", 0.5)
    write("name: parent\nval_fraction: 0.5", "parent.yaml")
    write("extends: parent.yaml\nname: texts", "texts.yaml")
    assert load_corpus("texts.yaml") == CorpusConfig(name="texts", val_fraction=0.5)


def test_an_index_changes_one_element_of_a_list_and_a_list_replaces_a_list():
    config = load("", "model.moe.balancers.0.coef=0.1")
    assert [(balancer.name, balancer.coef) for balancer in config.model.moe.balancers] == [("switch", 0.1)]
    config = load("model: {moe: {balancers: [z_loss, switch]}}", "model.moe.balancers.1.coef=0.3")
    assert [(balancer.name, balancer.coef) for balancer in config.model.moe.balancers] == [
        ("z_loss", 0.001),
        ("switch", 0.3),
    ]
    assert load("", "callbacks=[balance]", "callbacks.0={name: throughput}").callbacks[0].name == "throughput"


def test_numbers_may_be_written_in_any_usual_way():
    config = load("optim: {lr: 3e-4, eps: '1e-3', weight_decay: 0}\ntrainer: {max_steps: 1e5, devices: '2'}")
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (3e-4, 1e-3, 0.0)
    assert isinstance(config.optim.weight_decay, float)
    assert (config.trainer.max_steps, config.trainer.devices) == (100_000, 2)
    assert isinstance(config.trainer.max_steps, int)
    assert load("run: {name: 7}").run.name == "7"


def test_the_share_1_0_and_the_count_1_stay_different():
    for value in (1, 1.0):
        limit = load(f"trainer: {{limit_val_batches: {value}}}").trainer.limit_val_batches
        assert (limit, type(limit)) == (value, type(value))


def test_references_and_anchors_are_followed(monkeypatch):
    monkeypatch.setenv("MOELM_SEED", "5")
    config = load("run: {seed: '${oc.env:MOELM_SEED}'}\nmodel: {feed_forward: {d_ff: '${model.d_model}'}}")
    assert (config.run.seed, config.model.feed_forward.d_ff) == (5, 32)
    config = load("run: {seed: &seed 9}\ndata: {corpus: {seed: *seed}}")
    assert config.data.corpus.seed == 9
    assert load("", "optim.micro_batch_size=2", "run.seed=${optim.micro_batch_size}").run.seed == 2


def test_a_run_without_a_name_is_called_like_its_file():
    write(BASE.replace("{name: base}", "{seed: 1}"), "my-run.v2.yaml")
    assert load_config("my-run.v2.yaml").run_name == "my-run.v2"
    assert load_config("my-run.v2.yaml", ["run.name=null"]).run_name == "my-run.v2"
    assert load_config("my-run.v2.yaml", ["run.name=räuber_数"]).run_name == "räuber_数"


def test_a_dense_model_and_no_callbacks_can_be_asked_for():
    config = load("model: {moe: null}\ncallbacks: []")
    assert (config.model.moe, config.model.moe_layers, config.callbacks) == (None, [], [])


@pytest.mark.parametrize("name", ["1e3", "010", "true", "null", "no", "0x1F", "1.5", "1_0", "räuber_数"])
def test_a_name_that_looks_like_something_else_survives_printing(name):
    config = load(f"run: {{name: '{name}'}}")
    config.data.corpus.tokenizer.end_of_text = "a: b # 'c'\n\"\u2028"
    assert config.run.name == name
    assert load_config(write(to_yaml(config), "printed.yaml")) == config


def test_the_trainer_section_knows_every_argument_of_lightning():
    own = {f.name for f in fields(TrainerConfig)}
    arguments = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert own & set(MANAGED_TRAINER_ARGUMENTS) == set()
    assert own | set(MANAGED_TRAINER_ARGUMENTS) == arguments | set(OWN_TRAINER_KEYS)
    assert set(OWN_TRAINER_KEYS) <= own - arguments


def test_every_default_is_of_its_own_type_and_within_its_own_limits():
    assert from_dict(Config, yaml.safe_load(to_yaml(Config()))) == Config()


def test_an_error_names_its_key():
    with pytest.raises(ConfigError) as error:
        load("", "optim.lr=-1")
    assert error.value.key == "optim.lr"


def test_a_corpus_and_the_config_of_a_run_are_told_apart():
    write("sources: [stdlib]", "texts.yaml")
    with pytest.raises(
        ConfigError, match=r"texts\.yaml: is a corpus, not the config of a run\n.*data\.corpus=texts\.yaml"
    ):
        load_config("texts.yaml")
    with pytest.raises(ConfigError, match=r"data\.corpus: base\.yaml is the config of a run, not a corpus"):
        load_config("base.yaml", ["data.corpus=base.yaml"])
    write("model: {n_layers: 2}\ndata: {corpus: {sources: [stdlib], name: own}}", "run.yaml")
    seed = ["data.corpus.seed=3"]
    assert load_corpus("run.yaml", seed) == load_config("run.yaml", seed).data.corpus
    assert load_corpus("run.yaml").name == "own"
