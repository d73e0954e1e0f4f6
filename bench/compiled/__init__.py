"""Compiled kernels executed on a CPU: `make test-compiled`. What that shows, and what not, is in docs/kernels.md.

spirv: a kernel launch compiled by Triton for OpenCL, with the barriers that its back-end leaves out
opencl: such a program run on the CPU, on torch's own memory
plugin: the kernels' tests, with every launch going that way
check: file by file, and the table of results
requirements.txt: the environment, pinned
"""
