"""How kernels are launched.

runtime: back-end, launches that can be recorded
table: block sizes by kernel, architecture and size
offline: compiling recorded launches for GPUs that are not there
"""
