"""What the rest of the gradient says once texts are known: labels, counts, last tokens, and the proof.

Chapter `09_completion`.
"""
