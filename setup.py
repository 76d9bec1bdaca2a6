"""Package metadata. Ranges here; the exact versions that are tested stand in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
TRAIN = ["deepspeed>=0.19,<0.20", "webdataset>=1.0,<2", "wandb>=0.20", "tqdm", "braceexpand"]
PAGES = ["matplotlib", "soundfile>=0.12", "cairosvg>=2.7", "fsspec"]  # shards and files, seen and heard in a page
PEERS = [
    "librosa>=0.11",
    "opencv-python-headless>=4.10",
    "scikit-video",
    "threadpoolctl",
    "packaging",
]  # of launch/bench.py
SERVER = ["moto[s3]>=5", "flask", "flask-cors"]  # an S3 server on loopback; moto[server] would bring 25 more

setup(
    name="clip4vla",
    version=re.search(r'^__version__ = "(.+)"$', (HERE / "clip4vla/__init__.py").read_text(), re.M)[1],
    description="Give a CLIP model an audio encoder: pre-train it onto CLIP, fine-tune for retrieval, captioning, classification",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["clip4vla", "clip4vla.*"]),
    package_data={"clip4vla": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[  # inference alone
        "torch>=2.11,<2.12",
        "torchaudio>=2.11,<2.12",
        "open_clip_torch>=3.3,<5",  # tested: 3.3.0, and 4.2.0.dev0 by its source
        "timm>=1.0.17",  # tested: 1.0.31
        "huggingface_hub>=1",
        "safetensors>=0.4",
        "numpy>=1.26",
        "pillow",
        "av>=14",
        "pyyaml>=6",
    ],
    extras_require={  # clip4vla/cli.py knows which of them brings what
        "train": TRAIN + PAGES,
        "dali": ["nvidia-dali-cuda130>=2.0,<3"],
        "dali12": ["nvidia-dali-cuda120>=2.0,<3"],  # in its place, beside a torch for CUDA 12
        "eval": ["pycocoevalcap>=1.2", "scikit-learn"],  # captions (METEOR and tokeniser are Java programs); t-SNE
        "web": ["faiss-cpu>=1.9", "gradio>=6,<7", "fastapi", "uvicorn", *PAGES],
        "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"],
        "s3": ["s3fs"],  # shards and checkpoints at s3:// URLs; gs:// needs gcsfs, abfs:// adlfs
        # tables and the hub's data sets for data_prep/shard.py; text towers and tokenizers of transformers (tested: 5.24)
        "hf": ["pyarrow>=18", "datasets>=3", "transformers>=5.24,<6", "sentencepiece>=0.2", "protobuf"],
        "bench": ["clip4vla[train,dali,hf]", *PEERS],
        "dev": [
            "clip4vla[train,dali,eval,web,onnx,s3,hf,bench]",
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "pdoc",
            "build",
            "scipy",
            "markdown-it-py",
            *SERVER,
        ],
    },
)
