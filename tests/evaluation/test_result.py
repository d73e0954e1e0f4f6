"""What an evaluation measured, as a table."""

from pathlib import Path

import pytest
from evaluation_support import ColourNet, block_masks, evaluate, make_dataset


def test_table_names_classes_and_both_kinds_of_segmentation(tmp_path: Path) -> None:
    result = evaluate(ColourNet(), make_dataset(tmp_path, block_masks()))
    lines = result.table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:6] == ["IoU", "in", "%", "label-free", "label-aware", "best"]
    by_name = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert float(by_name["cat"][0]) == pytest.approx(result.label_free.iou[1], abs=0.006)
    assert float(by_name["mIoU"][1]) == pytest.approx(result.label_aware.miou, abs=0.006)
    assert result.cam.best_threshold != 0.5
    assert float(by_name["threshold"][2]) == pytest.approx(result.cam.best_threshold, abs=6e-4)
    assert float(by_name["threshold"][3]) == pytest.approx(0.3, abs=6e-4)
