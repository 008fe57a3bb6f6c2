"""Scorers, each in a process of its own."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lors.errors import LorsError
from lors.sweep.score import Objective, Scorer


def test_which_value_is_the_best() -> None:
    assert [Objective.parse(text).wanted for text in ("wer", "size:min", "bleu:max", "chrf:min")] == [
        "lowest", "lowest", "highest", "lowest",
    ]  # fmt: skip
    for text in ("bleu", "BLEU", "chrf", "accuracy"):
        with pytest.raises(LorsError, match=rf"^--objective: expected {text}:max \(or {text}:min\), .*got '{text}'$"):
            Objective.parse(text)


@pytest.mark.parametrize(
    ("command", "state", "error"),
    [
        ("sh -c 'echo 12.5'", "complete", ""),
        ("""sh -c 'echo progress; echo "{\\"score\\": 3}"; echo'""", "complete", ""),
        ("sh -c 'echo NaN'", "nan", "score is nan"),
        ("""sh -c 'echo "{\\"wer\\": 3}"'""", "failed", "expected a number for 'score'"),
        ("sh -c 'echo fine'", "failed", "expected a number or a JSON object"),
        ("sh -c 'echo broken >&2; exit 3'", "failed", "exit code 3: broken"),
        ("no-such-command {model}", "failed", "No such file"),
        ("sh -c 'sleep 30 & sleep 30'", "timeout", "no score after 0.3 s"),
        ("math:sqrt", "failed", "TypeError"),
        ("os.path:getsize", "complete", ""),
        (f"printf {'7' * 401}", "failed", "expected a number for 'score', got '7777"),
        (f"printf -- -{'7' * 5000}", "failed", "expected a number or a JSON object"),
        (f"printf {'[' * 100_000}", "failed", "expected a number or a JSON object"),
        (f"printf '{{\"score\": {'[' * 900}{']' * 900}}}'", "failed", "expected a number for 'score'"),
        ("sh -c 'echo 1e999'", "nan", "score is inf"),
        ("sh -c 'echo -Infinity'", "nan", "score is -inf"),
        ("sh -c 'echo true'", "failed", "expected a number for 'score'"),
        ("sh -c true", "failed", "in the last line, got ''"),
        ("sh -c 'head -c 5000000 /dev/zero'", "failed", "in the last line, got '[...]\\x00"),
        ("sh -c 'head -c 100000 /dev/urandom'", "failed", "expected "),
        (
            'sh -c \'head -c 70000 /dev/zero | tr "\\000" " "; echo 1\'',
            "failed",
            "got '[...]  ",
        ),  # "1" is not its last line
        ("sh -c 'yes | head -c 30000000; echo; echo 1'", "complete", ""),
        ("printf '\\033]0;owned\\007\\233[2J'", "failed", "\\x1b]0;owned\\x07"),
        ("sh -c 'printf \"\\033[2J\" >&2; exit 1'", "failed", "exit code 1: \\x1b[2J"),
        ("sh -c 'exec >&- 2>&-; sleep 0.2'", "failed", "got ''"),
        ("sh -c 'kill -9 $$'", "failed", "exit code 137"),
    ],
    ids=lambda value: value[:40],
)
def test_scorers(tmp_path: Path, command: str, state: str, error: str) -> None:
    begun = time.monotonic()
    got = Scorer(command, (Objective("score"),), 0.3 if state == "timeout" else 30)(tmp_path)
    assert got.state == state and error in got.error, got
    assert got.error.isprintable() and len(got.error) < 1000
    assert time.monotonic() - begun < 25 and (state != "complete" or len(got.values) == 1)
