"""Images, image-level labels and augmented batches. Imports nothing of the engine."""
