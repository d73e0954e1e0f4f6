"""Behind bench/data.py.

comparison: the pipelines side by side on copies of the same images
provider: a pipeline in a process of its own
dali: DALI's decoder alone
parity: DALI's pixels against PIL's
"""
