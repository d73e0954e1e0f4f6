"""What can be proved of compiled kernels without running them, from their LLVM IR; behind bench/kernels.py --static.

ir: the text of a kernel as blocks of instructions
graph: the ways through it
arithmetic: machine numbers, of all threads at once
words: 32-bit words through vectors, casts and exchanges between lanes
threads: what each thread computes from its number; on which bits of the number values may depend
accesses: loads, stores, copies, matrix units' reads, barriers and waits
races: no two threads at one byte of shared memory unordered, nothing outside of it, barriers met by all
listing: machine instructions, in all, in loops, per pixel
"""
