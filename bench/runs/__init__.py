"""Whole trainings side by side.

precision: bfloat16 against float32
curves: both data pipelines
collect: training on real images
matrix: what an ablation file asks for
ablation: its runs, one after the other or side by side
averages: means over seeds and differences by seed, in tables
estimators: what each threshold estimator loses
probe: what a backbone tells of the classes before it is trained
standalone: CoSA-MS beside the CoSA that it learned from
reading: a finished run's folder
"""
