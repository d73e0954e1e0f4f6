"""The two views of an image.

parameters: a pure function of (seed, position)
pixels: the same parameters applied to pixels
"""
