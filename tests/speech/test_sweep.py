"""The built-in scorer of sweeps, for real: a merge of trained experts, its dev WER by `lors sweep` and by `evaluate`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cut import cut_config
from lors.speech import evaluate
from lors.speech.experiment.plan import build_stages
from lors.speech.model.whisper import resolve_model


def test_a_sweep_scores_words(finished: Path, tmp_path: Path, recordings: Path) -> None:
    stages = {stage.name: stage.directory(finished) for stage in build_stages(cut_config())}
    experts = {name: stages[f"expert-{name}-s0"] / "model" for name in ("ca", "es")}
    models = "".join(f"- {{model: {path}, name: {name}}}\n" for name, path in experts.items())
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: lors\nbase_model: {resolve_model('tiny')}\nmodels:\n{models}parameters: {{rank: 4}}\n"
    )
    command = [
        sys.executable, "-c", "from lors.cli import main; main()", "sweep", str(recipe), "-o", str(tmp_path / "s"),
        "--lambda", "0.9", "--score", f"speech {recordings} ca", "--objective", "wer:min",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (trial,) = json.loads((tmp_path / "s" / "trials.json").read_text())["trials"]
    again = [sys.executable, "-c", "from lors.cli import main; main()", "merge", str(tmp_path / "s" / "best.yml")]
    subprocess.run([*again, str(tmp_path / "best"), "--quiet"], check=True)
    (result,) = evaluate(tmp_path / "best", data=str(recordings), languages="ca", split="dev").results
    assert trial["values"] == [result.score.wer] and 0 < result.score.wer < 100
