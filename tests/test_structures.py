"""The types that modules pass to each other."""

import torch
from tiny import target

from dfine.structures import Batch


def test_a_batch_goes_to_a_device_without_its_sizes():
    """A model in evaluation mode would have to wait for the GPU to read them."""
    batch = Batch(torch.zeros(1, 3, 8, 8), torch.tensor([[8, 6]]), [target([[0.5, 0.5, 0.2, 0.2]])])
    moved = batch.to(torch.device("meta"))
    assert moved.images.is_meta
    assert moved.targets[0].boxes.is_meta
    assert moved.sizes.tolist() == [[8, 6]]
