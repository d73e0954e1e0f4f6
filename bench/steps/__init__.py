"""Behind bench/throughput.py and bench/memory.py; evaluation is a command of its own.

throughput: every configuration with all of its providers
comparison: steps timed side by side
providers: what is compared, and the batches
baseline: the method as it is usually written
lattice: its permutohedral filter
loss_path: the losses alone
phases: where the time of a step goes
prediction: what a step should take on a GPU
evaluation: operators, memory and time of an evaluation, counted without a GPU
memory: a step's bytes, counted without data
"""
