"""A whole run.

training: the loop around the step; pictures and results at the end
resuming: which checkpoint a run starts from, whether it fits, what has changed
signals: SIGTERM and Ctrl-C: at the end of the step, elsewhere at once
endings: failures, what is saved when
opening: what a run says before its first iteration
evaluating: ON and AN in the loop, choice of the best; a checkpoint's networks
observations: what an evaluation leaves to look at: observed/, gallery.png, TensorBoard's pictures
checkpoint: files: save, rotate, newest
folder: every path below runs/NAME, its lock
replacing: an earlier run in the same folder, set aside and dropped
data: configuration into data sets, augmentation, pipeline
log: log.jsonl, TensorBoard, bar; means and speed
trackers: Weights & Biases, MLflow
manifest: versions, machine, commit, seed, data fingerprint
profiling: --profile: trace and table
"""
