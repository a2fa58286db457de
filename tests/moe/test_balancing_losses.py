"""The losses on small cases by hand, at balance, at collapse, with masked tokens and without any."""

import pytest
import torch
from test_balancing import LOGITS_BLE, LOSSES, identity_router, make_balancer, raw_loss, route, with_everything

from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.moe.balancing.base import auxiliary_losses
from moelm.moe.types import RouterStats, stack_stats

GROUPS = {"router": {"name": "top_k", "n_groups": 4, "top_k_groups": 2}}


def make_stats(load_BE, prob_BE, *, sent_BG=None, smooth_load_BE=None):
    """One layer's statistics from lists; top_k = 1, all gates 1, no selection bias."""
    load_BE, prob_BE = torch.tensor(load_BE, dtype=torch.float32), torch.tensor(prob_BE, requires_grad=True)
    extra = {"sent_BG": sent_BG, "smooth_load_BE": smooth_load_BE}
    return RouterStats(
        load_BE=load_BE,
        kept_BE=load_BE,
        first_choice_BE=load_BE,
        unbiased_load_BE=load_BE,
        prob_BE=prob_BE,
        gate_BE=load_BE,
        n_tokens_B=load_BE.sum(-1),
        log_z_sq=torch.zeros(()),
        extra={key: torch.tensor(value, dtype=torch.float32) for key, value in extra.items() if value is not None},
    )


def loss_and_gradient(name, stats, window_ME=None):
    """The raw loss of one layer, and its gradient by P, both as lists."""
    (raw,) = make_balancer(name).loss(stack_stats([stats]), window_ME)
    (gradient_BE,) = torch.autograd.grad(raw, stats.prob_BE)
    return raw.item(), gradient_BE.tolist()


def near(values):
    return [pytest.approx(row, rel=1e-6) for row in values]


def test_sequence_on_four_tokens_and_three_experts_by_hand():
    # loads (1, 0, 1) | (2, 0, 0): 3 f = (3/2, 0, 3/2) | (3, 0, 0); P = (3/8, 2/8, 3/8) | (4/8, 2/8, 2/8)
    # 9/16 + 9/16 = 9/8 | 3/2; the mean is 21/16
    stats = route(identity_router(), LOGITS_BLE)
    torch.testing.assert_close(raw_loss("sequence", stats), torch.tensor([21 / 16]))


def test_sequence_takes_top_2_as_shares_of_the_choices_by_hand():
    # one sequence of two tokens: choices 0, 1 and 0, 2: E / (K T) x counts = 3/4 (2, 1, 1)
    # P = (0.5, 0.3, 0.2): 3/4 (1 + 0.3 + 0.2) = 1.125
    stats = make_stats([[2, 1, 1]], [[0.5, 0.3, 0.2]])._replace(n_tokens_B=torch.tensor([2.0]))
    value, gradient_BE = loss_and_gradient("sequence", stats)
    assert value == pytest.approx(1.125)
    assert gradient_BE == near([[1.5, 0.75, 0.75]])


def test_sequence_is_not_the_loss_of_the_batch_where_sequences_are_unbalanced_in_opposite_ways():
    # each sequence has one expert of two: 2 (1 x 0.9) = 1.8 each; together they are balanced
    stats = make_stats([[4, 0], [0, 4]], [[0.9, 0.1], [0.1, 0.9]])
    value, gradient_BE = loss_and_gradient("sequence", stats)
    assert value == pytest.approx(1.8)
    assert gradient_BE == near([[1, 0], [0, 1]])
    assert raw_loss("switch", stats).item() == pytest.approx(1.0)


def test_a_sequence_without_tokens_does_not_count_in_the_mean_over_sequences():
    load, prob = [[4, 0, 0, 0], [0, 0, 0, 0], [2, 0, 0, 2]], [[0.7, 0.1, 0.1, 0.1], [0.0] * 4, [0.4, 0.2, 0.2, 0.2]]
    stats = make_stats(load, prob, sent_BG=[[4, 0], [0, 0], [2, 2]])
    # 4 x 0.7 = 2.8 and 4 (0.2 + 0.1) = 1.2; in groups of two: 2 x 0.8 = 1.6 and 2 (0.3 + 0.2) = 1
    assert loss_and_gradient("sequence", stats)[0] == pytest.approx(2.0)
    assert loss_and_gradient("device", stats)[0] == pytest.approx(1.3)
    assert loss_and_gradient("communication", stats)[0] == pytest.approx(1.3)


def test_a_selection_bias_changes_the_losses_that_count_the_choices_as_made_alone():
    """A bias of 10 sends all four tokens to expert 1, whose P is 1/4."""
    router = identity_router(selection_bias=True)
    router.expert_bias.copy_(torch.tensor([0.0, 10.0, 0.0]))
    stats = route(router, LOGITS_BLE)
    assert stats.load_BE.sum(0).tolist() == [0, 4, 0]
    window_ME = stats.load_BE.sum(0, keepdim=True)
    values = {name: make_balancer(name).loss(stack_stats([stats]), window_ME) for name in ("switch", "global_batch")}
    torch.testing.assert_close(values["switch"], torch.tensor([3 / 4]))
    torch.testing.assert_close(values["global_batch"], torch.tensor([3 / 4]))
    torch.testing.assert_close(raw_loss("switch", stats, first_choice_only=True), torch.tensor([3 / 4]))
    torch.testing.assert_close(raw_loss("sequence", stats), torch.tensor([21 / 16]))  # as without bias


def test_device_counts_without_the_selection_bias_and_communication_with_it():
    """Four experts in two groups, of which a bias closes the first: all four tokens would take expert 0."""
    router = identity_router(n_experts=4, n_groups=2, top_k_groups=1, selection_bias=True)
    router.expert_bias.copy_(torch.tensor([0.0, 0.0, 10.0, 10.0]))
    probability = torch.tensor([0.4, 0.3, 0.2, 0.1])
    stats = route(router, probability.log().expand(1, 4, 4))
    assert stats.load_BE.tolist() == [[0, 0, 4, 0]]
    torch.testing.assert_close(raw_loss("device", stats), torch.tensor([2 * 0.7]))
    torch.testing.assert_close(raw_loss("communication", stats), torch.tensor([2 * 0.3]))


def test_global_batch_takes_f_from_the_window_and_p_from_the_micro_batch_by_hand():
    # window (6, 1, 1): f = (6/8, 1/8, 1/8); P = (7/16, 4/16, 5/16): 3 (42 + 4 + 5) / 128 = 153/128
    stats = route(identity_router(), LOGITS_BLE)
    balancer = make_balancer("global_batch")
    value = balancer.loss(stack_stats([stats]), torch.tensor([[6.0, 1.0, 1.0]]))
    torch.testing.assert_close(value, torch.tensor([153 / 128]))
    assert balancer.scope == "global"
    # its own load as the window: the same as switch, 78/64
    value = balancer.loss(stack_stats([stats]), stats.load_BE.sum(0, keepdim=True))
    torch.testing.assert_close(value, torch.tensor([78 / 64]))


def test_switch_of_first_choices_by_hand():
    # a small slope instead of ties: first choices (3, 0, 1), all choices (4, 3, 1)
    logits_BLE = LOGITS_BLE + torch.tensor([0.02, 0.01, 0.0])
    stats = route(identity_router(top_k=2), logits_BLE)
    assert stats.first_choice_BE.sum(0).tolist() == [3, 0, 1]
    p_E = logits_BLE.softmax(-1).mean((0, 1))
    wanted = 3 * (3 / 4 * p_E[0] + 1 / 4 * p_E[2])
    torch.testing.assert_close(raw_loss("switch", stats, first_choice_only=True), wanted.view(1))
    assert (raw_loss("switch", stats) - wanted).abs() > 0.05


# Two sequences of two tokens, top-2 of four experts in two groups. The first takes experts (0, 1) and (0, 2), so it
# sends one token to group 0 alone and one to both; the second takes (2, 3) and (2, 3).
GROUPED = {
    "load_BE": [[2, 1, 1, 0], [0, 0, 2, 2]],
    "prob_BE": [[0.4, 0.2, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]],
    "sent_BG": [[2, 1], [0, 2]],
}


def test_device_by_hand():
    # E / (K T) = 1: f = counts; f' = means (3/2, 1/2) | (0, 2); P' = (0.6, 0.4) | (0.3, 0.7); 1.1 | 1.4
    value, gradient_BE = loss_and_gradient("device", make_stats(**GROUPED))
    assert value == pytest.approx(1.25)
    assert gradient_BE == near([[0.75, 0.75, 0.25, 0.25], [0, 0, 1, 1]])


def test_communication_by_hand():
    # M = 3/2 | 1 groups a token, T = 2: 2 / (M T) = 2/3 | 1; f'' = (4/3, 2/3) | (0, 2); 16/15 | 1.4; mean 37/30
    value, gradient_BE = loss_and_gradient("communication", make_stats(**GROUPED))
    assert value == pytest.approx(37 / 30)
    assert gradient_BE == near([[2 / 3, 2 / 3, 1 / 3, 1 / 3], [0, 0, 1, 1]])


def test_communication_counts_a_token_once_for_all_its_experts_in_a_group():
    """Both experts of group 0, and one of each group: loads of the groups are 3 : 1, tokens sent 2 : 1."""
    router = identity_router(n_experts=4, top_k=2, n_groups=2, top_k_groups=2)
    logits_BLE = torch.tensor([[[4.0, 3.0, 0.0, -1.0], [4.0, 0.0, 3.0, -1.0]]])
    stats = route(router, logits_BLE)
    assert stats.load_BE.tolist() == [[2, 1, 1, 0]]
    p_G = logits_BLE.softmax(-1).mean((0, 1)).view(2, 2).sum(-1)
    torch.testing.assert_close(raw_loss("communication", stats), (4 / 3 * p_G[0] + 2 / 3 * p_G[1]).view(1))
    torch.testing.assert_close(raw_loss("device", stats), (3 / 2 * p_G[0] + 1 / 2 * p_G[1]).view(1))


def test_importance_on_four_tokens_and_three_experts_by_hand():
    # gates 1/2 to expert 2, 1/2 three times to expert 0: (3/2, 0, 1/2), mean 2/3
    # deviations (5/6, -4/6, -1/6), variance (25 + 16 + 1) / 36 / 3 = 7/18; 7/18 / (4/9) = 7/8
    stats = route(identity_router(), LOGITS_BLE)
    assert stats.gate_BE.sum(0).tolist() == pytest.approx([1.5, 0, 0.5])
    torch.testing.assert_close(raw_loss("importance", stats), torch.tensor([7 / 8]))
    scaled = route(identity_router(route_scale=2.5), LOGITS_BLE)
    torch.testing.assert_close(raw_loss("importance", scaled), torch.tensor([7 / 8]))


def test_the_gradient_of_importance_flows_through_the_gates():
    # d CV^2 / d x_e = 2 (x_e - mean x^2 / mean) / (n mean^2): x = (3/2, 0, 1/2), mean 2/3, mean square 5/6
    gate_BE = torch.tensor([[1.5, 0.0, 0.5]], requires_grad=True)
    stats = make_stats([[3, 0, 1]], [[0.5, 0.2, 0.3]])._replace(gate_BE=gate_BE)
    (gradient_BE,) = torch.autograd.grad(raw_loss("importance", stats).sum(), gate_BE)
    assert gradient_BE.tolist() == near([[1.5 * (1.5 - 1.25), 1.5 * -1.25, 1.5 * (0.5 - 1.25)]])


def test_load_is_the_variation_of_the_smooth_load_by_hand():
    # summed over sequences (5/2, 1, 1/2), mean 4/3; deviations (7, -2, -5) / 6, variance 78/36 / 3 = 13/18
    # 13/18 / (16/9) = 13/32
    smooth = [[1.0, 0.5, 0.5], [1.5, 0.5, 0.0]]
    stats = make_stats([[2, 0, 0], [2, 0, 0]], [[1.0, 0, 0]] * 2, smooth_load_BE=smooth)
    torch.testing.assert_close(raw_loss("load", stats), torch.tensor([13 / 32]))
    leaf_BE = torch.tensor(smooth, requires_grad=True)
    raw_loss("load", stats._replace(extra={"smooth_load_BE": leaf_BE})).sum().backward()
    assert leaf_BE.grad[0].tolist() == leaf_BE.grad[1].tolist()
    assert leaf_BE.grad[0, 0] > 0.1 > -0.1 > leaf_BE.grad[0, 2]


PRODUCTS = ("switch", "sequence", "global_batch", "device", "communication")
VARIATIONS = ("importance", "load")


@pytest.mark.parametrize("name", [*PRODUCTS, *VARIATIONS])
def test_value_at_uniform_load_and_at_collapse(name):
    """Two sequences of 12 tokens, top-1 of six experts in three groups."""
    skewed, uniform = [0.4, 0.2, 0.1, 0.1, 0.1, 0.1], [1 / 6] * 6
    even = {"load_BE": [[2] * 6] * 2, "sent_BG": [[4] * 3] * 2, "smooth_load_BE": [[2] * 6] * 2}
    one = [12, 0, 0, 0, 0, 0]
    uneven = {"load_BE": [one] * 2, "sent_BG": [[12, 0, 0]] * 2, "smooth_load_BE": [one] * 2}

    def value(statistics, probability):
        stats = make_stats(prob_BE=[probability] * 2, **statistics)
        (raw,) = make_balancer(name).loss(stack_stats([stats]), stats.load_BE.sum(0, keepdim=True))
        return pytest.approx(raw.item(), abs=1e-5)

    if name in VARIATIONS:
        assert value(even, skewed) == 0
        assert value(uneven, skewed) == 5
    else:
        n = 3 if name in ("device", "communication") else 6
        assert value(even, skewed) == 1
        assert value(uneven, uniform) == 1
        assert value(uneven, [1.0, 0, 0, 0, 0, 0]) == n


def test_every_loss_was_tried():
    assert {*PRODUCTS, *VARIATIONS, "z_loss"} == set(LOSSES)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_does_not_change_the_scale(top_k):
    """All tokens take the same k experts, which have all of P: E / k per expert, as if there were E / k experts."""
    logits_BLE = torch.full((2, 5, 6), -40.0)
    logits_BLE[..., :top_k] = torch.linspace(1, 0, top_k)
    stats = route(identity_router(top_k=top_k, n_experts=6, n_groups=2, top_k_groups=1), logits_BLE)
    for name, wanted in (("sequence", 6 / top_k), ("device", 2), ("communication", 2)):
        assert raw_loss(name, stats).item() == pytest.approx(wanted), name


@pytest.mark.parametrize("name", LOSSES)
def test_masked_tokens_change_neither_loss_nor_gradient(tiny_config, name):
    """Padding to the right of both sequences, of whatever ids, against the sequences without it."""
    model = GPT(tiny_config(moe=GROUPS))
    initialize(model, 0)
    tokens_BL = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    mask_BL = (torch.arange(12) < 7).expand(2, 12)

    def loss_and_gradients(tokens_BL, mask_BL=None):
        model.zero_grad()
        loss = auxiliary_losses([make_balancer(name)], *with_everything(model(tokens_BL, token_mask_BL=mask_BL).stats))[
            name
        ].weighted
        loss.backward()
        return [loss.detach(), *(layer.router.weight.grad.clone() for layer in model.moe_layers)]

    alone = loss_and_gradients(tokens_BL[:, :7])
    for padding in (tokens_BL, torch.where(mask_BL, tokens_BL, 5)):
        for padded, wanted in zip(loss_and_gradients(padding, mask_BL), alone, strict=True):
            assert (padded - wanted).norm() <= 1e-5 * wanted.norm()
    whole = loss_and_gradients(tokens_BL)
    assert all((a - b).norm() > 1e-3 * b.norm() for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_tokens_gives_zero_and_finite_gradients(tiny_config, name):
    model = GPT(tiny_config(moe=GROUPS))
    initialize(model, 0)
    stats = model(torch.zeros(2, 6, dtype=torch.int64), token_mask_BL=torch.zeros(2, 6, dtype=torch.bool)).stats
    loss = auxiliary_losses([make_balancer(name, coef=1.0)], *with_everything(stats))[name].weighted
    assert loss.item() == 0
    loss.backward()
    for layer in model.moe_layers:
        assert (layer.router.weight.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_layers_are_float32_and_separate(name):
    """A layer's value does not depend on the other layers."""
    router = identity_router(n_experts=4, n_groups=2, top_k_groups=1)
    generator = torch.Generator().manual_seed(0)
    layers = [route(router, torch.randn(2, 6, 4, generator=generator)) for _ in range(3)]
    raw_M = make_balancer(name).loss(*with_everything(stack_stats(layers)))
    assert raw_M.dtype == torch.float32
    alone = [make_balancer(name).loss(*with_everything(stack_stats([layer]))) for layer in layers]
    torch.testing.assert_close(raw_M, torch.cat(alone))
    assert len(set(raw_M.tolist())) == 3
