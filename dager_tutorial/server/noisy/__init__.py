"""An update with noise, on a grid or pruned: what embeddings still name, and a matched filter of whole gradients.

Chapter `14_defences`.
"""
