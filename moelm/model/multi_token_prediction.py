"""DeepSeek-V3's multi-token prediction: modules in a row, each of which predicts one token further ahead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelm.config import ModelConfig
from moelm.model.block import Block
from moelm.model.norm import make_norm
from moelm.moe.types import RouteContext, RouterStats


class PredictionModule(nn.Module):
    """Module k = 1, 2, ... makes of h^{k-1}_i and of the token k places later what predicts the one after that
    (DeepSeek-V3, arXiv 2412.19437, section 2.2):

        h'_i = M [Norm(Emb(t_{i+k})); Norm(h^{k-1}_i)]      eq. 21, M: 2D -> D
        h^k_i = Norm(Block(h'))_i                           eq. 22
        p(t_{i+k+1}) = softmax(Head h^k_i)                  eq. 23, embedding and head are the main model's

    The columns of M are in the order of the released weights (`eh_proj` reads embedding, then hidden); the paper
    writes the hidden state first, which is the same function with the columns exchanged. h^0 is the main model's
    state *after* its final norm, as inference engines read the released weights. Those come with one module and without
    its training code, so h^k for a second one is chosen here: after the module's own norm (their `shared_head.norm`),
    as h^0 is. The norms have weights, so a state from before them would be another function.
    The block is that of `ModelConfig.prediction_layer`: an MoE block in a model that has any, with its attention.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_norm = make_norm(config)
        self.hidden_norm = make_norm(config)
        self.projection = nn.Linear(2 * config.d_model, config.d_model, bias=False)
        self.block = Block(config, config.prediction_layer)
        self.norm = make_norm(config)

    def forward(
        self,
        hidden_BLD: Tensor,
        embedded_BLD: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask_BLL: Tensor | None,
        context: RouteContext,
        recompute: str = "none",
    ) -> tuple[Tensor, RouterStats | None]:
        """h^k from h^{k-1} and the embeddings of the tokens k places later. Rotation and attention mask are those of
        position i, the context those of the tokens that are read (see `context_ahead`)."""
        pair_BLE = torch.cat([self.embedding_norm(embedded_BLD), self.hidden_norm(hidden_BLD)], dim=-1)
        x_BLD, stats = self.block(self.projection(pair_BLE), rotation, mask_BLL, context, None, recompute)
        return self.norm(x_BLD), stats


def context_ahead(context: RouteContext, document_ids_BL: Tensor | None, k: int) -> RouteContext:
    """What module k routes by: the tokens k places later, in the same static shape.

    Its mask leaves out the positions where one of the tokens i to i + k is masked, of another document, or past the
    end of the sequence: nothing is predicted there, nothing routed and nothing counted. No later position attends to
    one of the last k of a sequence, so that this is the paper's computation on sequences cut to L - k.
    """
    ids_BL, mask_BL = context.token_ids_BL, context.token_mask_BL
    L = ids_BL.shape[1]
    valid_BL = (torch.arange(L, device=ids_BL.device) < L - k).expand_as(ids_BL)
    for j in range(k + 1):
        if mask_BL is not None:
            valid_BL = valid_BL & mask_BL.roll(-j, 1)
        if document_ids_BL is not None:
            valid_BL = valid_BL & (document_ids_BL.roll(-j, 1) == document_ids_BL)
    return RouteContext(ids_BL.roll(-k, 1), valid_BL, context.training)
