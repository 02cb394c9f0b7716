"""Truth and result side by side: metrics, benchmarks, ablations. Nothing of client or server may import from here."""
