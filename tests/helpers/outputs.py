"""Made-up outputs of a model in training, for losses."""

import torch
from tiny import random_boxes
from torch import Tensor

from dfine.config import LossConfig
from dfine.model.fdr import weighting_function
from dfine.structures import Denoising, DFineOutput, NoisedTruth, Prediction, Queries, Refinement

W = weighting_function(8, 0.5, 0.25)
CONFIG = LossConfig()


def prediction(pages: int, queries: int) -> Prediction:
    logits = torch.randn(pages, queries, 3, dtype=torch.float64, requires_grad=True)
    return Prediction(logits, random_boxes(pages, queries).requires_grad_())


def refinement(pages: int, queries: int, layers: int = 3) -> Refinement:
    return Refinement(
        logits=torch.randn(layers, pages, queries, 3, dtype=torch.float64, requires_grad=True),
        boxes=random_boxes(layers, pages, queries).requires_grad_(),
        edge_logits=torch.randn(layers, pages, queries, 4, 9, dtype=torch.float64, requires_grad=True),
        initial_boxes=random_boxes(pages, queries),
    )


def made_up(pages: int = 2, queries: int = 6, layers: int = 3, seed: int = 0) -> DFineOutput:
    """What a model might say in training, without denoising."""
    torch.manual_seed(seed)
    cells = torch.zeros(pages, queries, dtype=torch.int64)
    start = Queries(cells, random_boxes(pages, queries), torch.ones_like(cells, dtype=torch.bool))
    return DFineOutput(
        refinement(pages, queries, layers), start, prediction(pages, queries), prediction(pages, queries)
    )


def with_denoising(output: DFineOutput, most: int, groups: int) -> DFineOutput:
    """With denoising queries that answer anything; all groups answer the same."""

    def repeated(answers: Tensor, dim: int) -> Tensor:
        return torch.cat([answers.detach()] * groups, dim).requires_grad_()

    pages = output.queries.cells.shape[0]
    torch.manual_seed(1)
    *stacked, frame = refinement(pages, 2 * most)
    refined = Refinement(*(repeated(x, 2) for x in stacked), repeated(frame, 1).detach())
    initial = Prediction(*(repeated(x, 1) for x in prediction(pages, 2 * most)))
    slots = 2 * most * groups
    start = NoisedTruth(torch.zeros(pages, slots, dtype=torch.int64), torch.zeros(pages, slots, 4), groups)
    return output._replace(denoising=Denoising(refined, initial, start))
