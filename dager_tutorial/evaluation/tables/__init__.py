"""The paper's tables, remade from rows of a sweep, with the published figures beside ours.

Chapter `15_reproducing_the_paper`.
"""
