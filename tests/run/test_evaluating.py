"""What the loop says of an evaluation."""

from cosa_fast.run.evaluating import headline


def test_a_line_says_how_far_the_thresholds_are_from_the_best() -> None:
    summary = {
        "seg_label_free": 43.64, "seg_label_aware": 47.7, "cam_best": 52.5, "cam_threshold_loss": 1.94,
        "cam_aux_threshold_loss": -0.26, "foreground_share_cam": 0.441, "foreground_share_true": 0.34,
    }  # fmt: skip
    assert headline(summary) == (
        "seg label-free 43.6  seg label-aware 47.7  CAM at best threshold 52.5  at ξ 1.9 less  CAM† at ξ† 0.3 more  "
        "foreground 44% (truth 34%)"
    )
    before = {"seg_label_free": 3.0, "cam_best": 44.6, "foreground_share_true": 0.34}
    assert headline(before) == "seg label-free 3.0  CAM at best threshold 44.6"
