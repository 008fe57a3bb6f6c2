"""A Whisper that knows some speech, with the vocabulary of openai's multilingual models: 51,865 tokens or 51,866.

Made of the base that comes with the package, whose 1,024 tokens are its own: each keeps its embedding and moves to the id that
its kind has in openai's vocabulary. Ids that the base lacks have the embedding of a token that it never says. The window may be
openai's 30 seconds, with the positions that openai computes: the base learnt 2, and says less there. The decoder has 64 positions, of
which the base knows 32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from lors.speech.model.whisper import SHIPPED

TEXT, END = 916, 50257  # text tokens of the base; <|endoftext|> in openai's vocabulary
POSITIONS = 64
NEVER_SAID = "<|startoflm|>"
LANGUAGES = 100
State = dict[str, np.ndarray]


def write(target: Path, count: int = 51865, dtype: str = "float32", seconds: int = 2) -> Path:
    """A directory in transformers' format; `count` 51865 has 99 languages, 51866 the hundredth too; `seconds`: of the window."""
    source = Path(SHIPPED["tiny"])
    target.mkdir(parents=True)
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    moved = _moved(content, count - 51766)
    _write_tokenizer(content, moved, source, target, seconds)
    _write_configuration(moved, count, source, target, seconds)
    state = _state(load_file(source / "model.safetensors"), content, moved, count, seconds)
    save_file({name: x.astype(dtype) for name, x in state.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def _moved(content: dict[str, Any], languages: int) -> dict[str, int]:
    """Special token -> its id in openai's vocabulary; the base has them in the same order."""
    names = [token["content"] for token in content["added_tokens"]]
    left_out = names[2 + languages : 2 + LANGUAGES]
    return {name: END + place for place, name in enumerate(name for name in names if name not in left_out)}


def _write_tokenizer(content: dict[str, Any], moved: dict[str, int], source: Path, target: Path, seconds: int) -> None:
    first = max(moved.values()) + 1
    times = {f"<|{0.02 * step:.2f}|>": first + step for step in range(1501)}
    old = {token["content"]: token for token in content["added_tokens"]}
    added = [old[name] | {"id": number} for name, number in moved.items()]
    added += [old["<|en|>"] | {"id": number, "content": name, "special": False} for name, number in times.items()]
    vocab = {token: number for token, number in content["model"]["vocab"].items() if number < TEXT}
    vocab |= {f"unused{number}": number for number in range(TEXT, END - 1)} | {"": END - 1}  # an empty one, as openai's
    content = content | {"added_tokens": added, "model": content["model"] | {"vocab": vocab}}
    (target / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["extra_special_tokens"] = [name for name in moved if name != "<|endoftext|>"]
    (target / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    processor = json.loads((source / "processor_config.json").read_text())
    processor["feature_extractor"] |= {
        "chunk_length": seconds,
        "n_samples": 16000 * seconds,
        "nb_max_frames": 100 * seconds,
    }
    (target / "processor_config.json").write_text(json.dumps(processor))


def _write_configuration(moved: dict[str, int], count: int, source: Path, target: Path, seconds: int) -> None:
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END) | {"decoder_start_token_id": END + 1}
    config = json.loads((source / "config.json").read_text())
    config |= special | {"vocab_size": count, "max_target_positions": POSITIONS, "max_source_positions": 50 * seconds}
    (target / "config.json").write_text(json.dumps(config))
    config = json.loads((source / "generation_config.json").read_text())
    config |= special | {
        "lang_to_id": {name: moved[name] for name in config["lang_to_id"]},
        "task_to_id": {name: moved[f"<|{name}|>"] for name in config["task_to_id"]},
        "no_timestamps_token_id": moved["<|notimestamps|>"],
        "prev_sot_token_id": moved["<|startofprev|>"],
    }
    (target / "generation_config.json").write_text(json.dumps(config))


def _state(state: State, content: dict[str, Any], moved: dict[str, int], count: int, seconds: int) -> State:
    state = {name: x.astype(np.float32) for name, x in state.items()}
    old = {token["content"]: token["id"] for token in content["added_tokens"]}
    known = state["model.decoder.embed_tokens.weight"]
    table = np.tile(known[old[NEVER_SAID]], (count, 1))
    table[:TEXT] = known[:TEXT]
    for name, number in moved.items():
        table[number] = known[old[name]]
    positions = state["model.decoder.embed_positions.weight"]
    state["model.decoder.embed_tokens.weight"] = table
    state["model.decoder.embed_positions.weight"] = np.concatenate([positions, positions])
    width = known.shape[1]
    rates = np.exp(-np.log(10000) / (width // 2 - 1) * np.arange(width // 2))
    angles = np.arange(50 * seconds)[:, None] * rates
    sinusoids = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    heard = state["model.encoder.embed_positions.weight"]
    assert np.abs(sinusoids[: len(heard)] - heard).max() < 1e-3, "rounded to float16"
    state["model.encoder.embed_positions.weight"] = sinusoids
    return state
