"""The check of the benchmarks' charts."""

from pathlib import Path

from PIL import Image


def assert_chart(path: Path) -> None:
    """A picture of more than two colours."""
    with Image.open(path) as image:
        assert image.width > 300
        assert image.convert("RGB").getcolors(2) is None
