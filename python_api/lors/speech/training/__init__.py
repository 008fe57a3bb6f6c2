"""Fine-tuning Whisper."""
