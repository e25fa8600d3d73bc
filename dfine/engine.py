"""A training run: its state, its folder, and one epoch of steps."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dfine import checkpoint, distributed, optim
from dfine import config as configs
from dfine.checkpoint import CheckpointError
from dfine.config import Config, ConfigError, TrainConfig
from dfine.data import Source, TrainBatches
from dfine.evaluation import Stopped, evaluate, table
from dfine.model import DFine
from dfine.pictures import grid
from dfine.predict import beside_truth
from dfine.structures import Batch
from dfine.transforms import PageError

Losses = Callable[[Batch], dict[str, Tensor]]


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
        content = checkpoint.read(path)
        if content["epoch_steps"] != self.epoch_steps:
            raise ConfigError(
                f"{path}: had {content['epoch_steps']} steps an epoch, now {self.epoch_steps}: resume with the same "
                "pages, data.batch_size, train.accumulate and number of processes"
            )
        if [c["name"] for c in content["categories"]] != [c["name"] for c in self.categories]:
            raise ConfigError(f"{path}: has other categories than data.train.annotations")
        wrong = checkpoint.misfit(self.model, content["model"])
        if wrong:
            raise ConfigError(f"{path}: does not fit the model of this config at {wrong}")
        self.model.load_state_dict(content["model"])
        self.ema.module.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step = self.saved = content["step"]
        self.since_evaluation = content["since_evaluation"]

    def save(self) -> None:
        """Writes last.pt; the one before it stays as previous.pt."""
        if distributed.is_main():
            last = self.folder / "last.pt"
            content = checkpoint.weights(self.config, self.categories, self.ema.module) | {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "epoch_steps": self.epoch_steps,
                "since_evaluation": self.since_evaluation,
            }
            checkpoint.save(last, content, keep=self.folder / "previous.pt")
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
            checkpoint.save(self.folder / "best.pt", checkpoint.weights(self.config, self.categories, self.ema.module))
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
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        if lines:
            self.evaluated = lines[-1]["step"]
            self.best = max(line["AP"] or 0.0 for line in lines)
        if self.evaluated == self.step:
            self.since_evaluation = []


def prepare(config: Config) -> None:
    """Seeds and threads of this process."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.train.seed)  # the same in every process: all start from the same weights


def say(text: str) -> None:
    """Prints on the main process only."""
    if distributed.is_main():
        tqdm.write(text)


def check_categories(train: Source, val: Source) -> None:
    """Raises ConfigError unless both mean the same by every label."""
    if train.categories != val.categories:
        raise ConfigError(
            f"data.val.annotations: its categories {val.categories} are not those of data.train: {train.categories}"
        )


def describe(train: Source, val: Source) -> str:
    """What is about to be trained on: pages, boxes and the category map, so that a mistake shows before it costs."""
    labels = ", ".join(f"{label} {c['name']} (id {c['id']})" for label, c in enumerate(train.categories))
    return f"train: {train.summary()}\nval: {val.summary()}\nlabels: {labels}"


def parallel(model: DFine, config: TrainConfig, device: torch.device) -> nn.Module:
    """The model as every process trains it: gradients are averaged over the processes."""
    replica: nn.Module = model
    if distributed.world_size() > 1:
        if device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        replica = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if config.compile:
        replica.compile(dynamic=True)
    return replica


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """bf16 on a GPU; what needs more (boxes, softmax, losses) raises itself to fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.bf16 and device.type == "cuda")


def step_seed(seed: int, step: int) -> int:
    """The seed of everything that torch draws in one step of this process."""
    return int(np.random.SeedSequence([seed, step, distributed.rank()]).generate_state(1)[0])


def train_epoch(run: Run, loader: DataLoader[Batch], sampler: TrainBatches, losses_of: Losses) -> Iterator[int]:
    """Trains to the end of the current epoch (or of the run), yielding where something may be due.

    That is after every optimizer step, at the start of a resumed run, and before leaving early.

    Raises:
        FloatingPointError: a loss or the gradient is not finite; names term, step and image ids. Nothing was changed.
        PageError: a page cannot be read; names it. Raised after a yield, at which the run is saved.
    """
    if run.evaluation_due:
        yield run.step
    config = run.config.train
    epoch, start = divmod(run.step, run.epoch_steps)
    sampler.set_position(epoch, start * config.accumulate)
    batches = iter(loader)
    last = min(run.last_step, (epoch + 1) * run.epoch_steps)
    title, shown = f"epoch {epoch + 1}", ("loss", "vfl", "l1", "giou", "fgl", "pages_per_second")
    hidden = not distributed.is_main()
    with tqdm(None, title, run.epoch_steps, initial=start, unit="step", mininterval=0.5, disable=hidden) as bar:
        while run.step < last and not run.interrupted:
            began = time.perf_counter()
            trained, failure = fetch(batches, config.accumulate)
            run.interrupted = distributed.any_process(run.signalled or failure is not None)
            if run.interrupted:
                yield run.step
                if failure is not None:
                    raise PageError(f"{failure}; stopped at step {run.step}, go on with --resume once it is mended")
                return
            torch.manual_seed(step_seed(config.seed, run.step))
            values = optimize(run, [batch.to(run.device) for batch in trained], losses_of)
            run.step += 1
            pages = sum(len(batch.targets) for batch in trained) * distributed.world_size()
            values["pages_per_second"] = pages / (time.perf_counter() - began)
            values["padded_share"] = float(np.mean([padded_share(batch) for batch in trained]))
            if run.board:
                run.since_evaluation.append(values)
                if run.step % run.LOG_EVERY == 0:
                    for name, value in values.items():
                        run.board.add_scalar(f"train/{name}", value, run.step)
            bar.set_postfix({key: f"{values[key]:.3g}" for key in shown}, refresh=False)
            bar.update()
            yield run.step


def fetch(batches: Iterator[Batch], count: int) -> tuple[list[Batch], PageError | None]:
    """The next batches, or why there are none: other processes must hear of it before this one stops."""
    try:
        return [next(batches) for _ in range(count)], None
    except PageError as error:
        return [], error


def optimize(run: Run, batches: list[Batch], losses_of: Losses) -> dict[str, float]:
    """One optimizer step over the batches' mean loss. Returns every term, the gradient norm and the learning rate."""
    config = run.config.train
    frozen = run.step < config.freeze_backbone_steps
    run.model.train()
    run.model.backbone.train(not frozen)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        terms = {name: term.sum() / len(batches) for name, term in losses_of(batch).items()}
        total = torch.stack(list(terms.values())).sum()
        total.backward()
        for name, term in {"loss": total, **terms}.items():
            sums[name] = sums.get(name, 0) + term.detach()
    if frozen:
        for parameter in run.model.backbone.parameters():
            parameter.grad = None
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.clip)
    values = dict(zip([*sums, "gradient_norm"], torch.stack([*sums.values(), norm]).tolist(), strict=True))
    wrong = [name for name, value in values.items() if not np.isfinite(value)]
    if wrong:
        pages = [target.image_id for batch in batches for target in batch.targets]
        raise FloatingPointError(f"step {run.step}: not finite: {', '.join(wrong)}; image ids {pages}")
    rate = optim.learning_rate(run.step, config.epochs * run.epoch_steps, config)
    optim.set_learning_rate(run.optimizer, rate)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.ema.update(run.model, run.step)
    return values | {"learning_rate": rate, "learning_rate_backbone": rate * config.backbone_factor}


def summary(steps: list[dict[str, float]]) -> dict[str, Any]:
    """The means of all values, and how the gradient norms were spread."""
    if not steps:
        return {}
    counts, edges = np.histogram([step["gradient_norm"] for step in steps], bins=20)
    means: dict[str, Any] = {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}
    return means | {"gradient_norm_histogram": {"counts": counts.tolist(), "edges": edges.tolist()}}


def padded_share(batch: Batch) -> float:
    """The share of a batch's pixels that belong to no page."""
    return 1 - float(batch.sizes.prod(1).sum()) / (len(batch.sizes) * batch.images.shape[-2] * batch.images.shape[-1])
