"""CTranslate2's model directory, which faster-whisper runs, by CTranslate2's own converter of transformers' models."""

from __future__ import annotations

import torch

from ..checkpoints.compatibility import ENGLISH_ONLY
from ..files.directory import OutputDirectory
from ..files.writing import writing
from ..merging.older_files import read_tokenizer
from .beside import accompany
from .model import Whisper
from .peer import converting, needed

__all__ = ["DTYPES", "write"]

DTYPES = ("float32", "float16", "int8")
_READ = ("tokenizer.json", "preprocessor_config.json")  # by faster-whisper
_CONVERTED = "converted"


def write(whisper: Whisper, output: OutputDirectory, dtype: str, notices: list[str]) -> None:
    """Writes model.bin, config.json and vocabulary.json, and what faster-whisper reads beside them."""
    converters = needed("ctranslate2.converters", "ctranslate2")
    needed("transformers", "ctranslate2")
    source = whisper.directory
    whisper.require_values(dtype)
    converted = output.path / _CONVERTED  # the converter makes the directory itself
    with writing(output.target), converting(whisper.name, "ctranslate2"):
        converter = converters.TransformersConverter(str(source))
        load = converter.load_model
        # it would load the weights in the type that config.json names, whatever they are stored in
        converter.load_model = lambda *names, **options: load(*names, **options | {"dtype": torch.float32})
        converter.convert(str(converted), quantization=dtype)
        for path in converted.iterdir():
            path.rename(output.path / path.name)
        converted.rmdir()
    accompany(whisper, output, "ctranslate2", notices, _READ)
    tokenizer = read_tokenizer(whisper.checkpoint.sidecars())
    if tokenizer is not None and "" not in tokenizer.vocab and whisper.dims.n_vocab != ENGLISH_ONLY:
        notices.append(
            f"{whisper.name}: its vocabulary lacks the empty token, by which ctranslate2 knows openai's multilingual one: "
            f"faster-whisper takes the model for English-only"
        )
