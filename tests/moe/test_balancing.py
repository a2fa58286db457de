"""The seam of the balancers, and the losses `switch` and `z_loss`, against arithmetic by hand."""

import math

import pytest
import torch

from moelm.config import MoEConfig, UserError, build, from_dict, registered
from moelm.model.gpt import GPT
from moelm.model.init import initialize
from moelm.moe.balancing.base import LossConfig, auxiliary_losses
from moelm.moe.balancing.switch import switch_aux_loss
from moelm.moe.routing.top_k import TopKRouter
from moelm.moe.types import RouteContext, stack_stats

LN2, LN4 = math.log(2), math.log(4)
# Four tokens' logits over three experts, in two sequences; their softmax is
#   (1/4, 1/4, 1/2) (1/2, 1/4, 1/4) | (1/2, 1/4, 1/4) (1/2, 1/4, 1/4)
# and their logsumexp ln 4, ln 4, ln 8, ln 4.
LOGITS_BLE = torch.tensor([[[0, 0, LN2], [LN2, 0, 0]], [[LN4, LN2, LN2], [LN2, 0, 0]]])


LOSSES = [name for name, config in registered("balancer").items() if issubclass(config, LossConfig)]


def make_balancer(name, **settings):
    config = registered("balancer")[name](name=name, **settings)
    return build("balancer", config)


def identity_router(top_k=1, n_experts=3, **options):
    """A router whose logits are its input."""
    raw = {"n_experts": n_experts, "top_k": top_k, "router": {"name": "top_k", **options}}
    moe = from_dict(MoEConfig, raw, "moe")
    router = TopKRouter(moe.router, moe, n_experts)
    with torch.no_grad():
        router.weight.copy_(torch.eye(n_experts))
    return router


def route(router, logits_BLE, mask_BL=None):
    tokens_BL = torch.zeros(logits_BLE.shape[:2], dtype=torch.int64)
    return router(logits_BLE, RouteContext(tokens_BL, mask_BL, True))[1]


def raw_loss(name, *layers, **settings):
    return make_balancer(name, **settings).loss(stack_stats(list(layers)), None)


def with_everything(stats):
    """Statistics that all losses can read, and the window; the smooth load, which top_k has not, made of P."""
    smooth = stats.prob_BE * stats.n_tokens_B.unsqueeze(-1)
    return stats._replace(extra={**stats.extra, "smooth_load_BE": smooth}), stats.load_BE.sum(1)


def test_switch_on_four_tokens_and_three_experts_by_hand():
    # load (3, 0, 1): f = (3/4, 0, 1/4); P = (7/16, 4/16, 5/16); 3 (21/64 + 5/64) = 78/64
    stats = route(identity_router(), LOGITS_BLE)
    assert stats.load_BE.sum(0).tolist() == [3, 0, 1]
    torch.testing.assert_close(raw_loss("switch", stats), torch.tensor([78 / 64]))


def test_switch_of_top_2_divides_the_counts_by_the_choices_by_hand():
    # a small slope instead of ties: token 1 takes (2, 0), the others (0, 1)
    logits_BLE = LOGITS_BLE + torch.tensor([0.02, 0.01, 0.0])
    stats = route(identity_router(top_k=2), logits_BLE)
    assert stats.load_BE.sum(0).tolist() == [4, 3, 1]
    p_E = logits_BLE.softmax(-1).mean((0, 1))
    wanted = 3 * (4 / 8 * p_E[0] + 3 / 8 * p_E[1] + 1 / 8 * p_E[2])
    torch.testing.assert_close(raw_loss("switch", stats), wanted.view(1))


def test_z_loss_on_four_tokens_by_hand():
    stats = route(identity_router(), LOGITS_BLE)
    wanted = (3 * LN4**2 + math.log(8) ** 2) / 4
    torch.testing.assert_close(raw_loss("z_loss", stats), torch.tensor([wanted]))
    zero = route(identity_router(), torch.zeros(1, 2, 3))
    torch.testing.assert_close(raw_loss("z_loss", zero), torch.tensor([math.log(3) ** 2]))


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_switch_is_one_when_load_or_probability_is_uniform(top_k):
    generator = torch.Generator().manual_seed(top_k)
    M, B, L, E = 3, 2, 48, 16
    n_tokens_MB = torch.full((M, B), float(L))
    random_prob = torch.rand(M, B, E, generator=generator).softmax(-1) ** 3
    random_prob = random_prob / random_prob.sum(-1, keepdim=True)
    ids = torch.rand(M, B, L, E, generator=generator).mul(torch.arange(1.0, E + 1)).topk(top_k).indices
    random_load = torch.nn.functional.one_hot(ids, E).sum((2, 3)).float()
    assert random_load.std() > 1
    uniform_load = torch.full((M, B, E), L * top_k / E)
    uniform_prob = torch.full((M, B, E), 1 / E)
    for load, prob in ((uniform_load, random_prob), (random_load, uniform_prob)):
        loss_M = switch_aux_loss(load, prob, n_tokens_MB)
        assert loss_M.shape == (M,)
        assert (loss_M - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_switch_is_the_number_of_experts_over_top_k_at_collapse(top_k):
    """All tokens take the same k experts, so f = 1/k there; all of P lies on them, so E sum f P = E / k
    however P is split among them. No f exceeds 1/k, so no value is larger."""
    E = 16
    logits_BLE = torch.full((2, 10, E), -40.0)
    logits_BLE[..., :top_k] = torch.linspace(1, 0, top_k)
    stats = route(identity_router(top_k=top_k, n_experts=E), logits_BLE)
    assert (raw_loss("switch", stats) - E / top_k).abs().item() <= 1e-5


def test_one_is_not_a_lower_bound_of_switch():
    probabilities = torch.tensor([[[0.51, 0.49], [0.51, 0.49], [0.01, 0.99]]])
    stats = route(identity_router(n_experts=2), probabilities.log())
    wanted = 2 * (2 / 3 * 1.03 / 3 + 1 / 3 * 1.97 / 3)
    torch.testing.assert_close(raw_loss("switch", stats), torch.tensor([wanted]))
    assert wanted < 0.9


def test_layers_are_not_pooled_so_opposite_imbalances_do_not_cancel():
    first, second = torch.tensor([9.0, -9.0]), torch.tensor([-9.0, 9.0])
    layers = [route(identity_router(n_experts=2), logits.expand(1, 6, 2)) for logits in (first, second)]
    torch.testing.assert_close(raw_loss("switch", *layers), torch.tensor([2.0, 2.0]))


def test_sequences_weigh_by_their_tokens():
    load_MBE = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])
    prob_MBE = torch.tensor([[[0.8, 0.2], [0.4, 0.6]]])
    # f = (1/4, 3/4), P = ((0.8 + 3 * 0.4) / 4, (0.2 + 3 * 0.6) / 4) = (0.5, 0.5)
    loss_M = switch_aux_loss(load_MBE, prob_MBE, torch.tensor([[1.0, 3.0]]))
    torch.testing.assert_close(loss_M, torch.tensor([1.0]))
    # P = (0.2, 0.8): f . P = 0.65
    prob_MBE = torch.tensor([[[0.2, 0.8], [0.2, 0.8]]])
    loss_M = switch_aux_loss(load_MBE, prob_MBE, torch.tensor([[1.0, 3.0]]))
    torch.testing.assert_close(loss_M, torch.tensor([1.3]))


def test_losses_of_the_layers_are_joined_by_mean_or_sum_and_multiplied_by_coef():
    layers = [route(identity_router(), LOGITS_BLE * factor) for factor in (0.5, 1.0, 2.0)]
    balancers = [make_balancer("switch", coef=0.02), make_balancer("z_loss", coef=0.5, over_layers="sum")]
    losses = auxiliary_losses(balancers, stack_stats(layers))
    assert list(losses) == ["switch", "z_loss"]
    switch_M, z_M = raw_loss("switch", *layers), raw_loss("z_loss", *layers)
    assert len({*switch_M.tolist(), *z_M.tolist()}) == 6
    assert torch.equal(losses["switch"].raw_M, switch_M)
    assert torch.equal(losses["z_loss"].raw_M, z_M)
    torch.testing.assert_close(losses["switch"].weighted, 0.02 * switch_M.sum() / 3)
    torch.testing.assert_close(losses["z_loss"].weighted, 0.5 * z_M.sum())
    assert not losses["switch"].raw_M.requires_grad
    assert losses["switch"].weighted.requires_grad


def test_a_balancer_without_a_loss_is_not_listed_and_one_without_a_bias_keeps_it():
    stats = stack_stats([route(identity_router(), LOGITS_BLE)])
    assert auxiliary_losses([make_balancer("loss_free")], stats) == {}
    assert auxiliary_losses([make_balancer("none")], stats) == {}
    for name in ("none", *LOSSES):
        assert make_balancer(name).update_bias(torch.zeros(1, 3), torch.ones(1, 3), 0) is None


@pytest.mark.parametrize("over_layers", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_doubling_coef_doubles_the_gradient_of_every_router(tiny_config, name, over_layers):
    model = GPT(tiny_config(moe={"router": {"name": "top_k", "n_groups": 4, "top_k_groups": 2}}))
    initialize(model, 0)
    tokens_BL = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))

    def router_gradients(coef):
        model.zero_grad()
        balancer = make_balancer(name, coef=coef, over_layers=over_layers)
        losses = auxiliary_losses([balancer], *with_everything(model(tokens_BL).stats))
        losses[name].weighted.backward()
        return [layer.router.weight.grad.clone() for layer in model.moe_layers]

    once, twice, none = router_gradients(0.01), router_gradients(0.02), router_gradients(0.0)
    for single, double, zero in zip(once, twice, none, strict=True):
        assert single.abs().max() > 1e-6
        ratio = double[single != 0] / single[single != 0]
        assert (ratio - 2).abs().max() <= 1e-6
        assert (zero == 0).all()


def test_the_gradient_of_switch_is_that_of_the_probabilities_with_fixed_counts():
    logits_BLE = (LOGITS_BLE + 0.1 * torch.arange(3.0)).requires_grad_()
    stats = route(identity_router(), logits_BLE)
    (gradient,) = torch.autograd.grad(raw_loss("switch", stats).sum(), logits_BLE)
    f_E = stats.load_BE.sum(0) / 4
    (wanted,) = torch.autograd.grad(3 * (logits_BLE.softmax(-1).mean((0, 1)) * f_E).sum(), logits_BLE)
    torch.testing.assert_close(gradient, wanted)
    assert gradient.abs().max() > 0.01


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_masked_tokens_change_no_loss(score):
    mask_BL = torch.tensor([[True, False, True], [False, False, True]])
    generator = torch.Generator().manual_seed(0)
    logits_BLE = torch.randn(2, 3, 3, generator=generator)
    alone = route(identity_router(score=score), logits_BLE[mask_BL].unsqueeze(0))
    for padding in (0.0, 100.0, -100.0):
        padded = torch.where(mask_BL.unsqueeze(-1), logits_BLE, padding * torch.arange(3.0))
        stats = route(identity_router(score=score), padded, mask_BL)
        for name in ("switch", "z_loss"):
            torch.testing.assert_close(raw_loss(name, stats), raw_loss(name, alone))
        bias_ME = torch.zeros(1, 3)
        for rule in ("sign", "proportional"):
            balancer = make_balancer("loss_free", rule=rule)
            steps = [balancer.update_bias(bias_ME, s.load_BE.sum(0, keepdim=True), 0) for s in (stats, alone)]
            assert torch.equal(*steps)


def test_a_batch_without_tokens_has_a_loss_of_zero():
    stats = route(identity_router(), LOGITS_BLE, torch.zeros(2, 2, dtype=torch.bool))
    losses = auxiliary_losses([make_balancer("switch"), make_balancer("z_loss")], stack_stats([stats]))
    assert [loss.weighted.item() for loss in losses.values()] == [0.0, 0.0]


def test_probabilities_of_a_sigmoid_router_sum_to_one_so_switch_keeps_its_scale():
    stats = route(identity_router(score="sigmoid"), LOGITS_BLE)
    torch.testing.assert_close(stats.prob_BE.sum(-1), torch.ones(2))
    scores_BLE = LOGITS_BLE.sigmoid()
    p_E = (scores_BLE / scores_BLE.sum(-1, keepdim=True)).mean((0, 1))
    torch.testing.assert_close(raw_loss("switch", stats), (3 * (0.75 * p_E[0] + 0.25 * p_E[2])).view(1))


def test_a_loss_that_is_no_number_a_layer_is_refused(monkeypatch):
    balancer, stats = make_balancer("switch"), stack_stats([route(identity_router(), LOGITS_BLE)] * 2)
    monkeypatch.setattr(balancer, "loss", lambda *_: torch.tensor(1.0))
    with pytest.raises(
        UserError, match=r"the balancer switch: its loss is of shape \[\], not \[2\], one number a layer"
    ):
        auxiliary_losses([balancer], stats)
