"""Images, image-level labels and augmented batches. Imports nothing of the engine.

datasets: the formats, label files, images, packs
views: what is random in the two views of an image, and the pixels that follow from it
stream: which positions a batch holds; unreadable images
torch_pipeline: positions into batches, in worker processes
dali: the same with NVIDIA DALI
batch: Batch(weak, strong, labels, valid, ids)
evaluation_stream, ahead: whole images with their masks, read ahead
"""
