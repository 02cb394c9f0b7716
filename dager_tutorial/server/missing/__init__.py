"""Gradients of which a client sent the large entries only: the zeros are missing, not small.

Chapter `11_limits`.
"""
