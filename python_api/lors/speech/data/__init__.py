"""Speech: corpora, recordings, features; what is said, in which language."""
