"""What devices hold and send, against counts by hand."""

from __future__ import annotations

import pytest

from moelm.config import Config, ConfigError, from_dict, to_dict
from moelm.model.devices import count, gathers_experts, on_devices, ranks_of_token
from moelm.model.gpt import GPT
from moelm.model.size import model_size, training_memory


def make(tiny_config, **trainer):
    config = from_dict(Config, {"model": to_dict(tiny_config(n_layers=3, moe={"first_moe_layer": 1}))})
    config.data.seq_len, config.optim.micro_batch_size, config.optim.batch_tokens = 16, 4, 256
    for key, value in trainer.items():
        setattr(config.trainer, key, value)
    return config


def test_every_parameter_is_counted_once(tiny_config):
    config = make(tiny_config)
    counts = count(config)
    assert counts.total == model_size(config.model).total
    block = GPT(config.model).blocks[2]
    assert counts.experts == 2 * counts.largest_experts == 2 * sum(p.numel() for p in block.moe.experts.parameters())
    assert counts.routers == 2 * 8 * 32
    assert counts.rest == 64 * 32 + 32


def test_a_token_is_sent_to_as_many_ranks_as_its_experts_lie_on(tiny_config):
    moe = tiny_config(moe={"n_experts": 4, "top_k": 2}).moe
    assert ranks_of_token(moe, 1) == 1
    assert ranks_of_token(moe, 2) == pytest.approx((2 * 1 + 4 * 2) / 6)  # of 6 pairs 2 lie on one rank
    assert ranks_of_token(moe, 4) == 2


def test_what_is_sent_is_what_the_formulas_of_the_docs_say(tiny_config):
    config = make(tiny_config)  # two micro-batches of 64 tokens on each of two devices
    n = count(config)
    ddp, fsdp, shared = on_devices(config, 2)
    assert [each.strategy for each in (ddp, fsdp, shared)] == ["ddp", "fsdp", "fsdp, expert_parallel=2"]
    assert ddp.sent == 8 * n.total / 2
    assert fsdp.sent == (2 * (12 * (n.blocks + n.experts) + 8 * n.rest) + 8 * n.routers) / 2
    short = make(tiny_config, precision="bf16-mixed")
    short.optim.batch_tokens = 2 * 64  # one micro-batch on each: gradients of fused experts in bfloat16
    assert on_devices(short, 2)[0].sent == (8 * n.total - 4 * n.experts) / 2
    rows = 64 * ranks_of_token(config.model.moe, 2) * 2
    tokens, choices = 2 * 4 * rows * 4 * 32, 2 * 12 * 64 * config.model.moe.top_k * 2
    assert shared.sent == int((2 * (12 * n.blocks + 8 * n.rest) + 8 * n.routers + tokens) / 2 + choices)
    once = make(tiny_config, accumulate_unreduced=True)
    assert fsdp.sent - on_devices(once, 2)[1].sent == (4 * (n.blocks + n.experts + n.rest)) / 2
    kept = on_devices(make(tiny_config, strategy="fsdp", reshard_after_forward=False), 2)[1]
    # of two micro-batches: blocks once in each, experts once
    assert fsdp.sent - kept.sent == (2 * 4 * n.blocks + 3 * 4 * n.experts) / 2
    halved = on_devices(make(tiny_config, reduce_dtype="bfloat16"), 2)[1]
    assert fsdp.sent - halved.sent == 2 * 2 * (n.blocks + n.experts) / 2
    again = make(tiny_config, activation_checkpointing="full")
    assert on_devices(again, 2)[2].sent - shared.sent == int(2 * 2 * rows * 4 * 32 / 2)


@pytest.mark.parametrize(
    ("precision", "reduce_dtype", "s", "r"),
    [("32-true", "float32", 4, 4), ("bf16-mixed", "float32", 2, 4), ("bf16-mixed", "bfloat16", 2, 2)],
)
def test_what_stays_whole_takes_memory(tiny_config, precision, reduce_dtype, s, r):
    config = make(tiny_config, precision=precision, reduce_dtype=reduce_dtype)
    config.model.n_layers = 6
    n, resharded = count(config), on_devices(config, 2)[1]
    config.trainer.reshard_after_forward = False
    kept = on_devices(config, 2)[1]
    assert kept.strategy == "fsdp, reshard_after_forward=false"
    # all is whole, and a unit is what all blocks hold but experts, of which two layers' gradients are there, one on
    # their way; else three units
    three_units = 3 * (n.largest_block + n.largest_experts)
    assert kept.memory - resharded.memory == s * (n.experts + 2 * n.blocks - three_units) + 2 * r * n.largest_experts


def test_experts_are_gathered_by_themselves_where_they_stay_and_are_dealt_out_evenly(tiny_config):
    def gathers(n_experts=8, n_ranks=2, **options):
        return gathers_experts(
            make(tiny_config, **{"reshard_after_forward": False, **options}).trainer, n_experts, n_ranks
        )

    assert gathers()
    assert gathers(n_ranks=8)
    assert not gathers(reshard_after_forward=True)
    assert not gathers(accumulate_unreduced=True)
    assert not gathers(replicas=2, n_ranks=4)
    assert not gathers(n_experts=9)
    assert not gathers(n_ranks=1)


def test_a_rank_has_room_for_half_as_many_choices_again(tiny_config, monkeypatch):
    config = make(tiny_config)
    row = 4 * (2 * 32 + 3 * config.model.moe.d_expert)  # in, out and hidden
    roomy = on_devices(config, 2)
    monkeypatch.setattr("moelm.model.devices.BUSIEST", 1.0)
    even = on_devices(config, 2)
    assert roomy[1] == even[1]
    assert roomy[2].memory - even[2].memory == 2 * 64 * config.model.moe.top_k * row / 2


def test_a_static_exchange_sends_all_tokens_to_all_ranks_and_has_room_for_all_their_choices(tiny_config, monkeypatch):
    monkeypatch.setattr("moelm.model.devices.BUSIEST", 1.0)
    exact, config = on_devices(make(tiny_config), 4)[3], make(tiny_config, static_exchange=True)
    static, moe = on_devices(config, 4)[3], config.model.moe
    assert static.strategy == "fsdp, expert_parallel=4, static_exchange=true"
    needless, layers = 64 * (4 - ranks_of_token(moe, 4)) * 4 * 32, 2  # bytes of a layer's tokens
    assert static.sent - exact.sent == pytest.approx(4 * needless * layers * 3 / 4, abs=1)
    row = 4 * (2 * 32 + 3 * moe.d_expert)
    gradients = 3 * 64 * moe.top_k * 4 * (3 * moe.d_expert + 32)  # of one layer
    assert static.memory - exact.memory == pytest.approx(
        layers * (needless + 3 * 64 * moe.top_k * row) + gradients, abs=1
    )


def test_all_that_lies_on_a_device_under_expert_parallelism_by_hand(tiny_config):
    config = make(tiny_config, precision="bf16-mixed", activation_checkpointing="full")
    n, shared, top_k = count(config), on_devices(config, 2)[2], config.model.moe.top_k
    assert shared.strategy == "fsdp, expert_parallel=2"
    held = n.routers + (n.blocks + n.experts + n.rest) // 2  # weights, two moments and gradients of each
    gathered = 2 * (n.blocks + n.blocks) + 8 * n.rest + 2 * n.experts / 2  # with gradients; working copies of experts
    exchanged = 64 * (ranks_of_token(config.model.moe, 2) - 1) * 2 * 32  # tokens of the other device, in one layer
    plan, row = 13 * 64 * top_k * 2, 2 * 2 * 16 + 12
    room = 64 * top_k / 2 * row  # for half as many choices again
    chosen = 8 * 64 * top_k * 2 * 2  # kept of both layers for all devices
    loss = 2 * 64 * 64 + 2 * 4 * 64 * 32 + 2 * 64 * 32  # logits, two gradients of the head, one of what it reads
    activations = training_memory(config).activations
    by_hand = 16 * held + gathered + int(exchanged + plan + room) + chosen + loss + activations
    assert shared.memory == by_hand


def test_replicas_hold_more_and_send_their_gradients_to_each_other(tiny_config):
    config = make(tiny_config, strategy="fsdp")
    config.optim.batch_tokens = 512  # two micro-batches on each of four devices
    n = count(config)
    alone, plain = on_devices(config, 2)[1], on_devices(config, 4)[1]
    config.trainer.replicas = 2
    found = on_devices(config, 4)
    assert [each.strategy for each in found] == ["ddp", "fsdp, replicas=2", "fsdp, replicas=2, expert_parallel=2"]
    assert plain.memory < found[1].memory == alone.memory
    config.optim.batch_tokens = 256
    config.trainer.replicas = 1
    alone = on_devices(config, 2)[1]  # two micro-batches too
    between = 2 * 8 * (n.total - n.routers) / 2 / 2
    assert found[1].sent == int(alone.sent + between + 8 * n.routers * (3 / 4 - 1 / 2))
    config.trainer.replicas = 3
    with pytest.raises(ConfigError, match="3 does not divide the 4 devices"):
        on_devices(config, 4)


def test_the_degrees_are_those_that_devices_and_experts_allow(tiny_config):
    config = make(tiny_config)
    assert [each.strategy for each in on_devices(config, 6)] == ["ddp", "fsdp", "fsdp, expert_parallel=2"]
    assert len(on_devices(config, 8)) == 5
    memory = [each.memory for each in on_devices(config, 8)]
    assert memory[0] > max(memory[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_parallel": 16}, "trainer.expert_parallel: 16 does not divide the 8 devices"),
        ({"expert_parallel": 8, "replicas": 2}, r"trainer.replicas: 2 does not divide the 8 devices / 8 \(trainer.exp"),
    ],
)
def test_what_devices_cannot_be_is_refused(tiny_config, options, message):
    with pytest.raises(ConfigError, match=message):
        on_devices(make(tiny_config, **options), 8)
