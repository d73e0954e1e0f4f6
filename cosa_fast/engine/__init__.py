"""One training step, and the state that it moves.

base: what the engines share
plain: the readable step
fused: the same step fast: flat buffers, half precision, one CUDA graph per phase
capture: one CUDA graph per phase
compiling: blocks by torch.compile, and machines without a compiler
flat: both networks' parameters in flat buffers
standalone: the step of CoSA-MS: one network, pseudo-labels, cross entropy
optim: AdamW's two groups; warm-up and poly
flops: FLOPs of a step, counted on shapes
"""
