"""Fine-tuning and evaluation of the shipped base on the shipped recordings."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from helpers import module
from lors.checkpoints.layers import decomposed
from lors.checkpoints.reader import open_checkpoint
from lors.errors import LorsError
from lors.speech import Trained, Training, compare, evaluate, finetune
from lors.speech.data.audio import AudioFile
from lors.speech.data.corpus import load_corpus
from lors.speech.data.utterance import Corpus
from lors.speech.model.whisper import SHIPPED, load_model, load_processor, resolve_model, torch_device
from lors.speech.scoring.evaluation import Decoder
from lors.speech.scoring.loss import mean_loss
from lors.speech.training import trainer

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
    while not (checkpoints / "checkpoint-6").exists():  # so the one before is complete
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


class Cut(Exception):
    pass


def _cut(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, call: int) -> None:
    """The method ends the run when it is called for the `call`-th time; `monkeypatch.undo` mends it."""
    original, calls = getattr(owner, method), itertools.count(1)

    def cut(*arguments: Any) -> Any:
        if next(calls) == call:
            raise Cut
        return original(*arguments)

    monkeypatch.setattr(owner, method, cut)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_cut_after_the_last_step(tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, train: str) -> None:
    """With nothing left to train, the trainer would still take a step."""
    if train == "lora":
        module("peft", "speech")
    training = replace(SHORT, max_steps=2, save_steps=2, lr_scheduler_type="constant", train=train)

    def run(name: str) -> Trained:
        return finetune("tiny", tmp_path / name, data=recordings, languages="ca", training=training)

    whole = run("whole")
    _cut(monkeypatch, trainer.Job, "_save", 1)
    with pytest.raises(Cut):
        run("cut")
    monkeypatch.undo()
    cut = run("cut")
    assert (cut.steps, cut.resumed_from, cut.train_loss) == (2, 2, None) and whole.train_loss is not None
    before, after = _weights(tmp_path / "whole"), _weights(tmp_path / "cut")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_cut_in_sequential_training(tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = replace(SHORT, max_steps=1, save_steps=1)
    _cut(monkeypatch, trainer.Job, "_save", 2)
    for expectation in (pytest.raises(Cut), nullcontext()):
        with expectation:
            result = finetune(
                "tiny", tmp_path / "s", data=recordings, languages="ca,es", training=training, sequential=True
            )
    assert (result.steps, result.items) == (2, 200)  # what was done before counts


def test_early_stopping_goes_on_counting(tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dev WER only rises here, so training stops at the third measurement, also when it is cut in or after that."""
    training = Training(max_steps=12, learning_rate=0.05, eval_steps=1, early_stopping_patience=2)

    corpus = load_corpus(recordings, languages="ca", split="train")[:20]
    dev = load_corpus(recordings, languages="ca", split="dev")

    def run(name: str) -> Trained:
        return finetune("tiny", tmp_path / name, data=corpus, dev=dev, languages="ca", training=training)

    whole = run("whole")
    assert whole.steps == 3
    for owner, method, call in ((trainer._DevSet, "scores", 3), (trainer.Job, "_save", 1)):
        _cut(monkeypatch, owner, method, call)
        with pytest.raises(Cut):
            run(method)
        monkeypatch.undo()
        # Moved in between: the best checkpoint must be found by the new path.
        for name in (method, f"{method}.checkpoints"):
            if (tmp_path / name).exists():
                (tmp_path / name).rename(tmp_path / f"moved-{name}")
        assert run(f"moved-{method}").steps == 3
        before, after = _weights(tmp_path / "whole"), _weights(tmp_path / f"moved-{method}")
        assert all(np.array_equal(before[name], after[name]) for name in before)


def test_progress_tells_loss_and_wer(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "_LOG_STEPS", 2)
    training = replace(SHORT, eval_steps=4)
    finetune("tiny", tmp_path / "x", data=recordings, languages="ca", training=training, limit=32, progress=True)
    said = capfd.readouterr()
    assert said.out == "" and re.fullmatch(
        r"ca: step 2 of 4: loss \d\.\d{3}\nca: step 4 of 4: loss \d\.\d{3}\n(ca: step 4 of 4: dev WER \d\d\.\d\d %\n)+",
        said.err,
    )


def test_a_full_disk_is_one_line(tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_FULL_DISK", 1 << 62)  # whatever torch says now, it is the disk

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664]")  # what torch.save says

    monkeypatch.setattr(trainer._Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(LorsError, match=r"cannot write .*x\.checkpoints: the disk is full: .* free$"):
        training = replace(SHORT, save_steps=1)
        finetune("tiny", tmp_path / "x", data=recordings, languages="ca", training=training, limit=16)
    assert not (tmp_path / "x").exists()


def _two_processes(out: Path, recordings: Path, *options: str) -> dict[str, Any]:
    """As `accelerate launch` starts them; each step takes a batch in each process, one of them writes."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lors.speech"),
        *("finetune", "--model", "tiny", "--data", str(recordings), "--language", "ca", "--max-steps", "4"),
        *("--device", "cpu", "--json", "-o", str(out), *options),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert record["steps"] == 4
    return dict(record)


def test_two_processes_train_one_model(tmp_path: Path, recordings: Path) -> None:
    _two_processes(tmp_path / "ca", recordings, "--train", "matrices")
    assert _changed(tmp_path / "ca") == decomposed({n: v.shape for n, v in _weights(tmp_path / "ca").items()})


def test_without_a_launcher_one_gpu_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.Seq2SeqTrainingArguments, "n_gpu", property(lambda _: 4))
    assert trainer._arguments(SHORT, tmp_path)._n_gpu == 1


def test_a_step_is_the_same_however_it_is_divided(tmp_path: Path, recordings: Path) -> None:
    """Sixteen utterances a step: at once, in four batches that accumulate, in two processes; references differ in length."""
    training = Training(max_steps=4, learning_rate=4e-4)
    whole = finetune("tiny", tmp_path / "1x16", data=recordings, languages="ca", training=training)
    parts = replace(training, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    losses = [finetune("tiny", tmp_path / "4x4", data=recordings, languages="ca", training=parts).train_loss]
    options = ("--learning-rate", "4e-4", "--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2")
    losses.append(_two_processes(tmp_path / "2x2x4", recordings, *options)["train_loss"])
    assert losses == pytest.approx([whole.train_loss] * 2, rel=1e-5)
    want = _weights(tmp_path / "1x16")
    norm = np.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in want.values()))
    for name in ("4x4", "2x2x4"):
        got = _weights(tmp_path / name)
        apart = np.sqrt(sum(float(np.square(got[key] - want[key], dtype=np.float64).sum()) for key in want))
        assert apart <= 1e-5 * norm, name


# ----------------------------------------------------------------------------------------------------- evaluation


def test_evaluate_writes_every_answer(tmp_path: Path, catalan: Corpus) -> None:
    evaluation = evaluate("tiny", data=catalan, languages="ca", tasks="transcribe,translate", cache=tmp_path / "c")
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
        (tmp_path / "absent", "expected a model directory, a hub id, tiny or tiny-early"),
        ("tini", "expected a model directory, a hub id, tiny or tiny-early"),
    ]:
        with pytest.raises(LorsError, match=said):
            resolve_model(source)
    with pytest.raises(LorsError, match=r"broken: no weights in this directory: expected model\.safetensors"):
        load_model(broken)
    with pytest.raises(LorsError, match="the model has no language 'ja'"):
        evaluate("tiny", data=[replace(u, language="ja") for u in catalan], languages="ja")
    with pytest.raises(LorsError, match="expected utterances with a reference"):
        evaluate("tiny", data=[replace(u, translation=None) for u in catalan], languages="ca", tasks=("translate",))
    with pytest.raises(LorsError, match="expected transcribe, translate or both, got 'sing'"):
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
    for settings, said in [
        ({"learning_rate": float("nan")}, "learning_rate: expected a positive number, got nan"),
        ({"learning_rate": "2e-4"}, "learning_rate: expected a positive number, got '2e-4'"),
        ({"save_steps": 0}, "save_steps: expected an integer of at least 1, got 0"),
        ({"device": "cuda:1"}, "device: training takes cpu or cuda .CUDA_VISIBLE_DEVICES chooses., got 'cuda:1'"),
    ]:
        with pytest.raises(LorsError, match=said):
            Training(**settings)
    for device in ("mps", "tpu", ""):
        with pytest.raises(LorsError, match=f"device: expected cpu or cuda, got {device!r}"):
            torch_device(device)
    with pytest.raises(LorsError, match="absent: expected a model directory"):
        evaluate(["tiny", "absent"], data="no manifest either", languages="ca")
    assert not (tmp_path / "x").exists()


def test_weights_that_are_not_the_models(tmp_path: Path, catalan: Corpus) -> None:
    """transformers fills in what is missing at random, and a network with NaN answers too: both would be scored."""
    from safetensors.numpy import load_file, save_file

    name = "model.decoder.layers.1.fc2.weight"
    weights = load_file(SHIPPED["tiny"] / "model.safetensors")
    without = {key: value for key, value in weights.items() if key != name}

    def model(label: str, changed: dict[str, np.ndarray]) -> Path:
        shutil.copytree(SHIPPED["tiny"], tmp_path / label)
        save_file(changed, tmp_path / label / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / label

    for path, said in [
        (model("less", without), f"expected all weights of config.json, 1 are missing: {name}"),
        (
            model("shape", {**weights, name: weights[name].T.copy()}),
            rf"expected {name} of shape \[128, 512\], got \[512",
        ),
        (model("nan", {**weights, name: weights[name] * np.float16("nan")}), f"got NaN or infinity in {name}"),
    ]:
        with pytest.raises(LorsError, match=said):
            evaluate(path, data=catalan, languages="ca", limit=1)
    cut = model("cut", weights) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    with pytest.raises(LorsError, match=r"cut/model\.safetensors: truncated"):
        evaluate(tmp_path / "cut", data=catalan, languages="ca")
    silent = model("silent", weights)
    (silent / "processor_config.json").unlink()
    with pytest.raises(LorsError, match=r"silent: expected the files of a WhisperProcessor .* beside the weights"):
        load_processor(silent)
    (silent / "generation_config.json").unlink()
    with pytest.raises(
        LorsError, match="silent: expected a multilingual Whisper: there is no generation_config.json in it"
    ):
        finetune(silent, tmp_path / "x", data=catalan, languages="ca")


def test_a_hub_that_cannot_be_reached(tmp_path: Path, recordings: Path) -> None:
    with pytest.raises(LorsError, match="org/absent: not a file or directory here, not in the hub cache, and the hub"):
        finetune("org/absent", tmp_path / "x", data=recordings, languages="ca")
    assert not list(tmp_path.iterdir())  # no checkpoints' directory of a run that never was


def test_recordings_that_cannot_be_trained_on(tmp_path: Path, catalan: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before the first step, wherever they stand in the corpus."""
    monkeypatch.setattr(trainer.Job, "_train", None)
    soundfile.write(tmp_path / "long.wav", np.zeros(40000, np.float32), 16000)
    soundfile.write(tmp_path / "fits.wav", np.zeros(96001, np.float32), 48000)  # 32,000 samples at 16 kHz
    (tmp_path / "text.wav").write_text("no audio")
    fits = AudioFile(tmp_path / "fits.wav")
    for name, said in [
        ("long.wav", r"long\.wav: expected at most 2 s, the model's window, got 2\.5 s"),
        ("absent.wav", r"cannot read audio .*absent\.wav: no such file"),
        ("text.wav", r"cannot read audio .*text\.wav: expected WAV, FLAC"),
    ]:
        audio = [fits] * (len(catalan) - 1) + [AudioFile(tmp_path / name)]
        data = [replace(u, split="train", audio=a) for u, a in zip(catalan, audio, strict=True)]
        with pytest.raises(LorsError, match=said):
            finetune("tiny", tmp_path / "x", data=data, languages="ca", training=SHORT)


def _with_a_broken_clip(corpus: Corpus, path: Path) -> Corpus:
    """The third recording ends in the middle of a frame: its header is fine, and no library decodes it."""
    sound = soundfile.SoundFile(corpus[2].audio.open()).read()
    soundfile.write(path, sound, 16000, format="FLAC")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return [*corpus[:2], replace(corpus[2], audio=AudioFile(path)), *corpus[3:]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_clip_that_cannot_be_decoded_is_left_out(tmp_path: Path, catalan: Corpus, workers: int) -> None:
    corpus = [replace(u, split=None) for u in _with_a_broken_clip(catalan, tmp_path / "cut.flac")]
    training = replace(SHORT, per_device_train_batch_size=5, dataloader_num_workers=workers)
    with pytest.raises(LorsError, match=r"cut.flac: expected a whole|cut.flac"):
        finetune(
            "tiny", tmp_path / "x", data=corpus, languages="ca", training=replace(training, max_steps=5), unusable=0
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.flac"], "nothing stays of what was refused"
    done = finetune(
        "tiny", tmp_path / "x", data=corpus, languages="ca", training=replace(training, max_steps=10), unusable=0.1
    )
    assert [line.count("cut.flac") for line in done.unusable] == [1] and done.steps == 10, "once, in both epochs"
    scored = evaluate("tiny", data=corpus, languages="ca", batch_size=4, workers=workers, unusable=0.1)
    assert len(scored.left_out.unusable) == 1 and len(scored.results[0].answers) == 24
    whole = evaluate("tiny", data=[*corpus[:2], *corpus[3:]], languages="ca", cache=str(tmp_path / "cache"))
    assert scored.results[0].answers == whole.results[0].answers
    with pytest.raises(
        LorsError, match=r"corpus: expected at most 1 % of 25 rows and recordings .* got 1; the first: .*cut"
    ):
        evaluate("tiny", data=corpus, languages="ca", workers=workers)


def test_features_by_other_processes_change_nothing(tmp_path: Path, recordings: Path) -> None:
    """And the cache may be a name; it stays, where features beside the checkpoints go."""
    training = replace(SHORT, dataloader_num_workers=0)
    finetune("tiny", tmp_path / "alone", data=recordings, languages="ca", training=training)
    training = replace(SHORT, dataloader_num_workers=2)
    finetune(
        "tiny", tmp_path / "two", data=recordings, languages="ca", training=training, cache=str(tmp_path / "cache")
    )
    assert list((tmp_path / "cache").glob("*/*.npy")) and not list(tmp_path.glob("*.checkpoints"))
    alone, two = _weights(tmp_path / "alone"), _weights(tmp_path / "two")
    assert all(np.array_equal(alone[name], two[name]) for name in alone)


def test_dev_is_shared_by_the_processes(tmp_path: Path, recordings: Path) -> None:
    """Each decodes its half; the WER is that of one process with the same weights."""
    record = _two_processes(tmp_path / "ca", recordings, "--eval-steps", "4", "--learning-rate", "4e-4")
    (want,) = evaluate(tmp_path / "ca", data=recordings, languages="ca", split="dev").results
    assert record["dev_wer"] == pytest.approx(want.score.wer)


def test_what_regularises_changes_the_training_and_not_the_configuration(tmp_path: Path, recordings: Path) -> None:
    def run(name: str, **options: Any) -> dict[str, np.ndarray]:
        training = replace(SHORT, max_steps=2, per_device_train_batch_size=4, **options)
        finetune("tiny", tmp_path / name, data=recordings, languages="ca", training=training)
        return _weights(tmp_path / name)

    plain = run("plain")
    config = (tmp_path / "plain" / "config.json").read_text()
    options: dict[str, Any] = {"label_smoothing_factor": 0.1, "dropout": 0.2, "apply_spec_augment": True}
    for name, value in options.items():
        changed = run(name, **{name: value})
        assert not np.array_equal(
            changed["model.decoder.layers.0.fc1.weight"], plain["model.decoder.layers.0.fc1.weight"]
        )
        assert (tmp_path / name / "config.json").read_text() == config, name
    frozen, before = run("frozen", freeze_encoder=True), _weights(SHIPPED["tiny"])
    moved = {name for name in before if not np.array_equal(before[name], frozen[name])}
    assert moved and not any(name.startswith("model.encoder") for name in moved)


def test_bleu_as_the_criterion(tmp_path: Path, recordings: Path) -> None:
    training = replace(SHORT, max_steps=2, eval_steps=1, metric_for_best_model="bleu")
    tasks = ("transcribe", "translate")
    done = finetune("tiny", tmp_path / "x", data=recordings, languages="ca", tasks=tasks, training=training, limit=16)
    assert done.steps == 2 and done.dev_wer is not None
    for wrong in ({"tasks": ("transcribe",)}, {"training": replace(training, eval_steps=None)}):
        with pytest.raises(
            LorsError, match="bleu is of translation on dev: expected the task translate and eval_steps"
        ):
            finetune(
                "tiny",
                tmp_path / "y",
                **{**dict(data=recordings, languages="ca", tasks=tasks, training=training), **wrong},
            )
    with pytest.raises(
        LorsError, match="metric_for_best_model: expected wer, bleu, loss, got 'los', did you mean 'loss'"
    ):
        replace(training, metric_for_best_model="los")
    with pytest.raises(LorsError, match="dropout: expected a number from 0 to below 1, got 1"):
        replace(training, dropout=1)
    with pytest.raises(LorsError, match="freeze_encoder: expected train 'all', got 'lora'"):
        replace(training, freeze_encoder=True, train="lora")


def test_empty_references_are_not_trained_on(tmp_path: Path, catalan: Corpus) -> None:
    data = [replace(u, split="train", text="" if i else u.text) for i, u in enumerate(catalan)]
    assert finetune("tiny", tmp_path / "x", data=data, languages="ca", training=replace(SHORT, max_steps=1)).items == 1
    with pytest.raises(LorsError, match="expected utterances with a reference for transcribe, got none"):
        finetune("tiny", tmp_path / "y", data=data[1:], languages="ca", training=SHORT)


def test_loss_as_the_criterion(tmp_path: Path, recordings: Path) -> None:
    """The checkpoint with the lowest dev loss is kept, and that is the loss which `mean_loss` computes. A learning rate that
    grows beyond what the model bears: the last one is not the best."""
    training = Training(
        max_steps=8,
        learning_rate=0.08,
        warmup_steps=40,
        eval_steps=2,
        metric_for_best_model="loss",
        report_to="tensorboard",
    )
    finetune("tiny", tmp_path / "x", data=recordings, languages="ca", training=training)
    steps, losses = zip(*_told(tmp_path / "x.runs" / "0-ca")["eval/loss"], strict=True)
    assert steps == (2, 4, 6, 8, 8), "the last one is that of the model that is kept"
    assert losses[4] == min(losses) < losses[3]
    decoder = Decoder.of(load_model(tmp_path / "x"), load_processor(tmp_path / "x"), tmp_path / "features")
    dev = load_corpus(recordings, languages="ca", split="dev")
    assert mean_loss(decoder, dev, "transcribe") == pytest.approx(losses[4], rel=1e-5)
    with pytest.raises(LorsError, match="metric_for_best_model: loss is that of dev: expected eval_steps, got none"):
        finetune("tiny", tmp_path / "y", data=recordings, languages="ca", training=replace(training, eval_steps=None))


def _told(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: curve -> (step, value)."""
    reader = module("tensorboard.backend.event_processing.event_accumulator", "speech")
    events = reader.EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_what_is_reported_stays_and_changes_nothing(tmp_path: Path, recordings: Path) -> None:
    told = replace(SHORT, report_to="tensorboard")
    for name, training in (("plain", SHORT), ("told", told)):
        finetune("tiny", tmp_path / name, data=recordings, languages="ca", training=training)
    plain, other = _weights(tmp_path / "plain"), _weights(tmp_path / "told")
    assert all(np.array_equal(plain[name], other[name]) for name in plain)
    assert "train/train_loss" in _told(tmp_path / "told.runs" / "0-ca")
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "told", "told.runs"}
    assert told.identity() == SHORT.identity(), "a run may go on with it, or without"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"report_to": "wandb"}, "report_to: wandb needs wandb: pip install wandb"),
        ({"report_to": "tensorboard"}, "report_to: tensorboard needs tensorboard: pip install tensorboard"),
        ({"optim": "adamw_8bit"}, "optim: adamw_8bit needs bitsandbytes: pip install bitsandbytes"),
    ],
)
def test_packages_that_are_not_installed(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("lors.speech.training.settings.find_spec", lambda name: None)
    with pytest.raises(LorsError, match=f"^{said}$"):
        finetune("tiny", tmp_path / "x", data=recordings, languages="ca", training=replace(SHORT, **changes))
    assert list(tmp_path.iterdir()) == []


def test_optimisers_and_types(tmp_path: Path, recordings: Path) -> None:
    for name in ("adamw_torch_fused", "adafactor"):
        training = replace(SHORT, max_steps=2, optim=name)
        finetune("tiny", tmp_path / name, data=recordings, languages="ca", training=training, limit=20)
    one, two = (_weights(tmp_path / name) for name in ("adamw_torch_fused", "adafactor"))
    assert any(not np.array_equal(one[name], two[name]) for name in one)
    for changes, said in (
        ({"optim": "adam"}, "optim: expected adamw_torch_fused, adafactor, adamw_8bit, got 'adam'"),
        ({"report_to": "tensorbord"}, "report_to: .*, did you mean 'tensorboard'"),
        ({"fp16": True}, "fp16: expected a GPU and no bf16, got device 'cpu', bf16 False"),
        (
            {"fp16": True, "bf16": True, "device": "cuda"},
            "fp16: expected a GPU and no bf16, got device 'cuda', bf16 True",
        ),
    ):
        with pytest.raises(LorsError, match=said):
            replace(SHORT, **changes)
    assert trainer._arguments(replace(SHORT, optim="adafactor", report_to="tensorboard"), tmp_path).report_to == [
        "tensorboard"
    ]


def test_errors_of_a_corpus_name_its_file(tmp_path: Path) -> None:
    manifest = tmp_path / "mine.tsv"
    manifest.write_text("audio\ttext\tlanguage\tsplit\na.wav\tbon dia\tca\ttrain\n")
    with pytest.raises(LorsError, match=r"^.*/mine\.tsv: expected at most 1 % of 1 rows and recordings"):
        finetune("tiny", tmp_path / "out", data=str(manifest), languages="ca", training=SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tsv"]
