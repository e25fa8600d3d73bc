"""D-FINE: backbone, hybrid encoder, query selection, decoder."""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfine.boxes import cxcywh_to_xyxy, full_precision, logit, multiplies_bf16
from dfine.config import ModelConfig
from dfine.model.backbone import Backbone, repeated
from dfine.model.decoder import Decoder, DecoderLayer, class_head
from dfine.model.denoising import attention_mask
from dfine.model.fdr import FullPrecision, mlp, xavier, zero_last
from dfine.model.hybrid_encoder import AIFI, ConvNorm, HybridEncoder, RepNCSPELAN4, RepVGG
from dfine.model.pyramid import SimplePyramid
from dfine.structures import Cells, Denoising, Detections, DFineOutput, NoisedTruth, Prediction, Queries, Refinement

Head = TypeVar("Head", Prediction, Refinement, Cells)


NOTHING = -1e4  # the logits of a query that no cell stands for: a score of 0 that learns nothing


class DFine(nn.Module):
    """Pages in, boxes out.

    Everything is computed in the frame of each page's own valid size, so that a page's answer does not depend on
    how far its batch is padded (in training, up to what the backbone and convolutions read of the padding).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        self.strides, self.classes = config.strides, classes
        dim, encoder_dim = config.hidden_dim, config.encoder.hidden_dim or config.hidden_dim
        self.backbone = Backbone(config.backbone, config.strides)
        plain = self.backbone.plain
        self.pyramid = SimplePyramid(self.backbone.channels[0], config.strides) if plain else None
        self.encoder = HybridEncoder(
            self.pyramid.channels if self.pyramid else self.backbone.channels,
            encoder_dim,
            config.encoder.heads,
            config.encoder.feedforward_dim,
            config.encoder.depth_mult,
            config.encoder.expansion,
        )
        self.projections = nn.ModuleList(
            xavier(ConvNorm(encoder_dim, dim, 1)) if encoder_dim != dim else nn.Identity() for _ in config.strides
        )
        self.selection = QuerySelection(dim, classes, config.strides, config.decoder.queries)
        self.denoising_labels = nn.Embedding(classes + 1, dim, padding_idx=classes)  # N(0, 1); row C is 0
        self.denoising_labels.requires_grad_(config.denoising.queries > 0)  # DDP would wait for its gradient
        self.decoder = Decoder(config.decoder, dim, classes)
        # Persistent: how pages are normalised travels with the weights.
        self.register_buffer("mean", torch.tensor(config.mean or self.backbone.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std or self.backbone.std).view(3, 1, 1))

    def forward(
        self,
        images: Tensor,
        sizes: Tensor | None = None,
        noised: NoisedTruth | None = None,
        shared: Queries | None = None,
        dense: bool = False,
    ) -> DFineOutput:
        """
        Args:
            images: (B, 3, H, W) RGB, uint8 or float in [0, 1]; H and W are multiples of the last stride.
            sizes: (B, 2) valid height, width of each page; None: the pages fill the canvas. In evaluation mode best on
                the CPU, also where the images are on a GPU: pages are grouped by them.
            noised: denoising queries.
            shared: another model's queries, which this decoder answers as well (distillation).
            dense: what the encoder's heads say of every memory cell is returned too, with its gradient.
        Returns:
            All heads in training mode; in evaluation mode only the last layer, as L = 1.
        """
        height, width = images.shape[-2:]
        maps = self.encode(images, sizes) if self.training else self.encode_apart(images, sizes)
        on_page, valid_ratio = None, None
        if sizes is not None:
            sizes = sizes.to(images.device, non_blocking=True)
            on_page = [cells_on_page((height, width), sizes, stride) for stride in self.strides]  # (B, cells) each
            valid_ratio = torch.stack([sizes[:, 1] / width, sizes[:, 0] / height], dim=-1)  # (B, 2)

        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)  # (B, S, D)
        if on_page is not None:
            memory = memory * torch.cat(on_page, dim=1)[..., None]
        places = (memory, shapes, valid_ratio)

        encoder, queries, tokens, cells = self.selection(memory, shapes, sizes, dense)
        x, reference, mask, slots = gather(tokens, queries.cells), queries.proposal, None, 0
        seen = keys(queries.real)
        if noised is not None:
            slots = noised.labels.shape[1]
            mask = attention_mask(slots, noised.groups, x.shape[1], x.device)[:slots]  # (slots, slots + Q)
            mask = mask | ~F.pad(seen, (slots, 0), value=True)[:, None]  # (B, slots, slots + Q)
            x = torch.cat([self.denoising_labels(noised.labels).to(x.dtype), x], dim=1)  # (B, slots + Q, D)
            reference = torch.cat([noised.boxes.clamp(1e-5, 1 - 1e-5), reference], dim=1)  # (B, slots + Q, 4)
        refined, initial = self.decoder(x, reference, *places, mask, seen, every_layer=self.training)

        denoising = None
        if noised is not None:
            denoising = Denoising(*split(refined, initial, slice(None, slots)), noised)
            refined, initial = split(refined, initial, slice(slots, None))
        answers = None
        if shared is not None:
            content, seen = gather(tokens, shared.cells), keys(shared.real)
            answers, _ = self.decoder(content, shared.proposal, *places, None, seen, every_layer=self.training)
            answers = silenced(answers, shared.real)
        refined, initial, encoder = (head and silenced(head, queries.real) for head in (refined, initial, encoder))
        return DFineOutput(refined, queries, initial, encoder, denoising, answers, cells)

    def encode(self, images: Tensor, sizes: Tensor | None) -> list[Tensor]:
        """The encoder's maps (B, D, H / stride, W / stride)."""
        on_page = None
        if sizes is not None:
            sizes = sizes.to(images.device, non_blocking=True)
            on_page = cells_on_page((images.shape[-2], images.shape[-1]), sizes, self.strides[-1])
        maps = self.backbone(self.normalise(images, sizes))
        maps = self.encoder(self.pyramid(maps) if self.pyramid else maps, on_page)
        return [project(x) for project, x in zip(self.projections, maps, strict=True)]

    def encode_apart(self, images: Tensor, sizes: Tensor | None) -> list[Tensor]:
        """`encode`, each page on the canvas that it has when it is alone: what else is in the batch does not matter."""
        if sizes is None or torch.onnx.is_in_onnx_export():  # there the caller takes them apart, see `OnnxModel`
            return self.encode(images, sizes)
        (height, width), sizes = images.shape[-2:], sizes.cpu()
        groups = by_canvas(sizes, self.strides[-1])
        if list(groups) == [(height, width)]:
            return self.encode(images, sizes)
        alone: dict[int, tuple[Tensor, ...]] = {}  # the maps of each page
        for (h, w), pages in groups.items():
            own = self.encode(torch.stack([images[i, :, :h, :w] for i in pages]), sizes[pages])
            own = [
                F.pad(x, (0, (width - w) // s, 0, (height - h) // s)) for x, s in zip(own, self.strides, strict=True)
            ]
            alone |= zip(pages, zip(*own, strict=True), strict=True)
        return [torch.stack(level) for level in zip(*(alone[i] for i in range(len(images))), strict=True)]

    def deploy(self, fast: bool = False) -> "DFine":
        """Makes the model faster, for use only: after this it can be neither trained nor saved.

        Batch norms become part of the convolutions before them, and every RepVGG block one convolution; the answers
        stay the same up to rounding.

        Args:
            fast: also channels-last memory; half precision (bf16 autocast), but not on a CPU where that is slower (see
                `multiplies_bf16`); and on a GPU compilation (see `compile_parts`). In half precision answers differ in
                the third digit. The model must be on its device; the first pages are slow where it compiles.
        """
        self.eval()
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.merge()
        for module in self.modules():
            if isinstance(module, RepVGG):
                module.merge()
        self.backbone.merge()
        if fast:
            self.to(memory_format=torch.channels_last)
        if fast and multiplies_bf16(self.mean.device):
            kept = {layer for module in self.modules() if isinstance(module, FullPrecision) for layer in module}
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention) and module not in kept:
                    module.bfloat16()  # once, not in every forward pass
            precision = torch.autocast(self.mean.device.type, torch.bfloat16)
            self.forward = precision(self.forward)  # type: ignore[method-assign]
        if fast and self.mean.device.type == "cuda":
            self.compile_parts()
        return self

    def compile_parts(self) -> None:
        """Compiles what repeats (the backbone's blocks, fusion blocks, decoder layers) and AIFI, in place.

        Modules of one shape share their code: it is compiled once for each, and serves every size of pages. The model
        as a whole would be one graph of everything repeated, which takes many times as long.
        """
        # Variants of a block that may exist: stages, with and without gradients, in both precisions (default: 8).
        torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
        parts = [module for module in self.modules() if isinstance(module, RepNCSPELAN4 | AIFI | DecoderLayer)]
        for module in [*repeated(self.backbone), *parts]:
            module.compile(dynamic=True)

    def normalise(self, images: Tensor, sizes: Tensor | None) -> Tensor:
        """(B, 3, H, W) uint8 or [0, 1] -> zero mean, unit variance; pixels of padding become 0."""
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        images = (images - self.mean) / self.std
        if sizes is None:
            return images
        height, width = images.shape[-2:]
        return images * cells_on_page((height, width), sizes, 1).view(-1, 1, height, width)


class QuerySelection(nn.Module):
    """Every memory cell proposes a class and a box; the best Q become the decoder's queries (arXiv 2304.08069)."""

    def __init__(self, dim: int, classes: int, strides: tuple[int, ...], queries: int) -> None:
        super().__init__()
        self.strides, self.queries = strides, queries
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.class_head = class_head(dim, classes)
        self.box_head = zero_last(FullPrecision(*mlp(dim, dim, dim, 4)))
        nn.init.xavier_uniform_(self.project.weight)

    def forward(
        self, memory: Tensor, shapes: list[tuple[int, int]], sizes: Tensor | None, dense: bool = False
    ) -> tuple[Prediction | None, Queries, Tensor, Cells | None]:
        """(B, S, D) -> in training mode the answer at the selected cells; where they are; all tokens (B, S, D).

        The tokens have no gradient. The fourth is the answer at every cell, with its gradient, if `dense` asks for it.
        """
        anchors, valid = self.anchors(shapes, sizes, memory)  # (B or 1, S, 4), (B or 1, S)
        if dense:
            return self.densely(memory, anchors, valid)
        memory = memory * valid[..., None]
        # Ranking has no gradient, but must not run under `no_grad`: up to torch 2.10 autocast would remember the half-
        # precision copies of the weights that it makes here, without a gradient, and use them for the answer as well.
        tokens = self.norm(self.project(memory.detach())).detach()  # (B, S, D)
        real, index = self.best(full_precision(self.class_head(tokens)), valid)  # (B, Q)
        anchors = gather(anchors.expand(index.shape[0], -1, -1), index)  # (B, Q, 4); len() would fix an ONNX file's B
        # The selected tokens (B, Q, D) are made again, so that the backward pass is over these alone.
        again = torch.is_grad_enabled()
        selected = self.norm(self.project(gather(memory, index))) if again else gather(tokens, index)
        boxes = (self.box_head(selected) + logit(anchors)).sigmoid()  # (B, Q, 4)
        answer = Prediction(full_precision(self.class_head(selected)), boxes) if self.training else None
        return answer, Queries(index, boxes.detach(), real), tokens, None

    def densely(
        self, memory: Tensor, anchors: Tensor, valid: Tensor
    ) -> tuple[Prediction | None, Queries, Tensor, Cells]:
        """`forward` from the answer at every cell: that at the selected cells is a part of it."""
        tokens = self.norm(self.project(memory * valid[..., None]))  # (B, S, D)
        logits = full_precision(self.class_head(tokens))  # (B, S, C)
        boxes = (self.box_head(tokens) + logit(anchors)).sigmoid()  # (B, S, 4)
        real, index = self.best(logits.detach(), valid)  # (B, Q)
        selected = Prediction(gather(logits, index), gather(boxes, index))
        queries = Queries(index, selected.boxes.detach(), real)
        cells = Cells(logits, boxes, anchors.expand_as(boxes), valid.expand(boxes.shape[:2]), memory)
        return selected if self.training else None, queries, tokens.detach(), cells

    def best(self, logits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Whether there are valid cells for the Q queries, and which are the best; (B, S, C), (B or 1, S) -> (B, Q)."""
        score = logits.amax(-1).masked_fill(~valid, -torch.inf)  # (B, S)
        best, index = score.topk(min(self.queries, score.shape[1]))
        return best != -torch.inf, index

    def anchors(self, shapes: list[tuple[int, int]], sizes: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """A box at the centre of each cell with sides 0.05 * 2^level, and whether all its numbers lie in (0.01, 0.99).

        In fractions of the page, so cells in the padding, whose centres lie beyond 1, are not valid.
        """
        levels = []
        for level, ((height, width), stride) in enumerate(zip(shapes, self.strides, strict=True)):
            page: Any = (height * stride, width * stride) if sizes is None else sizes.view(-1, 2, 1, 1).unbind(1)
            rows = torch.arange(height, device=like.device)[:, None]
            columns = torch.arange(width, device=like.device)
            y, x = (rows + 0.5) * stride / page[0], (columns + 0.5) * stride / page[1]  # (B, H, 1), (B, 1, W)
            centres = torch.stack(torch.broadcast_tensors(x, y), dim=-1).view(-1, height * width, 2)
            levels.append(torch.cat([centres, torch.full_like(centres, 0.05 * 2**level)], dim=-1))
        anchors = torch.cat(levels, dim=1).to(torch.promote_types(like.dtype, torch.float32))
        return anchors, ((anchors > 0.01) & (anchors < 0.99)).all(-1)


def class_dependent(model: DFine) -> list[str]:
    """The names of all that depends on the classes: class heads and the denoising embedding."""
    return [name for name in model.state_dict() if "class_head" in name or "denoising_labels" in name]


def cells_on_page(canvas: tuple[int, int], sizes: Tensor, stride: int) -> Tensor:
    """Which cells of a stride see any pixel of their page: (H, W), (B, 2) -> (B, H / stride * W / stride) bool."""
    rows = torch.arange(0, canvas[0], stride, device=sizes.device) < sizes[:, :1]  # (B, H / stride)
    columns = torch.arange(0, canvas[1], stride, device=sizes.device) < sizes[:, 1:]  # (B, W / stride)
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def by_canvas(sizes: Tensor, stride: int) -> dict[tuple[int, int], list[int]]:
    """Which pages have a canvas when they are alone, its sides being multiples of the stride; from sizes (B, 2)."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (h, w) in enumerate(((sizes + stride - 1) // stride * stride).tolist()):
        groups.setdefault((h, w), []).append(i)
    return groups


def keys(real: Tensor) -> Tensor:
    """Which queries are attended to: (B, Q) bool. On a page without a single real one all are: softmax needs some."""
    return real | ~real.any(1, keepdim=True)


def silenced(head: Head, real: Tensor) -> Head:
    """The answers, of which those that no cell stands for say that there is nothing."""
    return head._replace(logits=head.logits.masked_fill(~real[..., None], NOTHING))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """(B, S, K), (B, Q) -> (B, Q, K)"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def split(refined: Refinement, initial: Prediction | None, part: slice) -> tuple[Refinement, Prediction | None]:
    """The given queries' share of what the decoder says, as tensors of their own.

    Of slices of one tensor `torch.compile` would mistake one for another where they are answers of a model.
    """
    logits, boxes, edge_logits = (x[:, :, part].clone() for x in refined[:3])
    first = initial and Prediction(initial.logits[:, part].clone(), initial.boxes[:, part].clone())
    return Refinement(logits, boxes, edge_logits, refined.initial_boxes[:, part].clone()), first


def ranked(output: DFineOutput, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The last layer's `top` best (query, class) pairs of each page.

    Returns:
        scores (B, K), labels (B, K), boxes (B, K, 4) xyxy as fractions of the page.
    """
    logits, boxes = output.refined.logits[-1], output.refined.boxes[-1]  # (B, Q, C), (B, Q, 4)
    classes = logits.shape[-1]
    scores, best = logits.flatten(1).sigmoid().topk(min(top, logits[0].numel()))  # (B, K)
    return scores, best % classes, cxcywh_to_xyxy(gather(boxes, best // classes)).clamp(0, 1)


def detect(output: DFineOutput, sizes: list[tuple[int, int]], top: int = 300) -> list[Detections]:
    """The last layer's `top` best (query, class) pairs of each page, as far as their scores are not 0; no NMS.

    Args:
        sizes: original height, width of each page in pixels.
    Returns:
        For each page, on the CPU: all pages come there in one copy.
    """
    scores, labels, boxes = ranked(output, top)
    found = torch.cat([scores[..., None], labels[..., None], boxes], dim=-1).cpu()  # (B, K, 6)
    counts = (found[..., 0] != 0).sum(1).tolist()  # a page may have fewer queries than others of its batch
    return [
        Detections(page[:k, 0], page[:k, 1].long(), page[:k, 2:] * page.new_tensor([w, h, w, h]))
        for page, k, (h, w) in zip(found, counts, sizes, strict=True)
    ]
