"""Clients that train with dropout: its masks are read off the gradient, too.

Chapter `11_limits`.
"""
