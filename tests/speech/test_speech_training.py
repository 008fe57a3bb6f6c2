"""Fine-tuning and evaluation of the shipped base on the shipped recordings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers import module
from lors.checkpoint import open_checkpoint
from lors.errors import LorsError
from lors.layers import decomposed
from lors.speech import Training, compare, evaluate, finetune
from lors.speech.corpus import Corpus
from lors.speech.whisper import SHIPPED, load_model, resolve_model

SHORT = Training(max_steps=4, learning_rate=4e-4)


def _weights(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name).astype(np.float32).copy() for name in checkpoint.tensors}


def _changed(path: Path) -> set[str]:
    before, after = _weights(SHIPPED["tiny"]), _weights(path)
    assert before.keys() == after.keys()
    return {name for name in before if not np.array_equal(before[name], after[name])}


def test_train_matrices_changes_exactly_what_is_decomposed(tmp_path: Path, recordings: Path) -> None:
    training = replace(SHORT, train="matrices")
    result = finetune("tiny", tmp_path / "ca", data=recordings, languages="ca", training=training)
    shapes = {name: value.shape for name, value in _weights(tmp_path / "ca").items()}
    assert _changed(tmp_path / "ca") == decomposed(shapes)
    assert (result.steps, result.items, result.resumed_from) == (4, 100, 0)
    assert not (tmp_path / "ca.checkpoints").exists()


def test_train_all_and_both_tasks(tmp_path: Path, recordings: Path) -> None:
    tasks = ("transcribe", "translate")
    result = finetune("tiny", tmp_path / "m", data=recordings, languages="ca,de", tasks=tasks, training=SHORT)
    assert result.items == 400
    assert set(_weights(tmp_path / "m")) - _changed(tmp_path / "m") == {"model.encoder.embed_positions.weight"}


def test_lora_gives_the_merged_model_and_the_adapter(tmp_path: Path, recordings: Path) -> None:
    module("peft", "speech")
    training = replace(SHORT, train="lora", lora_rank=2)
    finetune("tiny", tmp_path / "ca", data=recordings, languages="ca", training=training)
    shapes = {name: value.shape for name, value in _weights(tmp_path / "ca").items()}
    assert _changed(tmp_path / "ca") == decomposed(shapes)
    name = "model.decoder.layers.1.fc2.weight"
    delta = _weights(tmp_path / "ca")[name] - _weights(SHIPPED["tiny"])[name]
    sigma = np.linalg.svd(delta, compute_uv=False)
    assert sigma[1] > 1e-6 and sigma[2] < 1e-4 * sigma[0]
    assert (tmp_path / "ca" / "adapter" / "adapter_config.json").exists()


def test_sequential_training_ends_in_the_last_language(tmp_path: Path, recordings: Path) -> None:
    result = finetune("tiny", tmp_path / "s", data=recordings, languages="ca,es", training=SHORT, sequential=True)
    assert result.steps == 8 and result.items == 200
    finetune("tiny", tmp_path / "ca", data=recordings, languages="ca", training=SHORT)
    finetune(tmp_path / "ca", tmp_path / "es", data=recordings, languages="es", training=SHORT)
    by_hand, sequential = _weights(tmp_path / "es"), _weights(tmp_path / "s")
    assert all(np.array_equal(by_hand[name], sequential[name]) for name in by_hand)


def test_early_stopping_keeps_the_best(tmp_path: Path, recordings: Path) -> None:
    # A learning rate that destroys the model: dev WER only rises, so training stops after `patience` measurements.
    training = Training(max_steps=12, learning_rate=0.05, eval_steps=2, early_stopping_patience=2)
    result = finetune("tiny", tmp_path / "x", data=recordings, languages="ca", training=training)
    assert result.steps < 12 and result.dev_wer is not None
    dev = evaluate(tmp_path / "x", data=recordings, languages="ca", split="dev")
    assert dev.results[0].score.wer == pytest.approx(result.dev_wer)


def test_killed_training_continues_to_the_same_weights(tmp_path: Path, recordings: Path) -> None:
    training = Training(max_steps=18, learning_rate=4e-4, save_steps=3)
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from lors.speech import Training, finetune\n"
        f"finetune('tiny', sys.argv[1], data={str(recordings)!r}, languages='ca', training={training!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "killed")], env=environment)
    checkpoints = tmp_path / "killed.checkpoints" / "0-ca"
    deadline = time.monotonic() + 120
    while not (checkpoints / "checkpoint-3" / "trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    # A checkpoint that was being written when the kill came has no state file and must be passed over.
    (checkpoints / "checkpoint-17").mkdir()

    def again(name: str, changed: Training = training, limit: int | None = None) -> int:
        out = tmp_path / name
        return finetune("tiny", out, data=recordings, languages="ca", training=changed, limit=limit).resumed_from

    # Checkpoints of other settings or other data are no start for this run.
    with pytest.raises(LorsError, match=r"learning_rate was 0.0004 there and is 0.001 here; remove the directory"):
        again("killed", replace(training, learning_rate=1e-3))
    with pytest.raises(LorsError, match=r"data was .* there and is .* here"):
        again("killed", limit=10)
    assert again("killed") >= 3 and again("whole") == 0
    killed, whole = _weights(tmp_path / "killed"), _weights(tmp_path / "whole")
    for name in whole:
        np.testing.assert_array_equal(killed[name], whole[name], err_msg=name)


def test_two_processes_train_one_model(tmp_path: Path, recordings: Path) -> None:
    """As `accelerate launch` starts them; each step takes a batch in each process, one of them writes."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lors.speech"),
        *("finetune", "--model", "tiny", "--data", str(recordings), "--language", "ca", "--max-steps", "4"),
        *("--train", "matrices", "--device", "cpu", "--json", "-o", str(tmp_path / "ca")),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["steps"] for line in done.stdout.splitlines() if line.startswith("{")] == [4]
    assert _changed(tmp_path / "ca") == decomposed({n: v.shape for n, v in _weights(tmp_path / "ca").items()})


# ----------------------------------------------------------------------------------------------------- evaluation


def test_evaluate_writes_every_answer(tmp_path: Path, catalan: Corpus) -> None:
    evaluation = evaluate("tiny", data=catalan, languages="ca", tasks=("transcribe", "translate"), cache=tmp_path / "c")
    evaluation.write(tmp_path)
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert [row["task"] for row in rows] == ["transcribe", "translate"] and rows[1]["bleu"] > 0
    lines = (tmp_path / "answers" / "tiny.transcribe.ca.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [a["reference"] for a in answers] == [u.text for u in catalan]
    errors = sum(a["errors"] for a in answers)
    assert rows[0]["wer"] == pytest.approx(100 * errors / sum(a["words"] for a in answers))


def test_batch_size_and_cache_change_no_word(tmp_path: Path, catalan: Corpus) -> None:
    def words(**options: object) -> list[str]:
        return [a.hypothesis for a in evaluate("tiny", data=catalan, languages="ca", **options).results[0].answers]  # type: ignore[arg-type]

    assert words() == words(batch_size=7) == words(cache=tmp_path)


def test_compare_two_models(catalan: Corpus) -> None:
    evaluation = evaluate(["tiny", "tiny-early"], data=catalan, languages="ca")
    interval = compare(evaluation, "tiny-early", "tiny", task="transcribe", metric="wer")
    by_model = {r.model: r.score.wer for r in evaluation.results}
    assert interval.difference == pytest.approx(by_model["tiny-early"] - by_model["tiny"])
    with pytest.raises(LorsError, match="no results of 'x'"):
        compare(evaluation, "x", "tiny", task="transcribe", metric="wer")


# ------------------------------------------------------------------------------------------------------ bad input


def test_bad_models_devices_and_settings(tmp_path: Path, recordings: Path, catalan: Corpus) -> None:
    import torch

    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "none").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((SHIPPED["tiny"] / "config.json").read_bytes())
    for source, said in [
        (other, "expected a Whisper checkpoint, got model_type 'bert'"),
        (tmp_path / "none", "expected a model directory with config.json"),
        (tmp_path / "absent", "expected a model directory, a hub id or tiny"),
        ("tini", "expected a model directory, a hub id or tiny"),
    ]:
        with pytest.raises(LorsError, match=said):
            resolve_model(source)
    with pytest.raises(LorsError, match="cannot load the model"):
        load_model(broken)
    with pytest.raises(LorsError, match="the model has no language 'ja'"):
        evaluate("tiny", data=[replace(u, language="ja") for u in catalan], languages="ja")
    with pytest.raises(LorsError, match="expected utterances with a reference"):
        evaluate("tiny", data=[replace(u, translation=None) for u in catalan], languages="ca", tasks=("translate",))
    with pytest.raises(LorsError, match="expected transcribe or translate, got 'sing'"):
        evaluate("tiny", data=catalan, languages="ca", tasks=("sing",))
    if not torch.cuda.is_available():
        with pytest.raises(LorsError, match="'cuda' was asked for, and PyTorch"):
            finetune("tiny", tmp_path / "x", data=recordings, languages="ca", training=replace(SHORT, device="cuda"))
    with pytest.raises(LorsError, match="expected all, matrices, lora, got 'matrix', did you mean 'matrices'"):
        Training(train="matrix")
    with pytest.raises(LorsError, match="expected eval_steps, got none"):
        Training(early_stopping_patience=2)
    with pytest.raises(LorsError, match="lr_scheduler_type: no 'lineer', did you mean 'linear'"):
        Training(lr_scheduler_type="lineer")
    with pytest.raises(LorsError, match="learning_rate: expected a positive number, got nan"):
        Training(learning_rate=float("nan"))
    with pytest.raises(LorsError, match="absent: expected a model directory"):
        evaluate(["tiny", "absent"], data="no manifest either", languages="ca")
    assert not (tmp_path / "x").exists()


def test_empty_references_are_not_trained_on(tmp_path: Path, catalan: Corpus) -> None:
    data = [replace(u, split="train", text="" if i else u.text) for i, u in enumerate(catalan)]
    assert finetune("tiny", tmp_path / "x", data=data, languages="ca", training=replace(SHORT, max_steps=1)).items == 1
    with pytest.raises(LorsError, match="expected utterances with a reference for transcribe, got none"):
        finetune("tiny", tmp_path / "y", data=data[1:], languages="ca", training=SHORT)
