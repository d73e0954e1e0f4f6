"""Behind bench/kernels.py.

scene: sizes, and what training hands to the operators
cases: every operator's inputs, and what it must move and compute
limits: what a device can move and compute
measured: times on a GPU
static: registers, spills, shared memory without one
output: tables, JSON and CSV, plots
"""
