"""Multi-token prediction against the paper's equations written out here, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moelm.config import Config, ConfigError, from_dict, registered
from moelm.config import check as check_config
from moelm.model.gpt import GPT, IGNORE
from moelm.model.init import initialize
from moelm.moe.types import RouteContext, RouterStats
from moelm.training.optim import kind_of

COEF = 0.7


def make_model(config, seed=0):
    model = GPT(config)
    initialize(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # at 1 a norm left out or applied twice might not show
                parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def make_tokens(B=2, L=13, seed=0):
    return torch.randint(64, (B, L), generator=torch.Generator().manual_seed(seed))


def with_modules(tiny_config, n=1, **changes):
    return tiny_config(multi_token_prediction={"n_modules": n, "coef": COEF}, **changes)


def total_loss(output):
    return output.loss + sum(output.extra_losses.values())


def gradients_of(model, loss):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def representations(model, run):
    """What `run()` returns, and h^1, h^2, ... of the modules in it."""
    seen = []
    hooks = [m.register_forward_hook(lambda *args: seen.append(args[-1][0])) for m in model.multi_token_prediction]
    output = run()
    for hook in hooks:
        hook.remove()
    return output, seen


def sequence_slice(stats, i):
    return {name: getattr(stats, name)[:, i] for name in ("load_BE", "kept_BE", "n_tokens_B", "prob_BE", "gate_BE")}


# ---------------------------------------------------------------------------------------- the equations


def norm_of(x_D, module):
    return x_D / (x_D.square().mean() + module.eps).sqrt() * module.weight


def reference(model, tokens_BL, targets_BL):
    """(CE, weighted loss of the modules) of whole sequences, each by itself, cut to L - k as in the paper."""
    D, L = model.config.d_model, tokens_BL.shape[1]
    head_VD = model.embedding.weight if model.head is None else model.head.weight
    blocks = list(model.blocks)

    def run(block, rows, ids):
        positions = torch.arange(len(rows))
        context = RouteContext(torch.stack(ids)[None], None, model.training)
        return list(block(torch.stack(rows)[None], block.attention.rotation(positions), None, context)[0][0])

    ce, further = [], [[] for _ in model.multi_token_prediction]
    for tokens_L, targets_L in zip(tokens_BL, targets_BL, strict=True):
        h = [model.embedding.weight[token] for token in tokens_L]
        for block in blocks:
            h = run(block, h, list(tokens_L))
        h = [norm_of(x, model.norm) for x in h]
        ce += [-(head_VD @ h[i]).log_softmax(-1)[targets_L[i]] for i in range(L)]
        for k, module in enumerate(model.multi_token_prediction, 1):
            x = []
            for i in range(L - k):
                later = norm_of(model.embedding.weight[tokens_L[i + k]], module.embedding_norm)
                here = norm_of(h[i], module.hidden_norm)
                M = module.projection.weight
                x.append(M[:, :D] @ later + M[:, D:] @ here)
            x = run(module.block, x, list(tokens_L[k:]))
            h = [norm_of(each, module.norm) for each in x]
            further[k - 1] += [-(head_VD @ h[i]).log_softmax(-1)[targets_L[i + k]] for i in range(L - k)]
    means = [torch.stack(each).mean() for each in further]
    return torch.stack(ce).mean(), COEF * sum(means) / len(means)


@pytest.mark.parametrize("n_modules", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"moe": {"n_shared_experts": 1, "router": {"name": "top_k", "score": "sigmoid", "selection_bias": True}}},
        {"tied_embeddings": False, "moe": {"moe_every_n_layers": 2}},
        {"moe": None},
    ],
    ids=["moe", "last layer dense", "dense"],
)
def test_loss_and_gradients_are_those_of_the_equations(tiny_config, n_modules, changes):
    model, tokens_BL = make_model(with_modules(tiny_config, n_modules, **changes)), make_tokens()
    inputs_BL, targets_BL = tokens_BL[:, :-1], tokens_BL[:, 1:]
    ce, further = reference(model, inputs_BL, targets_BL)
    output = model(inputs_BL, targets_BL)
    assert set(output.extra_losses) == {"multi_token_prediction"}
    torch.testing.assert_close(output.loss, ce, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.extra_losses["multi_token_prediction"], further, rtol=1e-5, atol=1e-6)
    wanted, found = gradients_of(model, ce + further), gradients_of(model, total_loss(output))
    for name, gradient in wanted.items():
        assert gradient is not None, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6, msg=name)
    has_experts = [module.block.moe is not None for module in model.multi_token_prediction]
    assert has_experts == [changes["moe"] is not None] * n_modules


def test_the_block_of_a_module_has_the_attention_and_the_rotation_of_the_layer_it_repeats(tiny_config):
    """Sections in turn: the last MoE layer, number 1 of 3, has the sliding window and another RoPE base."""
    sections = [{"name": "gqa", "n_heads": 4}, {"name": "gqa", "n_heads": 4, "sliding_window": 3, "rope_theta": 50.0}]
    moe = {"first_moe_layer": 1, "moe_every_n_layers": 2}
    model = make_model(with_modules(tiny_config, n_layers=3, attention=sections, moe=moe))
    assert model.config.prediction_layer == 1
    tokens_BL = make_tokens()
    _, further = reference(model, tokens_BL[:, :-1], tokens_BL[:, 1:])
    output = model(tokens_BL[:, :-1], tokens_BL[:, 1:])
    torch.testing.assert_close(output.extra_losses["multi_token_prediction"], further, rtol=1e-5, atol=1e-6)


def test_a_module_reads_no_token_later_than_the_one_before_its_target(tiny_config):
    model, tokens_BL, j = make_model(with_modules(tiny_config, 3, n_layers=3)), make_tokens(), 8
    changed_BL = tokens_BL.clone()
    changed_BL[:, j] = (changed_BL[:, j] + 1) % 64
    with torch.no_grad():
        _, before = representations(model, lambda: model(tokens_BL, tokens_BL))
        _, after = representations(model, lambda: model(changed_BL, tokens_BL))
    assert len(before) == 3
    for k, (old_BLD, new_BLD) in enumerate(zip(before, after, strict=True), 1):
        torch.testing.assert_close(old_BLD[:, : j - k], new_BLD[:, : j - k], rtol=1e-5, atol=1e-5)
        assert not torch.isclose(old_BLD[:, j - k], new_BLD[:, j - k], atol=1e-2).all(-1).any()


# ------------------------------------------------------------------------- masks, documents, no targets


@pytest.mark.parametrize("n_modules", [1, 2])
def test_documents_in_one_sequence_are_as_good_as_alone(tiny_config, n_modules):
    model, lengths = make_model(with_modules(tiny_config, n_modules)), [5, 1, 7]
    tokens_BL, L = make_tokens(B=1, L=14), 13
    document_ids_BL = torch.repeat_interleave(torch.tensor([4, 9, 4 + 1]), torch.tensor(lengths))[None]
    whole = model(tokens_BL[:, :-1], tokens_BL[:, 1:], document_ids_BL=document_ids_BL)
    sums, loads, start = [0.0] * n_modules, 0.0, 0
    for length in lengths:
        document_BL = tokens_BL[:, start : start + length + 1]
        start += length
        run = lambda: model(document_BL[:, :-1], document_BL[:, 1:])  # noqa: B023, E731
        output, hidden = representations(model, run)
        loads = loads + output.stats.load_BE
        for k, h_BLD in enumerate(hidden, 1):
            logits = F.linear(h_BLD[0, : max(length - k, 0)], model.head_weight_VD)
            sums[k - 1] = sums[k - 1] + F.cross_entropy(logits, document_BL[0, 1 + k :], reduction="sum")
    counts = [sum(max(length - k, 0) for length in lengths) for k in range(1, n_modules + 1)]
    wanted = COEF * sum(total / (L - k) for k, total in enumerate(sums, 1)) / n_modules
    torch.testing.assert_close(whole.extra_losses["multi_token_prediction"], wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole.stats.load_BE, loads)
    assert whole.stats.n_tokens_B.tolist() == [[L], [L], *[[n] for n in counts]]


def test_sequences_of_short_documents_weigh_in_any_micro_batch_alike(tiny_config):
    model, tokens_BL = make_model(with_modules(tiny_config, 2, moe=None)), make_tokens(B=3)
    lengths = [13], [2, 1, 2, 2, 2, 4], [6, 7]
    ids_BL = torch.stack([torch.repeat_interleave(torch.arange(len(each)), torch.tensor(each)) for each in lengths])
    together = model(tokens_BL, tokens_BL, document_ids_BL=ids_BL).extra_losses["multi_token_prediction"]
    apart = [
        model(tokens_BL[i : i + 1], tokens_BL[i : i + 1], document_ids_BL=ids_BL[i : i + 1]).extra_losses[
            "multi_token_prediction"
        ]
        for i in range(3)
    ]
    torch.testing.assert_close(together, sum(apart) / 3)


def test_a_padded_sequence_is_the_short_one(tiny_config):
    model, tokens_BL, n = make_model(with_modules(tiny_config)).eval(), make_tokens(), 9
    inputs_BL, targets_BL = tokens_BL[:, :-1].clone(), tokens_BL[:, 1:].clone()
    mask_BL = torch.ones_like(inputs_BL, dtype=torch.bool)
    mask_BL[1, n:] = False
    targets_BL[1, n:] = IGNORE
    padded = model(inputs_BL, targets_BL, token_mask_BL=mask_BL)
    rows = [model(inputs_BL[:1], targets_BL[:1]), model(inputs_BL[1:, :n], targets_BL[1:, :n])]
    for i, row in enumerate(rows):
        for name, value in sequence_slice(padded.stats, i).items():
            torch.testing.assert_close(value, sequence_slice(row.stats, 0)[name], msg=name)
    assert padded.stats.n_tokens_B.tolist() == [[12, n], [12, n], [11, n - 1]]
    long, short = (row.extra_losses["multi_token_prediction"] for row in rows)
    wanted = (11 * long + (n - 1) * short) / (11 + n - 1)
    torch.testing.assert_close(padded.extra_losses["multi_token_prediction"], wanted, rtol=1e-5, atol=1e-6)
    inputs_BL[1, n:] = 3
    again = model(inputs_BL, targets_BL, token_mask_BL=mask_BL)
    assert torch.equal(again.extra_losses["multi_token_prediction"], padded.extra_losses["multi_token_prediction"])


def test_a_masked_token_takes_all_that_read_it_out_of_the_count(tiny_config):
    model, tokens_BL = make_model(with_modules(tiny_config, 3)), make_tokens(B=1)
    mask_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    mask_BL[0, 6] = False
    stats = model(tokens_BL, tokens_BL, token_mask_BL=mask_BL).stats
    # of 13 positions: the masked one; the last k; and the k whose later tokens are masked
    assert stats.n_tokens_B.flatten().tolist() == [12, 12, 12 - 2, 12 - 4, 12 - 6]
    assert torch.equal(stats.load_BE.sum(-1), 2 * stats.n_tokens_B)


def test_a_target_that_is_ignored_is_ignored_at_every_depth_and_its_token_still_counts(tiny_config):
    model, tokens_BL, j = make_model(with_modules(tiny_config, 2)), make_tokens(B=1), 7
    inputs_BL, targets_BL = tokens_BL[:, :-1], tokens_BL[:, 1:].clone()
    targets_BL[0, j] = IGNORE
    output, hidden = representations(model, lambda: model(inputs_BL, targets_BL))
    means = []
    for k, h_BLD in enumerate(hidden, 1):
        kept = [i for i in range(12 - k) if i + k != j]
        logits = F.linear(h_BLD[0, kept], model.head_weight_VD)
        means.append(F.cross_entropy(logits, tokens_BL[0, [i + k + 1 for i in kept]]))
    torch.testing.assert_close(output.extra_losses["multi_token_prediction"], COEF * sum(means) / 2)
    assert output.stats.n_tokens_B.flatten().tolist() == [12, 12, 11, 10]


def test_a_sequence_too_short_for_a_module_costs_nothing_and_gives_no_nan(tiny_config):
    model, tokens_BL = make_model(with_modules(tiny_config, 2)), make_tokens(B=1, L=2)
    output = model(tokens_BL, tokens_BL)
    assert output.stats.n_tokens_B.flatten().tolist() == [2, 2, 1, 0]
    gradients = gradients_of(model, total_loss(output) + output.stats.log_z_sq.sum())
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)


# ----------------------------------------------------------------------------- what it must leave alone


def test_the_main_model_is_the_same_to_the_bit_with_and_without(tiny_config):
    with_it, without = make_model(with_modules(tiny_config, 2)).eval(), make_model(tiny_config()).eval()
    extra = with_it.state_dict().keys() - without.state_dict().keys()
    assert extra
    assert all(name.startswith("multi_token_prediction.") for name in extra)
    assert not any("prediction" in name for name in without.state_dict())
    for name, value in without.state_dict().items():
        assert torch.equal(with_it.state_dict()[name], value), name
    tokens_BL = make_tokens()
    assert torch.equal(with_it(tokens_BL).logits, without(tokens_BL).logits)
    assert with_it(tokens_BL).stats.load_BE.shape[0] == 2
    a, b = with_it(tokens_BL[:, :-1], tokens_BL[:, 1:]), without(tokens_BL[:, :-1], tokens_BL[:, 1:])
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.ce_BL, b.ce_BL)
    assert torch.equal(a.stats.load_BE[:2], b.stats.load_BE)
    assert b.extra_losses == {}
    cache = with_it.init_cache(2, 13)
    assert len(cache) == 2
    torch.testing.assert_close(with_it(tokens_BL, cache=cache).logits, without(tokens_BL).logits)
    with pytest.raises(ValueError, match="whole sequence"):
        with_it(tokens_BL, tokens_BL, cache=with_it.init_cache(2, 13))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activation_checkpointing_recomputes_the_modules_too_and_changes_nothing(tiny_config, dropout):
    model, tokens_BL = make_model(with_modules(tiny_config, 2, dropout=dropout)), make_tokens()
    calls, results = [], []
    model.multi_token_prediction[1].block.attention.register_forward_hook(lambda *args: calls.append(1))
    for model.activation_checkpointing in ("none", "full"):
        torch.manual_seed(0)
        output = model(tokens_BL[:, :-1], tokens_BL[:, 1:])
        results.append((output, gradients_of(model, total_loss(output))))
    assert len(calls) == 3
    (plain, wanted), (recomputed, found) = results
    assert torch.equal(total_loss(recomputed), total_loss(plain))
    assert torch.equal(recomputed.stats.load_BE, plain.stats.load_BE)
    assert plain.stats.load_BE.sum(-1).tolist() == [[24, 24], [24, 24], [22, 22], [20, 20]]
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name


def test_the_compiled_block_equals_the_eager_one(tiny_config):
    model, tokens_BL = make_model(with_modules(tiny_config, n_layers=1)), make_tokens()
    results = []
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()
            model.all_blocks[-1].compile(backend="aot_eager", fullgraph=True)
        output = model(tokens_BL[:, :-1], tokens_BL[:, 1:])
        results.append((output, gradients_of(model, total_loss(output))))
    (eager, wanted), (compiled_output, found) = results
    torch.testing.assert_close(total_loss(compiled_output), total_loss(eager), rtol=1e-6, atol=1e-6)
    assert torch.equal(compiled_output.stats.load_BE, eager.stats.load_BE)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


# --------------------------------------------------------------------------------- routers and optimizer


@pytest.mark.parametrize(
    ("router", "dispatch"),
    [(name, "dropless") for name in registered("router")]
    + [(name, "capacity") for name, config in registered("router").items() if config.routing == "token_choice"],
)
def test_every_router_serves_the_modules_and_leaves_their_last_positions_out(tiny_config, router, dispatch):
    top_k = 1 if router == "switch" else 2
    moe = {"router": router, "balancers": [], "top_k": top_k, "dispatch": dispatch}
    model, tokens_BL = make_model(with_modules(tiny_config, 2, moe=moe)), make_tokens(L=33)
    output = model(tokens_BL[:, :-1], tokens_BL[:, 1:])
    n_chunks = model.config.moe.router.n_chunks
    assert output.stats.n_tokens_B.tolist() == [[n * n_chunks] * 2 for n in (32, 32, 31, 30)]
    if router != "expert_choice":  # whose experts take a share of the static length
        assert (output.stats.load_BE.sum(-1) <= output.stats.n_tokens_B * top_k).all()
    gradients = gradients_of(model, total_loss(output) + output.stats.prob_BE.square().sum())
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)
    for name, gradient in gradients.items():
        if name.startswith("multi_token_prediction.") and "experts" in name:
            assert gradient.abs().sum() > 0, name


def test_reinforce_rewards_each_layer_by_the_prediction_it_serves(tiny_config):
    config = with_modules(tiny_config, 2, moe={"router": "reinforce", "experts": {"backend": "loop"}})
    model, tokens_BL = make_model(config), make_tokens()
    inputs_BL, targets_BL = tokens_BL[:, :-1], tokens_BL[:, 1:]
    output, hidden = representations(model, lambda: model(inputs_BL, targets_BL))
    router, losses = model.moe_layers[0].router, []
    for layer in range(4):
        k = max(0, layer - 1)  # layers 0 and 1 serve the next token
        ce_BL, predicted_BL = output.ce_BL, torch.arange(12).expand(2, 12) < 12 - k
        if k:
            logits = F.linear(hidden[k - 1][:, : 12 - k], model.head_weight_VD).transpose(1, 2)
            ce_BL = F.pad(F.cross_entropy(logits, targets_BL[:, k:], reduction="none").detach(), (0, k))
        row = {name: value[layer : layer + 1] for name, value in output.stats.extra.items()}
        one = RouterStats._make([*(column[layer : layer + 1] for column in output.stats[:-1]), row])
        losses.append(router.loss(one, ce_BL, predicted_BL))
    torch.testing.assert_close(output.extra_losses["routing"], torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
    found = gradients_of(model, output.extra_losses["routing"])
    assert all(found[name].abs().sum() > 0 for name in found if name.endswith("router.weight"))


def test_hash_routing_goes_by_the_token_that_the_module_reads(tiny_config):
    model = make_model(with_modules(tiny_config, 1, moe={"router": "hash", "balancers": []}))
    tokens_BL = make_tokens(B=1)
    stats = model.eval()(tokens_BL, tokens_BL).stats
    later = model.moe_layers[0].router(
        torch.zeros(1, 12, 32), RouteContext(tokens_BL[:, 1:].contiguous(), None, False)
    )[1]
    assert torch.equal(stats.load_BE[2], later.load_BE)
    assert not torch.equal(stats.load_BE[2], stats.load_BE[0])


def test_the_optimizer_and_the_initialisation_know_every_parameter(tiny_config):
    config = with_modules(tiny_config, 1, init={"std": 0.2, "router_std": 0.01})
    model = GPT(config)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan"))
    initialize(model, 0)
    kinds, stds = {}, {}
    for name, parameter in model.multi_token_prediction.named_parameters():
        assert parameter.isfinite().all(), name
        kinds[name] = kind_of(f"multi_token_prediction.{name}", parameter.ndim)
        stds[name] = float(parameter.detach().std())
    norms = ("embedding_norm", "hidden_norm", "norm", "block.attention_norm", "block.feed_forward_norm")
    assert {name for name, kind in kinds.items() if kind == "norm"} == {f"0.{norm}.weight" for norm in norms}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"matrix"}
    assert stds["0.projection.weight"] == pytest.approx(0.2, rel=0.1)
    assert stds["0.block.attention.out.weight"] == pytest.approx(0.2 / 2, rel=0.1)  # sqrt(2 x 2 layers)
    assert stds["0.block.moe.router.weight"] == pytest.approx(0.01, rel=0.2)


def test_modules_that_look_past_the_sequence_or_are_none_are_refused():
    raw = {"model": {"multi_token_prediction": {"n_modules": 16}}, "data": {"seq_len": 16}}
    raw["optim"] = {"batch_tokens": 16, "micro_batch_size": 1}
    with pytest.raises(ConfigError, match=r"n_modules: 16 .*seq_len = 16(.|\n)*at most 15"):
        check_config(from_dict(Config, raw))
    raw["model"]["multi_token_prediction"]["n_modules"] = 15
    check_config(from_dict(Config, raw))
    for wrong in ({"n_modules": 0}, {"coef": 0}, {"depth": 2}):
        with pytest.raises(ConfigError, match=f"multi_token_prediction.{next(iter(wrong))}"):
            from_dict(Config, {"model": {"multi_token_prediction": wrong}})
