"""The search where the rank is full: the evidence of all taps, weighed by what it is worth on a simulated batch.

Chapter `11_limits`.
"""
