"""Which pages share a batch, how large they are, and that nothing depends on who loads them."""

import re
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_folder import annotation, image, write
from PIL import Image
from processes import at_most, ends, gone, launch
from torch.utils.data import Dataset

from dfine import distributed
from dfine.config import AugmentConfig, Config, ConfigError, DataConfig, TrainConfig
from dfine.data.batches import (
    PageDataset,
    PageKey,
    PageLoader,
    TrainBatches,
    WorkerError,
    begin_worker,
    evaluation_batches,
    evaluation_loader,
    make_room,
    open_files,
    train_loader,
)
from dfine.data.sources import CocoPages
from dfine.data.transforms import PageError, canvas_of, fit

SMALL = DataConfig(batch_size=2, workers=0, short_edges=(32, 64), eval_short_edge=32, max_long_edge=96)


def many_sizes(count: int) -> list[tuple[int, int]]:
    random = np.random.default_rng(0)
    return [(int(h), int(w)) for h, w in random.integers(50, 200, (count, 2))]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world)


def test_every_page_comes_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[int] = Counter()
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        batches = list(TrainBatches(many_sizes(36), SMALL, seed=0, accumulate=2))
        assert len(batches) == 6
        seen.update(key.page for batch in batches for key in batch)
    assert seen == Counter(range(36))


def test_an_epoch_is_filled_up_to_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0, 1)
    sampler = TrainBatches(many_sizes(9), SMALL, seed=0, accumulate=4)
    counts = Counter(key.page for batch in sampler for key in batch)
    assert len(sampler) == 8
    assert sum(counts.values()) == 16
    assert set(counts.values()) == {1, 2}
    assert len(counts) == 9


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    def batches(seed: int, epoch: int) -> list[list[PageKey]]:
        sampler = TrainBatches(many_sizes(30), SMALL, seed, 1)
        sampler.set_position(epoch, 0)
        return list(sampler)

    assert batches(1, 2) == batches(1, 2)
    pages = [[[key.page for key in batch] for batch in batches(*which)] for which in ((1, 2), (1, 3), (2, 2))]
    assert pages[0] != pages[1]
    assert pages[0] != pages[2]


def test_a_resumed_epoch_gives_the_rest_of_the_same_batches() -> None:
    sampler = TrainBatches(many_sizes(30), SMALL, seed=0, accumulate=1)
    sampler.set_position(4, 0)
    whole = list(sampler)
    sampler.set_position(4, 6)
    assert list(sampler) == whole[6:]


def test_all_processes_draw_the_same_edge_and_all_edges_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    edges = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        batches = list(TrainBatches(many_sizes(80), SMALL, seed=0, accumulate=1))
        assert all(len({key.short_edge for key in batch}) == 1 for batch in batches)
        edges.append([batch[0].short_edge for batch in batches])
    assert edges[0] == edges[1]
    assert set(edges[0]) == {32, 64}


def test_pages_of_like_aspect_share_a_batch() -> None:
    sizes = many_sizes(200)
    spread = [np.ptp([sizes[key.page][0] / sizes[key.page][1] for key in b]) for b in TrainBatches(sizes, SMALL, 0, 1)]
    random = np.random.default_rng(0).permutation(200).reshape(-1, 2)
    chance = [np.ptp([sizes[page][0] / sizes[page][1] for page in pair]) for pair in random]
    assert np.mean(spread) < np.mean(chance) / 5


def test_evaluation_takes_every_page_once_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = many_sizes(50)
    pages: list[int] = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        pages += [key.page for batch in evaluation_batches(sizes, SMALL, 32) for key in batch]
    assert sorted(pages) == list(range(50))


def test_evaluation_batches_hold_pages_of_one_canvas() -> None:
    sizes = many_sizes(50)
    batches = evaluation_batches(sizes, SMALL, 32)
    assert max(len(batch) for batch in batches) == SMALL.batch_size
    for batch in batches:
        assert len({canvas_of([fit(sizes[key.page], 32, 96)], 32) for key in batch}) == 1


def test_a_page_is_augmented_by_seed_epoch_and_page_whoever_loads_it(tmp_path: Path) -> None:
    annotations = [annotation(i, [5, 5, 12, 20]) for i in range(6)]
    images, file = write(tmp_path, [image(i) for i in range(6)], annotations)
    for path in images.iterdir():
        Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(path)
    source = CocoPages(images, file)

    def batches(workers: int, start: int) -> list[Any]:
        data = DataConfig(batch_size=2, workers=workers, short_edges=(32, 64))
        loader, sampler = train_loader(source, Config(data=data, train=TrainConfig(seed=3)))
        sampler.set_position(1, start)
        return list(loader)

    alone = batches(workers=0, start=0)
    for batch, other in zip(alone[1:], batches(workers=2, start=1), strict=True):
        assert torch.equal(batch.images, other.images)
        assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(batch.targets, other.targets, strict=True))


def test_a_page_is_augmented_otherwise_in_every_epoch_and_with_every_seed(tmp_path: Path) -> None:
    images, file = write(tmp_path, [image(1, 60, 60)], [annotation(1, [20, 20, 20, 20])])
    noise = np.random.default_rng(1).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "1.png")
    source = CocoPages(images, file)
    always = AugmentConfig(rotation_p=1.0, noise_p=1.0)
    data = DataConfig(batch_size=2, short_edges=(64,), augment=always)
    keys = [(seed, PageKey(0, 64, epoch)) for seed in range(2) for epoch in range(3)]
    pages = [PageDataset(source, data, seed, training=True)[key] for seed, key in keys]
    assert len({page.tobytes() for page, _ in pages}) == 6
    assert len({tuple(target.boxes.flatten().tolist()) for _, target in pages}) == 6


def test_a_batch_lays_pages_in_the_upper_left_corner_and_says_how_large_they_are(tmp_path: Path) -> None:
    source = CocoPages(*write(tmp_path, [image(1, 100, 110), image(2, 98, 100)], []))
    config = Config(data=SMALL)
    (batch,) = evaluation_loader(source, config)
    assert batch.images.shape == (2, 3, 64, 32)
    assert batch.images.dtype == torch.uint8
    assert batch.sizes.tolist() == [[35, 32], [33, 32]]
    assert [target.image_id for target in batch.targets] == [1, 2]
    for page, (height, width) in zip(batch.images, batch.sizes.tolist(), strict=True):
        assert (page[:, :height, :width] == 255).all()
        assert page.sum() == 255 * 3 * height * width


class Long(Dataset):
    """What the worker says of one page more than fills its pipe."""

    def __getitem__(self, index: int) -> str:
        return "x" * 1_000_000


def reads_one_page_and_waits(folder: Path) -> None:
    pages = PageLoader(Long(), str, sampler=range(9), batch_size=None, num_workers=1, worker_init_fn=begin_worker)
    for _ in pages:
        (folder / "read").touch()
        time.sleep(100)


def test_workers_end_with_their_process_even_in_the_middle_of_a_batch(tmp_path: Path) -> None:
    (process,) = launch(reads_one_page_and_waits, tmp_path, count=1)
    while not (tmp_path / "read").exists():
        assert process.is_alive()
        time.sleep(0.1)
    time.sleep(2)  # for the worker to get stuck
    process.kill()
    process.join()
    assert process.pid is not None
    assert gone(process.pid)


# Pages that cannot be read


def five_of_which(folder: Path, broken: tuple[int, ...], missing: tuple[int, ...] = ()) -> tuple[Path, Path]:
    images, file = write(folder, [image(i) for i in range(5)], [annotation(i, [i, 5, 12, 20]) for i in range(5)])
    for i in broken:
        (images / f"{i}.png").write_text("no image")
    for i in missing:
        (images / f"{i}.png").unlink()
    return images, file


def ids(batches: Any) -> list[list[int]]:
    return [[target.image_id for target in batch.targets] for batch in batches]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_page_that_cannot_be_read_is_named_counted_and_replaced_by_the_next_of_its_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    images, file = five_of_which(tmp_path, broken=(1,), missing=(3,))
    still = AugmentConfig(**{name: 0.0 for name in AugmentConfig.model_fields if name.endswith("_p")})
    data = DataConfig(batch_size=5, workers=workers, short_edges=(64,), augment=still)
    with pytest.raises(PageError, match=r"1 of 5 images .* missing: 3\.png"):
        CocoPages(images, file)
    source = CocoPages(images, file, may_lack=True)
    strict, sampler = train_loader(source, Config(data=data))
    with pytest.raises(PageError, match=r"[13]\.png: cannot read"):
        list(strict)
    loader, _ = train_loader(source, Config(data=data.model_copy(update={"skip_unreadable": True})))
    order = [key.page for (*keys,) in sampler for key in keys]
    following = [*order, *order]
    expected = [next(page for page in following[i:] if page not in (1, 3)) for i in range(5)]
    for _ in range(2):
        (batch,) = loader
        assert ids([batch]) == [expected]
        lefts = [round(30 * (t.boxes[0, 0] - t.boxes[0, 2] / 2).item()) for t in batch.targets]
        assert lefts == expected  # its own truth came along
    said = capsys.readouterr().err
    assert said.count("page skipped") == 2
    assert f"2 so far: {images}" in said
    assert all(said.count(f"{images / name}: cannot read the image") == 1 for name in ("1.png", "3.png"))


def test_where_no_page_of_a_batch_can_be_read_and_in_evaluation_nothing_is_skipped(tmp_path: Path) -> None:
    source = CocoPages(*five_of_which(tmp_path, broken=(0, 1, 2, 3, 4)))
    config = Config(data=SMALL.model_copy(update={"skip_unreadable": True}))
    with pytest.raises(PageError, match=r"no page of a batch can be read, .*: .*\.png: cannot read"):
        list(train_loader(source, config)[0])
    with pytest.raises(PageError, match=r"png: cannot read"):
        list(evaluation_loader(source, config))


# Open files


def loads_with_few_files(folder: Path, spare: int) -> None:
    source = CocoPages(*write(folder, [image(i) for i in range(64)], [annotation(i, [1, 1, 9, 9]) for i in range(64)]))
    loader = evaluation_loader(source, Config(data=SMALL.model_copy(update={"batch_size": 16, "workers": 2})))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + spare,) * 2)
    try:
        kept = list(loader)  # each holds its files
        (folder / "said").write_text(f"{len(kept)} batches")
    except WorkerError as error:
        (folder / "said").write_text(str(error))


@pytest.mark.parametrize("spare", [12, 17, 22, 60])
def test_too_few_open_files_are_an_error_that_says_what_to_do_and_no_wait_for_ever(tmp_path: Path, spare: int) -> None:
    processes = launch(loads_with_few_files, tmp_path, spare, count=1)
    assert ends(processes) == [0]
    expected = "4 batches" if spare == 60 else r"loading pages failed: too many open files: raise the limit \(ulimit.*"
    assert re.fullmatch(expected, (tmp_path / "said").read_text())


def loads_with_little_memory(folder: Path) -> None:
    source = CocoPages(*write(folder, [image(i) for i in range(4)], []))
    loader = evaluation_loader(source, Config(data=SMALL.model_copy(update={"batch_size": 4, "workers": 1})))
    with at_most(10_000), pytest.raises(WorkerError, match=r"too little shared memory: raise its limit"):
        list(loader)  # the limit is on files in memory, too


def test_too_little_shared_memory_is_an_error_that_says_what_to_do_and_no_wait_for_ever(tmp_path: Path) -> None:
    assert ends(launch(loads_with_little_memory, tmp_path, count=1)) == [0]


def asks_for_room(folder: Path, soft: int, hard: int, workers: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        make_room(workers, "data.workers")
        (folder / "said").write_text(str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
    except ConfigError as error:
        (folder / "said").write_text(str(error))


@pytest.mark.parametrize(
    ("limits", "workers", "expected"),
    [
        ((1024, 4096), 16, "1024"),  # nothing needs to change
        ((128, 4096), 16, r"4\d\d"),  # raised as far as needed
        (
            (128, 128),
            16,
            r"data.workers: 16 processes .* may have 128: raise that limit \(ulimit -n \d+\) or take [0-3]",
        ),
        ((128, 128), 0, "128"),
    ],
)
def test_the_limit_on_open_files_is_raised_where_that_is_needed_and_allowed(
    tmp_path: Path, limits: tuple[int, int], workers: int, expected: str
) -> None:
    assert ends(launch(asks_for_room, tmp_path, *limits, workers, count=1)) == [0]
    assert re.fullmatch(expected, (tmp_path / "said").read_text())


def test_a_batch_comes_from_a_worker_in_few_tensors_however_many_pages_it_has(tmp_path: Path) -> None:
    source = CocoPages(*write(tmp_path, [image(i) for i in range(6)], [annotation(i, [1, 1, 9, 9]) for i in (1, 1, 4)]))
    loader = evaluation_loader(source, Config(data=SMALL.model_copy(update={"batch_size": 6, "workers": 1})))
    (batch,) = loader
    truths = [x for target in batch.targets for x in (target.labels, target.boxes)]
    assert len({x.untyped_storage().data_ptr() for x in (batch.images, *truths)}) == 3
    assert [len(target.labels) for target in batch.targets] == [0, 2, 0, 0, 1, 0]


def test_boxes_of_squashed_pages_lie_on_the_same_ink_and_no_page_is_padded(tmp_path: Path) -> None:
    files = write(tmp_path, [image(1, 40, 100), image(2, 100, 40)], [annotation(i, [10, 20, 20, 10]) for i in (1, 2)])
    for number in (1, 2):
        page = np.full((100, 40, 3) if number == 1 else (40, 100, 3), 255, np.uint8)
        page[20:30, 10:30] = 0
        Image.fromarray(page).save(files[0] / f"{number}.png")
    still = AugmentConfig(**{name: 0.0 for name in AugmentConfig.model_fields if name.endswith("_p")})
    squash = SMALL.model_copy(
        update={"sizing": "squash", "augment": still, "short_edges": (64,), "eval_short_edge": 64}
    )
    config = Config(data=squash)
    pages = CocoPages(*files)
    for loader in (train_loader(pages, config)[0], evaluation_loader(pages, config)):
        (batch,) = loader
        assert batch.images.shape == (2, 3, 64, 64)
        assert batch.sizes.tolist() == [[64, 64]] * 2
        for picture, target in zip(batch.images, batch.targets, strict=True):
            rows, columns = ((picture[0] < 128).any(axis).nonzero()[:, 0] for axis in (1, 0))
            ink = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            x, y, w, h = (64 * target.boxes[0]).tolist()
            np.testing.assert_allclose([x - w / 2, y - h / 2, x + w / 2, y + h / 2], ink, atol=1)
            assert target.size in ((100, 40), (40, 100))
