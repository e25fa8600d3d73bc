"""The table of what commands take beside busy programs."""

import re

import busy
import pytest


def test_commands_are_timed_alone_and_beside_a_busy_loop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["busy.py", "sleep 0.2", "true", "--beside", "a busy loop"])
    busy.main()
    heading, _, slow, fast = capsys.readouterr().out.splitlines()
    assert heading == "| command | alone | a busy loop |"
    assert re.fullmatch(r"\| `sleep 0.2` \| 0\.[2-9] s \(1\.00\) \| .* s \(.*\) \|", slow)
    assert fast.startswith("| `true` |")


def test_a_command_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["busy.py", "echo no such thing >&2; false"])
    with pytest.raises(SystemExit, match="false: no such thing"):
        busy.main()
