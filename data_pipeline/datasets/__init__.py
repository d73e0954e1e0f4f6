"""Images and image-level labels.

opening: open_dataset
base: what every data set offers
voc, coco, folder, synthetic (scene): the formats
labels, onehot_npy: label files
packed: many encoded images in one tar
images, inspection: reading any image upright in RGB; checking whole sets
preparation: what `prepare` does
"""
