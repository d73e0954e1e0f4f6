"""Behind bench/throughput.py.

baseline: the method as it is usually written
lattice: its permutohedral filter
providers: what is compared
loss_path: the losses alone
phases: where the time of a step goes
speed: time of whole steps
output: tables and JSON
"""
