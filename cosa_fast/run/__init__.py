"""A whole run.

training: the loop around the step
data: configuration into data sets, augmentation, pipeline
checkpoint: files: save, load, rotate
log: log.jsonl, TensorBoard, bar
manifest: versions, machine, commit, seed, data fingerprint
profiling: --profile: trace and table
"""
