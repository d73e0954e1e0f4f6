"""Whole trainings side by side.

precision: bfloat16 against float32
curves: both data pipelines
collect: training on real images
summarise: what gpu_check.sh leaves
reading: a finished run's folder
"""
