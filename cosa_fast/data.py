"""The data section of a configuration turned into data sets and augmentation parameters."""

from cosa_fast.config import Config
from cosa_fast.data_pipeline.augment import AugmentConfig
from cosa_fast.data_pipeline.datasets import ImageDataset, open_dataset
from cosa_fast.errors import UserError


def open_datasets(config: Config) -> tuple[ImageDataset, ImageDataset]:
    """The training and the validation split; the latter must have masks and the same classes."""
    data = config.data
    training_set = open_dataset(
        data.format, data.root, data.train_split, labels=data.labels, classes=data.classes, pack=data.pack
    )
    classes = training_set.classes
    validation_set = open_dataset(data.format, data.root, data.val_split, classes=classes, need_labels=False)
    if not validation_set.has_masks:
        raise UserError(f"data.val_split={data.val_split} in {data.root} has no masks to evaluate against; add masks/")
    for key, names in (("eval.classes", config.eval.classes or ()), ("eval.coexistence", config.eval.coexistence)):
        for name in names:
            if name not in training_set.classes:
                raise UserError(
                    f"{key}: {name!r} is not a class of {data.root}; it has {', '.join(training_set.classes)}"
                )
    return training_set, validation_set


def augmentation(config: Config) -> AugmentConfig:
    """The data section's part that concerns the views."""
    data = config.data
    return AugmentConfig(
        crop_size=data.crop_size,
        scale_range=data.scale_range,
        flip_probability=data.flip_probability,
        blur_probability=data.blur_probability,
        blur_radius=data.blur_radius,
        strong=data.strong,
        mean=data.mean,
        std=data.std,
    )
