"""Behind bench/data.py.

provider: a pipeline in a process of its own
dali: DALI alone
parity: DALI's pixels against PIL's
"""
