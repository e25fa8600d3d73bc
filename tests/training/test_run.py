"""What a run saves: nothing is lost or hidden when it is interrupted."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from processes import ends, launch
from scripts import evaluations, pages, same, state, train

from dfine import distributed
from dfine.checkpoints import ours
from dfine.config import ConfigError, DataConfig
from dfine.data.batches import TrainBatches
from dfine.data.transforms import PageError
from dfine.inference import evaluation
from dfine.training import engine
from dfine.training.run import Run


def test_a_run_stopped_in_mid_epoch_and_resumed_equals_the_uninterrupted_one(
    config: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path / "run", "train.max_steps=3")
    train(config, tmp_path / "run", "--resume")
    assert "resumed" in capsys.readouterr().out
    assert same(state(tmp_path / "run"), state(uninterrupted))


def test_accumulated_steps_and_muon_resume_exactly_too(config: Path, tmp_path: Path) -> None:
    own = ("train.accumulate=2", "train.muon_factor=10")
    train(config, tmp_path / "whole", *own)
    train(config, tmp_path / "parts", *own, "train.max_steps=3")
    train(config, tmp_path / "parts", *own, "--resume")
    assert same(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_a_truncated_checkpoint_is_named_and_the_previous_one_used(
    config: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(config, run, "train.max_steps=5")
    whole = (run / "last.pt").read_bytes()
    (run / "last.pt").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    train(config, run, "--resume")
    printed = capsys.readouterr().out
    assert "last.pt: truncated" in printed
    assert "at step 4" in printed
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
    whole = engine.optimize

    def optimize(run: Run, *arguments: Any) -> dict[str, float]:
        if run.step == step - 1 and distributed.rank() == rank:
            os.killpg(os.getpgid(0), number)
        return whole(run, *arguments)

    engine.optimize = optimize


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


def test_a_page_that_cannot_be_read_stops_all_processes_and_loses_nothing(config: Path, tmp_path: Path) -> None:
    own = pages(tmp_path / "pages", empty=(1,))
    order = list(TrainBatches([(110, 90)] * 8, DataConfig(batch_size=2), seed=0, accumulate=1))
    page = Path(own["images"]) / f"{order[2][1].page}.png"  # in the third step, of the second process
    page.write_bytes(page.read_bytes()[:100])
    arguments = (f"data.train.images={own['images']}", "data.batch_size=1", "data.workers=1")
    assert ends(launch(failing, tmp_path / "error", config, tmp_path / "run", *arguments)) == [0, 1]
    assert state(tmp_path / "run")["step"] == 2
    assert re.fullmatch(
        rf"{page}: cannot read the image: .*; stopped at step 2, go on with --resume .*",
        (tmp_path / "error").read_text(),
    )


def failing(error_file: Path, *arguments: Any) -> None:
    """train.py, keeping what it stops with."""
    try:
        train(*arguments)
    except PageError as error:
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


def test_a_run_is_not_overwritten_without_being_asked_to(config: Path, uninterrupted: Path) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        train(config, uninterrupted)
