"""Benchmarks. Doors: throughput, kernels, data, memory, ablate, thresholds; each runs as `python bench/NAME.py` and
`python -m bench.NAME` from a clone that is not installed.

timing: quantiles, time and memory of a call, replay from a CUDA graph
tables: terms, failures, tables, charts
arguments: what the doors' command lines share
operators: every kernel: time, memory, share of the limit; without a GPU its resources
steps: training against the method as it is usually written; memory of a step
views: the data pipelines
runs: whole trainings side by side
"""
