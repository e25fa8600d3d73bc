"""The decoder: layers of self-attention, deformable attention and a gate, and the refinement loop of FDR."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfine.boxes import full_precision, logit
from dfine.config import DecoderConfig
from dfine.model.deformable_attention import DeformableAttention, readable
from dfine.model.fdr import LQE, decode, expectation, weighting_function
from dfine.model.layers import FullPrecision, class_head, mlp, xavier, zero_last
from dfine.structures import Prediction, Refinement


class Decoder(nn.Module):
    """Refines the edge distributions of all queries layer by layer (paper section 4.1)."""

    w: Tensor

    def __init__(self, config: DecoderConfig, dim: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(dim, config.heads, config.feedforward_dim, config.points) for _ in range(config.layers)
        )
        self.position = xavier(FullPrecision(*mlp(4, 2 * dim, dim)))
        self.initial_box = zero_last(FullPrecision(*mlp(dim, dim, dim, 4)))
        self.edge_heads = nn.ModuleList(
            zero_last(FullPrecision(*mlp(dim, dim, dim, 4 * (config.bins + 1)))) for _ in range(config.layers)
        )
        self.class_heads = nn.ModuleList(class_head(dim, classes) for _ in range(config.layers))
        self.lqe = nn.ModuleList(LQE() for _ in range(config.layers))
        self.register_buffer("w", weighting_function(config.bins, config.a, config.c).float(), persistent=False)

    def forward(
        self,
        x: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: list[tuple[int, int]],
        valid_ratio: Tensor | None = None,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
        every_layer: bool = True,
    ) -> tuple[Refinement, Prediction | None]:
        """
        Args:
            x: (B, Q, D) content. reference: (B, Q, 4) where the queries start; detached.
            memory, shapes, valid_ratio, mask, valid: see `DecoderLayer`.
            every_layer: False computes only what the last layer's answer needs.
        Returns:
            All layers (or the last), and the plain head of layer 1 (or None).
        """
        memory = readable(memory)
        start, previous, edge_logits = reference, torch.zeros_like(x), 0
        initial, logits, boxes, edges = None, [], [], []
        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1
            position = self.position(reference).clamp(-10, 10)  # (B, Q, D)
            x = layer(x, position, reference, memory, shapes, valid_ratio, mask, valid)  # (B, Q, D)
            if i == 0:
                initial_boxes = (self.initial_box(x) + logit(start)).sigmoid()  # (B, Q, 4)
                frame = initial_boxes.detach()
                if every_layer:
                    initial = Prediction(full_precision(self.class_heads[0](x)), initial_boxes)
            refined = self.edge_heads[i](x + previous).unflatten(-1, (4, -1))  # (B, Q, 4, N + 1)
            edge_logits = refined + edge_logits  # Eq. 2; the previous ones are not detached
            box = decode(frame, expectation(edge_logits, self.w))  # (B, Q, 4)
            if every_layer or last:
                logits.append(self.lqe[i](self.class_heads[i](x), edge_logits))  # (B, Q, C)
                boxes.append(box)
                edges.append(edge_logits)
            reference, previous = box.detach(), x.detach()
        return Refinement(torch.stack(logits), torch.stack(boxes), torch.stack(edges), frame), initial


class DecoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, feedforward_dim: int, points: tuple[int, ...]) -> None:
        super().__init__()
        self.self_attention = SelfAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attention = DeformableAttention(dim, heads, points)
        self.gate = Gate(dim)
        self.feedforward = xavier(mlp(dim, feedforward_dim, dim))
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: list[tuple[int, int]],
        valid_ratio: Tensor | None = None,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x: (B, Q, D) content. position: (B, Q, D) added to queries and keys. reference: (B, Q, 4).
            memory, shapes, valid_ratio: see `DeformableAttention`. mask, valid: see `SelfAttention`.
        Returns:
            (B, Q, D)
        """
        x = self.norm1(x + self.self_attention(x, position, mask, valid))
        x = self.gate(x, self.cross_attention(x + position, reference, memory, shapes, valid_ratio))
        return self.norm2(x + self.feedforward(x))


class SelfAttention(nn.MultiheadAttention):
    """Among queries of which the first K, the denoising ones, see what a mask leaves them; the others see each other.

    So nothing is computed from what a mask would hide from the matching queries.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, position: Tensor, mask: Tensor | None = None, valid: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x: (B, Q, D) content. position: (B, Q, D) added to queries and keys.
            mask: (K, Q) or (B, K, Q), True where blocked.
            valid: (B, Q - K), which matching queries the matching queries see; None: all.
        Returns:
            (B, Q, D)
        """
        (to_qk, to_v), (qk_bias, v_bias) = (
            packed.split([2 * self.embed_dim, self.embed_dim]) for packed in (self.in_proj_weight, self.in_proj_bias)
        )
        qk, v = F.linear(x + position, to_qk, qk_bias), F.linear(x, to_v, v_bias)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (*qk.chunk(2, dim=-1), v)
        )  # (B, heads, Q, D / heads) each
        seen = None if valid is None else valid[:, None, None]  # (B, 1, 1, Q - K)
        slots = 0 if mask is None else mask.shape[-2]
        if mask is None or slots == 0:
            attended = attend(query, key, value, seen)
        else:
            masked = attend(query[:, :, :slots], key, value, ~mask.unsqueeze(-3))
            rest = slice(slots, None)
            among = attend(query[:, :, rest], key[:, :, rest], value[:, :, rest], seen)
            attended = torch.cat([masked, among], dim=2)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
    """`F.scaled_dot_product_attention`; on a CPU in fp32, where it is faster than in bf16."""
    if query.device.type == "cpu":
        query, key, value = full_precision(query), full_precision(key), full_precision(value)
    with torch.autocast("cpu", enabled=False):  # which would make them bf16 again
        return F.scaled_dot_product_attention(query, key, value, visible)


class Gate(nn.Module):
    """LN(g1 x + g2 y) with (g1, g2) = sigmoid(Linear[x; y]): a residual connection that can forget."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * dim, 2 * dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        g1, g2 = self.gate(torch.cat([x, y], dim=-1)).sigmoid().chunk(2, dim=-1)  # (B, Q, D) each
        return self.norm(g1 * x + g2 * y)
