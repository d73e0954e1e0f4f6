"""Clones as systems without symbolic links make them."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIND = """
import importlib.util
for name in ("kernels", "data_pipeline", "config"):
    print(importlib.util.find_spec(f"cosa_fast.{name}").origin)
"""


def test_packages_are_found_where_text_files_stand_for_links(tmp_path: Path) -> None:
    """As git writes them on Windows; a file of the package's own folder still comes first."""
    clone = tmp_path / "clone"
    for package in ("cosa_fast/config", "kernels", "data_pipeline"):
        (clone / package).mkdir(parents=True)
        (clone / package / "__init__.py").touch()
    shutil.copy(ROOT / "cosa_fast/__init__.py", clone / "cosa_fast")
    for name in ("kernels", "data_pipeline"):
        (clone / "cosa_fast" / name).write_text(f"../{name}")
    run = subprocess.run([sys.executable, "-S", "-c", FIND], cwd=clone, capture_output=True, text=True, check=True)
    found = [Path(line).relative_to(clone).parent.as_posix() for line in run.stdout.splitlines()]
    assert found == ["kernels", "data_pipeline", "cosa_fast/config"]


def test_a_clone_with_links_looks_nowhere_else() -> None:
    import cosa_fast

    assert [Path(place).resolve() for place in cosa_fast.__path__] == [ROOT / "cosa_fast"]
