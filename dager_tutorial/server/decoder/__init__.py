"""The attack on causal models: prefixes grown from the left, by whichever selector fits (chapters 4 and 7)."""
