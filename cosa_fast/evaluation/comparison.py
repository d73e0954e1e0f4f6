"""Several networks' evaluations in one table: what `evaluate` prints for more than one checkpoint."""

from collections.abc import Collection, Mapping, Sequence
from math import nan
from pathlib import Path

from cosa_fast.evaluation.legend import NETWORKS, NO_MASKS, OF_PIXELS, legend
from cosa_fast.evaluation.result import format_table

Rows = Sequence[tuple[str, Mapping[str, float]]]

# Columns, by a figure's name in a summary: the group's heading and the column's own.
COLUMNS = {
    "seg_label_free": ("segmentation", "free"),
    "seg_label_aware": ("segmentation", "aware"),
    "seg_crf_ours": ("with CRF", "ours"),
    "seg_crf_pydensecrf": ("with CRF", "pydense"),
    "cam_best": ("CAM", "best"),
    "cam_at_threshold": ("CAM", "at ξ"),
    "cam_aux_best": ("CAM†", "best"),
    "ensemble_best": ("ensemble", "best"),
    "seg_cam_agreement": ("CAM/seg", "IoU"),
    "image_ap": ("image", "AP"),
}


def comparison(rows: Rows) -> str:
    """The table of (name, summary), mIoU in percent; "-" for what a network has not. Columns that no network has are
    left out."""
    used = _used(rows)
    cells = [(name, [summary.get(figure, nan) for figure in used]) for name, summary in rows]
    return format_table([COLUMNS[figure] for figure in used], cells, corner="mIoU in %")


def comparison_legend(rows: Rows, words: Collection[str]) -> str:
    """What the words of that table mean, of all `words` that the results explain."""
    headings = [COLUMNS[figure] for figure in _used(rows)]
    shown = {word for heading in headings for word in (*heading, " ".join(heading))}
    return legend({*words} & {*shown, *NETWORKS, NO_MASKS, OF_PIXELS})


def _used(rows: Rows) -> list[str]:
    return [figure for figure in COLUMNS if any(figure in summary for _, summary in rows)]


def short_names(paths: Sequence[str]) -> list[str]:
    """What tells files apart: RUN/best for runs/RUN/checkpoints/best.pt, the path's last parts where that is not
    enough."""
    parts = [[part for part in Path(path).with_suffix("").parts if part not in ("checkpoints", "/")] for path in paths]
    names: list[str] = []
    for count in range(2, max(2, *map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(set(paths)):
            break
    return names
