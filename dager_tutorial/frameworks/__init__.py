"""Training frameworks as people run them: what a client sends there, captured as an `Update` and audited.

Chapter `12_federated`. Each framework is an extra of its own, and nothing else in the package needs one.
"""
