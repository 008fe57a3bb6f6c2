"""Merge experts of a Whisper, reload the result in transformers and generate from it.

python examples/demo.py                          makes a Whisper-tiny-sized base and five experts first
python examples/demo.py BASE ca=DIR de=DIR ...   merges yours
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import lors
from lors.cli.show import show_report

OUT = Path("demo-out/merged")


def models(arguments: list[str]) -> tuple[Path, dict[str, Path]]:
    if arguments:
        base, *experts = arguments
        return Path(base), {name: Path(path) for name, _, path in (expert.partition("=") for expert in experts)}
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from benchmarks.generate import Spec, generate

    print("making a base of Whisper-tiny's size and five experts (random weights, power-law task vectors) ...")
    made = generate(Path("demo-out/models"), Spec("tiny"), 5)
    return made.base, made.experts


def generate_from(directory: Path) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model, info = WhisperForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    problems = {key: value for key, value in info.items() if value and key.endswith("_keys")}
    if problems:
        raise SystemExit(f"transformers did not load all of {directory}: {problems}")
    processor = WhisperProcessor.from_pretrained(directory)
    sound = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000).astype(np.float32)
    features = processor(sound, sampling_rate=16000, return_tensors="pt").input_features
    tokens = model.generate(features, max_new_tokens=8)
    print(
        f"reloaded by transformers; it says {processor.batch_decode(tokens, skip_special_tokens=True)[0]!r} to a tone of 440 Hz"
    )


def main() -> None:
    base, experts = models(sys.argv[1:])
    show_report(lors.merge(base, experts, OUT, force=True))
    generate_from(OUT)


if __name__ == "__main__":
    try:
        main()
    except lors.LorsError as error:
        raise SystemExit(f"error: {error}") from None
