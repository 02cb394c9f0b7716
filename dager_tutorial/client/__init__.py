"""A client's day: a private batch and a loss become an update. Only `evaluation` may see what it knows.

Chapter `01_gradients_leak`.
"""
