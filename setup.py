"""Package metadata. Ranges here; the exact versions that are tested stand in constraints.txt."""

from setuptools import find_packages, setup

BENCH = ["librosa>=0.11", "opencv-python-headless>=4.10", "scikit-video"]  # what launch/bench.py compares with
EVAL = ["pycocoevalcap>=1.2", "scikit-learn"]  # scores of captions (its METEOR and tokeniser are Java programs); t-SNE
SERVER = ["s3fs", "moto[s3]>=5", "flask", "flask-cors"]  # an S3 server on loopback; moto[server] would bring 25 more

setup(
    name="clip4vla",
    version="0.1.0",
    description="Give a CLIP model ears: pre-train an audio tower onto CLIP, fine-tune for retrieval, captioning, classification",
    packages=find_packages(include=["clip4vla", "clip4vla.*"]),
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.8,<2.12",
        "torchvision>=0.23,<0.27",
        "torchaudio>=2.8,<2.12",
        "deepspeed>=0.19,<0.20",
        "open_clip_torch>=3.3,<4",
        "webdataset>=1.0,<2",
        "nvidia-dali-cuda130>=2.0,<3",
        "wandb>=0.20",
        "pyyaml>=6",
        "numpy>=1.26",
        "safetensors>=0.4",
        "fsspec",
        "tqdm",
        "pillow",
        "matplotlib",
        "av>=14",
        "ijson>=3.2",
        "soundfile>=0.12",
        "cairosvg>=2.7",
    ],
    extras_require={
        "eval": EVAL,
        "dev": [
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "scikit-video",
            "scipy",
            *BENCH,
            *EVAL,
            *SERVER,
        ],
        "bench": BENCH,
        "s3": ["s3fs"],  # shards and checkpoints at s3:// URLs; gs:// needs gcsfs, abfs:// adlfs
    },
)
