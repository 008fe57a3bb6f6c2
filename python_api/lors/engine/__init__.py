"""The engine: carries out a plan of work from sources to a sink, on the CPU or on GPUs. Opens no file and reads no recipe."""
