"""One module per backend, each with the operations under their public names."""
