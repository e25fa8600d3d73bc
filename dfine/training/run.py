"""A training run: its state, and the folder it is written to."""

import shlex
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn
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
from dfine.training import metrics, optim
from dfine.training.lock import lock


class Run:
    """Everything that changes while training, and the folder it is written to.

    All randomness is a function of (seed, step, rank) or of (seed, epoch, page), and the schedule of the step: so the
    weights, their average, the optimizer and the step are all there is to save, and the values of the steps since the
    last evaluation, of which metrics.jsonl will hold the means. That file says which evaluations are done.
    """

    LOG_EVERY = 10  # steps between points in TensorBoard
    REPEATS = 5.0  # seconds in which another Ctrl-C is taken for the first one, passed on

    def __init__(
        self,
        config: Config,
        categories: list[dict[str, Any]],
        model: DFine,
        device: torch.device,
        epoch_steps: int,
        auxiliary: nn.Module | None = None,
    ) -> None:
        """
        Args:
            auxiliary: trained along with the model and saved in last.pt, but no part of what is used later.
        """
        self.config, self.categories, self.device = config, categories, device
        self.folder = Path(config.run_dir)
        self.model, self.auxiliary = model, auxiliary or nn.Module()
        self.ema = optim.Average(model, config.train)
        self.optimizer = optim.optimizer(model, config.train, self.auxiliary)
        self.epoch_steps, self.step = epoch_steps, 0
        self.saved, self.evaluated = 0, 0  # the last steps that were
        self.best = -1.0  # the highest AP
        self.ap: float | None = None  # the last one; None: not known yet, or no boxes to find
        self.signalled, self.interrupted = False, False  # in this process; as agreed by all
        self.ctrl_c: float | None = None  # when the first one came
        self.since_evaluation: list[dict[str, float]] = []
        self.board: SummaryWriter | None = None

    @property
    def epoch(self) -> float:
        """Epochs done, fractions included."""
        return self.step / self.epoch_steps

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
        """Makes and locks the folder, and takes up the last saved step if there is one.

        Raises:
            ConfigError: see `resumes`; or another process has the folder, it cannot be written to, a file in it is
                broken, or the run in it was of another shape.
        """
        distributed.on_main(self.enter)
        last, previous = self.folder / "last.pt", self.folder / "previous.pt"
        if resumes(self.config, resume):
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
        self.evaluated, self.best, self.ap = distributed.on_main(self.recall_evaluations)
        if distributed.is_main():
            (self.folder / "config.yaml").write_text(yaml.safe_dump(configs.to_dict(self.config), sort_keys=False))
            self.board = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.interrupt)

    def enter(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder)  # kept: it ends with the file
        except OSError as error:
            raise ConfigError(f"run_dir: cannot write to {self.folder} ({error.strerror})") from error

    def interrupt(self, number: int, _: Any) -> None:
        """Ends the run after this step; a second Ctrl-C, some seconds after the first, ends it at once.

        A signal may come more than once: job schedulers signal every process, and torchrun passes its own on.
        """
        self.signalled = True
        if number == signal.SIGINT:
            now = time.monotonic()
            self.ctrl_c = self.ctrl_c or now
            if now - self.ctrl_c > self.REPEATS:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)

    def load(self, path: Path) -> None:
        """Takes up a saved step.

        Raises:
            CheckpointError: missing or damaged. ConfigError: of a run of another shape, or no run's.
        """
        content = ours.read(path)
        theirs = ours.settings_of(path, content)
        if "optimizer" not in content:
            raise ConfigError(
                f"{path}: holds weights alone, as best.pt does, from which a run cannot go on: remove it to go on from "
                f"previous.pt, or start another run with model.init_from={path}"
            )
        ours.require(path, content, SAVED)
        if content["epoch_steps"] != self.epoch_steps:
            raise ConfigError(
                f"{path}: had {content['epoch_steps']} steps an epoch, now {self.epoch_steps}: resume with the same "
                "pages, data.batch_size, train.accumulate and number of processes"
            )
        if [c["name"] for c in content["categories"]] != [c["name"] for c in self.categories]:
            raise ConfigError(f"{path}: has other categories than data.train.annotations")
        changed = changes(configs.to_dict(theirs)["model"], configs.to_dict(self.config)["model"], "model")
        if changed:
            raise ConfigError(f"{path}: {'; '.join(changed)}: a run keeps its model; resume it with the same")
        wrong = ours.misfit(self.model, content["model"]) or ours.misfit(self.ema.module, content["ema"])
        if wrong:
            raise CheckpointError(f"{path}: does not fit the model of its own config at {wrong}")
        auxiliary = content.get("auxiliary", {})
        wrong = ours.misfit(self.auxiliary, auxiliary)
        if wrong:
            raise ConfigError(
                f"{path}: distill.memory: the projection to the teacher's memory does not fit at {wrong}: resume with "
                "the same teacher, and a weight if the run had one (end_epoch may end it)"
            )
        if (theirs.train.muon_factor > 0) != (self.config.train.muon_factor > 0):
            raise ConfigError(f"{path}: train.muon_factor: a run cannot change between AdamW and Muon")
        self.model.load_state_dict(content["model"])
        self.auxiliary.load_state_dict(auxiliary)
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

    def save(self) -> None:
        """Writes last.pt; the one before it stays as previous.pt."""
        distributed.on_main(self.write)
        self.saved = self.step

    def write(self) -> None:
        content = ours.weights(self.config, self.categories, self.ema.module) | {
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

    def evaluate(self, batches: DataLoader[Batch], pages: Source) -> None:
        """Measures the averaged model; writes TensorBoard, a picture, best.pt if none was better, and metrics.jsonl.

        Told to stop, it gives up and leaves the evaluation to the resumed run.
        """
        distributed.broadcast_buffers(self.ema.module)  # every process has its own batch-norm statistics
        try:
            found = evaluate(self.ema.module, batches, pages, self.config.train.bf16, lambda: self.signalled)
        except Stopped:
            self.interrupted = True
            say(f"told to stop; saved at step {self.step}, go on with --resume")
            return
        distributed.on_main(lambda: self.record(found, pages))
        self.evaluated, self.best, self.ap = self.step, max(self.best, found["AP"] or 0.0), found["AP"]

    def record(self, found: dict[str, Any], pages: Source) -> None:
        """Writes down an evaluation.

        Raises:
            ConfigError: the folder cannot be written to. CheckpointError: nor can best.pt.
        """
        say(f"step {self.step}\n{table(found)}")
        line = {"step": self.step, "epoch": self.epoch, **found}
        line["train"] = metrics.summary(self.since_evaluation)
        try:
            self.draw(found, self.since_evaluation, pages)
            if (found["AP"] or 0.0) >= self.best:  # None: no boxes to find. With nothing to compare, the newest wins
                ours.save(self.folder / "best.pt", ours.weights(self.config, self.categories, self.ema.module))
            metrics.append(self.folder / "metrics.jsonl", line)  # the last thing: this line says that all is done
        except OSError as error:
            raise ConfigError(f"run_dir: cannot write to {self.folder} ({error.strerror})") from error
        self.since_evaluation = []

    def draw(self, found: dict[str, Any], steps: list[dict[str, float]], pages: Source) -> None:
        """An evaluation for people: scalars, a histogram and a picture."""
        assert self.board is not None
        classes = {f"val_class/{name}": numbers["AP"] for name, numbers in found["per_class"].items()}
        overall = {f"val/{name}": value for name, value in found.items() if name not in ("per_class", "shown")}
        overall |= {f"val_shown/{name}": value for name, value in found["shown"].items()}
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
        return (
            f"done: {best} has the best weights, AP {self.best:.3f}; what next:\n"
            f"  python evaluate.py --checkpoint {best}\n"
            f"  python -m dfine.predict --checkpoint {best} FILE_OR_FOLDER --out {predictions}\n"
            f"  tensorboard --logdir {folder}"
        )


# What last.pt holds beside weights for use.
SAVED = {"model": dict, "optimizer": dict, "step": int, "epoch_steps": int, "since_evaluation": list}

# Of the model's settings, what a resumed run may change: none of it says what the weights mean.
MAY_CHANGE = (
    "model.backbone.pretrained",
    "model.backbone.weights",
    "model.backbone.checkpointing",
    "model.decoder.queries",
    "model.denoising.",
    "model.init_from",
)


def resumes(config: Config, resume: bool) -> bool:
    """Whether there is a run in the run folder to go on with. It needs no other weights then.

    Raises:
        ConfigError: there is one, and `resume` does not ask for it.
    """
    folder = Path(config.run_dir)
    found = (folder / "last.pt").exists() or (folder / "previous.pt").exists()
    if found and not resume:
        raise ConfigError(f"run_dir: {folder} holds a run; go on with it by --resume, or name another run_dir")
    return found


def changes(before: Any, now: Any, key: str) -> list[str]:
    """What differs between two nested mappings of the same keys and may not, for people."""
    if isinstance(before, dict):
        return [line for name in before for line in changes(before[name], now[name], f"{key}.{name}")]
    return [] if before == now or key.startswith(MAY_CHANGE) else [f"{key} was {before}, now {now}"]
