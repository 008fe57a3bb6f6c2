"""Triton kernels of the operations over groups of matrices, one file per operation; `backend` puts them together."""
