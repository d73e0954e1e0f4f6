"""Images and image-level labels.

opening: open_dataset
base: what every data set offers; subset: part of one
layout: where the parts of a split are; voc, coco (instances, shapes), folder, synthetic (scene): the formats, which say
labels, tables, onehot_npy: label files; sources: which of them an image's label is from
images: reading any image upright in RGB
packed: many encoded images in one tar
masks: mask files, and sets of them that cannot be right; colours: masks that show classes as colours
pseudo_labels: training images with the masks that `predict --what cpl` wrote
identity: which images a set holds, wherever it lies
preparation: what `prepare` does; suggestion: the command that it prints; download: VOC2012 and SBD
"""
