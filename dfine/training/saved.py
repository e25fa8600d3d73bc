"""What a run saved, and whether another may go on from it."""

from pathlib import Path
from typing import Any

from torch import nn

from dfine import config as configs
from dfine.checkpoints import ours
from dfine.checkpoints.ours import CheckpointError
from dfine.config import Config, ConfigError

# What last.pt holds beside weights for use.
SAVED = {"model": dict, "optimizer": dict, "step": int, "epoch_steps": int, "since_evaluation": list}


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


def read(
    path: Path,
    config: Config,
    epoch_steps: int,
    categories: list[dict[str, Any]],
    model: nn.Module,
    auxiliary: nn.Module,
) -> dict[str, Any]:
    """The content of last.pt or previous.pt, which a run of this config, these pages and this model can go on from.

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
    if content["epoch_steps"] != epoch_steps:
        raise ConfigError(
            f"{path}: had {content['epoch_steps']} steps an epoch, now {epoch_steps}: resume with the same "
            "pages, data.batch_size, train.accumulate and number of processes"
        )
    if [c["name"] for c in content["categories"]] != [c["name"] for c in categories]:
        raise ConfigError(f"{path}: has other categories than data.train.annotations")
    changed = changes(configs.to_dict(theirs)["model"], configs.to_dict(config)["model"], "model")
    if changed:
        raise ConfigError(f"{path}: {'; '.join(changed)}: a run keeps its model; resume it with the same")
    wrong = ours.misfit(model, content["model"]) or ours.misfit(model, content["ema"])
    if wrong:
        raise CheckpointError(f"{path}: does not fit the model of its own config at {wrong}")
    wrong = ours.misfit(auxiliary, content.get("auxiliary", {}))
    if wrong:
        raise ConfigError(
            f"{path}: distill.memory: the projection to the teacher's memory does not fit at {wrong}: resume with "
            "the same teacher, and a weight if the run had one (end_epoch may end it)"
        )
    if (theirs.train.muon_factor > 0) != (config.train.muon_factor > 0):
        raise ConfigError(f"{path}: train.muon_factor: a run cannot change between AdamW and Muon")
    return content


def changes(before: Any, now: Any, key: str) -> list[str]:
    """What differs between two nested mappings of the same keys and may not, for people."""
    if isinstance(before, dict):
        return [line for name in before for line in changes(before[name], now[name], f"{key}.{name}")]
    return [] if before == now or key.startswith(ours.MAY_DIFFER) else [f"{key} was {before}, now {now}"]
