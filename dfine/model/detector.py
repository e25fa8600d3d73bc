"""D-FINE: backbone, hybrid encoder, query selection, decoder."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfine.boxes import cxcywh_to_xyxy
from dfine.config import ModelConfig
from dfine.model.backbone import Backbone
from dfine.model.decoder import Decoder
from dfine.model.denoising import attention_mask
from dfine.model.deploy import deploy
from dfine.model.hybrid_encoder import HybridEncoder
from dfine.model.layers import ConvNorm, xavier
from dfine.model.pyramid import SimplePyramid
from dfine.model.query_selection import QuerySelection, gather
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
        self.config, self.strides, self.classes = config, config.strides, classes
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
        teacher_queries: Queries | None = None,
        dense: bool = False,
    ) -> DFineOutput:
        """
        Args:
            images: (B, 3, H, W) RGB, uint8 or float in [0, 1]; H and W are multiples of the last stride.
            sizes: (B, 2) valid height, width of each page; None: the pages fill the canvas. In evaluation mode best on
                the CPU, also where the images are on a GPU: pages are grouped by them.
            noised: denoising queries.
            teacher_queries: another model's queries, which this decoder answers as well (distillation).
            dense: what the encoder's heads say of every memory cell is returned too, with its gradient.
        Returns:
            All heads in training mode; in evaluation mode only the last layer, as L = 1.
        """
        height, width = images.shape[-2:]
        maps = self.encode(images, sizes) if self.training else self.encode_apart(images, sizes)
        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)  # (B, S, D)
        valid_ratio = None
        if sizes is not None:
            sizes = sizes.to(images.device, non_blocking=True)
            valid_ratio = torch.stack([sizes[:, 1].float() / width, sizes[:, 0].float() / height], dim=-1)  # (B, 2)
            on_page = [cells_on_page((height, width), sizes, stride) for stride in self.strides]  # (B, cells) each
            memory = memory * torch.cat(on_page, dim=1)[..., None]

        encoder, queries, tokens, cells = self.selection(memory, shapes, sizes, dense)
        x, reference, keys = gather(tokens, queries.cells), queries.proposal, attended_to(queries.valid)
        mask, slots = None, 0
        if noised is not None:
            slots = noised.labels.shape[1]
            mask = attention_mask(slots, noised.groups, x.shape[1], x.device)[:slots]  # (slots, slots + Q)
            mask = mask | ~F.pad(keys, (slots, 0), value=True)[:, None]  # (B, slots, slots + Q)
            x = torch.cat([self.denoising_labels(noised.labels).to(x.dtype), x], dim=1)  # (B, slots + Q, D)
            reference = torch.cat([noised.boxes.clamp(1e-5, 1 - 1e-5), reference], dim=1)  # (B, slots + Q, 4)
        refined, initial = self.decoder(x, reference, memory, shapes, valid_ratio, mask, keys, self.training)

        denoising = None
        if noised is not None:
            denoising = Denoising(*split(refined, initial, slice(None, slots)), noised)
            refined, initial = split(refined, initial, slice(slots, None))
        on_teacher_queries = None
        if teacher_queries is not None:
            x, reference = gather(tokens, teacher_queries.cells), teacher_queries.proposal
            keys = attended_to(teacher_queries.valid)
            second, _ = self.decoder(x, reference, memory, shapes, valid_ratio, None, keys, self.training)
            on_teacher_queries = mask_logits(second, teacher_queries.valid)
        refined, initial, encoder = (head and mask_logits(head, queries.valid) for head in (refined, initial, encoder))
        return DFineOutput(refined, queries, initial, encoder, denoising, on_teacher_queries, cells)

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
        """Makes the model faster, for use only: after this it can be neither trained nor saved. See `deploy`."""
        return deploy(self, fast)

    def normalise(self, images: Tensor, sizes: Tensor | None) -> Tensor:
        """(B, 3, H, W) uint8 or [0, 1] -> zero mean, unit variance; pixels of padding become 0."""
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        images = (images - self.mean) / self.std
        if sizes is None:
            return images
        height, width = images.shape[-2:]
        return images * cells_on_page((height, width), sizes, 1).view(-1, 1, height, width)


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


def ranked(output: DFineOutput, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The last layer's `top` best (query, class) pairs of each page.

    Returns:
        scores (B, K), labels (B, K), boxes (B, K, 4) xyxy as fractions of the page.
    """
    logits, boxes = output.refined.logits[-1], output.refined.boxes[-1]  # (B, Q, C), (B, Q, 4)
    classes = logits.shape[-1]
    scores, best = logits.flatten(1).sigmoid().topk(min(top, logits[0].numel()))  # (B, K)
    return scores, best % classes, cxcywh_to_xyxy(gather(boxes, best // classes)).clamp(0, 1)


def mask_logits(head: Head, valid: Tensor) -> Head:
    """The answers, of which those that no cell stands for say that there is nothing."""
    return head._replace(logits=head.logits.masked_fill(~valid[..., None], NOTHING))


def attended_to(valid: Tensor) -> Tensor:
    """Which queries are attended to: (B, Q) bool. On a page without a single valid one all are: softmax needs some."""
    return valid | ~valid.any(1, keepdim=True)


def split(refined: Refinement, initial: Prediction | None, part: slice) -> tuple[Refinement, Prediction | None]:
    """The given queries' share of what the decoder says, as tensors of their own.

    Of slices of one tensor `torch.compile` would mistake one for another where they are answers of a model.
    """
    logits, boxes, edge_logits = (x[:, :, part].clone() for x in refined[:3])
    first = initial and Prediction(initial.logits[:, part].clone(), initial.boxes[:, part].clone())
    return Refinement(logits, boxes, edge_logits, refined.initial_boxes[:, part].clone()), first


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


def class_dependent(model: DFine) -> list[str]:
    """The names of all that depends on the classes: class heads and the denoising embedding."""
    return [name for name in model.state_dict() if "class_head" in name or "denoising_labels" in name]
