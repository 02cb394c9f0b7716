"""Texts written for this project: the packaged data sets that `dager_tutorial.data` reads by name."""
