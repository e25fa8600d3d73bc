"""Processes that load pages end with the run, send few tensors, and say when they lack open files."""

import re
import resource
import time
from pathlib import Path

import pytest
from coco_folder import annotation, image, write
from processes import at_most, ends, gone, launch
from torch.utils.data import Dataset

from dfine.config import Config, ConfigError, DataConfig
from dfine.data.batches import evaluation_loader
from dfine.data.sources import CocoPages
from dfine.data.workers import PageLoader, WorkerError, make_room, open_files

SMALL = DataConfig(batch_size=16, workers=2, short_edges=(32, 64), eval_short_edge=32, max_long_edge=96)


class Long(Dataset):
    """What the worker says of one page more than fills its pipe."""

    def __getitem__(self, index: int) -> str:
        return "x" * 1_000_000


def reads_one_page_and_waits(folder: Path) -> None:
    pages = PageLoader(Long(), str, sampler=range(9), batch_size=None, num_workers=1)
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


# Open files


def loads_with_few_files(folder: Path, spare: int) -> None:
    source = CocoPages(*write(folder, [image(i) for i in range(64)], [annotation(i, [1, 1, 9, 9]) for i in range(64)]))
    loader = evaluation_loader(source, Config(data=SMALL))
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
    loader = evaluation_loader(source, Config(data=SMALL))
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
    loader = evaluation_loader(source, Config(data=SMALL.model_copy(update={"batch_size": 6})))
    (batch,) = loader
    truths = [x for target in batch.targets for x in (target.labels, target.boxes)]
    assert len({x.untyped_storage().data_ptr() for x in (batch.images, *truths)}) == 3
    assert [len(target.labels) for target in batch.targets] == [0, 2, 0, 0, 1, 0]
