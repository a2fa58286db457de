"""Models on disk, to transformers and back: the same text, the same bits, and nothing half-written."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the models are read by transformers: pip install moelm[hub]")

import hub_models
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from moelm import command_line
from moelm.config import Config, TokenizerConfig, UserError, to_yaml
from moelm.convert import main
from moelm.data.tokenizer import encode_prompt
from moelm.evaluate import evaluate
from moelm.generate import main as generate_main
from moelm.hub import exporting
from moelm.hub.exporting import Export
from moelm.hub.importing import Import
from moelm.hub.streaming import ShardWriter, cast, staged
from moelm.hub.tokenizer_files import read_special_tokens, read_tokenizer
from moelm.hub.verification import verify_export, verify_import
from moelm.train import train
from moelm.training.checkpoint_io import (
    find_checkpoint,
    load_checkpoint_config,
    load_weights,
    write_manifest,
)

MIXTRAL = {"model.moe.router": {"name": "top_k", "normalize_gates": "after_top_k"}}
DEEPSEEK_V3 = {
    "model.n_layers": 3,
    "model.norm_eps": 1e-6,
    "model.tied_embeddings": False,
    "model.attention": {
        **{"name": "mla", "n_heads": 2, "q_latent_dim": 16, "kv_latent_dim": 8, "nope_head_dim": 8},
        **{"rope_head_dim": 8, "v_head_dim": 8},
    },
    "model.moe": {
        **{"n_experts": 8, "top_k": 2, "d_expert": 16, "n_shared_experts": 1, "first_moe_layer": 1},
        "router": {
            **{"name": "top_k", "score": "sigmoid", "selection_bias": True, "normalize_gates": "after_top_k"},
            **{"n_groups": 2, "top_k_groups": 1, "group_score": "top2_sum", "route_scale": 2.5},
        },
        "balancers": [{"name": "loss_free", "rate": 0.01}],
    },
    "model.multi_token_prediction": {"n_modules": 1, "coef": 0.3},
}
PROMPTS = ("def ", "class Reader:\n", "", "<|endoftext|>", "日本")


def trained(tiny: Callable[..., Config], changes: Mapping[str, Any]) -> Config:
    config = tiny({"optim.lr": 1e-2, "trainer.max_steps": 60, "model.init": {"std": 0.1}, **changes})
    train(config)
    return config


def text_of_moelm(checkpoint: Path, prompt: str, capsys: pytest.CaptureFixture[str], n: int = 30) -> str:
    capsys.readouterr()
    options = ["--temperature", "0", "--max-new-tokens", str(n), "--prompt", prompt]
    generate_main(["--checkpoint", str(checkpoint), *options])
    return capsys.readouterr().out.removesuffix("\n").removeprefix(prompt)


def text_of_transformers(folder: Path, prompt: str, n: int = 30) -> str:
    """As anyone would: nothing of moelm is needed."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=n)[0, inputs.input_ids.shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def assert_same_weights(a: Path, b: Path) -> None:
    left, right = load_weights(find_checkpoint(a)), load_weights(find_checkpoint(b))
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def test_a_trained_model_writes_the_same_text_in_transformers_and_comes_back_bit_equal(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    config = trained(tiny, MIXTRAL)
    exported, back = tmp_path / "new" / "exported", tmp_path / "back"
    capsys.readouterr()
    main(["to-hf", "--checkpoint", str(config.run_folder), "--out", str(exported), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["architecture"], report["dtypes"], report["notes"]) == ("mixtral", ["float32"], [])
    assert report["verified_tensors"] == len(load_weights(find_checkpoint(config.run_folder)))
    texts = [text_of_moelm(config.run_folder, prompt, capsys) for prompt in PROMPTS]
    assert texts == [text_of_transformers(exported, prompt) for prompt in PROMPTS]
    assert len(set(texts)) > 2, "too dull a model to show anything"
    request.getfixturevalue("in_this_process")
    main(["from-hf", "--model", str(exported), "--out", str(back)])
    assert f"{back}: mixtral, {report['n_parameters']:,} parameters" in capsys.readouterr().out
    assert_same_weights(config.run_folder, back)
    assert load_checkpoint_config(back).run.name == "back"
    assert texts == [text_of_moelm(back, prompt, capsys) for prompt in PROMPTS]
    data = tmp_path / "data.yaml"
    data.write_text(to_yaml(config.data.corpus))
    expected = evaluate(config.run_folder)["all"]
    assert evaluate(back, data)["all"].ce == pytest.approx(expected.ce, abs=1e-6)
    with pytest.raises(UserError, match="holds weights only"):
        train(dataclasses.replace(config, run=dataclasses.replace(config.run, name="on")), resume=str(back))
    left = [path.name for path in [*tmp_path.iterdir(), *exported.parent.iterdir()] if path.name.startswith(".")]
    assert left == []


@pytest.mark.usefixtures("in_this_process")
def test_a_selection_bias_stays_float32_in_both_directions_and_modules_of_multi_token_prediction_are_left_out(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trained(tiny, DEEPSEEK_V3)
    exported, rounded, imported = tmp_path / "exported", tmp_path / "rounded", tmp_path / "imported"
    main(["to-hf", "--checkpoint", str(config.run_folder), "--out", str(exported)])
    assert "tensors that only training needs, such as multi_token_prediction.0." in capsys.readouterr().out
    for prompt in PROMPTS:
        assert text_of_moelm(config.run_folder, prompt, capsys) == text_of_transformers(exported, prompt)
    source = Export(config.run_folder)
    source.left_out = []
    with pytest.raises(UserError, match=r"multi_token_prediction\S+ of \S+ is nowhere in the model"):
        verify_export(source, exported)
    main(["to-hf", "--checkpoint", str(config.run_folder), "--out", str(rounded), "--dtype", "bfloat16"])
    main(["from-hf", "--model", str(exported), "--out", str(imported), "--dtype", "bfloat16"])
    before = load_weights(find_checkpoint(config.run_folder))
    after, theirs = load_weights(imported), load_file(rounded / "model.safetensors")
    assert after.keys() == {name for name in before if not name.startswith("multi_token_prediction.")} != before.keys()
    for layer in (1, 2):
        ours = before[f"blocks.{layer}.moe.router.expert_bias"]
        assert ours.unique().numel() > 2
        assert not torch.equal(ours, ours.bfloat16().float()), "nothing to lose"
        assert torch.equal(ours, after[f"blocks.{layer}.moe.router.expert_bias"])
        assert torch.equal(ours, theirs[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"])
    assert {tensor.dtype for name, tensor in after.items() if "expert_bias" not in name} == {torch.bfloat16}
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"
    assert text_of_moelm(imported, "def ", capsys)  # a model in bfloat16 runs


def test_what_is_stored_stays_as_it_is_but_for_float16_and_what_is_asked_for() -> None:
    stored = torch.tensor([0.1, 3.0])
    for dtype, wanted in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)):
        tensor = cast(stored.to(dtype), "weight", "auto", is_state=False)
        assert (tensor.dtype, tensor.tolist()) == (wanted, stored.to(dtype).tolist())
    for asked, is_state, wanted in (("bfloat16", False, torch.bfloat16), ("bfloat16", True, torch.float32)):
        assert cast(stored.half(), "weight", asked, is_state).dtype == wanted


KINDS = {kind: name for name, (kind, _) in reversed(hub_models.CASES.items())}  # the first case of each


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder as transformers writes it, to be read only."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("model")
            hub_models.make(name).save_pretrained(made[name])
        return made[name]

    return make


@pytest.mark.usefixtures("in_this_process")
def test_what_an_import_leaves_behind_is_said(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = tiny({**MIXTRAL, "trainer.max_steps": 2}), tmp_path / "model"
    train(run)
    main(["to-hf", "--checkpoint", str(run.run_folder), "--out", str(model)])
    capsys.readouterr()
    main(["from-hf", "--model", str(model), "--out", str(tmp_path / "same")])
    assert "note" not in capsys.readouterr().out
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7], "temperature": 0.6}))
    main(["from-hf", "--model", str(model), "--out", str(tmp_path / "chat")])
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "note: the tokenizer puts nothing before a text; here '<|endoftext|>' comes first, as in training",
        "note: left out: the chat template",
        "note: left out: all tokens that end a text but '<|endoftext|>', of the ids [0, 7]",
        "note: left out: temperature of generation_config.json",
    ]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    "name",
    [name if name in KINDS.values() else pytest.param(name, marks=pytest.mark.slow) for name in hub_models.CASES],
)
def test_the_files_of_every_architecture_come_back(
    name: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    main(["from-hf", "--model", str(model_folder(name)), "--out", str(tmp_path / "checkpoint")])
    main(["to-hf", "--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "back")])
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder(name), tmp_path / "back"))
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype, key
        assert torch.equal(before[key], after[key]), key
    assert load_checkpoint_config(tmp_path / "checkpoint").model == Import(tmp_path / "back").folder.config


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("name", [KINDS["Mixtral"], KINDS["DeepseekV3"], KINDS["Qwen2Moe"]])
def test_both_layouts_and_any_number_of_files_make_the_same_checkpoint(
    name: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    apart = model_folder(name)
    main(["from-hf", "--model", str(apart), "--out", str(tmp_path / "from-apart")])
    for layout, state in (
        ("sharded", load_file(apart / "model.safetensors")),
        ("fused", {key: tensor.clone() for key, tensor in hub_models.make(name).state_dict().items()}),
    ):
        folder = tmp_path / layout
        folder.mkdir()
        shutil.copy(apart / "config.json", folder)
        names = sorted(state)
        files = {key: f"model-{i % 3:05d}-of-00003.safetensors" for i, key in enumerate(names)}
        for file in set(files.values()):
            save_file({key: state[key] for key in names if files[key] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        main(["from-hf", "--model", str(folder), "--out", str(tmp_path / f"from-{layout}")])
        assert_same_weights(tmp_path / "from-apart", tmp_path / f"from-{layout}")


@pytest.mark.usefixtures("in_this_process")
def test_layers_of_multi_token_prediction_are_left_out_if_the_config_counts_them(
    model_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder(KINDS["DeepseekV3"]), folder)
    change_state(folder, lambda state: state.update({"model.layers.3.eh_proj.weight": state[NORM]}))
    change_json(folder / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(UserError, match=r"model\.layers\.3\.eh_proj\.weight is not expected"):
        Import(folder)
    change_json(folder / "config.json", num_nextn_predict_layers=1)
    main(["from-hf", "--model", str(folder), "--out", str(tmp_path / "checkpoint")])
    assert "left out: 1 tensors that are none of the model, such as model.layers.3.eh" in capsys.readouterr().out


@pytest.mark.usefixtures("in_this_process")
def test_an_output_table_beside_a_tied_one_is_dropped_only_if_it_is_the_same(
    model_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, head, embedding = tmp_path / "model", "lm_head.weight", "model.embed_tokens.weight"
    shutil.copytree(model_folder("mixtral sliding and tied"), folder)
    change_state(folder, lambda state: state.update({head: state[embedding]}))
    main(["from-hf", "--model", str(folder), "--out", str(tmp_path / "same")])
    assert "left out: 1 tensors that are none of the model, such as lm_head.weight" in capsys.readouterr().out
    change_state(folder, lambda state: state.update({head: state[head] + 1e-3}))
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        main(["from-hf", "--model", str(folder), "--out", str(tmp_path / "other")])
    change_json(folder / "config.json", tie_word_embeddings=False)
    main(["from-hf", "--model", str(folder), "--out", str(tmp_path / "other")])
    assert torch.equal(load_weights(tmp_path / "other")["head.weight"], load_file(folder / "model.safetensors")[head])


def test_weights_are_written_in_files_of_limited_size(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardWriter.__init__, "__defaults__", (4000,))
    source = Import(model_folder(KINDS["Mixtral"]))
    (tmp_path / "checkpoint").mkdir()
    source.write(tmp_path / "checkpoint", "checkpoint")
    assert len(list((tmp_path / "checkpoint").glob("model-0000?.safetensors"))) > 3
    export = Export(tmp_path / "checkpoint")
    (tmp_path / "out").mkdir()
    export.write(tmp_path / "out", "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    verify_export(export, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = hub_models.make(KINDS["Mixtral"]).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ verification

Tensors = dict[str, torch.Tensor]


def zero(state: Tensors, key: str) -> None:
    state[key] = torch.zeros_like(state[key])


def swap(state: Tensors, a: str, b: str) -> None:
    state[a], state[b] = state[b], state[a]


EXPERT = "model.layers.1.mlp.experts.{}.down_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
EXPORT_DAMAGE: list[tuple[Callable[[Tensors], Any], str]] = [
    (lambda state: zero(state, "model.norm.weight"), r"norm\.weight is all zero, its source is not"),
    (lambda state: zero(state, EXPERT.format(3)), r"blocks\.1\.moe\.experts\.down differs"),
    (lambda state: zero(state, BIAS), r"blocks\.1\.moe\.router\.expert_bias is all zero"),
    (lambda state: state.pop(EXPERT.format(3)), r"experts\.3\.down_proj\.weight is missing"),
    (lambda state: state.pop("lm_head.weight"), r"lm_head\.weight is missing"),
    (lambda state: state.update({"model.extra": torch.ones(1)}), r"model\.extra is not expected"),
    (lambda state: state.update({"model.layers.9.x": torch.ones(1)}), r"model\.layers\.9\.x is not expected"),
    (lambda state: swap(state, EXPERT.format(1), EXPERT.format(2)), r"blocks\.1\.moe\.experts\.down differs"),
    (lambda state: swap(state, "lm_head.weight", "model.embed_tokens.weight"), r"embedding\.weight differs"),
    (lambda state: state.update({BIAS: state[BIAS].nextafter(torch.tensor(9.0))}), r"expert_bias differs"),
    (lambda state: state.update({BIAS: state[BIAS][:3]}), r"e_score_correction_bias has the shape \(3,\), not \(12,\)"),
    (
        lambda state: state.update({"model.norm.weight": state["model.norm.weight"].bfloat16()}),
        r"norm\.weight is torch\.bfloat16 \(27,\), not torch\.float32 \(27,\)",
    ),
]


def test_verification_of_an_export_finds_every_damage(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    checkpoint.mkdir()
    Import(model_folder(KINDS["DeepseekV3"])).write(checkpoint, "x")
    out.mkdir()
    source = Export(checkpoint)
    source.write(out, "out")
    n_tensors = verify_export(source, out)
    assert n_tensors == len(load_weights(checkpoint))
    whole = load_file(out / "model.safetensors")
    for damage, message in EXPORT_DAMAGE:
        state = dict(whole)
        damage(state)
        save_file(state, out / "model.safetensors")
        with pytest.raises(UserError, match=message):
            verify_export(source, out)
    save_file(whole, out / "model.safetensors")
    assert verify_export(source, out) == n_tensors
    change_json(out / "config.json", routed_scaling_factor=1.5)
    with pytest.raises(UserError, match=r"model\.moe\.router\.route_scale is 1\.5, the checkpoint has 2\.5"):
        verify_export(source, out)


IMPORT_DAMAGE: list[tuple[Callable[[Tensors], Any], str]] = [
    (lambda state: zero(state, "blocks.0.attention.q.weight"), r"q_proj\.weight is all zero, its source is not"),
    (lambda state: state.pop("norm.weight"), r"norm\.weight is missing"),
    (lambda state: state.update(extra=torch.ones(1)), "extra is not expected"),
    (lambda state: swap(state, "blocks.0.moe.experts.down", "blocks.1.moe.experts.down"), r"experts\.0\.w2.* differs"),
    (lambda state: state["blocks.1.moe.experts.gate_up"][2].neg_(), r"layers\.1.*experts\.2\.w1\.weight differs"),
    (lambda state: state.update({"norm.weight": state["norm.weight"].half()}), "is torch.float16"),
]


def test_verification_of_an_import_finds_every_damage(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    source = Import(model_folder(KINDS["Mixtral"]))
    source.write(checkpoint, "x")
    file = checkpoint / "model-00001.safetensors"
    assert verify_import(source, checkpoint) == len(source.folder.tensors)
    whole = {name: tensor.clone() for name, tensor in load_weights(checkpoint).items()}
    for damage, message in IMPORT_DAMAGE:
        state = {name: tensor.clone() for name, tensor in whole.items()}
        damage(state)
        save_file(state, file)
        with pytest.raises(UserError, match=r"sha256|bytes"):
            verify_import(source, checkpoint)
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint, 0)
        with pytest.raises(UserError, match=message):
            verify_import(source, checkpoint)
    text = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(text.replace("norm_eps: 1.0e-05", "norm_eps: 1.0e-06"))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, 0)
    with pytest.raises(UserError, match=r"model\.norm_eps is 1e-06, its source has 1e-05"):
        verify_import(source, checkpoint)


@pytest.mark.parametrize("where", ["in this process", pytest.param("in a fresh process", marks=pytest.mark.slow)])
def test_what_was_written_wrong_is_removed(
    where: str,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if where == "in this process":
        request.getfixturevalue("in_this_process")
    add = ShardWriter.add

    def forget_one(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        if name != "blocks.1.attention.k.weight":
            add(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", forget_one)  # in this process only
    with pytest.raises(UserError, match=r"blocks\.1\.attention\.k\.weight is missing"):
        main(["from-hf", "--model", str(model_folder(KINDS["Mixtral"])), "--out", str(tmp_path / "new" / "out")])
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------- bad input


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.file,))


def change_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "removed"}))


def change_state(folder: Path, change: Callable[[Tensors], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({key: tensor.clone() for key, tensor in state.items()}, folder / "model.safetensors")


def change_bytes(folder: Path, change: Callable[[bytes], bytes]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"model.norm.weight": Bomb(folder.parent / "executed")}, file)


def become(folder: Path, name: str) -> None:
    """Another model in the place of this one."""
    shutil.rmtree(folder)
    hub_models.make(name).save_pretrained(folder)


def index(folder: Path, **files: str) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names | files}))


NORM = "model.norm.weight"
NO_LAYERS: dict[str, Any] = {"num_hidden_layers": 0, "layer_types": []}
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: change_bytes(f, lambda b: b[:-9]), "model.safetensors: not a whole safetensors file"),
    "corrupted": (lambda f: change_bytes(f, lambda b: b[:9] + b"}" + b[10:]), "model.safetensors: not a whole"),
    "empty": (lambda f: change_bytes(f, lambda b: b""), "model.safetensors: not a whole safetensors file"),
    "unknown key": (lambda f: change_json(f / "config.json", spice=3), "spice"),
    "unknown model": (lambda f: change_json(f / "config.json", model_type="llama"), "model_type is 'llama'"),
    "no model_type": (lambda f: change_json(f / "config.json", model_type="removed"), "model_type is None"),
    "a value that cannot be": (lambda f: change_json(f / "config.json", num_local_experts="many"), "num_local_experts"),
    "missing tensor": (lambda f: change_state(f, lambda state: state.pop(NORM)), f"{NORM} is missing"),
    "unexpected tensor": (lambda f: change_state(f, lambda s: s.update(x=s[NORM])), "x is not expected"),
    "a layer past the last": (
        lambda f: change_state(f, lambda s: s.update({"model.layers.3.input_layernorm.weight": s[NORM]})),
        "model.layers.3.input_layernorm.weight is not expected",
    ),
    "another shape": (
        lambda f: change_state(f, lambda s: s.update({NORM: s[NORM][:4]})),
        f"{NORM} makes norm.weight (4,)",
    ),
    "whole numbers": (lambda f: change_state(f, lambda s: s.update({NORM: s[NORM].long()})), f"{NORM} is torch.int64"),
    "another shape of an expert": (
        lambda f: change_state(f, lambda s: s.update({W1: s[W1][:4]})),
        "experts.0.w1.weight has no right shape",
    ),
    "a pickle": (only_a_pickle, "pytorch_model.bin is a pickle, which can run code: it is not opened"),
    "a pickle called safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(Bomb(f.parent / "executed"))),
        "model.safetensors: not a whole safetensors file",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors and no model.safetensors.index"),
    "index of another folder": (lambda f: index(f, **{NORM: "../x.safetensors"}), "names '../x.safetensors'"),
    "index of a pickle": (lambda f: index(f, **{NORM: "x.bin"}), "names 'x.bin'"),
    "index of a file that is not there": (lambda f: index(f, **{NORM: "x.safetensors"}), "x.safetensors: missing"),
    "index of more than there is": (lambda f: index(f, y="model.safetensors"), "y: the index says model.safetensors"),
    "an index that is none": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": 3}'),
        "has no weight_map",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: missing"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: not a mapping"),
    "tokenizer is no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json: not a tokenizer"),
    "no folder": (shutil.rmtree, "no such folder"),
    "no layers of which each has a type": (
        lambda f: (become(f, "qwen2_moe windows, steps"), change_json(f / "config.json", **NO_LAYERS)),
        "num_hidden_layers is 0",
    ),
    "no layers of which some are dense": (
        lambda f: (become(f, "qwen3_moe sparse steps"), change_json(f / "config.json", **NO_LAYERS)),
        "num_hidden_layers is 0",
    ),
    "sizes beyond 64 bits": (
        lambda f: change_json(f / "config.json", hidden_size=10**12, vocab_size=10**18),
        "the sizes in the config do not make a model",
    ),
    "a number in place of a matrix": (
        lambda f: (become(f, "gpt_oss"), change_state(f, lambda s: s.update({GATE_UP: torch.tensor(1.0)}))),
        f"{GATE_UP} has no right shape",
    ),
    "an id of the end that cannot be": (
        lambda f: (
            change_json(f / "config.json", eos_token_id=10**12),
            Tokenizer(WordLevel({"a": 0}, "a")).save(str(f / "tokenizer.json")),
        ),
        "eos_token_id 0 of config.json: 1000000000000",
    ),
    "a tokenizer that cannot encode": (
        lambda f: Tokenizer(WordLevel({"b": 0}, "?")).save(str(f / "tokenizer.json")),
        "tokenizer.json: not a tokenizer",
    ),
    "a tokenizer of another model": (
        lambda f: Tokenizer(WordLevel({"a": 0, "b": 61}, "a")).save(str(f / "tokenizer.json")),
        "has the id 61 ('b'), but the vocab_size is 61",
    ),
}
W1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


def refusal(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which the command ends, with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["convert", *arguments])
    with pytest.raises(SystemExit) as stop:
        command_line.run(main)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_bad_model_is_one_message_and_nothing_is_executed_or_written(
    kind: str,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = tmp_path / "model", tmp_path / "new" / "out"
    shutil.copytree(model_folder(KINDS["Mixtral"]), folder)
    spoil, message = BAD_MODELS[kind]
    spoil(folder)
    capsys.readouterr()
    said = refusal(["from-hf", "--model", str(folder), "--out", str(out)], monkeypatch, capsys)
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 1
    assert message in said
    assert {path.name for path in tmp_path.iterdir()} <= {"model"}


def test_only_what_a_killed_conversion_left_is_removed(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    killed = subprocess.Popen(["true"])
    killed.wait()
    runs, dead = (f".out.tmp-{number}" for number in (os.getppid(), killed.pid))
    for name in (runs, dead, f".out.tmp-{os.getpid()}", f".out.tmp-{10**30}", ".out.tmp-x", f".other.tmp-{killed.pid}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    with staged(tmp_path / "out") as stage:
        assert list(stage.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"out", runs, ".out.tmp-x", f".other.tmp-{killed.pid}"}


@pytest.mark.parametrize(
    ("exit_code", "message"),
    [
        ("kill -9 $$", "the verification itself failed (exit -9), so what was written was removed"),
        (
            "echo no memory >&2; exit 1",
            "the verification itself failed (exit 1), so what was written was removed:\nno m",
        ),
        ("echo y is wrong >&2; exit 2", "what was written is not right, so it was removed:\ny is wrong"),
    ],
)
def test_a_verification_that_fails_itself_is_told_from_one_that_finds_something(
    exit_code: str,
    message: str,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "python").write_text(f"#!/bin/sh\n{exit_code}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError) as caught:
        main(["from-hf", "--model", str(model_folder(KINDS["Mixtral"])), "--out", str(tmp_path / "out")])
    assert str(caught.value).startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_a_folder_that_exists_is_left_alone(
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").mkdir()
    source = str(model_folder(KINDS["Mixtral"]))
    for out in (tmp_path / "out", Path(source) / "config.json"):
        assert f"{out} exists" in refusal(["from-hf", "--model", source, "--out", str(out)], monkeypatch, capsys)
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["from-hf", "--checkpoint", "x", "--out", "y"], "from-hf takes --model, not --checkpoint"),
        (["to-hf", "--model", "x", "--out", "y"], "to-hf takes --checkpoint, not --model"),
        (["to-hf", "--checkpoint", "x"], "one of the arguments --out --verify is required"),
        (["sideways", "--checkpoint", "x", "--out", "y"], "invalid choice: 'sideways'"),
        (["to-hf", "--checkpoint", "x", "--out", "y", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["to-hf", "--checkpoint", "nowhere", "--out", "y"], "nowhere: no such folder"),
        (["--plugin", "nowhere.py", "to-hf", "--checkpoint", "x", "--out", "y"], "--plugin nowhere.py"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(arguments, monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_architecture_expresses_is_refused_with_all_reasons_before_anything_is_written(
    tiny: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {"model.moe.router": {"name": "hash"}, "model.moe.balancers": ["none"], "trainer.max_steps": 2}
    config = tiny(changes)
    train(config)
    arguments = ["to-hf", "--checkpoint", str(config.run_folder), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    said = refusal(arguments, monkeypatch, capsys)
    assert "router" in said
    assert "hash" in said
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "example:\n  python -m moelm.convert to-hf" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture
def with_tokenizer(tiny: Callable[..., Config], tmp_path: Path) -> Callable[..., Path]:
    """A model folder beside whose weights lies a tokenizer, which puts `first` before a text, if that is given."""
    from moelm.data.prepare import prepare

    def make(first: str | None) -> Path:
        folder = tmp_path / "model"
        hub_models.make("mixtral odd", vocab_size=520).save_pretrained(folder)
        tokenizer = Tokenizer.from_file(str(prepare(tiny().data.corpus).tokenizer_file))
        tokenizer.add_special_tokens(["<s>", "</s>"])
        if first is not None:
            tokens = [(first, tokenizer.token_to_id(first))]
            tokenizer.post_processor = TemplateProcessing(single=f"{first} $A", special_tokens=tokens)
        tokenizer.save(str(folder / "tokenizer.json"))
        change_json(folder / "config.json", eos_token_id=[tokenizer.token_to_id("</s>"), 3])
        return folder

    return make


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("first", ["<s>", None])
def test_an_imported_model_begins_with_the_token_that_its_tokenizer_puts_first(
    first: str | None, with_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    folder = with_tokenizer(first)
    main(["from-hf", "--model", str(folder), "--out", str(tmp_path / "checkpoint")])
    section = load_checkpoint_config(tmp_path / "checkpoint").data.corpus.tokenizer
    assert (section.start_of_text, section.end_of_text, section.file) == (first, "</s>", None)
    tokenizer = Tokenizer.from_file(str(tmp_path / "checkpoint" / "tokenizer.json"))
    ids = encode_prompt(tokenizer, section, "def f(x)")
    assert ids[0] == tokenizer.token_to_id(first or "</s>")
    if first is not None:
        assert ids == tokenizer.encode("def f(x)").ids
    main(["to-hf", "--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "back")])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert theirs("def f(x)").input_ids == ids
    assert (theirs.bos_token, theirs.eos_token) == (first or "</s>", "</s>")
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.token_to_id("</s>")


@pytest.mark.usefixtures("in_this_process")
def test_the_end_of_text_is_what_the_tokenizers_own_config_says(
    with_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    folder = with_tokenizer("<s>")
    for i, eos in enumerate(["<|endoftext|>", {"content": "<|endoftext|>", "special": True}]):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        main(["from-hf", "--model", str(folder), "--out", str(tmp_path / f"checkpoint{i}")])
        section = load_checkpoint_config(tmp_path / f"checkpoint{i}").data.corpus.tokenizer
        assert section.end_of_text == "<|endoftext|>"


def test_the_end_of_text_is_the_first_that_is_named_and_that_the_tokenizer_has(
    with_tokenizer: Callable[..., Path],
) -> None:
    folder = with_tokenizer("<s>")
    ids = {"config.json": [4_000_000, 1.5, True, -1], "generation_config.json": 10**12}
    for name, eos_token_id in ids.items():
        change_json(folder / name, eos_token_id=eos_token_id)
    hf = json.loads((folder / "config.json").read_text())

    def end() -> str:
        return read_special_tokens(folder, hf, 520).end_of_text

    assert end() == "<|endoftext|>"  # the default, which it has too
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer.replace("<|endoftext|>", "<|other|>"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(UserError) as caught:
        end()
    for words in ("tokenizer_config.json: '<|im_end|>'", "eos_token_id 0 of config.json: 4000000", "1000000000000"):
        assert words in str(caught.value)
    assert "name one as eos_token in" in str(caught.value)
    assert "['<|other|>', '<s>', '</s>']" in str(caught.value)
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<s>"}}')
    assert end() == "<s>"
    change_json(folder / "generation_config.json", eos_token_id=[7_000_000, 513])
    assert end() == "</s>"
    change_json(folder / "tokenizer_config.json", eos_token="<|other|>")
    assert end() == "<|other|>"


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(with_tokenizer: Callable[..., Path]) -> None:
    folder = with_tokenizer("<s>")
    assert read_special_tokens(folder, {}, 514).start_of_text == "<s>"
    with pytest.raises(UserError, match=r"tokenizer\.json: has the id 513 \('</s>'\), but the vocab_size is 513"):
        read_special_tokens(folder, {}, 513)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("prompt", ["", "w1 w2"])
def test_the_words_of_a_sentencepiece_tokenizer_are_streamed_with_their_spaces(
    prompt: str, model_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("mixtral odd"), folder)
    tokenizer = Tokenizer(WordLevel({f"▁w{i}": i for i in range(60)}, "▁w0"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    main(["from-hf", "--model", str(folder), "--out", str(tmp_path / "checkpoint")])
    words = (prompt + text_of_moelm(tmp_path / "checkpoint", prompt, capsys, n=5)).split(" ")
    assert len(words) == len(prompt.split()) + 5
    assert all(f"▁{word}" in tokenizer.get_vocab() for word in words)


def test_what_a_tokenizer_file_says_of_length_is_no_matter(with_tokenizer: Callable[..., Path]) -> None:
    folder = with_tokenizer("<s>")
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = encode_prompt(plain, TokenizerConfig(start_of_text="<s>"), "def f(x): return x")
    for change in (lambda each: each.enable_truncation(2), lambda each: each.enable_padding(length=99)):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        change(tokenizer)
        tokenizer.save(str(folder / "changed.json"))
        changed = Tokenizer.from_file(str(folder / "changed.json"))
        assert changed.encode("def f(x): return x").ids != plain.encode("def f(x): return x").ids
        assert encode_prompt(changed, TokenizerConfig(start_of_text="<s>"), "def f(x): return x") == expected
        assert read_tokenizer(folder / "changed.json").encode("def f(x): return x").ids == expected


@pytest.mark.usefixtures("in_this_process")
def test_a_tokenizer_that_cannot_be_written_or_lacks_its_tokens_leaves_nothing(
    with_tokenizer: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    main(["from-hf", "--model", str(with_tokenizer(None)), "--out", str(checkpoint)])
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_name_files", lambda out, _: (out / "tokenizer.json").symlink_to("/dev/full"))
        said = refusal(["to-hf", "--checkpoint", str(checkpoint), "--out", str(out)], patch, capsys)
    assert "No space left on device" in said
    config = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(config.replace("start_of_text: null", "start_of_text: <bos>"))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, 0)
    monkeypatch.setattr(ShardWriter, "add", None)  # found out before a tensor is written
    said = refusal(["to-hf", "--checkpoint", str(checkpoint), "--out", str(out)], monkeypatch, capsys)
    assert "lacks what data.corpus.tokenizer of the checkpoint names\n  - '<bos>', its bos_token_id" in said
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.usefixtures("in_this_process")
def test_the_longest_text_of_an_imported_model_comes_back(with_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_tokenizer("<s>")
    change_json(folder / "config.json", max_position_embeddings=163_840)
    main(["from-hf", "--model", str(folder), "--out", str(tmp_path / "checkpoint")])
    assert load_checkpoint_config(tmp_path / "checkpoint").data.seq_len == 4096
    main(["to-hf", "--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "back")])
    assert json.loads((tmp_path / "back" / "config.json").read_text())["max_position_embeddings"] == 163_840
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "back").model_max_length == 163_840


def test_verification_finds_a_tokenizer_that_feeds_other_ids(
    with_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("checkpoint", "out"):
        (tmp_path / name).mkdir()
    Import(with_tokenizer(None)).write(tmp_path / "checkpoint", "x")
    source = Export(tmp_path / "checkpoint")
    source.write(tmp_path / "out", "out")
    verify_export(source, tmp_path / "out")
    file = tmp_path / "out" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    with pytest.raises(UserError, match=r"the tokenizer makes \[.*\] of 'a', moelm\.generate \["):
        verify_export(source, tmp_path / "out")
