"""Pictures of what networks see.

palette: the colours of class indices
overlay: classes and confidences laid over an image
gallery: rows of an image's panels: CAMs, pseudo-label, perplexity, segmentation, truth; one sheet of them
predictions: what `predict` makes of an image, and its files
voc_test: the archive for the VOC test server
"""
