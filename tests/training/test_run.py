"""What a run saves: nothing is lost or hidden when it is interrupted."""

import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import timm
import torch
from processes import ends, gone, launch, skip_where_groups_hang
from scripts import evaluations, pages, same, state, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dfine import distributed
from dfine.checkpoints import ours
from dfine.config import ConfigError, DataConfig
from dfine.data.batches import TrainBatches
from dfine.data.sources import CocoPages
from dfine.data.transforms import PageError
from dfine.data.workers import WorkerError
from dfine.files import lock
from dfine.inference import evaluation
from dfine.model.detector import DFine
from dfine.training import run as run_module
from dfine.training.run import Run
from dfine.training.stop import Stop


def test_a_run_stopped_in_mid_epoch_and_resumed_equals_the_uninterrupted_one(
    config: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path / "run", "train.max_steps=3")
    train(config, tmp_path / "run", "--resume")
    assert "resumed" in capsys.readouterr().out
    assert same(state(tmp_path / "run"), state(uninterrupted))
    steps = [sum(line["train"]["gradient_norm_histogram"]["counts"]) for line in evaluations(tmp_path / "run")]
    assert steps == [3, 1, 4]  # none counts in two evaluations


def test_accumulated_steps_and_muon_resume_exactly_too(config: Path, tmp_path: Path) -> None:
    own = ("train.accumulate=2", "train.muon_factor=10")
    train(config, tmp_path / "whole", *own)
    train(config, tmp_path / "parts", *own, "train.max_steps=3")
    train(config, tmp_path / "parts", *own, "--resume")
    assert same(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_after_their_last_epoch_more_queries_a_box_are_one(config: Path, tmp_path: Path) -> None:
    several = ("loss.matcher.encoder_queries=3", "train.epochs=2")
    train(config, tmp_path / "own", *several, "loss.matcher.encoder_queries_end_epoch=1")
    train(config, tmp_path / "by hand", *several, "train.max_steps=4")
    train(config, tmp_path / "by hand", "train.epochs=2", "--resume")
    assert same(state(tmp_path / "own"), state(tmp_path / "by hand"))
    train(config, tmp_path / "never", *several)
    assert not same(state(tmp_path / "own"), state(tmp_path / "never"))


def test_a_truncated_checkpoint_is_named_and_the_previous_one_used(
    config: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(config, run, "train.max_steps=5", "train.save_every=1")
    whole = (run / "last.pt").read_bytes()
    (run / "last.pt").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    train(config, run, "--resume", "train.max_steps=5")
    printed = capsys.readouterr().out
    assert "last.pt: truncated" in printed
    assert "at step 4" in printed
    assert ours.read(run / "previous.pt")["step"] == 4  # not the broken one
    train(config, run, "--resume")
    assert same(state(run), state(uninterrupted))


# Stopped in the middle: what happens to a process is done to it from inside, so that it happens at a known step


def killed_while_saving(step: int) -> None:
    whole = torch.save

    def half(content: dict, file: BinaryIO) -> None:
        if content.get("step") == step:
            file.write(b"half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        whole(content, file)

    torch.save = half


def killed_while_evaluating() -> None:
    evaluation.coco_metrics = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def signalled_in_step(step: int, number: signal.Signals, rank: int) -> None:
    """The process and its loader's workers get the signal, as from a terminal or a job scheduler."""
    whole = Run.step_done

    def step_done(run: Run, values: dict[str, float]) -> None:
        if run.step == step - 1 and distributed.rank() == rank:
            os.killpg(os.getpgid(0), number)
        whole(run, values)

    Run.step_done = step_done


def signalled_and_again_while_saving(numbers: tuple[signal.Signals, ...]) -> None:
    """As job schedulers and torchrun do, who each pass a signal on."""
    signalled_in_step(2, numbers[0], 0)
    whole = torch.save

    def save(content: dict, file: BinaryIO) -> None:
        for number in numbers if content.get("step") == 2 else ():
            os.kill(os.getpid(), number)
        whole(content, file)

    torch.save = save


def told_twice_to_stop() -> None:
    """By two Ctrl-C in the same step, deliberately."""
    whole, Stop.REPEATS = Run.step_done, 0.1

    def step_done(run: Run, values: dict[str, float]) -> None:
        for _ in range(2 if run.step == 1 else 0):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        whole(run, values)

    Run.step_done = step_done


def losing_a_worker(step: int, rank: int) -> None:
    whole = Run.step_done

    def step_done(run: Run, values: dict[str, float]) -> None:
        if run.step == step - 1 and distributed.rank() == rank:
            for worker in multiprocessing.active_children():
                worker.kill()
                worker.join()
        whole(run, values)

    Run.step_done = step_done


def nothing() -> None:
    """Nothing happens."""


def stopped(config: Path, run: Path, own: tuple[str, ...], stop: Callable[..., None], *how: object) -> None:
    """train.py as one process that something happens to."""
    stop(*how)
    train(config, run, *own)


def test_wherever_two_processes_with_workers_are_stopped_they_resume_to_the_uninterrupted_run(
    config: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "parts"
    own = ("data.batch_size=1", "data.workers=1", "train.save_every=2")
    assert ends(launch(train, config, whole, *own)) == [0, 0]

    assert ends(launch(stopped, config, run, own, killed_while_saving, 4))[0] == -signal.SIGKILL
    assert state(run)["step"] == 2
    own += ("--resume",)
    assert ends(launch(stopped, config, run, own, killed_while_evaluating))[0] == -signal.SIGKILL
    assert state(run)["step"] == 4
    assert not (run / "metrics.jsonl").exists()
    assert ends(launch(stopped, config, run, own, signalled_in_step, 5, signal.SIGINT, 1)) == [0, 0]
    assert state(run)["step"] == 5
    assert ends(launch(stopped, config, run, own, signalled_in_step, 8, signal.SIGTERM, 0)) == [0, 0]
    assert [line["step"] for line in evaluations(run)] == [4]  # the one at step 8 was given up
    assert ends(launch(train, config, run, *own)) == [0, 0]
    assert same(state(run), state(whole))
    assert evaluations(run) == evaluations(whole)
    assert same(ours.read(run / "best.pt")["ema"], ours.read(whole / "best.pt")["ema"])


def test_a_resumed_run_has_the_weight_decay_of_its_own_config(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config, run, "train.max_steps=1")
    train(config, run, "train.max_steps=2", "train.weight_decay=0.2", "--resume")
    assert {group["weight_decay"] for group in state(run)["optimizer"]["param_groups"]} == {0.0, 0.2}
    with pytest.raises(ConfigError, match="between AdamW and Muon"):
        train(config, run, "train.muon_factor=10", "--resume")


def test_a_killed_run_goes_on_from_the_last_saved_step(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    (process,) = launch(
        stopped, config, tmp_path, ("train.save_every=3",), signalled_in_step, 8, signal.SIGKILL, 0, count=1
    )
    assert ends([process]) == [-signal.SIGKILL]
    assert state(tmp_path)["step"] == 6
    train(config, tmp_path, "--resume")
    assert same(state(tmp_path), state(uninterrupted))
    assert evaluations(tmp_path) == evaluations(uninterrupted)


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,) * 2, (signal.SIGINT,) * 3, (signal.SIGINT, signal.SIGTERM)])
def test_a_signal_that_comes_again_does_not_cut_the_saving_short(
    config: Path, tmp_path: Path, numbers: tuple[signal.Signals, ...]
) -> None:
    (process,) = launch(stopped, config, tmp_path, (), signalled_and_again_while_saving, numbers, count=1)
    assert ends([process]) == [0]
    assert state(tmp_path)["step"] == 2


def test_a_second_ctrl_c_some_seconds_later_ends_a_run_at_once(config: Path, tmp_path: Path) -> None:
    own = ("train.save_every=1",)
    assert ends(launch(stopped, config, tmp_path, own, told_twice_to_stop, count=1)) == [-signal.SIGINT]
    assert state(tmp_path)["step"] == 1


@pytest.mark.parametrize("step", [2, 4], ids=["in mid epoch", "in the last step of an epoch"])
def test_a_run_that_loses_a_worker_is_saved_and_says_so(config: Path, tmp_path: Path, step: int) -> None:
    own = ("data.batch_size=1", "data.workers=1")
    processes = launch(failing, tmp_path / "error", config, tmp_path / "run", own, losing_a_worker, step, 1)
    assert ends(processes) == [0, 1]
    said = (tmp_path / "error").read_text()
    assert re.fullmatch(r"loading pages failed: .*worker.*; stopped at step \d, go on with --resume .*", said)
    assert f"step {state(tmp_path / 'run')['step']}," in said


def waiting_for_pages(hang: Path, step: int, rank: int) -> None:
    """From this step on the pages of one process never come, and in the middle of the wait all are told to stop."""
    read = CocoPages.read

    def never(source: CocoPages, index: int) -> Any:
        while hang.exists() and os.environ.get("RANK", "0") == str(rank):
            time.sleep(0.1)
        return read(source, index)

    def step_done(run: Run, values: dict[str, float]) -> None:
        if run.step == step - 1:
            hang.touch()
            threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        whole(run, values)

    whole, CocoPages.read, Run.step_done, Stop.PATIENCE = Run.step_done, never, step_done, 1.0


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 1), (2, 0)])
@pytest.mark.parametrize("step", [3, 8], ids=["in mid epoch", "in the evaluation"])
def test_a_run_that_waits_for_pages_ends_saved_when_it_is_told_to_and_resumes(
    config: Path, uninterrupted: Path, tmp_path: Path, processes: int, workers: int, step: int
) -> None:
    run, hang = tmp_path / "run", tmp_path / "hang"
    own = (f"data.batch_size={2 // processes}", f"data.workers={workers}")
    codes = ends(launch(stopped, config, run, own, waiting_for_pages, hang, step, processes - 1, count=processes))
    assert codes == ([0] if processes == 1 else [1, 1])
    assert state(run)["step"] - step in range(3 if workers else 1)  # a worker may be ahead
    hang.unlink()
    if processes == 1:
        train(config, run, *own, "--resume")
        assert same(state(run), state(uninterrupted))


# One run at a time


def works_in(folder: Path) -> None:
    """A run that was killed: its worker lives on."""
    file = lock(folder, "run_dir")
    if os.fork():
        (folder / "locked").touch()
    time.sleep(100)
    file.close()


def test_a_second_run_in_a_folder_is_told_which_process_has_it_and_a_killed_one_leaves_no_lock(
    config: Path, tmp_path: Path
) -> None:
    (process,) = launch(works_in, tmp_path, count=1)
    while not (tmp_path / "locked").exists():
        assert process.is_alive()
        time.sleep(0.1)
    with pytest.raises(ConfigError, match=rf"run_dir: {tmp_path} is in use by process {process.pid} on .* since 20"):
        train(config, tmp_path, "train.max_steps=1")
    assert not (tmp_path / "config.yaml").exists()
    process.kill()
    process.join()
    lock(tmp_path, "run_dir").close()
    os.killpg(process.pid, signal.SIGKILL)


def orphaned(config: Path, run: Path) -> None:
    """train.py as the child of this process, which takes torchrun's place."""
    if os.fork() == 0:
        os.environ["TORCHELASTIC_RUN_ID"] = "any"
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        train(config, run, "train.epochs=100000", "train.eval_every=100000", "train.save_every=1", "data.workers=1")
        os._exit(0)
    os.wait()


def test_a_run_whose_torchrun_is_killed_saves_and_ends(config: Path, tmp_path: Path) -> None:
    skip_where_groups_hang()
    run = tmp_path / "run"
    (torchrun,) = launch(orphaned, config, run, count=1)
    while not (run / "last.pt").exists():
        assert torchrun.is_alive()
        time.sleep(0.1)
    torchrun.kill()
    torchrun.join()
    assert gone(torchrun.pid)
    assert state(run)["step"] > 1


def test_tensorboard_forgets_what_a_resumed_run_does_again(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (run / "previous.pt").replace(run / "last.pt")
    train(config, run, "--resume")
    board = EventAccumulator(str(run)).Reload()
    assert [event.step for event in board.Scalars("val/AP")] == [4, 8]


# What a resumed run needs, and what it refuses


def test_a_resumed_run_needs_neither_the_weights_it_started_from_nor_timms(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    backbone = timm.create_model("test_resnet", pretrained=False)
    torch.save(backbone.state_dict(), tmp_path / "timm.pt")
    (tmp_path / "start.pt").write_bytes((uninterrupted / "best.pt").read_bytes())
    origin = ["model.backbone.pretrained=true", f"model.backbone.weights={tmp_path / 'timm.pt'}"]
    origin += [f"model.init_from={tmp_path / 'start.pt'}"]
    train(config, tmp_path / "run", *origin, "train.max_steps=1")
    (tmp_path / "timm.pt").unlink()
    (tmp_path / "start.pt").unlink()
    train(config, tmp_path / "run", *origin, "train.max_steps=2", "--resume")
    assert state(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.decoder.a=0.6", r"model\.decoder\.a was 0\.5, now 0\.6"),
        ("model.decoder.c=0.3", r"model\.decoder\.c was 0\.25, now 0\.3"),
        ("model.decoder.points=[6, 3, 3]", r"model\.decoder\.points was \[3, 6, 3\], now \[6, 3, 3\]"),
        ("model.encoder.heads=4", r"model\.encoder\.heads was 8, now 4"),
        ("model.hidden_dim=64", r"model\.hidden_dim was 32, now 64"),
    ],
)
def test_a_run_does_not_go_on_as_another_model(config: Path, uninterrupted: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"last\.pt: {said}: a run keeps its model"):
        train(config, uninterrupted, "--resume", override)


def test_a_run_goes_on_with_its_own_classes_alone_and_both_data_sets_have_the_same(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    own = pages(tmp_path / "pages", names=("text", "table"))
    others = [f"data.{part}.{key}={value}" for part in ("train", "val") for key, value in own.items()]
    with pytest.raises(ConfigError, match=r"last\.pt: has other categories than data\.train\.annotations"):
        train(config, uninterrupted, "--resume", *others)
    with pytest.raises(ConfigError, match=r"data\.val.* categories .*figure.* are not those of data\.train: .*table"):
        train(config, tmp_path / "run", *others[:2])


@pytest.fixture
def finished(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of the uninterrupted run, to be damaged."""
    return shutil.copytree(uninterrupted, tmp_path / "finished")


def refused(config: Path, run: Path) -> str:
    """How the run is refused."""
    with pytest.raises((ConfigError, ours.CheckpointError)) as error:
        train(config, run, "--resume")
    return str(error.value)


@pytest.mark.parametrize("line", ['{"step": 4, "AP"', "[]", '{"AP": 0.5}', '{"step": 4, "AP": "high"}'])
def test_a_broken_line_of_metrics_is_named(config: Path, finished: Path, line: str) -> None:
    path = finished / "metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}")
    assert refused(config, finished) == f"{path}: line 1: not an evaluation: mend or delete this line"


def test_a_line_of_metrics_that_a_full_disk_cut_short_is_dropped(config: Path, finished: Path) -> None:
    path = finished / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 8, "AP"')
    train(config, finished, "--resume")
    assert path.read_text() == whole


def test_best_in_the_place_of_last_is_named_with_what_to_do(config: Path, finished: Path) -> None:
    shutil.copy(finished / "best.pt", finished / "last.pt")
    last = finished / "last.pt"
    assert refused(config, finished) == (
        f"{last}: holds weights alone, as best.pt does, from which a run cannot go on: remove it to go on from "
        f"previous.pt, or start another run with model.init_from={last}"
    )
    last.unlink()
    train(config, finished, "--resume")


def test_a_checkpoint_of_another_version_is_named_with_what_to_do(config: Path, finished: Path) -> None:
    content = ours.read(finished / "last.pt")
    content["config"]["model"]["wheels"] = 4
    ours.save(finished / "last.pt", content)
    assert re.match(rf"{finished}/last\.pt: written by another version of dfine \(.*wheels", refused(config, finished))
    with pytest.raises(ConfigError, match=rf"{finished}/last\.pt: written by another version.*model\.init_from"):
        ours.load_model(finished / "last.pt")


@pytest.mark.parametrize("part", ["since_evaluation", "model", "optimizer state"])
def test_a_checkpoint_that_lacks_something_is_named_and_the_previous_one_used(
    config: Path, finished: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = ours.read(finished / "last.pt")
    if part == "optimizer state":
        content["optimizer"]["param_groups"].pop()
    elif part == "model":
        content["model"].popitem()
    else:
        del content[part]
    ours.save(finished / "last.pt", content)
    train(config, finished, "--resume")
    assert re.search(rf"{finished}/last\.pt: .*{part.split()[0]}.*; going on from", capsys.readouterr().out)


def test_a_flipped_bit_in_a_checkpoint_is_noticed(config: Path, finished: Path) -> None:
    path = finished / "best.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ours.CheckpointError, match=rf"{path}: damaged at .*: the checksum does not fit"):
        ours.load_model(path)


def test_a_folder_that_cannot_be_written_to_is_named(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"run_dir: cannot write to {tmp_path}/file/run \(Not a directory\)"):
        train(config, tmp_path / "file" / "run")


@pytest.mark.parametrize("metric", [0.0, None], ids=["never finds anything", "nothing to find"])
def test_with_nothing_to_compare_the_newest_is_the_best(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: float | None
) -> None:
    monkeypatch.setattr(run_module, "evaluate", lambda *_: {"AP": metric, "per_class": {}, "shown": {}})
    train(config, tmp_path, "train.max_steps=2", "train.eval_every=1")
    assert len(evaluations(tmp_path)) == 2
    assert same(ours.read(tmp_path / "best.pt")["ema"], state(tmp_path)["ema"])


def measuring(averages: list[float], seen: list[Any]) -> Callable[..., dict[str, Any]]:
    """Stands for an evaluation: gives these APs in turn, and keeps what is measured."""

    def evaluate(model: DFine, *_: Any) -> dict[str, Any]:
        seen.append({name: x.clone() for name, x in model.state_dict().items()})
        return {"AP": averages[len(seen) - 1], "per_class": {}, "shown": {}}

    return evaluate


def test_best_holds_the_averaged_weights_of_the_best_evaluation_also_of_a_resumed_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(run_module, "evaluate", measuring([0.2, 0.5, 0.3, 0.4, 0.45, 0.6], seen))
    own = ("train.eval_every=1", "train.save_every=1", "train.ema_decay=0.5")
    train(config, tmp_path, *own, "train.max_steps=4")
    assert same(ours.read(tmp_path / "best.pt")["ema"], seen[1])
    assert same(state(tmp_path)["ema"], seen[3])
    assert not same(state(tmp_path)["model"], seen[3])
    train(config, tmp_path, *own, "train.max_steps=5", "--resume")
    assert same(ours.read(tmp_path / "best.pt")["ema"], seen[1])
    train(config, tmp_path, *own, "train.max_steps=6", "--resume")
    assert same(ours.read(tmp_path / "best.pt")["ema"], seen[5])


def test_all_processes_measure_with_the_main_process_statistics(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process has its own batch-norm statistics."""
    seen: list[Any] = []

    def broadcast(module: torch.nn.Module) -> None:
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.fill_(7)

    monkeypatch.setattr(run_module, "evaluate", measuring([0.2], seen))
    monkeypatch.setattr(distributed, "broadcast_buffers", broadcast)
    train(config, tmp_path, "train.max_steps=1")
    means = [x for name, x in seen[0].items() if name.endswith("running_mean")]
    assert means
    assert all((x == 7).all() for x in means)


def test_a_page_that_cannot_be_read_stops_all_processes_and_loses_nothing(config: Path, tmp_path: Path) -> None:
    own = pages(tmp_path / "pages", empty=(1,))
    order = list(TrainBatches([(110, 90)] * 8, DataConfig(batch_size=2), seed=0, accumulate=1))
    page = Path(own["images"]) / f"{order[2][1].page}.png"  # in the third step, of the second process
    page.write_bytes(page.read_bytes()[:100])
    arguments = (f"data.train.images={own['images']}", "data.batch_size=1", "data.workers=1")
    assert ends(launch(failing, tmp_path / "error", config, tmp_path / "run", arguments, nothing)) == [0, 1]
    assert state(tmp_path / "run")["step"] == 2
    assert re.fullmatch(
        rf"{page}: cannot read the image: .*; stopped at step 2, go on with --resume .*",
        (tmp_path / "error").read_text(),
    )


def failing(error_file: Path, *arguments: Any) -> None:
    """`stopped`, keeping what it stops with."""
    try:
        stopped(*arguments)
    except (PageError, WorkerError) as error:
        error_file.write_text(str(error))
        raise


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    ours.save(path, {"step": 1})
    (tmp_path / "last.pt.writing").symlink_to("/dev/full")
    with pytest.raises(ours.CheckpointError, match=r"last\.pt: cannot save.*intact"):
        ours.save(path, {"weights": torch.zeros(100_000)})
    assert ours.read(path) == {"step": 1}


def test_a_run_is_not_overwritten_without_being_asked_to(config: Path, finished: Path) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match="--resume"):
            train(config, finished)
        (finished / "last.pt").unlink(missing_ok=True)  # as where a run is killed while it saves
