"""The attack on causal models: prefixes grown from the left, by whichever selector fits.

Chapters `06_decoder_recovery` and `11_limits`.
"""
