"""Checkpoints by their names on the Hugging Face hub: `org/name`, or `org/name@revision`."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from dfine.checkpoints.ours import CheckpointError

FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]  # what `transformers_format.read` looks for
NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")


def is_name(text: str) -> bool:
    """Whether a text could be the name of a checkpoint on the hub."""
    return NAME.fullmatch(text) is not None


def folder(name: str) -> Path:
    """The folder with the files of a checkpoint on the hub, fetched unless they are in huggingface_hub's cache.

    Raises:
        CheckpointError: it cannot be had; says which files to fetch elsewhere and what to do with them.
    """
    found = NAME.fullmatch(name)
    assert found, f"{name} is no name on the hub"
    repository, revision = found.groups()
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=FILES))
    except Exception as error:  # huggingface_hub, and the HTTP library below it, have many kinds without a common one
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{name}: no such file or folder here, and the Hugging Face hub does not give it ({type(error).__name__}: "
            f"{reason}). Without network, fetch {', '.join(FILES)} of {name} elsewhere, put them into a folder, and "
            "name that folder"
        ) from error
