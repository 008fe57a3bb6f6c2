"""Whisper's sizes, and the shapes of the matrices that LoRS-Merging decomposes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WhisperSize:
    """The numbers that make one Whisper configuration differ from another."""

    width: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    mel_bins: int = 80
    languages: int = 99

    @property
    def vocabulary(self) -> int:
        """50257 text tokens, then <|endoftext|>, <|startoftranscript|>, languages, 6 tasks, 1501 time stamps."""
        return 50257 + 2 + self.languages + 6 + 1501

    def matrices(self) -> dict[tuple[int, int], int]:
        """Shape -> how many: 4 projections per attention (a decoder layer has two), fc1 and fc2 per layer."""
        layers = self.encoder_layers + self.decoder_layers
        square, wide = (self.width, self.width), (4 * self.width, self.width)
        return {square: 4 * (layers + self.decoder_layers), wide: layers, wide[::-1]: layers}


SIZES = {
    "micro": WhisperSize(64, 2, 1, 1),  # not a released model: for the tests of this harness
    "tiny": WhisperSize(384, 6, 4, 4),
    "base": WhisperSize(512, 8, 6, 6),
    "small": WhisperSize(768, 12, 12, 12),
    "medium": WhisperSize(1024, 16, 24, 24),
    "large-v3": WhisperSize(1280, 20, 32, 32, mel_bins=128, languages=100),
    "turbo": WhisperSize(1280, 20, 32, 4, mel_bins=128, languages=100),
}

# The two groups of five languages of the paper, in its order: names of the experts.
LANGUAGES = ("ca", "de", "es", "fr", "it", "id", "nl", "pt", "ru", "sv")
