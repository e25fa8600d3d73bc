"""A training run: its state, and the folder it is written to."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from dfine import config as configs
from dfine import distributed
from dfine.checkpoints import ours
from dfine.checkpoints.ours import CheckpointError
from dfine.config import Config, ConfigError
from dfine.data.sources import Source
from dfine.distributed import say
from dfine.inference.evaluation import Stopped, evaluate, table
from dfine.inference.pages import beside_truth
from dfine.inference.pictures import grid
from dfine.model.detector import DFine
from dfine.structures import Batch
from dfine.training import optim


class Run:
    """Everything that changes while training, and the folder it is written to.

    All randomness is a function of (seed, step, rank) or of (seed, epoch, page), and the schedule of the step: so the
    weights, their average, the optimizer and the step are all there is to save, and the values of the steps since the
    last evaluation, of which metrics.jsonl will hold the means. That file says which evaluations are done.
    """

    LOG_EVERY = 10  # steps between points in TensorBoard

    def __init__(
        self, config: Config, categories: list[dict[str, Any]], model: DFine, device: torch.device, epoch_steps: int
    ) -> None:
        self.config, self.categories, self.device = config, categories, device
        self.folder = Path(config.run_dir)
        self.model = model
        self.ema = optim.Average(model, config.train)
        self.optimizer = optim.optimizer(model, config.train)
        self.epoch_steps, self.step = epoch_steps, 0
        self.saved, self.evaluated, self.best = 0, 0, -1.0  # the last steps that were; the highest AP
        self.signalled, self.interrupted = False, False  # in this process; as agreed by all
        self.since_evaluation: list[dict[str, float]] = []
        self.board: SummaryWriter | None = None

    @property
    def last_step(self) -> int:
        """Where the run ends; the schedule spans all epochs all the same."""
        steps = self.config.train.epochs * self.epoch_steps
        return min(steps, self.config.train.max_steps or steps)

    @property
    def done(self) -> bool:
        return self.interrupted or (self.step >= self.last_step and not self.evaluation_due)

    @property
    def evaluation_due(self) -> bool:
        """Now, or it was when the run was stopped at this step."""
        return not self.interrupted and self.step > self.evaluated and self.due(self.config.train.eval_every)

    @property
    def save_due(self) -> bool:
        """Also before an evaluation, in which much can go wrong, and before the run leaves."""
        due = self.interrupted or self.evaluation_due or self.due(self.config.train.save_every)
        return due and self.step > self.saved

    def due(self, every: int) -> bool:
        """Whether something that happens `every` so many steps (0: every epoch) and at the end happens now."""
        return self.step % (every or self.epoch_steps) == 0 or self.step >= self.last_step

    def open(self, resume: bool) -> None:
        """Makes the folder and takes up the last saved step if there is one.

        Raises:
            ConfigError: the folder holds a run and `resume` is not set, or that run was of another shape.
        """
        last, previous = self.folder / "last.pt", self.folder / "previous.pt"
        if not resume and (last.exists() or previous.exists()):
            raise ConfigError(f"run_dir: {self.folder} holds a run; go on with it by --resume, or name another run_dir")
        if last.exists() or previous.exists():
            try:
                self.load(last)
            except CheckpointError as error:
                say(f"{error}; going on from {previous}")
                self.load(previous)
                if distributed.is_main() and last.exists():
                    last.replace(last.with_name("last.pt.broken"))  # so that it never becomes previous.pt
            say(f"resumed {self.folder} at step {self.step} of {self.last_step}")
        if len(set(distributed.gather(self.step))) > 1:
            raise ConfigError(f"run_dir: not every process finds the run in {self.folder}; all machines must share it")
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(yaml.safe_dump(configs.to_dict(self.config), sort_keys=False))
            self.recall_evaluations()
            self.board = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        self.evaluated, self.best = distributed.gather((self.evaluated, self.best))[0]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.interrupt)

    def interrupt(self, number: int, _: Any) -> None:
        """Ends the run after this step; the second signal ends it at once."""
        self.signalled = True
        signal.signal(number, signal.SIG_DFL)

    def load(self, path: Path) -> None:
        """Takes up a saved step.

        Raises:
            CheckpointError: missing or truncated. ConfigError: of a run of another shape.
        """
        content = ours.read(path)
        if content["epoch_steps"] != self.epoch_steps:
            raise ConfigError(
                f"{path}: had {content['epoch_steps']} steps an epoch, now {self.epoch_steps}: resume with the same "
                "pages, data.batch_size, train.accumulate and number of processes"
            )
        if [c["name"] for c in content["categories"]] != [c["name"] for c in self.categories]:
            raise ConfigError(f"{path}: has other categories than data.train.annotations")
        wrong = ours.misfit(self.model, content["model"])
        if wrong:
            raise ConfigError(f"{path}: does not fit the model of this config at {wrong}")
        self.model.load_state_dict(content["model"])
        self.ema.module.load_state_dict(content["ema"])
        if (content["config"]["train"]["muon_factor"] > 0) != (self.config.train.muon_factor > 0):
            raise ConfigError(f"{path}: train.muon_factor: a run cannot change between AdamW and Muon")
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(content["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # weight decay and the like are this config's, not the saved ones
        self.step = self.saved = content["step"]
        self.since_evaluation = content["since_evaluation"]

    def save(self) -> None:
        """Writes last.pt; the one before it stays as previous.pt."""
        if distributed.is_main():
            last = self.folder / "last.pt"
            content = ours.weights(self.config, self.categories, self.ema.module) | {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "epoch_steps": self.epoch_steps,
                "since_evaluation": self.since_evaluation,
            }
            ours.save(last, content, keep=self.folder / "previous.pt")
        if self.board:
            self.board.flush()
        self.saved = self.step
        distributed.barrier()

    def evaluate(self, batches: DataLoader[Batch], pages: Source) -> None:
        """Measures the averaged model; writes TensorBoard, a picture, best.pt if it is the best, and metrics.jsonl.

        Told to stop, it gives up and leaves the evaluation to the resumed run.
        """
        distributed.broadcast_buffers(self.ema.module)  # every process has its own batch-norm statistics
        try:
            metrics = evaluate(self.ema.module, batches, pages, self.config.train.bf16, lambda: self.signalled)
        except Stopped:
            self.interrupted = True
            return
        average = metrics["AP"] or 0.0  # None: no boxes to find
        better, self.best, self.evaluated = average > self.best, max(average, self.best), self.step
        if self.board is None:
            return
        say(f"step {self.step}\n{table(metrics)}")
        steps, self.since_evaluation = self.since_evaluation, []
        line = {"step": self.step, "epoch": self.step / self.epoch_steps, **metrics, "train": summary(steps)}
        self.draw(metrics, steps, pages)
        if better:
            ours.save(self.folder / "best.pt", ours.weights(self.config, self.categories, self.ema.module))
        with (self.folder / "metrics.jsonl").open("a") as file:  # the last thing: this line says that all is done
            file.write(json.dumps(line) + "\n")

    def draw(self, metrics: dict[str, Any], steps: list[dict[str, float]], pages: Source) -> None:
        """An evaluation for people: scalars, a histogram and a picture."""
        assert self.board is not None
        classes = {f"val_class/{name}": numbers["AP"] for name, numbers in metrics["per_class"].items()}
        overall = {f"val/{name}": value for name, value in metrics.items() if name != "per_class"}
        for name, value in (overall | classes).items():
            if value is not None:
                self.board.add_scalar(name, value, self.step)
        if steps:
            norms = np.array([step["gradient_norm"] for step in steps])
            self.board.add_histogram("train/gradient_norm_before_clipping", norms, self.step)
        picture = grid(
            [beside_truth(self.ema.module, pages, i, self.config.data) for i in range(min(3, len(pages.ids)))], 1
        )
        (self.folder / "pictures").mkdir(exist_ok=True)
        Image.fromarray(picture).save(self.folder / "pictures" / f"step_{self.step:07d}.png")

    def recall_evaluations(self) -> None:
        """Takes up what metrics.jsonl says; drops its lines after the resumed step: they will be written again."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        whole = path.read_text().rpartition("\n")[0].splitlines()  # on a full disk a line may have been cut short
        lines = [line for line in map(json.loads, whole) if line["step"] <= self.step]
        beside = path.with_name("metrics.jsonl.writing")
        beside.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        beside.replace(path)
        if lines:
            self.evaluated = lines[-1]["step"]
            self.best = max(line["AP"] or 0.0 for line in lines)
        if self.evaluated == self.step:
            self.since_evaluation = []


def summary(steps: list[dict[str, float]]) -> dict[str, Any]:
    """The means of all values, and how the gradient norms were spread."""
    if not steps:
        return {}
    counts, edges = np.histogram([step["gradient_norm"] for step in steps], bins=20)
    means: dict[str, Any] = {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}
    return means | {"gradient_norm_histogram": {"counts": counts.tolist(), "edges": edges.tolist()}}
