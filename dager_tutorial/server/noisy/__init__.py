"""An update that was given Gaussian noise: what embeddings still name, and a matched filter of whole gradients.

Chapter `11_limits`.
"""
