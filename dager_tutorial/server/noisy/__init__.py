"""An update with Gaussian noise or on a grid: what embeddings still name, and a matched filter of whole gradients.

Chapter `14_defences`.
"""
