"""Other people's merges, each started as its own process so that its import, reading and writing are counted."""
