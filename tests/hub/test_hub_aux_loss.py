"""The auxiliary loss of transformers in terms of ours: theirs pools the layers before it multiplies."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from hub.hub_models import CASES, fill, tokens

from moelm.hub import from_transformers
from moelm.moe.balancing.switch import switch_aux_loss

WITH_AUX_LOSS = ("mixtral odd", "qwen3_moe sparse steps", "olmoe odd", "qwen2_moe wide shared experts")
WITH_AUX_LOSS += ("dbrx odd, clipped", "gpt_oss")


def losses(name: str, n_moe_layers: int):
    """(theirs, ours for each layer, top_k, E, f [M, E] choices a token, P [M, E] mean probability)."""
    kind, values = CASES[name]
    steps = values.get("decoder_sparse_step", 1)
    values = copy.deepcopy(values) | {"n_layers" if kind == "Dbrx" else "num_hidden_layers": n_moe_layers * steps}
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{kind}Config")(**values), attn_implementation="eager", experts_implementation="eager"
    ).eval()
    fill(model)
    config, gpt = from_transformers(model)
    tokens_BL = tokens(model)
    with torch.no_grad():
        theirs = model(tokens_BL, output_router_logits=True).aux_loss
        stats = gpt(tokens_BL).stats
    ours_M = switch_aux_loss(stats.load_BE, stats.prob_BE, stats.n_tokens_B)
    share_ME = stats.load_BE.sum(1) / tokens_BL.numel()
    prob_ME = stats.prob_BE.mean(1)  # sequences of equal length
    return theirs, ours_M, config.moe.top_k, config.moe.n_experts, share_ME, prob_ME


@pytest.mark.parametrize("name", WITH_AUX_LOSS)
def test_of_one_layer_theirs_is_top_k_times_ours(name: str):
    theirs, ours_M, top_k, *_ = losses(name, 1)
    assert len(ours_M) == 1
    torch.testing.assert_close(theirs, top_k * ours_M[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", WITH_AUX_LOSS)
def test_of_several_layers_theirs_multiplies_means_over_the_layers(name: str):
    theirs, ours_M, top_k, n_experts, share_ME, prob_ME = losses(name, 3)
    assert len(ours_M) == 3
    pooled = n_experts * (share_ME.mean(0) * prob_ME.mean(0)).sum()
    torch.testing.assert_close(theirs, pooled, rtol=1e-5, atol=0)
    mean = top_k * ours_M.mean()
    assert abs(theirs - mean) > 0.01 * mean  # imbalances of different layers cancel in theirs
    torch.testing.assert_close(mean, n_experts * (share_ME * prob_ME).sum(-1).mean(), rtol=1e-5, atol=0)


def test_pooling_hides_layers_that_are_each_on_half_of_the_experts():
    """Two layers, each with all choices on its own half: ours says 2 for both, theirs that all is well."""
    load_MBE = torch.tensor([[[8.0, 8, 0, 0]], [[0, 0, 8.0, 8]]])
    prob_MBE = load_MBE / 16
    ours_M = switch_aux_loss(load_MBE, prob_MBE, torch.full((2, 1), 16.0))
    logits = tuple((20 * (each > 0) + torch.arange(4) * 1e-3).expand(16, 4) for each in load_MBE[:, 0])
    theirs = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func(logits, 4, 2)
    assert ours_M.tolist() == [2, 2]
    assert theirs == pytest.approx(2, rel=1e-3)  # top_k x 1, the value at balance
