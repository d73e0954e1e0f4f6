"""The pipeline on NVIDIA DALI.

pipeline: sample positions into batches
samples: images and the parameters of their views, as the graph's inputs
operations: pixel operations, pieces of the graph
feed: files into any graph, batches out of it, and what DALI cannot decode
decoder: whole images, for evaluation
"""
