"""Pictures of what networks see.

palette: the colours of class indices
overlay: classes and confidences laid over an image
gallery: one sheet of a run's images, CAMs, pseudo-labels, segmentations
"""
