"""What is installed, and from which folder."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="cl-dist",
    version="0.1.0",
    description="Distributed continual learning for language models: MIGU and KIF on DeepSpeed ZeRO shards",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # benchmarks, kernels and launch lie at the top level and are imported through symbolic links in cl_dist: a module
    # named `kernels` would be taken for the PyPI package of that name, which transformers looks for.
    packages=find_packages(include=["cl_dist", "cl_dist.*"]),
    package_data={"cl_dist": ["py.typed", "recipes/*.yaml"], "cl_dist.launch": ["job.sh"], "cl_dist.report": ["templates/*"]},
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
        "shtab>=1.7",
        "zstandard>=0.23",
        "typing_extensions>=4.15",
    ],
    extras_require={
        "general": ["lm_eval>=0.4.13,<0.5"],
        "mpi": ["mpi4py>=4.1"],
        # For builds of PyTorch that bring no Triton. Those that do pin one: 2.11 has 3.6.0, 2.13 has 3.7.1.
        # `make test-triton` runs the tests of the kernels with both, `make test` with 3.8.
        "triton": ["triton>=3.6,<4; platform_system == 'Linux'"],
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
