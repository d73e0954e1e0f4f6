"""What is learned from what.

objective: which losses, which weights; diagnostics of the pseudo-labels
assignment: AN's multi-scale flipped forward pass and its pseudo-labels
threshold: ξ, ξ†: queue of histograms and the mixture fitted to their sum
normalisers: what a loss is divided by where a call sees part of a batch
"""
