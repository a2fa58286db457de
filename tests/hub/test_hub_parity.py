"""Whole models against transformers: logits, choices and gradients, and the way there and back to the last bit."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hub.hub_models import CASES, make, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelm.config import ModelConfig, from_dict, to_dict
from moelm.hub import ARCHITECTURES, Architecture, from_transformers, load_weights, to_transformers, write_config
from moelm.model.gpt import GPT
from moelm.model.init import initialize

every_model = pytest.mark.parametrize("name", CASES)


@cache  # never changed by a test
def pair(name: str) -> tuple[Any, Any, GPT]:
    """(theirs, our config, ours)."""
    model = make(name)
    config, gpt = from_transformers(model)
    return model, config, gpt


def architecture(model: Any) -> Architecture:
    return ARCHITECTURES[model.config.model_type]


def test_there_are_three_models_of_every_architecture():
    kinds = [make(name).config.model_type for name in CASES]
    assert set(kinds) == set(ARCHITECTURES)
    assert all(kinds.count(kind) >= 3 for kind in ARCHITECTURES)


@every_model
def test_probabilities_choices_and_gradients_are_theirs(name: str):
    model, config, gpt = pair(name)
    tokens_BL = tokens(model)
    targets_BL = tokens_BL.roll(-1, 1)
    chosen: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
        for path, module in model.named_modules()
        if path.endswith(".experts")
    ]
    model.zero_grad()
    wanted_BLV = model(tokens_BL).logits
    for handle in handles:
        handle.remove()
    F.cross_entropy(wanted_BLV.flatten(0, 1), targets_BL.flatten()).backward()
    scores: list[Tensor] = []
    handles = [
        layer.router.register_forward_pre_hook(lambda router, args: scores.append(choice_scores(router, args[0])))
        for layer in gpt.moe_layers
    ]
    output = gpt(tokens_BL)
    for handle in handles:
        handle.remove()
    gpt.zero_grad()
    gpt(tokens_BL, targets_BL).loss.backward()

    assert wanted_BLV.std() >= 1
    wanted, result = (logits.detach().double().log_softmax(-1) for logits in (wanted_BLV, output.logits))
    assert (wanted.exp() * (wanted - result)).sum(-1).mean() < 1e-9
    assert (wanted - result).abs().max() <= 5e-4

    assert len(chosen) == len(scores) == len(config.moe_layers)
    for theirs_TK, ours_BLK, scores_TE in zip(chosen, output.stats.extra["expert_ids_BLK"], scores, strict=True):
        top_k = ours_BLK.shape[-1]
        best = F.pad(scores_TE.sort(-1, descending=True).values, (0, 1), value=-torch.inf)
        clear_T = best[:, top_k - 1] - best[:, top_k] > 1e-5
        assert clear_T.float().mean() > 0.9
        assert torch.equal(theirs_TK.sort(-1).values[clear_T], ours_BLK.flatten(0, 1).sort(-1).values[clear_T])

    assert_gradients_are_equal(model, config, gpt)


def choice_scores(router: Any, x_BLD: Tensor) -> Tensor:
    """What the experts are chosen by, [T, E]."""
    with torch.no_grad():
        logits_TE = router.logits(x_BLD.flatten(0, 1))
        scores_TE = logits_TE.softmax(-1) if router.config.score == "softmax" else logits_TE.sigmoid()
        if router.expert_bias is not None:
            scores_TE = scores_TE + router.expert_bias
        return router._mask_other_groups(scores_TE) if router.config.n_groups > 1 else scores_TE


def assert_gradients_are_equal(model: Any, config: Any, gpt: GPT) -> None:
    gradients = {name: parameter.grad for name, parameter in gpt.named_parameters()}
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    wanted: dict[str, Tensor] = {}
    for weight in architecture(model).weights(config, fused=True):
        if not weight.ours[0].endswith("expert_bias"):
            wanted |= weight.to_ours(theirs)
    assert gradients.keys() == wanted.keys()
    differences = torch.stack([(gradients[name] - wanted[name]).norm() for name in wanted])
    norms = torch.stack([gradient.norm() for gradient in wanted.values()])
    assert (norms > 0).all()
    assert differences.norm() <= 2e-4 * norms.norm()
    small = 1e-3 * norms.norm() / len(norms) ** 0.5  # below it rounding shows
    for name, difference, norm in zip(wanted, differences, norms, strict=True):
        assert difference <= 2e-3 * max(norm, small), name


@every_model
def test_the_map_covers_every_tensor_of_both_once(name: str):
    model, config, gpt = pair(name)
    theirs = set(model.state_dict()) - ({"lm_head.weight"} if config.tied_embeddings else set())
    for fused in (True, False):
        weights = list(architecture(model).weights(config, fused))
        ours = [each for weight in weights for each in weight.ours]
        assert sorted(ours) == sorted(gpt.state_dict())
        names = [each for weight in weights for each in weight.theirs]
        assert len(names) == len(set(names))
        if fused:
            assert set(names) == theirs


@every_model
def test_weights_come_layer_by_layer_so_that_they_can_be_streamed(name: str):
    model, config, _ = pair(name)
    for fused in (True, False):
        first, *layers, last = (weight.ours[0] for weight in architecture(model).weights(config, fused))
        assert first == "embedding.weight"
        if not config.tied_embeddings:
            assert last == "head.weight"
            *layers, last = layers
        assert last == "norm.weight"
        numbers = [int(each.split(".")[1]) for each in layers]
        assert numbers == sorted(numbers)
        assert set(numbers) == set(range(config.n_layers))


@every_model
def test_there_and_back_changes_no_bit(name: str):
    model, config, gpt = pair(name)
    exported = to_transformers(gpt, config)
    assert type(exported) is type(model)
    assert_equal(exported.state_dict(), model.state_dict())
    again, gpt_again = from_transformers(exported)
    assert again == config
    assert_equal(gpt_again.state_dict(), gpt.state_dict())


@every_model
def test_both_layouts_there_and_back_change_no_bit(name: str):
    model, config, gpt = pair(name)
    ours = gpt.state_dict()
    for fused in (True, False):
        theirs: dict[str, Tensor] = {}
        for weight in architecture(model).weights(config, fused):
            theirs |= weight.to_theirs(ours)
        assert all(tensor.is_contiguous() for tensor in theirs.values())
        assert_equal(load_weights(architecture(model), config, theirs), ours)


@every_model
def test_a_folder_that_transformers_wrote_is_read_to_the_last_bit(name: str, tmp_path):
    model, config, gpt = pair(name)
    model.save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    assert architecture(model).read_config(hf) == config
    files = load_file(tmp_path / "model.safetensors")
    fused_only = model.config.model_type in ("dbrx", "gpt_oss")
    assert architecture(model).is_fused(set(files), config) is False
    assert fused_only or any(".experts.0." in each for each in files)
    assert_equal(load_weights(architecture(model), config, files), gpt.state_dict())


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@every_model
def test_a_folder_in_either_layout_is_read_by_transformers_to_the_last_bit(name: str, fused: bool, tmp_path):
    model, config, gpt = pair(name)
    found, hf = write_config(config)
    theirs: dict[str, Tensor] = {}
    for weight in found.weights(config, fused):
        theirs |= weight.to_theirs(gpt.state_dict())
    save_file(theirs, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hf))
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_equal(loaded.state_dict(), model.state_dict())


def assert_equal(result: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert result.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert result[name].dtype == tensor.dtype, name
        assert torch.equal(result[name], tensor), name


def test_what_is_exported_computes_the_same_in_their_code():
    model, config, gpt = pair("deepseek_v3 groups, yarn")
    exported = to_transformers(gpt, config)
    exported.set_attn_implementation("eager")
    assert torch.equal(exported(tokens(model)).logits, model(tokens(model)).logits)


@pytest.mark.parametrize("name", ["mixtral odd", "mixtral sliding and tied"])
def test_weights_are_copied_and_tied_where_they_were(name: str):
    model, config, gpt = pair(name)
    exported = to_transformers(gpt, config)
    for one, other in ((model, gpt), (gpt, exported)):
        pointers = [{tensor.data_ptr() for tensor in each.state_dict().values()} for each in (one, other)]
        assert not pointers[0] & pointers[1]
    same = exported.get_output_embeddings().weight is exported.get_input_embeddings().weight
    assert same == config.tied_embeddings


def test_the_selection_bias_stays_float32_in_a_bf16_model():
    model = copy.deepcopy(pair("deepseek_v3 like Moonlight")[0]).to(torch.bfloat16)
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias = (torch.arange(8) / 8 + 1e-4).float()
    config, gpt = from_transformers(model)
    assert {tensor.dtype for tensor in gpt.parameters()} == {torch.bfloat16}
    assert torch.equal(gpt.moe_layers[0].router.expert_bias, gate.e_score_correction_bias)
    exported = to_transformers(gpt, config).model.layers[1].mlp.gate
    assert exported.weight.dtype == torch.bfloat16
    assert exported.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(exported.e_score_correction_bias, gate.e_score_correction_bias)


def test_a_selection_bias_that_a_file_holds_in_bf16_is_read_as_float32():
    model, config, _ = pair("deepseek_v3 like Moonlight")
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    state = load_weights(architecture(model), config, tensors)
    biases = [name for name, tensor in state.items() if tensor.dtype == torch.float32]
    assert biases == [f"blocks.{layer}.moe.router.expert_bias" for layer in (1, 2)]


def test_modules_of_multi_token_prediction_are_left_out_of_the_export():
    config = pair("deepseek_v3 like Moonlight")[1]
    raw = to_dict(config) | {"multi_token_prediction": {"n_modules": 1}}
    predicting = from_dict(ModelConfig, raw, "model")
    gpt = GPT(predicting)
    initialize(gpt, 0)
    assert any(name.startswith("multi_token_prediction.") for name in gpt.state_dict())
    exported = to_transformers(gpt, predicting)
    again, gpt_again = from_transformers(exported)
    assert again == config
    ours = {name: tensor for name, tensor in gpt.state_dict().items() if name in gpt_again.state_dict()}
    assert_equal(gpt_again.state_dict(), ours)


def test_training_mode_follows_the_model():
    model = copy.deepcopy(pair("dbrx")[0])
    assert not from_transformers(model)[1].training
    assert from_transformers(model.train())[1].training
    assert not any(module.training for module in to_transformers(*reversed(from_transformers(model))).modules())
