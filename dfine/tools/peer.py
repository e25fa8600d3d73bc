"""The D-FINE of `transformers` around the same timm backbone, for the benchmark alone (pip install 'dfine[bench]').

What is compared is what people build this pipeline from today. Both get the same tensors, the same optimizer and the
same clipping, and run in turns; ours also normalises its pages. The peer lays out memory as it comes, ours as train.py
does (channels-last).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dfine.config import Config
from dfine.model.detector import DFine
from dfine.structures import DFineOutput, Target
from dfine.tools.stopwatch import Stopwatch, race
from dfine.tools.workload import Case, answers, built, finish, made_up, step, total_loss
from dfine.training import optim
from dfine.training.engine import autocast

try:
    from transformers import DFineConfig, DFineForObjectDetection, TimmBackboneConfig
    from transformers.loss.loss_d_fine import DFineForObjectDetectionLoss
except ImportError as error:
    raise SystemExit(f"error: --peer needs the extra: pip install 'dfine[bench]' ({error})") from error


def peer_of(model: DFine, settings: Config) -> Any:
    """The peer with random weights, on the model's device: same backbone, widths, layers, queries and denoising."""
    parts = settings.model
    config = DFineConfig(
        backbone_config=TimmBackboneConfig(backbone=parts.backbone.name, out_indices=model.backbone.indices),
        num_labels=model.classes,
        feat_strides=list(parts.strides),
        num_feature_levels=len(parts.strides),
        encoder_hidden_dim=parts.encoder.hidden_dim or parts.hidden_dim,
        encoder_ffn_dim=parts.encoder.feedforward_dim,
        encoder_attention_heads=parts.encoder.heads,
        hidden_expansion=parts.encoder.expansion,
        depth_mult=parts.encoder.depth_mult,
        encode_proj_layers=[len(parts.strides) - 1],
        d_model=parts.hidden_dim,
        num_queries=model.selection.queries,
        decoder_in_channels=[parts.encoder.hidden_dim or parts.hidden_dim] * len(parts.strides),
        decoder_ffn_dim=parts.decoder.feedforward_dim,
        decoder_n_points=list(parts.decoder.points),
        decoder_layers=parts.decoder.layers,
        decoder_attention_heads=parts.decoder.heads,
        max_num_bins=parts.decoder.bins,
        num_denoising=parts.denoising.queries,
        label_noise_ratio=2 * parts.denoising.label_noise,  # they halve it
    )
    torch.manual_seed(0)
    return DFineForObjectDetection(config).to(model.mean.device)


def labels_of(targets: list[Target]) -> list[dict[str, Tensor]]:
    return [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]


def loss_on(output: DFineOutput, targets: list[Target], config: Any) -> Callable[[], Tensor]:
    """The peer's matching and losses on the answers of our model, as a function to be timed.

    Its stacks run over pages, then layers, then queries, the denoising ones first.
    """
    noisy, first, encoder = output.denoising, output.initial, output.encoder
    assert noisy is not None
    assert first is not None
    assert encoder is not None
    assert noisy.initial is not None
    groups, slots = noisy.queries.groups, noisy.queries.labels.shape[1]

    def joined(denoising: Tensor, matching: Tensor) -> Tensor:
        return torch.cat([denoising, matching], dim=2).transpose(0, 1)

    def with_initial(refined: Tensor, initial: Tensor) -> Tensor:
        return torch.cat([initial[None], refined])

    ours, theirs = output.refined, noisy.refined
    layers = len(ours.logits)
    classes = joined(with_initial(theirs.logits, noisy.initial.logits), with_initial(ours.logits, first.logits))
    boxes = joined(with_initial(theirs.boxes, noisy.initial.boxes), with_initial(ours.boxes, first.boxes))
    corners = joined(theirs.edge_logits.flatten(-2), ours.edge_logits.flatten(-2))
    frames = joined(theirs.initial_boxes.expand(layers, -1, -1, -1), ours.initial_boxes.expand(layers, -1, -1, -1))
    most = slots // (2 * groups)
    positives = tuple(
        torch.cat([torch.arange(len(target.labels)) + 2 * most * group for group in range(groups)])
        for target in targets
    )
    meta = {"dn_positive_idx": positives, "dn_num_group": groups, "dn_num_split": [slots, ours.logits.shape[2]]}

    def loss() -> Tensor:
        return DFineForObjectDetectionLoss(
            classes[:, -1],
            labels_of(targets),
            classes.device,
            boxes[:, -1],
            config,
            classes,
            boxes,
            enc_topk_logits=encoder.logits,
            enc_topk_bboxes=encoder.boxes,
            denoising_meta_values=meta,
            predicted_corners=corners,
            initial_reference_points=frames,
        )[0]

    return loss


def against_peer(settings: Config, case: Case, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """A row for each thing compared."""
    model, batch = built(settings, case.queries, device).train(), made_up(case, device)
    other = peer_of(model, settings).train()
    images = model.normalise(batch.images, None)
    optimizer = optim.optimizer(model, settings.train)
    others = torch.optim.AdamW(other.parameters(), lr=settings.train.learning_rate, fused=True)
    output = answers(model, batch, settings)

    def their_step() -> None:
        with autocast(device, settings.train):
            loss = other(pixel_values=images, labels=labels_of(batch.targets)).loss
        loss.backward()
        finish(other, others, settings.train.clip)

    ours: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "matching and all losses": (
            lambda: total_loss(model, output, batch, settings),
            loss_on(output, batch.targets, other.config),
        ),
        "training step": (lambda: step(model, optimizer, batch, settings, Stopwatch(device)), their_step),
    }
    rows = [race(what, *pair, device, repeats) for what, pair in ours.items()]
    other.eval()
    valid = torch.tensor([target.size for target in batch.targets])  # on the CPU, as in evaluation
    for what, fast in (("inference, deploy()", False), ("inference, deploy(fast=True)", True)):
        deployed = built(settings, case.queries, device).deploy(fast)
        with torch.inference_mode():
            answer, their_answer = partial(deployed, batch.images, valid), partial(other, pixel_values=images)
            rows.append(race(what, answer, their_answer, device, repeats))
    return [{**case._asdict(), **row} for row in rows]
