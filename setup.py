"""Packaging. Versions here are loose; constraints.txt holds the set that the tests run with."""

from pathlib import Path

from setuptools import find_packages, setup

# In a clone without symbolic links, which cosa_fast/kernels and cosa_fast/data_pipeline are.
UNLINKED = [
    name for name in ("kernels", "data_pipeline") if not Path(__file__).parent.joinpath("cosa_fast", name).is_dir()
]

setup(
    name="cosa-fast",
    version="0.1.0",
    description="Training engine for CoSA: weakly supervised semantic segmentation from image-level labels",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["cosa_fast", "cosa_fast.*"]),
        *(f"cosa_fast.{name}" for top in UNLINKED for name in find_packages(include=[top, f"{top}.*"])),
    ],
    package_dir={f"cosa_fast.{name}": name for name in UNLINKED},
    package_data={"cosa_fast": ["configs/*.yaml", "report/*.html", "report/*.md"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        'triton>=3.6; platform_system == "Linux"',
        "timm>=1.0.20",
        "numpy>=1.26",
        "pillow>=10.3",
        "pyyaml>=6.0",
        "safetensors>=0.4",
        "huggingface_hub>=0.23",
        "tensorboard>=2.16",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "tqdm>=4.66",
    ],
    entry_points={"console_scripts": ["cosa-fast=cosa_fast.__main__:run"]},
    extras_require={
        "coco": ["pycocotools>=2.0.8"],
        "bench": ["scikit-learn>=1.5", "scipy>=1.11"],
        "dali": ["nvidia-dali-cuda130>=2.4"],
        "crf": ["pydensecrf2>=1.1"],
        "export": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"],
        "ms": ["segmentation-models-pytorch>=0.5"],
        "wandb": ["wandb>=0.18"],
        "mlflow": ["mlflow-skinny>=2.16"],
        "xformers": ["xformers>=0.0.35"],
        "dev": [
            "onnx>=1.17",
            "onnxruntime>=1.20",
            "onnxscript>=0.5",
            "pycocotools>=2.0.8",
            "pydensecrf2>=1.1",
            "segmentation-models-pytorch>=0.5",
            'nvidia-dali-cuda130>=2.4; platform_system == "Linux"',
            "pytest>=8",
            "hypothesis>=6.100",
            "scikit-learn>=1.5",
            "scipy>=1.11",
            "ruff>=0.9",
            "mypy>=1.14",
            "types-PyYAML",
            "types-tqdm",
            "types-setuptools",
        ],
    },
)
