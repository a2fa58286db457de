"""The options of the attentions: what each computes, and that the cache and documents hold with all of them."""

import pytest
import torch

from moelm.config import build
from moelm.model.gpt import GPT, attention_mask
from moelm.model.init import initialize
from moelm.model.size import flops_per_token

YARN = {"kind": "yarn", "factor": 8.0, "original_context": 16}
OPTIONS = {
    "head norm": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, "qk_norm": "head", "qkv_bias": True},
    "full norm": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, "qk_norm": "full", "clip_qkv": 0.5, "out_bias": True},
    "interleaved": {"name": "gqa", "n_heads": 4, "rope_interleaved": True, "rope_scaling": YARN},
    "sliding": [{"name": "gqa", "n_heads": 4, "sliding_window": 3}, {"name": "gqa", "n_heads": 4}],
    "sinks": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, "sinks": True},
    "sliding with sinks": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, "sliding_window": 4, "sinks": True},
    "latent": {"name": "mla", "n_heads": 3, "kv_latent_dim": 12, "nope_head_dim": 5, "v_head_dim": 7},
    "latent of q": {
        **{"name": "mla", "n_heads": 3, "q_latent_dim": 9, "kv_latent_dim": 12, "nope_head_dim": 5, "v_head_dim": 7},
        "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0},
    },
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def model(request, tiny_config):
    model = GPT(tiny_config(attention=request.param)).eval()
    initialize(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # what begins at a constant must have its say too
        for name, parameter in model.named_parameters():
            if "attention." in name and parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def make_tokens(B=2, L=12):
    return torch.randint(64, (B, L), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pieces", [(7,), (4, 3), (1, 1, 5)], ids=str)
def test_cached_logits_equal_uncached_ones(model, pieces):
    tokens_BL = make_tokens()
    with torch.no_grad():
        wanted = model(tokens_BL).logits
        cache = model.init_cache(2, 12)
        parts = [model(piece, cache=cache).logits for piece in tokens_BL.split([*pieces, *[1] * 5], dim=1)]
        with pytest.raises(ValueError, match="12 tokens, 13"):
            model(tokens_BL[:, :1], cache=cache)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-5, atol=1e-5)


def test_documents_are_independent_of_each_other(model):
    tokens_BL = make_tokens()
    ids_BL = torch.tensor([[0] * 5 + [1] * 7, [3] * 2 + [7] * 10])
    with torch.no_grad():
        together = model(tokens_BL, document_ids_BL=ids_BL).logits
        torch.testing.assert_close(together[0, 5:], model(tokens_BL[:1, 5:]).logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[1, 2:], model(tokens_BL[1:, 2:]).logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[0, :5], model(tokens_BL[:1, :5]).logits[0], rtol=1e-4, atol=1e-4)


def test_every_parameter_begins_as_the_rules_say(tiny_config):
    options = OPTIONS["sliding with sinks"] | {"qk_norm": "head", "qkv_bias": True, "out_bias": True}
    for attention in (options, OPTIONS["latent of q"]):
        model = GPT(tiny_config(attention=attention))
        initialize(model, 0)
        for name, parameter in model.blocks[1].attention.named_parameters():
            if parameter.ndim == 1:
                wanted = 1.0 if name.endswith("norm.weight") else 0.0
                assert torch.equal(parameter, torch.full_like(parameter, wanted)), name
            else:
                std = 0.2 / 2 if name == "out.weight" else 0.2  # two layers: / sqrt(2 * 2)
                assert parameter.std().item() == pytest.approx(std, rel=0.15), name


# -------------------------------------------------------------------------------------- sliding window


def test_layers_take_the_attentions_of_a_list_in_turn(tiny_config):
    sections = [
        {"name": "gqa", "n_heads": 4, "sliding_window": 3},
        {"name": "gqa", "n_heads": 2, "rope_theta": 50.0},
        {"name": "mla", "n_heads": 4, "rope_head_dim": 6},
    ]
    model = GPT(tiny_config(n_layers=5, attention=sections))
    initialize(model, 0)
    names = [type(block.attention).__name__ for block in model.blocks]
    assert names == ["GQA", "GQA", "MLA", "GQA", "GQA"]
    assert [block.attention.window for block in model.blocks if hasattr(block.attention, "window")] == [3, None] * 2
    rotations = {}  # what each layer was given
    for i, block in enumerate(model.blocks):
        block.attention.register_forward_hook(lambda _, arguments, __, i=i: rotations.update({i: arguments[1]}))
    with torch.no_grad():
        model(make_tokens())
    for i, block in enumerate(model.blocks):
        wanted = block.attention.rotation(torch.arange(12))
        assert all(torch.equal(given, own) for given, own in zip(rotations[i], wanted, strict=True))
    one, as_list = tiny_config(attention=sections[0]), tiny_config(attention=sections[:1])
    assert one.attention_of(1) == as_list.attention_of(1)


@pytest.mark.parametrize("window", [1, 3, 12])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_sliding_layer_sees_itself_and_those_just_before(tiny_config, window, sinks):
    attention = make_attention(tiny_config, sliding_window=window, sinks=sinks)
    x_BLD = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0))
    rotation = attention.rotation(torch.arange(12))
    with torch.no_grad():
        before = attention(x_BLD, rotation)
        for j in range(12):
            changed_BLD = x_BLD.clone()
            changed_BLD[0, j] += 1.0
            moved_L = (attention(changed_BLD, rotation) - before)[0].abs().amax(-1)
            assert [i for i in range(12) if moved_L[i] > 1e-6] == list(range(j, min(12, j + window)))


def test_flops_of_a_window_are_those_of_the_keys_it_shows(tiny_config):
    """Causal attention counts L / 2 keys, half a key less than the mean of 1 ... L; so does a window."""
    L, W = 64, 10

    def scores(**options):
        config = tiny_config(n_layers=1, attention={"name": "gqa", "n_heads": 4, **options})
        return flops_per_token(config, L) / (3 * 4 * 32)  # / (training x two products x width)

    without = scores() - L / 2
    keys = sum(min(i + 1, W) for i in range(L)) / L
    assert scores(sliding_window=W) - without == pytest.approx(keys, abs=0.5)
    assert scores(sliding_window=L) == scores(sliding_window=10 * L) == scores()
    two = [{"name": "gqa", "n_heads": 4, "sliding_window": W}, {"name": "gqa", "n_heads": 4}]
    both = flops_per_token(tiny_config(n_layers=2, attention=two), L)
    plain = flops_per_token(tiny_config(n_layers=2), L)
    assert (plain - both) / (3 * 4 * 32) == pytest.approx(L / 2 - keys, abs=0.5)  # one of the two layers slides


# ----------------------------------------------------------------------------------------------- sinks


def make_attention(tiny_config, **options):
    config = tiny_config(attention={"name": "gqa", "n_heads": 4, "n_kv_heads": 2} | options)
    attention = build("attention", config.attention, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return attention


def with_and_without_sinks(tiny_config, value):
    """Outputs of the same weights, at any mask, with sinks of `value` and without any."""
    one, other = make_attention(tiny_config, sinks=True), make_attention(tiny_config)
    other.load_state_dict({name: p for name, p in one.state_dict().items() if name != "sinks"})
    x_BLD = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    ids_BL = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    results = []
    with torch.no_grad():
        one.sinks.fill_(value)
        for mask_BLL in (None, attention_mask(torch.arange(9), ids_BL, 0)):
            results.append([each(x_BLD, each.rotation(torch.arange(9)), mask_BLL) for each in (one, other)])
    return results


def test_a_sink_takes_its_share_and_adds_nothing(tiny_config):
    for result, plain in with_and_without_sinks(tiny_config, -60.0):
        torch.testing.assert_close(result, plain)
    for result, plain in with_and_without_sinks(tiny_config, 60.0):
        assert result.abs().max() < 1e-6 < plain.abs().max()


def test_the_first_token_is_weighed_against_its_sink_alone(tiny_config):
    """One key: the weight is exp(a) / (exp(s) + exp(a)) with a = q k / sqrt(Q), head by head."""
    attention = make_attention(tiny_config, sinks=True, out_bias=True)
    x_D = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q_HQ, k_HQ, v_HQ = (each.weight.mv(x_D).view(-1, 8) for each in (attention.q, attention.k, attention.v))
        y_HQ = torch.stack(
            [torch.sigmoid(q_HQ[h] @ k_HQ[h // 2] / 8**0.5 - attention.sinks[h]) * v_HQ[h // 2] for h in range(4)]
        )
        wanted = attention.out(y_HQ.flatten())
        result = attention(x_D.view(1, 1, 32), attention.rotation(torch.tensor([5])))
    torch.testing.assert_close(result.flatten(), wanted)


# --------------------------------------------------------------------------------------- latent attention


def test_the_cache_of_latent_attention_holds_the_latent_and_one_rotated_key(tiny_config):
    cache = GPT(tiny_config(attention=OPTIONS["latent"])).init_cache(2, 7)[0]
    assert (cache.keys.shape, cache.values.shape) == ((2, 1, 7, 12), (2, 1, 7, 16))
