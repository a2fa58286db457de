"""The decoder-only GPT whose feed-forward is a mixture of experts in the layers that the config says."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelm.config import ModelConfig
from moelm.model.attention.base import Attention
from moelm.model.block import Block
from moelm.model.cross_entropy import IGNORE, chunked_cross_entropy
from moelm.model.multi_token_prediction import PredictionModule, context_ahead
from moelm.model.norm import make_norm
from moelm.moe.types import RouteContext, RouterStats, stack_stats


class GPTOutput(NamedTuple):
    logits: Tensor | None  # [B, L, V], without targets
    loss: Tensor | None  # scalar, mean cross-entropy in nats a token; with gradient
    ce_BL: Tensor | None  # float32 cross-entropy of each token, detached; 0 where the target is ignored
    extra_losses: dict[str, Tensor]  # named, weighted losses beside it: `multi_token_prediction`, `routing`
    stats: RouterStats | None  # stacked over MoE layers, with targets over prediction modules too; None if dense
    cache: list[Any] | None


class Prediction(NamedTuple):
    """One of what the model predicts at each position: the next token, or one further ahead."""

    loss: Tensor  # scalar, mean cross-entropy; with gradient
    ce_BL: Tensor  # float32 cross-entropy of each token, detached; 0 where nothing is predicted
    predicted_BL: Tensor  # bool
    stats: list[RouterStats]  # of the MoE layers that serve this prediction first


class GPT(nn.Module):
    """Parameters are uninitialised until `moelm.model.init.initialize` fills them, so it builds on meta too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = "none"  # of each block, by `checkpointing.run`; changes no value
        self.cuda_graphs = False
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = make_norm(config)
        tied = config.tied_embeddings
        self.head = None if tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.multi_token_prediction = nn.ModuleList(
            PredictionModule(config) for _ in range(config.n_prediction_modules)
        )

    @property
    def head_weight_VD(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def moe_layers(self) -> list[Any]:
        """The MoELayer modules, in the order of the M axis of the statistics: `ModelConfig.routed_layers`."""
        return [block.moe for block in self.all_blocks if block.moe is not None]

    @property
    def all_blocks(self) -> list[Block]:
        """Those of the main model, then those of multi-token prediction."""
        blocks = [*self.blocks, *(module.block for module in self.multi_token_prediction)]
        return [block for block in blocks if isinstance(block, Block)]

    @property
    def attentions(self) -> list[Attention]:
        return [block.attention for block in self.blocks if isinstance(block, Block)]

    def compile_blocks(self, cuda_graphs: bool = False, **options: Any) -> None:
        """Each block in place; names and values stay. `options` are those of torch.compile.

        With `cuda_graphs` a block's kernels are launched together, as recorded; what it returns and its gradients then
        lie in memory that the next forward pass of the model takes again (`own_gradients`).
        """
        import torch._dynamo.config
        import torch._functorch.config
        import torch._inductor.config  # here, since that takes longer than all else and most commands compile nothing

        self.cuda_graphs = cuda_graphs
        if cuda_graphs:
            options["mode"] = "reduce-overhead"
            # what is not recorded, since other ranks decide its size, stays in the order that overlaps
            torch._inductor.config.triton.reorder_for_reducing_graph_partitions = False
        # else the backward pass is traced under the forward's autocast, and the router's float32 products become bf16
        torch._functorch.config.backward_pass_autocast = "off"
        torch._dynamo.config.capture_dynamic_output_shape_ops = True  # of tokens that other ranks sent
        for block in self.all_blocks:
            block.compile(dynamic=False, **options)

    def own_gradients(self) -> None:
        """After the first micro-batch of a step, to which those of others are added: out of memory that CUDA graphs
        write again. Those of experts that are summed in one place lie outside of it."""
        for block in self.all_blocks if self.cuda_graphs else []:
            for parameter in block.parameters():
                if parameter.grad is not None and not hasattr(parameter, "gradient_sum"):
                    parameter.grad = parameter.grad.clone()

    def init_cache(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> list[Any]:
        """An empty cache for generation: one entry a layer, opaque, filled in place by `forward`."""
        weight = self.embedding.weight
        options = (batch_size, max_len, weight.device, dtype or weight.dtype)
        return [attention.init_cache(*options) for attention in self.attentions]

    def forward(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor | None = None,
        *,
        token_mask_BL: Tensor | None = None,
        document_ids_BL: Tensor | None = None,
        cache: list[Any] | None = None,
    ) -> GPTOutput:
        """Without targets logits, with targets the loss (the full logits then never exist at once).

        `targets_BL`: int64, IGNORE where nothing is predicted. `token_mask_BL`: bool, False = padding, neither
        routed nor counted. `document_ids_BL`: attention stays within equal ids. `cache`: from `init_cache`;
        the tokens follow those it holds. Modules of multi-token prediction run only with targets.
        """
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        L = tokens_BL.shape[1]
        start = cache[0].length if cache is not None else 0
        positions_L = torch.arange(start, start + L, device=tokens_BL.device)
        n_sections = len(self.config.attentions)
        rotations = [attention.rotation(positions_L) for attention in self.attentions[:n_sections]]
        mask_BLL = attention_mask(positions_L, document_ids_BL, start)
        context = RouteContext(tokens_BL, token_mask_BL, self.training)
        recompute = self.activation_checkpointing if torch.is_grad_enabled() else "none"
        embedded_BLD = F.dropout(self.embedding(tokens_BL), self.config.dropout, self.training)
        x_BLD, layer_stats = embedded_BLD, []
        for i, block in enumerate(self.blocks):
            refresh_copies(block)
            inputs = (x_BLD, rotations[i % n_sections], mask_BLL, context)
            x_BLD, stats = block(*inputs, None, recompute) if cache is None else block(*inputs, cache[i])
            if stats is not None:
                layer_stats.append(stats)
        x_BLD = self.norm(x_BLD)
        if targets_BL is None:
            all_stats = stack_stats(layer_stats) if layer_stats else None
            return GPTOutput(F.linear(x_BLD, self.head_weight_VD), None, None, {}, all_stats, cache)
        if cache is not None and self.multi_token_prediction:
            raise ValueError("targets_BL with a cache: multi-token prediction needs the whole sequence")
        predictions = [self._predict(x_BLD, targets_BL, layer_stats)]
        rotation = rotations[self.config.prediction_layer % n_sections]
        for k, module in enumerate(self.multi_token_prediction, 1):
            refresh_copies(module.block)
            ahead = context_ahead(context, document_ids_BL, k)
            x_BLD, stats = module(x_BLD, embedded_BLD.roll(-k, 1), rotation, mask_BLL, ahead, recompute)
            assert ahead.token_mask_BL is not None
            targets_ahead_BL = torch.where(ahead.token_mask_BL, targets_BL.roll(-k, 1), IGNORE)
            prediction = self._predict(x_BLD, targets_ahead_BL, [] if stats is None else [stats])
            if document_ids_BL is not None:  # else micro-batches of short documents would weigh as much as others
                within = context_ahead(context, None, k).token_mask_BL
                assert within is not None
                share = ahead.token_mask_BL.sum() / within.sum().clamp(min=1)
                prediction = prediction._replace(loss=share * prediction.loss)
            predictions.append(prediction)
        all_stats = stack_stats([stats for each in predictions for stats in each.stats]) if layer_stats else None
        return GPTOutput(None, predictions[0].loss, predictions[0].ce_BL, self._extra(predictions), all_stats, cache)

    def _predict(self, x_BLD: Tensor, targets_BL: Tensor, stats: list[RouterStats]) -> Prediction:
        loss, ce_T = chunked_cross_entropy(x_BLD.flatten(0, 1), self.head_weight_VD, targets_BL.flatten())
        return Prediction(loss, ce_T.view_as(targets_BL), targets_BL != IGNORE, stats)

    def _extra(self, predictions: list[Prediction]) -> dict[str, Tensor]:
        """The named losses beside the main cross-entropy: DeepSeek-V3 (2412.19437) eq. 24-25 of the predictions
        further ahead, and that of routers which need one, a mean over all MoE layers, in which each is rewarded by the
        prediction that it serves first."""
        extra = {}
        section = self.config.multi_token_prediction
        if section is not None:
            extra["multi_token_prediction"] = section.coef * torch.stack([each.loss for each in predictions[1:]]).mean()
        routed = [each for each in predictions if each.stats]
        if routed:
            router, n_layers = self.moe_layers[0].router, len(self.moe_layers)
            losses = [router.loss(stack_stats(each.stats), each.ce_BL, each.predicted_BL) for each in routed]
            if losses[0] is not None:
                shares = [len(each.stats) / n_layers for each in routed]
                extra["routing"] = sum(share * loss for share, loss in zip(shares, losses, strict=True))
        return extra


def refresh_copies(block: Any) -> None:
    """Of a block's experts. Outside of it, since it may be compiled, and right before it: autograd visits first what
    was made last, so these weights get their gradients before those of the blocks below, and they can be sent."""
    if isinstance(block, Block) and block.moe is not None and block.moe.experts.backend == "fused":
        block.moe.experts.refresh()


def attention_mask(positions_L: Tensor, document_ids_BL: Tensor | None, start: int) -> Tensor | None:
    """bool [B or 1, L, keys], True = may attend; None where plain causal attention is the same and faster."""
    if document_ids_BL is None and (start == 0 or len(positions_L) == 1):
        return None
    keys = torch.arange(start + len(positions_L), device=positions_L.device)
    mask_BLL = (keys <= positions_L.unsqueeze(-1)).unsqueeze(0)
    if document_ids_BL is not None:
        if start:
            raise ValueError("document_ids_BL with a filled cache: the ids of the cached tokens are unknown")
        mask_BLL = mask_BLL & (document_ids_BL.unsqueeze(1) == document_ids_BL.unsqueeze(2))
    return mask_BLL
