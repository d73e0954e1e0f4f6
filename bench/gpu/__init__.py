"""What gpu_check.sh does on a machine with a GPU.

check: the door's command line, and the way through the parts
parts: what is measured, in the order of its worth, and the tiny sizes of a dry run
machine: what is installed, and which GPU there is
forks: a part in a process of its own, under a time limit
correctness: every kernel, and the captured step, against their definitions
training: the demo
tests: the tests that are marked for a GPU
profile: kernels of a step by their time
evaluation: what an evaluated image costs
summary: one JSON and one table, predicted beside measured
"""
