"""The commands as a person types them: evaluate, generate, info, and their mistakes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import scalars_of, summary_of
from tokenizers import Tokenizer

from data_prep.prepare import main as prepare_main
from moelm import command_line, generate, info
from moelm.compare import main as compare_main
from moelm.config import Config, ConfigError, UserError, registered, to_yaml
from moelm.data.datamodule import validation_loader
from moelm.data.token_shards import TokenShards
from moelm.evaluate import as_dict, evaluate
from moelm.evaluate import main as evaluate_main
from moelm.generate import main as generate_main
from moelm.info import main as info_main
from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.moe.dispatch.capacity import CapacityDispatcher
from moelm.train import main as train_main
from moelm.train import train
from moelm.training.checkpoint_io import step_folder
from moelm.training.evaluation import EvaluationSums, forward_batch
from moelm.training.loading import load_model

MAINS = {
    **{"compare": compare_main, "evaluate": evaluate_main, "generate": generate_main},
    **{"info": info_main, "train": train_main},
}


@pytest.fixture
def run(tiny: Callable[..., Config]) -> Config:
    config = tiny({"trainer.max_steps": 12, "checkpoint.every_n_steps": 6})
    train(config)
    return config


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_evaluate_on_the_last_checkpoint_equals_the_logged_validation(
    tiny: Callable[..., Config], precision: str
) -> None:
    config = tiny({"trainer.max_steps": 5, "trainer.precision": precision})
    train(config)
    result = evaluate(config.run_folder)["all"]
    logged = summary_of(config.run_folder)
    assert result.ce == pytest.approx(logged["val/ce"], abs=1e-6)
    assert result.bits_per_byte == pytest.approx(logged["val/bits_per_byte"], abs=1e-6)


def test_evaluation_and_validation_stay_within_documents_where_training_does(tiny: Callable[..., Config]) -> None:
    config = tiny({"data.mask_documents": True, "trainer.max_steps": 3, "model.init": {"std": 0.2}})
    train(config)
    model, _, _ = load_model(step_folder(config.run_folder, 3))
    shards = TokenShards(config.data.corpus.path)
    ce = {}
    for separator in (None, shards.end_of_text_id):
        sums = EvaluationSums(shards.domains)
        with torch.no_grad():
            for batch in validation_loader(shards, 32, 16):
                sums.add(batch, forward_batch(model, batch, separator))
        ce[separator] = sums.results()["all"].ce
    assert abs(ce[None] - ce[shards.end_of_text_id]) > 1e-4
    assert evaluate(config.run_folder)["all"].ce == pytest.approx(ce[shards.end_of_text_id], abs=1e-6)
    assert summary_of(config.run_folder)["val/ce"] == pytest.approx(ce[shards.end_of_text_id], abs=1e-6)


def test_the_domains_of_an_evaluation_add_up(run: Config) -> None:
    results = evaluate(run.run_folder)
    domains = {name: result for name, result in results.items() if name != "all"}
    assert set(domains) == {"code", "more"}
    everything = results["all"]
    assert everything.tokens == sum(result.tokens for result in domains.values())
    assert everything.ce == pytest.approx(sum(r.ce * r.tokens for r in domains.values()) / everything.tokens)
    for result in results.values():
        assert torch.tensor(result.load).sum(-1).tolist() == [2 * result.tokens] * 2
    total = sum(torch.tensor(result.load) for result in domains.values())
    assert total.tolist() == everything.load  # type: ignore[union-attr]
    assert as_dict(everything)["perplexity"] == pytest.approx(2.718281828**everything.ce)


def test_what_an_evaluation_says_of_load_and_capacity_is_what_the_experts_got(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch = {"name": "capacity", "eval_capacity_factor": 0.5}
    usage = {"name": "expert_usage", "per_layer": ["val_dropped"]}
    config = tiny({"model.moe.dispatch": dispatch, "trainer.max_steps": 2, "callbacks": [usage]})
    train(config)
    counts, kept = [], CapacityDispatcher.kept

    def watched(self: Any, routing: Any, training: bool) -> Any:
        ids_TK = kept(self, routing, training)
        counts.append([np.bincount(each.flatten(), minlength=9)[:8] for each in (routing.expert_ids_TK, ids_TK)])
        return ids_TK

    monkeypatch.setattr(CapacityDispatcher, "kept", watched)
    found = as_dict(evaluate(config.run_folder)["all"])
    load_ME, kept_ME = np.array(counts).reshape(-1, 2, 2, 8).sum(0).swapaxes(0, 1)  # layers take turns
    dropped_M = 1 - kept_ME.sum(1) / load_ME.sum(1)
    assert (dropped_M > 0.3).all()
    assert found["load"] == load_ME.tolist()
    assert found["dropped"] == pytest.approx(dropped_M)
    assert found["max_violation"] == pytest.approx(load_ME.max(1) / load_ME.mean(1) - 1)
    curves = scalars_of(config.run_folder)
    for layer in (0, 1):
        assert curves[f"moe/layer_{layer:02d}/val_dropped"] == [(2, pytest.approx(dropped_M[layer], rel=1e-5))]


def test_evaluate_predicts_every_token_once_and_counts_every_byte(run: Config) -> None:
    manifest = json.loads((run.data.corpus.path / "manifest.json").read_text())["splits"]["val"]
    result = evaluate(run.run_folder)["all"]
    assert result.tokens == sum(counts["tokens"] for counts in manifest.values())
    assert result.bytes == pytest.approx(sum(counts["bytes"] for counts in manifest.values()))


def test_evaluate_prints_json_and_a_table(run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_main(["--checkpoint", str(step_folder(run.run_folder, 6)), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert {"ce", "perplexity", "bits_per_byte", "load", "tokens"} <= set(printed["all"])
    evaluate_main(["--checkpoint", str(run.run_folder)])
    table = capsys.readouterr().out
    assert "bits/byte" in table
    assert "share of the routed tokens" in table


def test_evaluate_on_other_data_uses_the_checkpoints_tokenizer(run: Config, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for i in range(20):
        (tmp_path / "other" / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    data = tmp_path / "other.yaml"
    data.write_text(
        f"name: other\ndir: {tmp_path / 'shards'}\nval_fraction: 0.3\n"
        f"sources: [{{name: files, path: {tmp_path / 'other'}}}]\ntokenizer: {{vocab_size: 300}}\n"
    )
    prepare_main(["--config", str(data)])  # with a tokenizer of its own, which is left alone
    first = evaluate(step_folder(run.run_folder, 6), data)["all"]
    second = evaluate(step_folder(run.run_folder, 12), data)["all"]
    assert first.tokens == second.tokens > 0
    assert first.ce != second.ce
    made = [path for path in tmp_path.iterdir() if path.name.startswith("shards-") and path.is_dir()]
    assert len(made) == 1
    assert (made[0] / "tokenizer.json").read_bytes() == (run.data.corpus.path / "tokenizer.json").read_bytes()


def test_evaluate_on_the_data_of_the_run_reads_what_is_there(run: Config, tmp_path: Path) -> None:
    data = tmp_path / "same.yaml"
    data.write_text(to_yaml(run.data.corpus))
    assert evaluate(run.run_folder, data)["all"] == evaluate(run.run_folder)["all"]


def small_model(tiny: Callable[..., Config]) -> GPT:
    config = tiny({"model.init": {"std": 0.3}}).model
    model = GPT(config)
    initialize(model, 1)
    return model


def test_greedy_generation_with_and_without_a_cache_is_the_same_text(tiny: Callable[..., Config]) -> None:
    model, prompt = small_model(tiny), torch.tensor([[3, 1, 4, 1, 5, 9]])
    cached, plain = (list(generate.generate(model, prompt, 40, use_cache=use)) for use in (True, False))
    assert cached == plain
    assert len(set(cached)) > 5, "too dull a text to show anything"


@pytest.mark.parametrize("router", sorted(registered("router")))
def test_a_router_generates_the_same_text_with_a_cache_as_without_or_says_why_it_cannot(
    tiny: Callable[..., Config], router: str
) -> None:
    top_k = 1 if router == "switch" else 2
    moe = {"router": router, "top_k": top_k, "balancers": ["none"], "n_experts": 8, "d_expert": 16}
    config = tiny({"model.moe": moe, "model.init": {"std": 0.3}})
    assert config.model.moe is not None
    if config.model.moe.no_generation:
        with pytest.raises(ConfigError, match=r"cannot generate(.|\n)*remedy"):
            next(generate.generate(GPT(config.model), torch.tensor([[1]]), 1))
        return
    model = GPT(config.model)
    initialize(model, 0)
    prompt = torch.tensor([[3, 1, 4, 1, 5, 9]])
    cached, plain = (list(generate.generate(model, prompt, 30, use_cache=use)) for use in (True, False))
    assert cached == plain


def test_a_domain_that_is_shorter_than_a_sequence_is_named(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for domain, words in (("long", 4000), ("short", 30)):
        (tmp_path / "text" / domain).mkdir(parents=True)
        for i in range(9):
            (tmp_path / "text" / domain / f"{i}.txt").write_text("some words that are text " * (words // 9))
    source = {"name": "files", "path": str(tmp_path / "text")}
    corpus = {"dir": str(tmp_path / "shards"), "sources": [source], "tokenizer": {"vocab_size": 300}}
    config = tiny(
        {
            "data.corpus": {**corpus, "val_fraction": 0.3},
            "data.seq_len": 256,
            "trainer.max_steps": 1,
            "optim.micro_batch_size": 2,
        }
    )
    train(config)
    said = capsys.readouterr().err
    assert "note   less than one sequence of 256 tokens, so never trained on: short" in said


def test_a_smaller_tokenizer_and_a_model_that_will_not_generate_are_said_and_may_still_generate(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some words that are text\n\n" * 400)
    source = {"name": "files", "path": str(tmp_path / "text.txt"), "separator": ""}
    corpus = {"dir": str(tmp_path / "shards"), "sources": [source], "tokenizer": {"vocab_size": 500}}
    changes = {"data.corpus": corpus, "trainer.max_steps": 1}
    train(tiny({**changes, "model.moe.dispatch": "capacity"}))
    said = capsys.readouterr().err
    assert re.search(r"note   the text gave a tokenizer of 2\d\d tokens, not of 500\n", said)
    assert "note   moelm.generate will refuse it: with capacity in evaluation" in said
    dropless = {"name": "capacity", "eval_dispatch": "dropless"}
    config = tiny({**changes, "trainer.max_steps": 2, "model.moe.dispatch": dropless})
    train(config, resume="auto")
    said = capsys.readouterr().err
    assert "change model.moe.dispatch.eval_dispatch capacity -> dropless, trainer.max_steps 1 -> 2" in said
    assert "will refuse" not in said
    generate_main(["--checkpoint", str(config.run_folder), "--max-new-tokens", "2"])


def test_a_model_that_cannot_generate_is_refused_before_a_device_is_touched(
    tiny: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny({"model.moe.router": "expert_choice", "model.moe.balancers": ["none"], "trainer.max_steps": 2})
    train(config)
    assert "note   expert_choice is not causal" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="not causal"):
        generate_main(["--checkpoint", str(config.run_folder), "--prompt", "x"])
    assert evaluate(config.run_folder)["all"].ce == pytest.approx(summary_of(config.run_folder)["val/ce"], abs=1e-6)


def test_expert_choice_needs_a_token_for_each_expert(tiny: Callable[..., Config]) -> None:
    moe = {"router": "expert_choice", "balancers": ["none"], "n_experts": 64, "top_k": 1, "d_expert": 8}
    tiny({"model.moe": moe, "data.seq_len": 64, "optim.micro_batch_size": 8})
    with pytest.raises(ConfigError, match=r"data\.seq_len: 32 tokens x top_k = 1 leave less than one"):
        tiny({"model.moe": moe, "data.seq_len": 32})


def test_capacity_generates_only_if_its_evaluation_is_dropless(tiny: Callable[..., Config]) -> None:
    for eval_dispatch, allowed in (("capacity", False), ("dropless", True)):
        config = tiny({"model.moe.dispatch": {"name": "capacity", "eval_dispatch": eval_dispatch}})
        assert config.model.moe is not None
        assert (config.model.moe.no_generation == "") == allowed


def test_sampling_repeats_under_a_seed_and_top_p_cuts_the_tail(tiny: Callable[..., Config]) -> None:
    model, prompt = small_model(tiny), torch.tensor([[3, 1, 4]])

    def sample(**options: float) -> list[int]:
        return list(generate.generate(model, prompt, 20, temperature=1.0, **options))  # type: ignore[arg-type]

    assert sample(seed=1) == sample(seed=1)
    assert sample(seed=1) != sample(seed=2)
    assert sample(seed=1, top_p=1e-6) == list(generate.generate(model, prompt, 20))
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {int(generate.choose_token(logits, 1.0, 0.7, generator)) for _ in range(200)}
    assert drawn == {0, 1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_is_the_root_that_is_drawn_of_a_probability(temperature: float) -> None:
    logits, generator = torch.tensor([0.6, 0.4]).log(), torch.Generator().manual_seed(0)
    drawn = [int(generate.choose_token(logits, temperature, 1.0, generator)) for _ in range(2000)]
    first, second = 0.6 ** (1 / temperature), 0.4 ** (1 / temperature)
    assert sum(drawn) / 2000 == pytest.approx(second / (first + second), abs=0.04)  # 3.5 deviations


def test_generation_stops_at_the_end_of_a_document(tiny: Callable[..., Config]) -> None:
    model, prompt = small_model(tiny), torch.tensor([[3, 1, 4]])
    ids = list(generate.generate(model, prompt, 20))
    end = ids[7]
    assert list(generate.generate(model, prompt, 20, end_of_text=end)) == ids[: ids.index(end)]


def test_generate_streams_the_text_of_uncached_greedy_decoding(run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(run.run_folder), "--prompt", "def", "--max-new-tokens", "12"]
    generate_main([*arguments, "--temperature", "0"])
    shown = capsys.readouterr().out
    model, _, _ = load_model(step_folder(run.run_folder, 12))
    tokenizer = Tokenizer.from_file(str(run.data.corpus.path / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    prompt = torch.tensor([[end, *tokenizer.encode("def").ids]])
    ids = list(generate.generate(model, prompt, 12, end_of_text=end, use_cache=False))
    assert len(ids) > 3
    assert shown == "def" + tokenizer.decode(ids) + "\n"


def test_a_prompt_that_is_not_utf_8_is_continued_and_more_tokens_than_fit_are_refused(
    run: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--checkpoint", str(run.run_folder), "--max-new-tokens", "2", "--prompt"]
    generate_main([*arguments, "d\udcff"])  # as Python spells a byte that is none
    assert capsys.readouterr().out.startswith("d\N{REPLACEMENT CHARACTER}")

    def full(*sizes: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(GPT, "init_cache", full)
    with pytest.raises(ConfigError, match="--max-new-tokens: no memory for the keys and values of 2 tokens"):
        generate_main([*arguments, "d"])


def test_a_character_of_several_tokens_is_streamed_whole() -> None:
    class Bytes:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode("utf-8", "replace")

    text = "naïve → 日本"
    parts = list(generate.stream_text(Bytes(), iter(text.encode())))  # type: ignore[arg-type]
    assert "".join(parts) == text
    assert not any("�" in part for part in parts)


def test_info_prints_the_promised_keys_without_building_the_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Callable[..., Config]
) -> None:
    file = tmp_path / "large.yaml"
    config = tiny({"model.d_model": 4096, "model.n_layers": 60, "model.moe.d_expert": 8192, "model.moe.n_experts": 64})
    file.write_text(to_yaml(config))
    info_main(["--config", str(file), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert {
        *("total_params", "active_params", "active_params_no_input_embedding", "active_params_no_embeddings"),
        *("flops_per_token", "memory_gib"),
    } <= set(facts)
    assert facts["total_params"] > 300e9
    info_main(["--config", str(file)])
    table = capsys.readouterr().out
    for words in ("390B-A15.1B", "389,585,276,928", "C(64,2) = 2,016", "d_expert / d_model", "2.000"):
        assert words in table, words


def test_info_names_memory_for_both_precisions(tiny: Callable[..., Config]) -> None:
    plain, mixed = (info.info(tiny({"trainer.precision": p})) for p in ("32-true", "bf16-mixed"))
    assert mixed["memory_parts_gib"]["activations"] < plain["memory_parts_gib"]["activations"]


def test_gradients_lie_beside_all_activations_only_where_they_accumulate(tiny: Callable[..., Config]) -> None:
    for micro_batch, together in ((8, True), (16, False)):
        config = tiny({"optim.micro_batch_size": micro_batch})
        facts = info.info(config)
        parts = facts["memory_parts_gib"]
        larger_only = 0 if together else min(parts["gradients"], parts["activations"])
        assert facts["memory_gib"] == pytest.approx(sum(parts.values()) - larger_only)
        assert ("gradients come as activations go" in info.as_table(config, facts)) == (not together)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("evaluate", ["--checkpoint", "nowhere"], "nowhere: no such folder"),
        ("generate", ["--checkpoint", "nowhere"], "nowhere: no such folder"),
        ("evaluate", ["--checkpoint", "."], ".: no valid checkpoint"),
        ("generate", ["--checkpoint", ".", "--top-p", "2"], "--top-p: 2.0"),
        ("generate", ["--checkpoint", ".", "--temperature", "-1"], "--temperature: -1"),
        ("generate", ["--checkpoint", ".", "--seed", str(2**63)], "--seed: 9223372036854775808"),
        ("generate", ["--checkpoint", ".", "--max-new-tokens", str(2**31)], "--max-new-tokens: 2147483648"),
        ("info", ["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        ("train", ["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    module: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as stop:
        command_line.run(MAINS[module])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n  remedy: ") == 1
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_a_real_process_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moelm.evaluate", "--checkpoint", "nowhere"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: nowhere: no such folder")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("outlives", [True, False])
def test_what_trains_goes_on_when_nobody_reads_what_it_says(tmp_path: Path, outlives: bool) -> None:
    program = f"""
import sys
from moelm import command_line
def main(argv):
    sys.stdin.readline()  # until the pipes are closed
    for stream in 2 * (sys.stdout, sys.stderr):
        print("a line", file=stream, flush=True)
    open("done", "w").close()
command_line.run(main, outlives_console={outlives})
"""
    options: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, **options)
    for pipe in (process.stdout, process.stderr, process.stdin):
        pipe.close()  # type: ignore[union-attr]
    assert process.wait() == 0
    assert (tmp_path / "done").exists() == outlives


@pytest.mark.parametrize("module", MAINS)
def test_help_has_an_example(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        MAINS[module](["--help"])
    assert stop.value.code == 0
    assert f"example:\n  python -m moelm.{module} " in capsys.readouterr().out


def test_another_tokenizer_is_refused(run: Config) -> None:
    from moelm.training.loading import check_tokenizer

    shards = TokenShards(run.data.corpus.path)
    other = step_folder(run.run_folder, 6)
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not the tokenizer(.|\n)*remedy: another"):
        check_tokenizer(other, shards, "another")


def test_commands_leave_the_environment_alone() -> None:
    before = dict(os.environ)
    command_line.import_builtins()
    assert dict(os.environ) == before
