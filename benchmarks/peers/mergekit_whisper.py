"""mergekit with its Whisper architecture repaired: `python -m benchmarks.peers.mergekit_whisper CONFIG.yml OUT ...`

mergekit 0.1.5 names the decoder's tensors "model.decoderlayers...", for its architecture file lacks a dot, and so
cannot merge any Whisper. The dot is put back in this process; everything else is mergekit-yaml as installed.
"""

from __future__ import annotations


def repair() -> None:
    """Replace the decoder module of each Whisper architecture by a copy with the prefix "model.decoder."."""
    from mergekit.architecture.json_definitions import NAME_TO_ARCH

    for architecture in NAME_TO_ARCH["WhisperForConditionalGeneration"]:
        decoder = architecture.modules["decoder"]
        architecture.modules["decoder"] = decoder.model_copy(update={"weight_prefix": "model.decoder."})


def main() -> None:
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    repair()
    mergekit_yaml()


if __name__ == "__main__":
    main()
