"""Analysis: what is in a checkpoint, how experts differ from their base and from each other. Merges nothing."""
