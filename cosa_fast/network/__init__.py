"""The network, one architecture for ON and AN.

build: a network as configured, with its weights
model: CoSANet: classifiers, global max pooling, LargeFOV or ASPP
standalone: CoSA-MS: a network of segmentation_models_pytorch
encoder: any timm backbone as (F, F†) on one grid
attention: AN's scales as one packed sequence, and the kernels that keep attention within an image
attention_backends: kernels for attention by name: which can run where, in which order they are tried
attention_choice: the kernel that a network gets, found out by a small image
positions: a ViT's position embedding on other grids, resampled as the official release does it
rotary: rotary positions computed once for each size
resizing: images at the sizes that a network takes
reading: weight files of any origin, read safely; which network in them is taken
weights: hub, local files, the official release's naming; refuses silent mismatches
architecture: what a whole network's file tells of its architecture
torchvision_compat: lets torchvision import beside a CPU-only torch
"""
