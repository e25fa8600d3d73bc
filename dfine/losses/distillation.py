"""Distillation: a small student learns from a frozen teacher, where both answer the same questions.

The teacher's queries: the student's decoder answers them as well, from the same memory cells and proposals but with its
own memory (`teacher_queries` in `DFine.forward`). Scores, boxes and edge distributions are compared. D-FINE's bins are
offsets in each model's own initial box, so distributions of two models cannot be compared bin by bin: the teacher's are
carried over from its frame into the student's first (`project`).
Denoising queries: they come from the truth and are the same for both from the first step (the consistent points of
KD-DETR, arXiv 2211.08071). They are compared in the same way.
Memory cells: with the same strides, cells, anchors and page frames are the same in both models. Compared are what the
encoder's heads say of each, which is what query selection chooses by, and the memory itself (FitNets, arXiv 1412.6550;
weighted by what the teacher sees there). Cells that are not valid have no part.
On pages without boxes, blank or not yet annotated, the teacher alone teaches (`on_labelled_pages`).

Others carry edge distributions from model to model too: dfine-seg 0.6.2 pairs the queries of both models through the
boxes of the truth that they match, and bins the teacher's edges anew. It has not published what that gains.

The losses are pure functions, of queries each a sum per layer.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfine import distributed
from dfine.boxes import full_precision, iou
from dfine.config import DistillConfig, MatcherConfig
from dfine.losses.golsd import ddf, kl_of_edges
from dfine.losses.matcher import match
from dfine.model.denoising import match_denoising, noised_share
from dfine.model.detector import DFine, mask_logits
from dfine.model.fdr import decode, encode, soft_bins
from dfine.structures import Batch, Cells, DFineOutput, Matches, NoisedTruth, Refinement, Target, send

# The terms by what they compare.
TEACHER_QUERIES = ("class", "box", "go_lsd")
DENOISING = ("class_denoising", "box_denoising", "go_lsd_denoising")
CELLS = ("cell_class", "cell_box", "memory")


def distillation(
    student: DFineOutput,
    teacher: DFineOutput,
    w: Tensor,
    teacher_w: Tensor,
    targets: list[Target],
    weights: dict[str, float],
    config: DistillConfig,
    matcher: MatcherConfig,
) -> dict[str, Tensor]:
    """The weighted losses: of queries a number for each of the student's layers, of cells one.

    Args:
        student, teacher: see `student_forward` and `teacher_forward`; of the teacher's layers the last one counts.
        w, teacher_w: W(n) of either model, (N + 1,) each; N may differ.
        weights: of the terms to compute, see `active`.
    Returns:
        `distill_` and the name of the term, for each that has a weight.
    Raises:
        FloatingPointError: the teacher's answer is not finite; names the image id.
    """
    losses: dict[str, Tensor] = {}
    truth = w.new_full((), sum(len(target.labels) for target in targets))
    truth, boxes = normaliser(torch.stack([truth, truth + found_without_truth(teacher, targets)]))
    temperature = config.go_lsd.temperature
    if terms := weights.keys() & TEACHER_QUERIES:
        assert student.on_teacher_queries is not None
        answers, valid = (student.on_teacher_queries, teacher.refined), teacher.queries.valid
        losses |= of_queries(*answers, terms, config, boxes)
        if "go_lsd" in terms:
            matches = teacher_matches(teacher.refined, targets, matcher, valid)
            losses["go_lsd"] = go_lsd(*answers, w, teacher_w, targets, temperature, matches, valid)
    if terms := weights.keys() & DENOISING:
        assert student.denoising is not None
        assert teacher.denoising is not None
        noised = teacher.denoising.queries
        valid = noised.labels < teacher.refined.logits.shape[-1]  # (B, K): padded slots have no part
        answers = (mask_logits(student.denoising.refined, valid), mask_logits(teacher.denoising.refined, valid))
        terms = {term.removesuffix("_denoising") for term in terms}
        found = of_queries(*answers, terms, config, truth * noised.groups * noised_share(targets, noised.chosen))
        if "go_lsd" in terms:
            matches = match_denoising(targets, noised.groups, noised.chosen).to(valid.device)
            found["go_lsd"] = go_lsd(*answers, w, teacher_w, targets, temperature, matches, valid)
        losses |= {f"{term}_denoising": loss for term, loss in found.items()}
    if terms := weights.keys() & CELLS:
        assert student.cells is not None
        assert teacher.cells is not None
        losses |= of_cells(student.cells, teacher.cells, terms, boxes)
    return {f"distill_{term}": weights[term] * loss for term, loss in losses.items()}


def of_queries(
    student: Refinement, teacher: Refinement, terms: Collection[str], config: DistillConfig, boxes: Tensor
) -> dict[str, Tensor]:
    """Class and box, if they are named, for queries that both models answer -> (L,) each.

    Args:
        student: answers of all layers. teacher: of whose layers the last one counts.
        boxes: () what classes are divided by.
    """
    logits, teacher_boxes = teacher.logits[-1].detach(), teacher.boxes[-1].detach()  # (B, Q, C), (B, Q, 4)
    losses = {}
    if "class" in terms:
        temperature = config.classes.temperature
        kl = config.classes.loss == "kl"
        sums = class_kl(logits, student.logits, temperature) if kl else class_mse(logits, student.logits)
        losses["class"] = sums / boxes
    if "box" in terms:
        confidence = logits.sigmoid().amax(-1)  # (B, Q)
        sums = box_distance(teacher_boxes, student.boxes, confidence, squared=config.boxes.loss == "mse")
        losses["box"] = sums / normaliser(confidence.sum(), least=torch.finfo(confidence.dtype).tiny)
    return losses


def of_cells(student: Cells, teacher: Cells, terms: Collection[str], boxes: Tensor) -> dict[str, Tensor]:
    """Those of `CELLS` that are named -> () each; what the teacher sees in a cell is what its box and memory weigh.

    Args:
        student: with its memory projected to the teacher's width. boxes: () what classes are divided by.
    """
    teacher = mask_logits(Cells(*(x.detach() for x in teacher)), teacher.valid)
    confidence = teacher.logits.sigmoid().amax(-1)  # (B, S); 0 where a cell is not valid
    total = normaliser(confidence.sum(), least=torch.finfo(confidence.dtype).tiny)
    losses = {}
    if "cell_class" in terms:
        logits = mask_logits(student, teacher.valid).logits[None]  # (1, B, S, C)
        losses["cell_class"] = class_kl(teacher.logits, logits, temperature=1)[0] / boxes
    if "cell_box" in terms:
        losses["cell_box"] = box_distance(teacher.boxes, student.boxes[None], confidence, squared=False)[0] / total
    if "memory" in terms:
        losses["memory"] = memory_distance(teacher.memory, student.memory, confidence) / total
    return losses


def go_lsd(
    student: Refinement,
    teacher: Refinement,
    w: Tensor,
    teacher_w: Tensor,
    targets: list[Target],
    temperature: float,
    matches: Matches,
    valid: Tensor,
) -> Tensor:
    """GO-LSD across models: DDF of every layer of the student against the teacher's last layer -> (L,).

    A query that stands for a box weighs the IoU of the teacher's answer with it, any other the teacher's best class
    probability; matched and unmatched queries are averaged apart (paper section 4.2).
    """
    logits, boxes, edge_logits = (x[-1].detach() for x in teacher[:3])
    at = (matches.batch, matches.query)
    matched = torch.zeros_like(valid)  # (B, Q)
    matched.index_put_(at, matched.new_ones(()))  # `= True` would wait for the GPU up to torch 2.14
    weight = logits.sigmoid().amax(-1)  # (B, Q)
    weight[at] = iou(boxes[at], torch.cat([target.boxes for target in targets])[matches.target])

    p = (edge_logits / temperature).softmax(-1)  # (B, Q, 4, N + 1)
    p = project(p, teacher.initial_boxes, teacher_w, student.initial_boxes, w)  # (B, Q, 4, the student's N + 1)
    kl = kl_of_edges(p, student.edge_logits, temperature)  # (L, B, Q)
    counts = torch.stack([matched.sum(), (valid & ~matched).sum()]).to(w.dtype)  # (2,)
    return ddf(kl, weight, matched, normaliser(counts), normaliser(counts, least=0))


def project(p: Tensor, frame: Tensor, w: Tensor, new_frame: Tensor, new_w: Tensor) -> Tensor:
    """Carries edge distributions over into another frame, bin by bin: the edge positions stay where they are.

    Bin n of an edge stands for a place on the page, decode(frame, W(n)); its probability goes to the two bins around
    that place in the new frame. So the decoded box stays, up to what lies beyond the outermost bins of the new frame
    and is moved onto them; with the same frame and W the distribution itself stays.

    Args:
        p: (..., 4, N + 1) probabilities. frame, new_frame: (..., 4) initial boxes, cxcywh.
        w, new_w: (N + 1,) each; N may differ.
    Returns:
        (..., 4, new N + 1) probabilities.
    """
    offsets = w.view(-1, *[1] * frame.dim()).expand(-1, *frame.shape)  # (N + 1, ..., 4): W(n) on all four edges
    offsets = encode(new_frame, decode(frame, offsets)).movedim(0, -1)  # (..., 4, N + 1)
    left, left_weight, right_weight = soft_bins(offsets, new_w)
    projected = p.new_zeros(*p.shape[:-1], len(new_w))
    return projected.scatter_add(-1, left, p * left_weight).scatter_add(-1, left + 1, p * right_weight)


def teacher_matches(teacher: Refinement, targets: list[Target], matcher: MatcherConfig, valid: Tensor) -> Matches:
    """Which queries stand for which box to the teacher: the Hungarian matching of its last layer.

    Raises:
        FloatingPointError: its answer is not finite; names the image id.
    """
    try:
        matches = match(teacher.logits[-1:], teacher.boxes[-1:], targets, matcher, valid=valid)
    except FloatingPointError as error:
        raise FloatingPointError(f"the teacher's answer: {error}") from error
    return matches.to(valid.device)


def class_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of every score, each a Bernoulli distribution sigmoid(logit / T).

    Args:
        teacher: (B, Q, C) logits. student: (L, B, Q, C) logits.
    Returns:
        (L,) summed over pages, queries and classes.
    """
    teacher, student = teacher / temperature, student / temperature
    p = teacher.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(teacher, p, reduction="none")
    cross_entropy = F.binary_cross_entropy_with_logits(student, p.expand_as(student), reduction="none")
    return temperature**2 * (cross_entropy - entropy).sum((1, 2, 3))


def class_mse(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared differences of the scores (not of the logits): (B, Q, C), (L, B, Q, C) logits -> (L,) summed."""
    return (student.sigmoid() - teacher.sigmoid()).square().sum((1, 2, 3))


def box_distance(teacher: Tensor, student: Tensor, confidence: Tensor, squared: bool) -> Tensor:
    """L1 or squared distance of raw cxcywh, weighted by the teacher's confidence.

    Args:
        teacher: (B, Q, 4). student: (L, B, Q, 4). confidence: (B, Q) the teacher's best class probability.
    Returns:
        (L,) summed over pages and queries.
    """
    difference = student - teacher
    distance = difference.square() if squared else difference.abs()
    return (confidence * distance.sum(-1)).sum((1, 2))


def memory_distance(teacher: Tensor, student: Tensor, confidence: Tensor) -> Tensor:
    """Squared distance of two memories after layer norm (without weights), a mean over channels.

    Args:
        teacher, student: (B, S, D). confidence: (B, S) what each cell weighs.
    Returns:
        () summed over pages and cells.
    """
    teacher, student = (F.layer_norm(full_precision(x), x.shape[-1:]) for x in (teacher, student))
    return (confidence * (student - teacher).square().mean(-1)).sum()


def found_without_truth(teacher: DFineOutput, targets: list[Target]) -> int | Tensor:
    """How many boxes the teacher finds, with a score above .5, on the pages without boxes."""
    pages = [i for i, target in enumerate(targets) if not len(target.labels)]
    return sum((teacher.refined.logits[-1, i].sigmoid().amax(-1) > 0.5).sum() for i in pages)


def normaliser(count: Tensor, least: float = 1) -> Tensor:
    """What sums are divided by: a count over all processes, divided by their number."""
    return distributed.sum_over_processes(count).clamp(min=least) / distributed.world_size()


def active(config: DistillConfig, epoch: float) -> dict[str, float]:
    """The terms that count now and their weights, alpha included; none: the teacher need not be asked.

    Args:
        epoch: epochs done, fractions included.
    """
    go_lsd = config.go_lsd.weight if epoch >= config.go_lsd.start_epoch else 0.0
    answers = (config.classes.weight, config.boxes.weight, go_lsd)
    weights = {term: config.shared * weight for term, weight in zip(TEACHER_QUERIES, answers, strict=True)}
    weights |= {term: config.denoising * weight for term, weight in zip(DENOISING, answers, strict=True)}
    cells = fading(epoch, config.cells.end_epoch)
    weights |= {"cell_class": cells * config.cells.classes, "cell_box": cells * config.cells.boxes}
    weights["memory"] = fading(epoch, config.memory.end_epoch) * config.memory.weight
    return {term: config.alpha * weight for term, weight in weights.items() if config.alpha * weight > 0}


def fading(epoch: float, end_epoch: float) -> float:
    """From 1 at the start linearly to 0 at `end_epoch`; without an end, 1."""
    return max(0.0, 1 - epoch / end_epoch) if end_epoch else 1.0


def end_epoch(config: DistillConfig) -> float:
    """Epochs after which no term counts any more, and the teacher teaches nothing; infinite if some always do."""
    if active(config, float("inf")):
        return float("inf")
    ends = {"cell_class": config.cells.end_epoch, "cell_box": config.cells.end_epoch, "memory": config.memory.end_epoch}
    return max((ends[term] for term in active(config, 0)), default=0.0)


def teacher_forward(
    teacher: DFine, batch: Batch, noised: NoisedTruth | None, weights: dict[str, float]
) -> DFineOutput | None:
    """The teacher's answers, as far as the terms need them."""
    if not weights:
        return None
    with torch.no_grad():
        noised = noised if weights.keys() & DENOISING else None
        return teacher(batch.images, batch.sizes, noised, dense=bool(weights.keys() & CELLS))


def student_forward(
    student: nn.Module,
    projection: nn.Module,
    batch: Batch,
    noised: NoisedTruth | None,
    taught: DFineOutput | None,
    weights: dict[str, float],
) -> DFineOutput:
    """The student's answers, to the teacher's queries and for every cell as far as the terms need them.

    Args:
        projection: see `memory_projection`; its output is the memory of the cells.
    """
    teacher_queries = taught.queries if taught and weights.keys() & TEACHER_QUERIES else None
    output = student(batch.images, batch.sizes, noised, teacher_queries, dense=bool(weights.keys() & CELLS))
    if "memory" in weights:
        output = output._replace(cells=output.cells._replace(memory=projection(output.cells.memory)))
    return output


def memory_projection(student: DFine, teacher: DFine) -> nn.Linear:
    """From the width of the student's memory to that of the teacher's; for training only."""
    return nn.Linear(student.selection.project.in_features, teacher.selection.project.in_features)


def on_labelled_pages(output: DFineOutput, targets: list[Target]) -> DFineOutput:
    """The student's answers, of which those on pages without boxes learn nothing from the truth."""
    labelled = [len(target.labels) > 0 for target in targets]
    if all(labelled):
        return output
    (pages,) = send([torch.tensor(labelled)], output.queries.valid.device)
    valid = output.queries.valid & pages[:, None]  # (B, Q)
    refined, queries = mask_logits(output.refined, valid), output.queries._replace(valid=valid)
    initial, encoder = (head and mask_logits(head, valid) for head in (output.initial, output.encoder))
    denoising = output.denoising
    if denoising is not None:
        slots = pages[:, None].expand_as(denoising.queries.labels)  # (B, K): those of an empty page are padding
        first = denoising.initial and mask_logits(denoising.initial, slots)
        denoising = denoising._replace(refined=mask_logits(denoising.refined, slots), initial=first)
    return output._replace(refined=refined, queries=queries, initial=initial, encoder=encoder, denoising=denoising)
