"""The paper's attacks as it writes them: the oracle of the tests and the baseline of the benchmarks.

Petrov et al., DAGER, NeurIPS 2024 (arXiv 2405.15586). Thresholds on distances are set by hand, and every vector is
computed anew whenever it is needed: `spans`, `block_inputs`, `token_filter`, then the searches of `decoder` and
`encoder`. Nothing here is shared with the attack of `server`, which is checked against it.
"""
