"""The network, one architecture for ON and AN.

build: a network as configured, with its weights
model: CoSANet: classifiers, global max pooling, LargeFOV
encoder: any timm backbone as (F, F†) on one grid
attention: AN's scales as one packed sequence, and the kernels that keep attention within an image
rotary: rotary positions computed once for each size
resizing: images at the sizes that a network takes
weights: hub, local files, the official release's naming; refuses silent mismatches
torchvision_compat: lets torchvision import beside a CPU-only torch
"""
