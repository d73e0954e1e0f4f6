"""cosa_fast: training engine for CoSA, weakly supervised co-training with swapping assignments (arXiv 2402.17891)."""

__version__ = "0.1.0"
