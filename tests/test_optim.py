"""The average of the weights."""

import torch
from timm.utils import ModelEmaV3
from tiny import shaken, tiny_model

from dfine.config import TrainConfig
from dfine.optim import Average


def test_the_average_is_timms_though_it_lists_the_tensors_only_once():
    model = tiny_model()
    ours = Average(model, TrainConfig(ema_decay=0.9))
    timms = ModelEmaV3(model, decay=0.9, use_warmup=True, warmup_power=0.75)
    for step in range(3):
        shaken(model)
        model(torch.rand(1, 3, 64, 64))  # moves the running statistics and their counters
        for average in (ours, timms):
            average.update(model, step)
    assert ours.module.state_dict().keys() == timms.module.state_dict().keys()
    for name, value in timms.module.state_dict().items():
        assert torch.equal(ours.module.state_dict()[name], value), name


def test_the_average_goes_on_from_loaded_weights():
    model = tiny_model()
    average = Average(model, TrainConfig(ema_decay=0.9))
    average.module.load_state_dict({name: torch.zeros_like(x) for name, x in model.state_dict().items()})
    average.update(model, 1000)
    weight = model.decoder.position[0].weight
    torch.testing.assert_close(average.module.decoder.position[0].weight, 0.1 * weight)
