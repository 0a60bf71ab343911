"""Packaging. `scripts/setup.sh` makes a whole environment; this file alone needs fairseq to be installed apart."""

import os
import re
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithStartup(build_py):
    """Adds the startup module and its `.pth` file to site-packages, the only place where Python reads `.pth` files.

    They lie beside the package in a regular wheel (`pip install .`) and beside the link to it in an editable one.
    """

    def run(self):
        if not self.editable_mode:  # an earlier build may have left files there that the package no longer has
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        site_packages = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        for name in ("fairseq_alibi_startup.py", "fairseq_alibi_startup.pth"):
            self.copy_file(os.path.join("fairseq_alibi", "startup", name), site_packages)


def read(path):
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), path), encoding="utf-8") as f:
        return f.read()


setup(
    name="fairseq-alibi",
    version=re.search(r'__version__ = "(.+)"', read("fairseq_alibi/__init__.py")).group(1),
    description="Train short, test long: attention with linear biases (ALiBi) for fairseq",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["fairseq_alibi", "fairseq_alibi.*"]),
    package_data={"fairseq_alibi.evaluation": ["paper.json"]},
    cmdclass={"build_py": BuildWithStartup},
    entry_points={"console_scripts": ["fairseq-alibi = fairseq_alibi.__main__:main"]},
    # 3.15 has not been tried: torch has wheels for it from 2.15 on, which is newer than what is tested.
    python_requires=">=3.9,<3.15",
    # fairseq 0.12.2 itself is not listed: its metadata pins releases that no current pip accepts, so it is installed
    # with --no-deps, and the libraries it really needs stand here.
    install_requires=[
        "torch>=2.7",
        "hydra-core>=1.3,<1.4",
        "omegaconf>=2.3,<2.4",
        "numpy>=2",
        "bitarray",
        "cffi",
        "filelock",
        "packaging",
        "regex",
        "sacrebleu",
        "tqdm",
        "matplotlib>=3.8.4",  # older ones were built for numpy 1 and do not import with numpy 2
        "joblib>=1.3",  # generators
        "sacremoses",
        "subword-nmt",
        "tabulate>=0.9",  # older ones cannot break the heads of columns
        "tensorboardX>=2.6.2.2",  # 2.6 does not import with today's protobuf
    ],
    extras_require={
        "sentencepiece": ["sentencepiece"],
        "transformers": ["transformers>=4.57.1,<5.25", "safetensors"],
        "test": [
            *("accelerate", "codespell", "hypothesis", "mypy", "pytest", "pytest-xdist", "ruff"),
            *("safetensors", "sentencepiece", "transformers>=4.57.1,<5.25"),
        ],
    },
)
