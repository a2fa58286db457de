"""The GPT through its forward pass: what may see what, what the loss is, and what must change nothing."""

import pytest
import torch
import torch.nn.functional as F

from moelm.model.gpt import GPT, IGNORE, chunked_cross_entropy
from moelm.model.init import initialize
from moelm.model.rope import rotate, rotation
from moelm.moe.types import RouteContext


def make_model(config, seed=0):
    model = GPT(config)
    initialize(model, seed)
    return model


def make_tokens(B=2, L=12, vocab_size=64, seed=0):
    return torch.randint(vocab_size, (B, L), generator=torch.Generator().manual_seed(seed))


def stats_dict(stats):
    return {name: value for name, value in stats._asdict().items() if name != "extra"}


def train_step(model, tokens_BL, seed=0):
    """(output, {name: gradient}) of cross-entropy and of every statistic that carries gradient."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = model(tokens_BL[:, :-1], tokens_BL[:, 1:])
    loss = output.loss
    if output.stats is not None:
        loss = loss + output.stats.prob_BE.square().sum() + 0.1 * output.stats.log_z_sq.sum()
    loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


# ------------------------------------------------------------------------------------------ structure


@pytest.mark.parametrize(
    ("first", "every", "wanted"),
    [
        (0, 1, [0, 1, 2, 3, 4, 5]),
        (1, 1, [1, 2, 3, 4, 5]),
        (0, 2, [0, 2, 4]),
        (1, 2, [1, 3, 5]),
        (2, 3, [2, 5]),
    ],
)
def test_moe_layers_are_where_the_config_says(tiny_config, first, every, wanted):
    config = tiny_config(n_layers=6, moe={"first_moe_layer": first, "moe_every_n_layers": every})
    model = make_model(config)
    assert wanted == [i for i in range(6) if i >= first and (i - first) % every == 0]
    assert [i for i, block in enumerate(model.blocks) if block.moe is not None] == wanted
    assert [i for i, block in enumerate(model.blocks) if block.feed_forward is None] == wanted
    assert model.moe_layers == [model.blocks[i].moe for i in wanted]
    assert model(make_tokens()).stats.load_BE.shape == (len(wanted), 2, 8)


def test_a_dense_model_has_no_stats(tiny_config):
    output = make_model(tiny_config(moe=None))(make_tokens(), make_tokens())
    assert output.stats is None
    assert output.loss.isfinite()


@pytest.mark.parametrize("top_k", [1, 3])
def test_counts_sum_to_exactly_tokens_times_top_k(tiny_config, top_k):
    model = make_model(tiny_config(n_layers=3, moe={"top_k": top_k, "first_moe_layer": 1}))
    stats = model(make_tokens(B=3, L=10)).stats
    for load in (stats.load_BE, stats.kept_BE, stats.unbiased_load_BE):
        assert torch.equal(load.sum(-1), torch.full((2, 3), 10.0 * top_k))
    assert torch.equal(stats.first_choice_BE.sum(-1), torch.full((2, 3), 10.0))
    torch.testing.assert_close(stats.prob_BE.sum(-1), torch.ones(2, 3))


def test_stats_are_stacked_in_the_order_of_the_layers(tiny_config):
    model = make_model(tiny_config(n_layers=3, moe={"router": {"name": "top_k", "selection_bias": True}}))
    for layer, expert in zip(model.moe_layers, (5, 0, 3), strict=True):
        layer.router.expert_bias[expert] = 100.0
    stats = model(make_tokens()).stats
    assert stats.first_choice_BE.argmax(-1).tolist() == [[5, 5], [0, 0], [3, 3]]


def test_masked_tokens_reach_no_expert_of_any_layer(tiny_config):
    model, tokens_BL = make_model(tiny_config()), make_tokens()
    mask_BL = torch.arange(12).expand(2, 12) < torch.tensor([[12], [7]])
    stats = model(tokens_BL, token_mask_BL=mask_BL).stats
    assert stats.n_tokens_B.tolist() == [[12, 7]] * 2
    assert stats.load_BE.sum(-1).tolist() == [[24, 14]] * 2
    alone = model(tokens_BL[1:, :7]).stats
    assert torch.equal(stats.load_BE[:, 1:], alone.load_BE)
    torch.testing.assert_close(stats.prob_BE[:, 1:], alone.prob_BE)


def test_an_untied_head_is_a_matrix_of_its_own(tiny_config):
    tokens_BL = make_tokens()
    untied = make_model(tiny_config(tied_embeddings=False))
    tied = make_model(tiny_config())
    assert "head.weight" in untied.state_dict()
    assert "head.weight" not in tied.state_dict()
    with torch.no_grad():
        other = untied(tokens_BL).logits
        untied.head.weight.copy_(untied.embedding.weight)
        assert torch.equal(untied(tokens_BL).logits, tied(tokens_BL).logits)
    assert not torch.allclose(other, untied(tokens_BL).logits, atol=0.1)
    _, separate = train_step(untied, tokens_BL)
    _, shared = train_step(tied, tokens_BL)
    torch.testing.assert_close(separate["embedding.weight"] + separate["head.weight"], shared["embedding.weight"])


# ------------------------------------------------------------------------------------- what sees what


def test_a_later_token_changes_no_earlier_logit(tiny_config):
    model, tokens_BL = make_model(tiny_config()), make_tokens()
    changed_BL = tokens_BL.clone()
    changed_BL[:, 7] = (changed_BL[:, 7] + 1) % 64
    with torch.no_grad():
        before, after = model(tokens_BL).logits, model(changed_BL).logits
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=1e-5, atol=1e-5)
    assert ((after - before)[:, 7:].abs().amax(-1) > 1e-3).all()


def test_documents_are_independent_of_each_other(tiny_config):
    model, tokens_BL = make_model(tiny_config()), make_tokens(B=2, L=12)
    ids_BL = torch.tensor([[0] * 5 + [1] * 7, [3] * 2 + [7] * 6 + [3] * 4])  # an id may come back
    with torch.no_grad():
        together = model(tokens_BL, document_ids_BL=ids_BL).logits
        alone = [  # RoPE knows distances only, so a document on its own is the same wherever it starts
            (together[0, :5], tokens_BL[:1, :5]),
            (together[0, 5:], tokens_BL[:1, 5:]),
            (together[1, 2:8], tokens_BL[1:, 2:8]),
        ]
        for part, tokens in alone:
            torch.testing.assert_close(part, model(tokens).logits[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(tokens_BL).logits[0, 5:], together[0, 5:], atol=0.01)
        changed_BL = tokens_BL.clone()
        changed_BL[1, 0] = (changed_BL[1, 0] + 1) % 64
        changed = model(changed_BL, document_ids_BL=ids_BL).logits
    torch.testing.assert_close(changed[1, 2:8], together[1, 2:8], rtol=1e-5, atol=1e-5)
    assert ((changed - together)[1, 8:].abs().amax(-1) > 1e-3).all()


def test_grouped_query_attention_equals_multi_head_attention_with_repeated_kv_heads(tiny_config):
    grouped = make_model(tiny_config(attention={"name": "gqa", "n_heads": 4, "n_kv_heads": 2}))
    multi = make_model(tiny_config(attention={"name": "gqa", "n_heads": 4}))
    repeated = {
        name: value.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
        if name.endswith(("attention.k.weight", "attention.v.weight"))
        else value
        for name, value in grouped.state_dict().items()
    }
    multi.load_state_dict(repeated)
    assert grouped.blocks[0].attention.k.weight.shape == (16, 32)
    ids_BL = torch.tensor([[0] * 5 + [1] * 7]).expand(2, 12)
    for document_ids_BL in (None, ids_BL):
        wanted = multi(make_tokens(), document_ids_BL=document_ids_BL).logits
        result = grouped(make_tokens(), document_ids_BL=document_ids_BL).logits
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------- RoPE


def turned(x_Q, position, theta=10_000.0):
    cos, sin = rotation(torch.tensor([position]), len(x_Q), theta)
    return rotate(x_Q.view(1, 1, 1, -1), cos, sin).flatten()


def test_rope_scores_depend_on_the_distance_alone():
    q_Q, k_Q = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    scores = {}
    for distance in (0, 1, 5, 40):
        near = [turned(q_Q, start + distance) @ turned(k_Q, start) for start in (0, 1, 17, 300)]
        torch.testing.assert_close(torch.stack(near), near[0].expand(4), rtol=1e-4, atol=1e-4)
        scores[distance] = round(near[0].item(), 2)
    torch.testing.assert_close(torch.tensor(scores[0]), q_Q @ k_Q, rtol=0, atol=0.006)
    assert len(set(scores.values())) == 4
    ahead, behind = turned(q_Q, 5) @ turned(k_Q, 0), turned(q_Q, 0) @ turned(k_Q, 5)
    assert (ahead - behind).abs() > 0.01


def test_attention_knows_the_order_of_the_earlier_tokens(tiny_config):
    """Without positions one causal layer would see a set: the last logits would not move."""
    model, tokens_BL = make_model(tiny_config(n_layers=1)), torch.arange(12).unsqueeze(0)
    swapped_BL = tokens_BL.clone()
    swapped_BL[0, [2, 9]] = tokens_BL[0, [9, 2]]
    with torch.no_grad():
        difference_V = (model(swapped_BL).logits - model(tokens_BL).logits)[0, -1]
    assert difference_V.abs().max() > 1e-3


def test_rope_turns_each_pair_by_its_own_angle():
    """As complex numbers: (x_i + j x_{i + Q/2}) exp(j position theta^(-2i/Q))."""
    x_Q = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = 7 * 500.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    product = torch.complex(x_Q[:4], x_Q[4:]) * torch.exp(1j * angles)
    wanted = torch.cat([product.real, product.imag]).float()
    torch.testing.assert_close(turned(x_Q.float(), 7, theta=500.0), wanted)


# ------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_cross_entropy_of_the_logits_without_ignored_targets(tiny_config):
    model, tokens_BL, targets_BL = make_model(tiny_config()), make_tokens(), make_tokens(seed=1)
    targets_BL[0, :3] = targets_BL[1, 11] = IGNORE
    output = model(tokens_BL, targets_BL)
    assert output.logits is None
    log_prob = model(tokens_BL).logits.double().log_softmax(-1)
    each = [
        [0.0 if t == IGNORE else -log_prob[b, i, t].item() for i, t in enumerate(row)]
        for b, row in enumerate(targets_BL.tolist())
    ]
    torch.testing.assert_close(output.ce_BL, torch.tensor(each), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.loss, torch.tensor(sum(map(sum, each)) / 20), rtol=1e-5, atol=1e-6)
    assert not output.ce_BL.requires_grad
    assert (output.ce_BL[targets_BL == IGNORE] == 0).all()


def test_a_batch_without_targets_has_a_loss_of_zero(tiny_config):
    output = make_model(tiny_config())(make_tokens(), torch.full((2, 12), IGNORE))
    output.loss.backward()
    assert output.loss.item() == 0


@pytest.mark.parametrize("max_logits", [1, 64 * 7, 64 * 8 + 5, 64 * 29])
def test_many_chunks_of_the_loss_equal_one_and_bound_the_logits(monkeypatch, max_logits):
    generator = torch.Generator().manual_seed(0)
    targets_T = torch.randint(64, (30,), generator=generator)
    targets_T[[0, 7, 29]] = IGNORE
    x_TD, weight_VD = torch.randn(30, 16, generator=generator), torch.randn(64, 16, generator=generator)
    sizes, linear = [], F.linear

    def recording(*args):
        result = linear(*args)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(F, "linear", recording)

    def run(max_logits):
        sizes.clear()
        x, weight = x_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        loss, ce_T = chunked_cross_entropy(x, weight, targets_T, max_logits)
        loss.backward()
        return loss, ce_T, x.grad, weight.grad

    whole = run(64 * 30)
    assert sizes == [64 * 30]  # kept, not recomputed
    for value, wanted in zip(run(max_logits), whole, strict=True):
        torch.testing.assert_close(value, wanted)
    assert max(sizes) <= max(max_logits, 64)  # one token's logits are the least
    assert sum(sizes) == 2 * 64 * 30  # once in forward, once in backward
    with torch.no_grad():
        sizes.clear()
        chunked_cross_entropy(x_TD, weight_VD, targets_T, max_logits)
    assert max(sizes) <= max(max_logits, 64)
    assert sum(sizes) == 64 * 30


# ---------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("pieces", [(7,), (4, 3), (1, 6), (1, 1, 5)], ids=str)
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_cached_logits_equal_uncached_ones(tiny_config, pieces, n_kv_heads):
    model = make_model(tiny_config(attention={"name": "gqa", "n_heads": 4, "n_kv_heads": n_kv_heads})).eval()
    tokens_BL = make_tokens()
    with torch.no_grad():
        wanted = model(tokens_BL).logits
        cache, parts = model.init_cache(2, 12), []
        for piece in tokens_BL.split([*pieces, *[1] * 5], dim=1):
            output = model(piece, cache=cache)
            cache = output.cache
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-5, atol=1e-5)


def test_a_cache_works_with_activation_checkpointing_and_gradients_on(tiny_config):
    model, tokens_BL = make_model(tiny_config()), make_tokens()
    wanted = model(tokens_BL).logits
    model.activation_checkpointing = "full"
    cache = model.init_cache(2, 12)
    parts = [model(piece, cache=cache).logits.detach() for piece in tokens_BL.split(6, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-5, atol=1e-5)


def test_a_full_cache_and_document_ids_with_a_filled_one_are_refused(tiny_config):
    model, tokens_BL = make_model(tiny_config()), make_tokens()
    cache = model.init_cache(2, 12)
    with torch.no_grad():
        model(tokens_BL, cache=cache)
        with pytest.raises(ValueError, match="12 tokens, 13"):
            model(tokens_BL[:, :1], cache=cache)
        with pytest.raises(ValueError, match="document_ids_BL"):
            model(tokens_BL, document_ids_BL=torch.zeros_like(tokens_BL), cache=cache)


# ------------------------------------------------------------------------------- what changes nothing


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activation_checkpointing_changes_no_loss_gradient_or_count(tiny_config, dropout):
    config = tiny_config(n_layers=3, dropout=dropout, moe={"first_moe_layer": 1, "n_shared_experts": 1})
    model, tokens_BL = make_model(config), make_tokens(L=17)
    calls = []
    model.blocks[1].attention.register_forward_hook(lambda *args: calls.append(1))
    plain, plain_gradients = train_step(model, tokens_BL)
    model.activation_checkpointing = "full"
    result, gradients = train_step(model, tokens_BL)
    assert len(calls) == 3  # once plain, and twice with recomputation
    assert torch.equal(result.loss, plain.loss)
    assert torch.equal(result.ce_BL, plain.ce_BL)
    for name, value in stats_dict(result.stats).items():
        assert torch.equal(value, stats_dict(plain.stats)[name]), name
    assert torch.equal(result.stats.load_BE.sum(-1), torch.full((2, 2), 16.0 * 2))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain_gradients[name]), name
    if dropout:  # the comparison can fail: other masks give other values
        assert not torch.equal(train_step(model, tokens_BL, seed=1)[0].loss, plain.loss)


def test_dropout_is_off_in_evaluation(tiny_config):
    model, tokens_BL = make_model(tiny_config(dropout=0.5)), make_tokens()
    first, second = model(tokens_BL).logits, model(tokens_BL).logits
    assert not torch.allclose(first, second)
    model.eval()
    assert torch.equal(model(tokens_BL).logits, model(tokens_BL).logits)


@pytest.mark.parametrize("silent", ["attention.out", "feed_forward.down"])
def test_dropout_halves_what_each_part_of_a_block_adds_and_doubles_the_rest(tiny_config, silent):
    block = make_model(tiny_config(dropout=0.5, n_layers=1, moe=None)).blocks[0]
    block.get_submodule(silent).weight.data.zero_()  # so that the other part adds all
    x_BLD = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(0))
    context = RouteContext(torch.zeros(4, 8, dtype=torch.long), None, True)
    rotation_L = block.attention.rotation(torch.arange(8))
    torch.manual_seed(0)
    with torch.no_grad():
        whole, dropped = (block.train(mode)(x_BLD, rotation_L, None, context)[0] - x_BLD for mode in (False, True))
    gone = dropped.abs() < 1e-6
    assert 0.4 < gone.float().mean() < 0.6
    torch.testing.assert_close(dropped[~gone], 2 * whole[~gone], rtol=1e-3, atol=1e-5)


def test_dropout_takes_half_of_the_embedding(tiny_config):
    model, seen = make_model(tiny_config(dropout=0.5, n_layers=1)), []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    tokens_BL = make_tokens()
    model(tokens_BL)
    gone = seen[0] == 0
    assert 0.4 < gone.float().mean() < 0.6
    torch.testing.assert_close(seen[0][~gone], 2 * model.embedding(tokens_BL)[~gone])


def test_compiled_blocks_equal_eager_ones(tiny_config):
    config = tiny_config(moe={"first_moe_layer": 1, "router": {"name": "top_k", "selection_bias": True}})
    model, tokens_BL = make_model(config), make_tokens(L=17)
    keys = list(model.state_dict())
    eager, eager_gradients = train_step(model, tokens_BL)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    compiled, gradients = train_step(model, tokens_BL)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(compiled.loss, eager.loss, rtol=1e-6, atol=1e-6)
    for name, value in stats_dict(compiled.stats).items():
        torch.testing.assert_close(value, stats_dict(eager.stats)[name], rtol=1e-6, atol=1e-6, msg=name)
    for name, gradient in gradients.items():
        bound = 1e-5 * eager_gradients[name].abs().max()
        assert (gradient - eager_gradients[name]).abs().max() <= bound, name


def test_compiled_under_autocast_the_gradients_of_the_router_are_float32_products_too(tiny_config):
    model, tokens_BL = make_model(tiny_config(n_layers=1)), make_tokens(L=33)
    gradients = []
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()
            model.compile_blocks(backend="aot_eager", fullgraph=True)
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            output = model(tokens_BL[:, :-1], tokens_BL[:, 1:])
        (output.loss + output.stats.prob_BE.square().sum()).backward()
        gradients.append(model.moe_layers[0].router.weight.grad)
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()
