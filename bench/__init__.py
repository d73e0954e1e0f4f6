"""Benchmarks. Doors: throughput, kernels, data, memory; each runs as `python bench/NAME.py` from a bare clone.

tables: quantiles and charts
operators: every kernel: time, memory, share of the limit; without a GPU its resources
steps: training against the method as it is usually written
views: the data pipelines
runs: whole trainings side by side
"""
