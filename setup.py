"""What is installed, and from which folder."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
BENCHMARK_RESULTS = "benchmarks/results"
"""What our own benchmarks have measured; the pages show it."""


def readme() -> str:
    """README.md as it can be shown elsewhere: without pictures and links into the repository, which lead nowhere there.

    What they say stays readable: a picture's description, and `GPUs (docs/gpu.md)`.
    """
    page = HERE / "README.md"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    away = r"(?!https?://|mailto:)"
    text = re.sub(r"<picture>.*?\balt=\"([^\"]*)\".*?</picture>", r"\1", text, flags=re.DOTALL)
    text = re.sub(rf"!\[([^]]*)\]\({away}[^)]*\)", "", text)
    text = re.sub(rf"<img\b[^>]*\bsrc=[\"']{away}[^>]*>|</?(?:picture|source)\b[^>]*>", "", text)
    text = re.sub(rf"<a\b[^>]*\bhref=[\"']{away}[^>]*>(.*?)</a>", r"\1", text, flags=re.DOTALL)
    return re.sub(rf"\[([^]]*)\]\({away}([^)]*)\)", _named, text)


def _named(link: "re.Match[str]") -> str:
    text, target = link[1], link[2].partition("#")[0]
    return text if not target or text.strip("`") == target else f"{text} ({target})"


def data_files() -> list[str]:
    """Every file of the package that is not code, by its path in it: recipes, templates, job.sh, py.typed."""
    root = HERE / "cl_dist"
    found = [
        Path(folder, name).relative_to(root)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if not name.startswith(".") and Path(name).suffix not in (".py", ".pyc")
    ]
    return sorted(path.as_posix() for path in found if not path.is_relative_to(BENCHMARK_RESULTS))


setup(
    name="cl-dist",
    version="0.1.0",
    description="Distributed continual learning for language models: MIGU and KIF on DeepSpeed ZeRO shards",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    keywords=[
        "continual learning",
        "catastrophic forgetting",
        "language models",
        "fine-tuning",
        "distributed training",
        "DeepSpeed",
        "ZeRO",
        "MIGU",
        "KIF",
        "LoRA",
    ],
    # The papers whose methods it implements. The code has no public address yet.
    project_urls={
        "MIGU (paper)": "https://arxiv.org/abs/2406.17245",
        "KIF (paper)": "https://arxiv.org/abs/2408.05200",
        "TaSL (paper)": "https://arxiv.org/abs/2408.09857",
        "Recurrent-KIF (paper)": "https://arxiv.org/abs/2502.17510",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # benchmarks, kernels and launch lie at the top level and are imported through symbolic links in cl_dist: a module
    # named `kernels` would be taken for the PyPI package of that name, which transformers looks for.
    packages=find_packages(include=["cl_dist", "cl_dist.*"]),
    package_data={"cl_dist": data_files()},
    install_requires=[
        "torch>=2.8",
        "deepspeed==0.19.8",  # cl_dist.sharding reads its private attributes: one release at a time, checked at start
        "transformers>=5.20,<6",
        "peft>=0.21,<0.22",
        "datasets>=5.2,<6",
        "accelerate>=1.15,<2",
        "huggingface_hub>=2.4,<3",
        "tokenizers>=0.23",
        "safetensors>=0.8",
        "numpy>=2.2,<3",
        "sentencepiece>=0.2",
        "protobuf>=6",  # transformers reads tokenizers that come as a sentencepiece model alone with it
        "gguf>=0.19",
        "numba>=0.63",
        "matplotlib>=3.10,<4",
        "rouge-score>=0.1.2",
        "pydantic>=2.14,<3",
        "pydantic_core",  # pydantic itself says which release
        "PyYAML>=6.0.3",
        "rich>=15",
        "jinja2>=3.1",
        "markupsafe>=3",  # the strings that jinja2 does not escape
        "shtab>=1.7",
        "pandas>=2.3",  # the tables of the Python API; datasets needs it too
        "pyarrow>=21",  # Parquet; datasets needs it too
        "zstandard>=0.23",
        "typing_extensions>=4.15",
    ],
    extras_require={
        "general": ["lm_eval>=0.4.13,<0.5"],
        "mpi": ["mpi4py>=4.1"],
        "trl": ["trl>=1.16,<2; python_version >= '3.11'"],  # its releases need that Python
        # For builds of PyTorch that bring no Triton. Those that do pin one: 2.11 has 3.6.0, 2.13 has 3.7.1.
        # `make test-triton` runs the tests of the kernels with both, `make test` with 3.8.
        "triton": ["triton>=3.6,<4; platform_system == 'Linux'"],
        # Trackers of experiments (`track`). The lock has the smallest one alone.
        "tensorboard": ["tensorboard>=2.20"],
        "wandb": ["wandb>=0.26"],
        "mlflow": ["mlflow>=3.1,<4"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"],
        "dev": [
            "axe-playwright-python>=0.1.4",
            "hypothesis>=6.168",
            "ipykernel>=6.29",
            "mypy>=2.4",
            "nbclient>=0.10",
            "playwright>=1.50",
            "pre-commit>=4.6",
            "pytest>=9.2",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["cl-dist = cl_dist.cli:program"]},
)
