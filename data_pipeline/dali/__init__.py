"""The pipeline on NVIDIA DALI.

pipeline: positions into batches
feed: files into DALI's graphs, around what it cannot decode
samples: parameters of the views as DALI's inputs
operations: pixels
decoder: evaluation images
"""
