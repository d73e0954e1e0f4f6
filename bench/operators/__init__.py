"""Behind bench/kernels.py.

cases: inputs of every operator
timing: time and memory of a call
output: JSON, CSV, plots
static: registers, spills, shared memory without a GPU
"""
