"""Speech: corpora, fine-tuning, scoring and the whole merging experiment."""
