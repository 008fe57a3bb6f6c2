"""Triton kernels of the three operations over groups of matrices, one file per operation; `backend` puts them together."""
