"""Sweeps: a grid of cells, one row a cell, in a store that survives a kill at any moment.

Chapter `15_reproducing_the_paper`.
"""
