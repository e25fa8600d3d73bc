"""Time and memory with a data set of PubLayNet's size: `python tests/benchmarks/scale.py --out FOLDER`.

Makes up the data set there, a json with outlines and links to one image, unless it is there; then measures, in
processes like those that torchrun starts on one machine without a GPU: reading; what a loader worker copies in an epoch
of the memory that it shares; and an evaluation, of pages with 300 made-up detections each. Prints a table: seconds, by
the wall and of the CPU, and the peak of memory above that of a process that has imported everything. Linux only.
"""

import argparse
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from dfine import distributed
from dfine.config import DataConfig, PagesConfig
from dfine.data import sources
from dfine.data.batches import PageDataset, PageKey
from dfine.data.sources import CocoPages, open_source
from dfine.inference.evaluation import coco_metrics, coco_rows
from dfine.structures import Detections

CLASSES = {"text": 0.7, "title": 0.17, "list": 0.04, "table": 0.045, "figure": 0.045}  # as often as in PubLayNet
WIDTH, HEIGHT = 601, 792
FOUND = 300  # detections a page


def make(folder: Path, pages: int, boxes: int) -> None:
    """Writes pages.json, in which an annotation has some 280 bytes, and images/."""
    random = np.random.default_rng(0)
    names = [f"PMC{i // 3:07d}_{i:05d}.png" for i in range(pages)]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.new("L", (WIDTH, HEIGHT), 255).save(folder / "page.png")
    for name in names:
        if not (folder / "images" / name).is_symlink():  # of a run that was interrupted
            (folder / "images" / name).symlink_to("../page.png")
    entries = ({"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT} for i, name in enumerate(names))
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    with (folder / "writing").open("w") as file:
        file.write(f'{{"categories": {json.dumps(categories)}, "images": [{", ".join(map(json.dumps, entries))}], ')
        file.write('"annotations": [')
        for first in range(0, boxes, 10_000):  # a part at a time, as a data set of this size has to be
            count = min(10_000, boxes - first)
            own, kinds = random.integers(pages, size=count), random.choice(len(CLASSES), count, p=[*CLASSES.values()])
            xy, size = random.uniform(0, 400, (count, 2)).round(2), random.uniform(8, 190, (count, 2)).round(2)
            corners = np.concatenate([xy, xy + size], axis=1)[:, [0, 1, 2, 1, 2, 3, 0, 3] * 2].round(2)
            columns = (own, kinds + 1, np.concatenate([xy, size], axis=1), size.prod(1).round(4), corners)
            things = (
                {"id": i, "image_id": page, "category_id": kind, "bbox": box, "area": area, "iscrowd": 0}
                | {"segmentation": [outline]}
                for i, (page, kind, box, area, outline) in enumerate(zip(*(x.tolist() for x in columns), strict=True))
            )
            file.write(", " * (first > 0) + ", ".join(map(json.dumps, things)))
        file.write("]}")
    (folder / "writing").rename(folder / "pages.json")


def memory(kind: str, file: str = "status") -> float:
    """MB of this process, as Linux counts them: VmHWM is its peak."""
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1e3


def copied_in_an_epoch(pages: CocoPages, queue: Any) -> None:
    """What a worker does in an epoch, but for reading the images; puts MB."""
    dataset = PageDataset(pages, DataConfig(short_edges=(32,), eval_short_edge=32), seed=0, training=False)
    page = np.zeros((64, 48, 3), np.uint8)
    with mock.patch.object(sources, "read_page", new=lambda *_: page):  # noqa: PT008 (a Mock remembers each call)
        dataset[PageKey(0, 32, 0)]
        before = memory("Private_Dirty", "smaps_rollup")
        for index in range(len(pages.ids)):
            dataset[PageKey(index, 32, 0)]
    queue.put(memory("Private_Dirty", "smaps_rollup") - before)


def made_up(pages: CocoPages, numbers: list[int]) -> np.ndarray:
    """Detections: what is there, somewhat moved, and much that is not."""
    rows = []
    for number in numbers:
        random = np.random.default_rng(number)
        own = slice(pages.first[number], pages.first[number + 1])
        boxes, labels = random.uniform(8, 190, (FOUND, 4)), random.choice(len(CLASSES), FOUND, p=[*CLASSES.values()])
        boxes[: own.stop - own.start] = pages.truth.xywh[own] + random.normal(0, 3, (own.stop - own.start, 4))
        labels[: own.stop - own.start] = pages.truth.labels[own]
        boxes[:, 2:] += boxes[:, :2]
        scores = np.sort(random.random(FOUND) ** 4)[::-1].copy()
        found = Detections(torch.from_numpy(scores), torch.from_numpy(labels), torch.from_numpy(boxes))
        rows.append(coco_rows(number, found, [category["id"] for category in pages.categories]))
    return np.concatenate([np.empty((0, 7)), *rows])


def measured(what: str, work: Callable[[], Any], before: float) -> Any:
    """Prints a line of the table; MB are those of the process that needs most and of the one that needs least."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    spent = time.perf_counter() - wall, time.process_time() - cpu, memory("VmHWM") - before
    walls, cpus, peaks = zip(*distributed.gather(spent), strict=True)
    cells = f"{max(walls):.1f} | {max(cpus):.1f} | {max(peaks):.0f} | {min(peaks):.0f}"
    distributed.say(f"| {what} | {len(walls)} | {cells} |")
    return result


def process(rank: int, world: int, port: int, folder: Path, evaluated: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    distributed.start()
    before = memory("VmRSS")
    config = PagesConfig(images=str(folder / "images"), annotations=str(folder / "pages.json"))
    pages = measured("reading", lambda: open_source(config, "data.val"), before)
    if world == 1:  # of several, the file that they share is nobody's own
        fork = multiprocessing.get_context("fork")
        queue = fork.Queue()
        worker = fork.Process(target=copied_in_an_epoch, args=(pages, queue))
        worker.start()
        distributed.say(f"| copied by a worker in an epoch | {world} | | | {queue.get(timeout=600):.0f} | |")
        worker.join()
    numbers = [*range(evaluated)][rank::world]
    rows = made_up(pages, numbers)
    distributed.gather(None)  # all are ready
    metrics = measured("evaluation", lambda: coco_metrics(pages.ground_truth(numbers), rows), before)
    distributed.say(f"| its AP, {metrics['AP']!r} | {world} | | | | |")
    distributed.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=335_703)
    parser.add_argument("--boxes", type=int, default=3_190_000)
    parser.add_argument("--evaluated", type=int, default=11_245, metavar="PAGES")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    if not (options.out / "pages.json").exists():
        make(options.out, options.pages, options.boxes)
    print("| | processes | seconds | of the CPU | MB, most | MB, least |\n|---|---|---|---|---|---|", flush=True)
    for world in options.processes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(process, (world, port, options.out, options.evaluated), world)


if __name__ == "__main__":
    main()
