"""The D-FINE of `transformers` around the same timm backbone, for the benchmark alone (pip install 'dfine[bench]').

What is compared is what people build this pipeline from today. Both get the same tensors, the same optimizer and the
same clipping, and run in turns; ours also normalises its pages. The peer lays out memory as it comes, ours as train.py
does (channels-last).
"""

from collections.abc import Callable
from typing import Any

import torch
from workload import finish

from dfine.config import Config
from dfine.model.detector import DFine
from dfine.structures import Batch
from dfine.training.engine import autocast

try:
    from transformers import DFineConfig, DFineForObjectDetection, TimmBackboneConfig
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


def step_of(peer: Any, model: DFine, batch: Batch, settings: Config) -> Callable[[], None]:
    """A training step of the peer on the same pages, with the same optimizer as far as it is AdamW."""
    images, device = model.normalise(batch.images, None), model.mean.device
    labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in batch.targets]
    optimizer = torch.optim.AdamW(peer.parameters(), lr=settings.train.learning_rate, fused=True)

    def step() -> None:
        with autocast(device, settings.train):
            loss = peer(pixel_values=images, labels=labels).loss
        loss.backward()
        finish(peer, optimizer, settings.train.clip)

    return step
