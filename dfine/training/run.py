"""A training run: its state, and the folder it is written to."""

import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import yaml
from PIL import Image
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dfine import config as configs
from dfine import distributed
from dfine.checkpoints import ours
from dfine.checkpoints.ours import CheckpointError
from dfine.config import Config, ConfigError
from dfine.data.transforms import PageError
from dfine.data.workers import WorkerError
from dfine.distributed import say
from dfine.files import lock
from dfine.inference.evaluation import Stopped, evaluate, table
from dfine.inference.pages import beside_truth
from dfine.inference.pictures import grid
from dfine.model.detector import DFine
from dfine.structures import Batch
from dfine.training import metrics, optim, saved
from dfine.training.engine import Data
from dfine.training.stop import Stop


class Run:
    """Everything that changes while training, and the folder it is written to.

    All randomness is a function of (seed, step, rank) or of (seed, epoch, page), and the schedule of the step: so the
    weights, their average, the optimizer and the step are all there is to save, and the values of the steps since the
    last evaluation, of which metrics.jsonl will hold the means. That file says which evaluations are done.
    """

    LOG_EVERY = 10  # steps between points in TensorBoard

    def __init__(
        self, config: Config, data: Data, model: DFine, device: torch.device, auxiliary: nn.Module | None = None
    ) -> None:
        """
        Args:
            auxiliary: trained along with the model and saved in last.pt, but no part of what is used later.
        """
        self.config, self.data, self.device = config, data, device
        self.folder = Path(config.run_dir)
        self.model, self.auxiliary = model, auxiliary or nn.Module()
        self.ema = ModelEmaV3(model)
        self.optimizer = optim.optimizer(model, config.train, self.auxiliary)
        self.epoch_steps, self.step = len(data.sampler) // config.train.accumulate, 0
        self.saved, self.evaluated = 0, 0  # the last steps that were
        self.best = -1.0  # the highest AP
        self.ap: float | None = None  # the last one; None: not known yet, or no boxes to find
        self.stop, self.interrupted = Stop(self.leave_alone), False  # this process was told to; all have agreed
        self.since_evaluation: list[dict[str, float]] = []
        self.board: SummaryWriter | None = None
        self.bar: tqdm = tqdm(disable=True)
        self.began, self.loaded = 0.0, 0.0  # when the current step did, and when it had its pages
        self.pace = metrics.Pace()
        self.batches: list[Batch] = []  # of the current step

    @property
    def epoch(self) -> float:
        """Epochs done, fractions included."""
        return self.step / self.epoch_steps

    @property
    def schedule_steps(self) -> int:
        """The steps of all epochs."""
        return self.config.train.epochs * self.epoch_steps

    @property
    def last_step(self) -> int:
        """Where the run ends; the schedule spans all epochs all the same."""
        return min(self.schedule_steps, self.config.train.max_steps or self.schedule_steps)

    @property
    def backbone_frozen(self) -> bool:
        return self.step < self.config.train.freeze_backbone_steps

    @property
    def evaluation_due(self) -> bool:
        """Now, or it was when the run was stopped at this step."""
        return not self.interrupted and self.step > self.evaluated and self.due(self.config.train.eval_every)

    @property
    def save_due(self) -> bool:
        """Also before an evaluation, in which much can go wrong."""
        return self.step > self.saved and (self.evaluation_due or self.due(self.config.train.save_every))

    def due(self, every: int) -> bool:
        """Whether something that happens `every` so many steps (0: every epoch) and at the end happens now."""
        return self.step % (every or self.epoch_steps) == 0 or self.step >= self.last_step

    def open(self, resume: bool) -> None:
        """Makes and locks the folder, and takes up the last saved step if there is one.

        Raises:
            ConfigError: see `saved.resumes`; or another process has the folder, it cannot be written to, a file in it
                is broken, or the run in it was of another shape.
        """
        distributed.on_main(self.enter)
        last, previous = self.folder / "last.pt", self.folder / "previous.pt"
        if saved.resumes(self.config, resume):
            try:
                self.load(last)
            except CheckpointError as error:
                say(f"{error}; going on from {previous}")
                self.load(previous)
                if distributed.is_main() and last.exists():
                    last.replace(last.with_name("last.pt.broken"))  # so that it never becomes previous.pt
            say(f"resumed {self.folder} at step {self.step}")
        if len(set(distributed.gather(self.step))) > 1:
            raise ConfigError(f"run_dir: not every process finds the run in {self.folder}; all machines must share it")
        self.evaluated, self.best, self.ap = distributed.on_main(self.recall_evaluations)
        if distributed.is_main():
            (self.folder / "config.yaml").write_text(yaml.safe_dump(configs.to_dict(self.config), sort_keys=False))
            self.board = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        self.stop.listen()
        say(f"{self.last_step - self.step} steps to go, {self.epoch_steps} an epoch")

    def enter(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder, "run_dir")  # kept: it ends with the file
        except OSError as error:
            raise ConfigError(f"run_dir: cannot write to {self.folder} ({error.strerror})") from error

    def leave_alone(self) -> NoReturn:
        """Saves and ends this process, without the others and whatever its threads wait for."""
        status = 0 if distributed.world_size() == 1 else 1  # 1: torchrun then ends those that were not told
        try:
            if distributed.is_main() and self.step > self.saved:
                self.write()
            say(f"told to stop while waiting; saved at step {self.step}, go on with --resume")
        except CheckpointError as error:
            say(f"error: {error}")
            status = 1
        os._exit(status)

    def load(self, path: Path) -> None:
        """Takes up a saved step.

        Raises:
            CheckpointError: missing or damaged. ConfigError: of a run of another shape, or no run's.
        """
        content = saved.read(path, self.config, self.epoch_steps, self.data.categories, self.model, self.auxiliary)
        self.model.load_state_dict(content["model"])
        self.auxiliary.load_state_dict(content.get("auxiliary", {}))
        self.ema.module.load_state_dict(content["ema"])
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: the optimizer's state does not fit this model ({error})") from error
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # weight decay and the like are this config's, not the saved ones
        self.step = self.saved = content["step"]
        self.since_evaluation = content["since_evaluation"]

    def steps(self) -> Iterator[list[Batch]]:
        """The batches of each optimizer step, up to the end of the run; `step_done` must be called after each.

        The model is in training mode then, and what torch draws is seeded by the step. Told to stop, or where a batch
        cannot be loaded by any process, it saves and ends early.

        Raises:
            PageError: a page cannot be read; names it. WorkerError: a process that loads pages is gone.
        """
        accumulate = self.config.train.accumulate
        while self.step < self.last_step and not self.interrupted:
            epoch, first = divmod(self.step, self.epoch_steps)
            self.data.sampler.set_position(epoch, first * accumulate)
            batches = iter(self.data.batches)
            bar: dict[str, Any] = {"unit": "step", "mininterval": 0.5, "disable": not distributed.is_main()}
            with tqdm(None, f"epoch {epoch + 1}", self.epoch_steps, initial=first, **bar) as self.bar:
                while epoch * self.epoch_steps <= self.step < min(self.last_step, (epoch + 1) * self.epoch_steps):
                    self.began = time.perf_counter()
                    with self.stop.waiting():
                        self.batches, failure = fetch(batches, accumulate)
                        agreed = self.agreed(self.stop.told or failure is not None)
                    if agreed is None:
                        self.leave_alone()
                    self.interrupted |= agreed
                    if self.interrupted:
                        self.leave(failure)
                        return
                    self.loaded = time.perf_counter()
                    torch.manual_seed(step_seed(self.config.train.seed, self.step))
                    self.model.train()
                    self.model.backbone.train(not self.backbone_frozen)
                    yield [batch.to(self.device) for batch in self.batches]
                    if self.interrupted:  # in an evaluation
                        return

    def agreed(self, stop: bool) -> bool | None:
        """Whether any process wants to stop; None: this one shall, and another is gone already."""
        try:
            return distributed.any_process(stop)
        except RuntimeError:  # its connection is gone
            time.sleep(1)  # what ended it, or torchrun, may be telling this one, too
            if self.stop.told:
                return None
            raise

    def leave(self, failure: PageError | WorkerError | None) -> None:
        """Saves and says so, or raises the failure."""
        if self.step > self.saved:
            self.save()
        if failure is not None:
            cause = f"{failure}; stopped at step {self.step}, go on with --resume once it is mended"
            if isinstance(failure, PageError) and not self.config.data.skip_unreadable:
                cause += ", or without it: data.skip_unreadable=true"
            raise type(failure)(cause) from failure
        say(f"told to stop; saved at step {self.step}, go on with --resume")

    def step_done(self, values: dict[str, float]) -> None:
        """Counts the step and logs its values: every tenth step to TensorBoard, their means to metrics.jsonl."""
        self.step += 1
        now, pages = time.perf_counter(), sum(len(batch.targets) for batch in self.batches) * distributed.world_size()
        if self.device.type == "cpu" and (slower := self.pace.slower(now - self.loaded)):
            say(slower)
        values = values | {
            "pages_per_second": pages / (now - self.began),
            "padded_share": float(np.mean([padded_share(batch) for batch in self.batches])),
        }
        if self.board:
            self.since_evaluation.append(values)
            if self.step % self.LOG_EVERY == 0:
                for name, value in values.items():
                    self.board.add_scalar(f"train/{name}", value, self.step)
        known = {} if self.ap is None else {"AP": f"{self.ap:.3f}"}
        shown = ("loss", "vfl", "l1", "giou", "fgl", "pages_per_second")
        self.bar.set_postfix(known | {key: f"{values[key]:.3g}" for key in shown}, refresh=False)
        self.bar.update()

    def save(self) -> None:
        """Writes last.pt; the one before it stays as previous.pt."""
        distributed.on_main(self.write)
        self.saved = self.step

    def write(self) -> None:
        content = ours.weights(self.config, self.data.categories, self.ema.module) | {
            "model": self.model.state_dict(),
            "auxiliary": self.auxiliary.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch_steps": self.epoch_steps,
            "since_evaluation": self.since_evaluation,
        }
        ours.save(self.folder / "last.pt", content, keep=self.folder / "previous.pt")
        if self.board:
            self.board.flush()

    def evaluate(self) -> None:
        """Measures the averaged model; writes TensorBoard, a picture, best.pt if none was better, and metrics.jsonl.

        Told to stop, it gives up and leaves the evaluation to the resumed run.
        """
        distributed.broadcast_buffers(self.ema.module)  # every process has its own batch-norm statistics
        bf16, told = self.config.train.bf16, lambda: self.stop.told
        try:
            with self.stop.waiting():
                found = evaluate(self.ema.module, self.data.val_batches, self.data.val, bf16, told)
        except Stopped:
            self.interrupted = True
            say(f"told to stop; saved at step {self.step}, go on with --resume")
            return
        distributed.on_main(lambda: self.record(found))
        self.evaluated, self.best, self.ap = self.step, max(self.best, found["AP"] or 0.0), found["AP"]

    def record(self, found: dict[str, Any]) -> None:
        """Writes down an evaluation.

        Raises:
            ConfigError: the folder cannot be written to. CheckpointError: nor can best.pt.
        """
        say(f"step {self.step}\n{table(found)}")
        line = {"step": self.step, "epoch": self.epoch, **found}
        line["train"] = metrics.summary(self.since_evaluation)
        try:
            self.draw(found)
            if (found["AP"] or 0.0) >= self.best:  # None: no boxes to find. With nothing to compare, the newest wins
                ours.save(self.folder / "best.pt", ours.weights(self.config, self.data.categories, self.ema.module))
            metrics.append(self.folder / "metrics.jsonl", line)  # the last thing: this line says that all is done
        except OSError as error:
            raise ConfigError(f"run_dir: cannot write to {self.folder} ({error.strerror})") from error
        self.since_evaluation = []

    def draw(self, found: dict[str, Any]) -> None:
        """An evaluation for people: scalars, a histogram and a picture."""
        assert self.board is not None
        classes = {f"val_class/{name}": numbers["AP"] for name, numbers in found["per_class"].items()}
        overall = {f"val/{name}": value for name, value in found.items() if name not in ("per_class", "shown")}
        overall |= {f"val_shown/{name}": value for name, value in found["shown"].items()}
        for name, value in (overall | classes).items():
            if value is not None:
                self.board.add_scalar(name, value, self.step)
        if self.since_evaluation:
            norms = np.array([step["gradient_norm"] for step in self.since_evaluation])
            self.board.add_histogram("train/gradient_norm_before_clipping", norms, self.step)
        pages = range(min(3, len(self.data.val.ids)))
        picture = grid([beside_truth(self.ema.module, self.data.val, i, self.config.data) for i in pages], 1)
        (self.folder / "pictures").mkdir(exist_ok=True)
        Image.fromarray(picture).save(self.folder / "pictures" / f"step_{self.step:07d}.png")

    def recall_evaluations(self) -> tuple[int, float, float | None]:
        """The last evaluated step, the highest AP and the last; what came after the resumed step is forgotten."""
        lines = metrics.recall(self.folder / "metrics.jsonl", self.step)
        if not lines:
            return self.evaluated, self.best, self.ap
        if lines[-1]["step"] == self.step:
            self.since_evaluation = []
        return lines[-1]["step"], max(line["AP"] or 0.0 for line in lines), lines[-1]["AP"]

    def what_next(self) -> str:
        """For the end of a run: where its weights are, and the commands that use them."""
        best, predictions, folder = (
            shlex.quote(str(path)) for path in (self.folder / "best.pt", self.folder / "predictions", self.folder)
        )
        ap = "" if self.ap is None else f", AP {self.best:.3f}"
        return (
            f"done: {best} has the best weights{ap}; what next:\n"
            f"  python evaluate.py --checkpoint {best}\n"
            f"  python -m dfine.predict --checkpoint {best} FILE_OR_FOLDER --out {predictions}\n"
            f"  tensorboard --logdir {folder}"
        )


def step_seed(seed: int, step: int) -> int:
    """The seed of everything that torch draws in one step of this process."""
    return int(np.random.SeedSequence([seed, step, distributed.rank()]).generate_state(1)[0])


def fetch(batches: Iterator[Batch], count: int) -> tuple[list[Batch], PageError | WorkerError | None]:
    """The next batches, or why there are none: other processes must hear of it before this one stops."""
    try:
        return [next(batches) for _ in range(count)], None
    except (PageError, WorkerError) as error:
        return [], error


def padded_share(batch: Batch) -> float:
    """The share of a batch's pixels that belong to no page."""
    return 1 - float(batch.sizes.prod(1).sum()) / (len(batch.sizes) * batch.images.shape[-2] * batch.images.shape[-1])
