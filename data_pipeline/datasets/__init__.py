"""Images and image-level labels.

opening: open_dataset
base: what every data set offers; subset: part of one
layout: where the parts of a split are; voc, coco, folder, synthetic (scene): the formats, which say so
labels, tables, onehot_npy: label files
images: reading any image upright in RGB
packed: many encoded images in one tar
preparation: what `prepare` does
"""
