"""What is learned from what.

objective: which losses, which weights; diagnostics of the pseudo-labels
assignment: AN's multi-scale flipped forward pass and its pseudo-labels
threshold: ξ, ξ†: queue of histograms and the mixture fitted to their sum
supervised: what a standalone network learns: cross entropy with pseudo-labels
normalisers: what a loss is divided by where a call sees part of a batch
"""
