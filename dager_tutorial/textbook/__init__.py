"""The paper's algorithms as it writes them: the oracle of the tests and the baseline of the benchmarks."""
