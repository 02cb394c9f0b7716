"""The attacks that came before: they optimise embeddings until a simulated gradient matches the one received.

DLG (Zhu et al., 2019), TAG (Deng et al., 2021) and LAMP (Balunovic et al., 2022), with the settings of their papers as
defaults. Unlike the server's attack they are told things: how many texts a batch has, how long each one is, and (where
they are not guessed) the labels. `told.Told` holds all of it. Nothing here is part of the attack of `server`.

Chapter `02_attacks_that_optimise`.
"""

PRIOR = "smollm2-135m"
"""Judges LAMP's moves where no other model is named."""
