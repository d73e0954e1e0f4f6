"""What a network is worth, and what it says of an image.

evaluator: networks over a set: mIoU of segmentation, CAM, CAM†, ensemble
counting: everything that is counted over a set with masks
part: images of one size that are counted together, and what a network says of them
gathering: figures that stay where they are computed until the end: histograms, rows per image
image_labels: the classifier's scores of whole images beside their true labels
label_only: what can be known without masks: image AP, agreement of CAM and segmentation
protocol: how images are shown and maps come back: at their own size, or squashed as the official release does
result: the figures of an evaluation, and their table
evaluated: which images figures are of, in words and for files
comparison: several evaluations in one table
legend: what the words of these tables mean
observed: what a report draws besides the figures: confusions, confidences, quality per image
metrics: confusion matrix, threshold sweep
inference: one image through a network at several scales
cam: M' of one image
seeing: all that a network says of one image: classes, CAMs, segmentation
crf: mean-field CRF on the exact dense filter, or on pydensecrf
exporting: a network for other programs: one graph, and its files: safetensors, torch.export, ONNX
exported: the .safetensors among them, written and read back
cleaning: segmentations through the CRF, several images at a time
crf_scores: mIoU with and without the CRF, its time, how far its two methods agree
networks: networks back from a file, a checkpoint or another program's
imported: what another program's file holds, under which configuration
prediction: segmentations of any images; which files they go to
"""
