"""Writing files: what cannot be written is said before the work, and no file is left half written."""

import shutil
from pathlib import Path

import pytest
from processes import at_most

from dfine.config import ConfigError
from dfine.files import try_writing, write_whole


def test_trying_makes_the_folder_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    try_writing(tmp_path / "a" / "b", "--out")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_made_or_filled_is_named_with_its_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"run_dir: cannot write to {tmp_path / 'file'} \(.*exists\): .* run_dir"):
        try_writing(tmp_path / "file", "run_dir")
    with at_most(100), pytest.raises(ConfigError, match=rf"--out: cannot write to {tmp_path} \(File too large\)"):
        try_writing(tmp_path, "--out")


def test_files_are_written_all_or_not_at_all(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    write_whole(dict.fromkeys(paths, "before"))
    with at_most(100), pytest.raises(ConfigError, match=r"cannot write .*a.json, .*b.json \(File too large\)"):
        write_whole({paths[0]: "after", paths[1]: "x" * 200})
    assert [path.read_text() for path in paths] == ["before", "before"]
    assert sorted(tmp_path.iterdir()) == paths
    shutil.rmtree(tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        write_whole({paths[0]: "after"})
