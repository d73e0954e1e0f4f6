"""cosa_fast: training engine for CoSA, weakly supervised co-training with swapping assignments (arXiv 2402.17891)."""

from pathlib import Path

__version__ = "0.1.0"

# kernels/ and data_pipeline/ are symbolic links to the folders above. Clones on Windows may have text files in their
# place, and archives nothing: then the packages are looked for where the links would lead.
_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels" / "__init__.py").is_file():
    __path__.append(str(_HERE.parent))
