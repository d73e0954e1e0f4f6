"""Images, image-level labels and augmented batches. Imports nothing of the engine.

datasets: images and labels by index, and where they come from
views: the two views of an image, parameters apart from pixels
torch_pipeline, dali: the training pipelines; stream: what they share; batch: what they yield
evaluation_stream: whole images with their masks
ahead: loading with threads
"""
