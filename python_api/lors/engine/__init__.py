"""The engine: carries out a plan of work from sources to a sink. Knows no file and no recipe."""
