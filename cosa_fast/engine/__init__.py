"""One training step, and the state that it moves.

base: what both engines share
plain: the readable step
fused: the same step fast: flat buffers, half precision, one CUDA graph per phase
capture: one CUDA graph per phase
flat: both networks' parameters in flat buffers
optim: AdamW's two groups; warm-up and poly
flops: FLOPs of a step, counted on shapes
"""
