"""Files: appearing complete or not at all, locked, hashed, fetched, read strictly. Knows no tensor."""
