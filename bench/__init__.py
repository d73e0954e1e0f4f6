"""Benchmarks. Doors: throughput, kernels, data, memory, ablate, thresholds; each runs as `python bench/NAME.py` and
`python -m bench.NAME` from a clone that is not installed. gpu_check.sh: all of them that want a GPU, in nine minutes.

timing: quantiles, time and memory of a call, replay from a CUDA graph
tables: terms, failures, tables, charts
arguments: what the doors' command lines share
operators: every kernel: time, memory, share of the limit; without a GPU its resources
proofs: of compiled kernels, without running them: no races in shared memory; instructions
compiled: compiled kernels executed on a CPU
steps: training against the method as it is usually written; memory of a step
views: the data pipelines
gpu: what gpu_check.sh does
runs: whole trainings side by side
"""
