"""What the words of an evaluation's tables mean: those that are shown, each told once."""

from collections.abc import Collection

NETWORKS = frozenset({"ON", "AN"})
AVERAGE_PRECISION, OF_PIXELS = "image AP", "image AP, no classifier"
AGREEMENT, NO_MASKS = "CAM/seg IoU", "no masks"

# Lines of (words with one meaning, that).
_LINES = (
    ((("ON",), "the online network, which learns"), (("AN",), "the assignment network, its moving average")),
    ((("free",), "label-free, the best of all classes"), (("aware",), "told which classes the image holds")),
    (
        (("CAM",), "told them, too"),
        (("CAM free",), "told nothing"),
        (("CAM†",), "of the auxiliary head"),
        (("ensemble",), "of CAM and CAM†"),
    ),
    (
        (("best",), "at the fixed threshold that fits the masks best"),
        (("at ξ", "at ξ†", "mean ξ"), "at the run's own"),
    ),
    (((AVERAGE_PRECISION,), "average precision of the classifier"),),
    (((OF_PIXELS,), "of the probability that the segmentation gives a class at its surest pixel"),),
    (((AGREEMENT,), "of the segmentation with the CAM, which is told the classes: both may be wrong"),),
    (((NO_MASKS,), "nothing here tells how good the segmentation is; only masks can"),),
)


def legend(words: Collection[str]) -> str:
    """The meaning of each of these words, of those that need one, in lines of at most 100 columns."""
    lines = []
    for line in _LINES:
        parts = [([word for word in group if word in words], meaning) for group, meaning in line]
        lines.append("; ".join(f"{', '.join(shown)}: {meaning}" for shown, meaning in parts if shown))
    return "\n".join(filter(None, lines))
