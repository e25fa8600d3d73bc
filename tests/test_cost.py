"""What a training step and inference cost, counted and not timed: operators, copies to the CPU, memory."""

from collections import Counter

import pytest
import torch
from outputs import made_up, with_denoising
from tiny import noised, random_boxes, target, tiny_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dfine.config import LossConfig
from dfine.losses.criterion import criterion
from dfine.model import deformable_attention
from dfine.model.deformable_attention import by_grid_sample
from dfine.model.detector import detect
from dfine.model.fdr import weighting_function
from dfine.structures import Target


class Dispatched(TorchDispatchMode):
    """Counts operators, and the numbers that they write."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.numbers, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operators[function.overloadpacket.__name__] += 1
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.numbers += x.numel()
                self.largest = max(self.largest, x.numel())
        return result


class Called(TorchFunctionMode):
    """Counts functions and methods by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names[getattr(function, "__name__", str(function))] += 1
        return function(*args, **(kwargs or {}))


def crowd(boxes: int, pages: int, dtype: torch.dtype = torch.float32) -> list[Target]:
    torch.manual_seed(boxes)
    return [target(random_boxes(boxes).tolist(), [i % 3 for i in range(boxes)], i, dtype) for i in range(pages)]


def test_matching_and_all_losses_take_few_operators_and_copy_to_the_cpu_once():
    """6 layers, 300 queries, denoising, 4 pages of 40 boxes. The original takes about 9,900 and reads 1,800 scalars."""
    pages, model = crowd(40, 4), tiny_model(layers=6, queries=300)
    output = model(torch.zeros(4, 3, 160, 160), noised=noised(pages, queries=100))
    assert output.refined.logits.shape[:3] == (6, 4, 300)
    with Dispatched() as dispatched, Called() as called:
        criterion(output, pages, model.decoder.w, LossConfig())
    assert dispatched.operators.total() <= 1500
    assert called.names["cpu"] == 1
    reads = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select"}  # would wait for a GPU as well
    assert not reads & dispatched.operators.keys()
    assert not {"item", "tolist", "__bool__", "__int__", "__float__"} & called.names.keys()


def test_a_training_step_reads_back_only_costs_and_sends_only_matches_and_counts(monkeypatch: pytest.MonkeyPatch):
    """Each read, and each tensor made of Python numbers, would wait for a GPU."""
    monkeypatch.setattr(deformable_attention, "by_embedding_bag", by_grid_sample)  # the form for GPUs
    pages, model, sizes = crowd(5, 2), tiny_model(), torch.tensor([[64, 96], [64, 80]])
    queries = noised(pages)
    with Dispatched() as dispatched, Called() as called:
        output = model(torch.zeros(2, 3, 64, 96), sizes, queries)
        criterion(output, pages, model.decoder.w, LossConfig())
    assert called.names["cpu"] == called.names["tensor"] == 1
    assert not {"item", "tolist", "new_tensor"} & called.names.keys()
    assert "_local_scalar_dense" not in dispatched.operators


@pytest.mark.parametrize("pages", [1, 5])
def test_the_detections_of_all_pages_come_to_the_cpu_in_one_copy(pages: int):
    output = tiny_model().eval()(torch.zeros(pages, 3, 64, 96))
    with Called() as called:
        found = detect(output, [(64, 96)] * pages)
    assert len(found) == pages
    assert called.names["cpu"] == 1


def test_matching_and_losses_grow_linearly_with_the_boxes():
    """Twice the boxes add twice the numbers: no matrix of pairs by pairs, which would add four times as many."""
    w, numbers, largest = weighting_function(8, 0.5, 0.25), [], []
    for boxes in (100, 200, 400):
        output = with_denoising(made_up(queries=400), most=boxes, groups=1)
        with Dispatched() as dispatched:
            criterion(output, crowd(boxes, 2, torch.float64), w, LossConfig())
        numbers.append(dispatched.numbers)
        largest.append(dispatched.largest)
    assert numbers[2] - numbers[1] < 2.1 * (numbers[1] - numbers[0])
    assert largest[2] <= 2.1 * largest[1] <= 2.1 * 2.1 * largest[0]
