"""Package `emkum`: Extracting Multimodal Knowledge from Unimodal Models, on fairseq.

Python 3.12 is the first choice: fairseq-fixed has a ready-made wheel for it and compiles from source on 3.11.
The folder `user_dir/` is not a package of this distribution: fairseq takes it by path (`--user-dir`).
"""

from setuptools import find_packages, setup

REQUIREMENTS = [
    # The newest three of torch that agree with one another; a later torch breaks `import torchaudio`.
    "torch==2.11.0",
    "torchvision==0.26.0",
    "torchaudio==2.11.0",
    # The maintained fork: upstream fairseq 0.12.2 neither imports on Python >= 3.11 nor holds Data2Vec 2.
    "fairseq-fixed==0.12.3.1",
    "timm==1.0.31",
    "sentencepiece==0.2.3",
    # Without it `--tensorboard-logdir` logs nothing and says nothing.
    "tensorboardX",
    "numpy",
    # Logistic regression of linear probes.
    "scikit-learn",
    "pillow",
    "pyyaml",
    "matplotlib",
    "safetensors",
    "tqdm",
    # WordPiece and byte-pair tokenizers; their splitting rules; the repair of broken Unicode that CLIP's begins with.
    "tokenizers",
    "regex",
    "ftfy",
]

# No extra for apex: the PyPI package of that name is an unrelated project. NVIDIA's apex is an optional accelerator
# that fairseq detects by itself where it is installed.
EXTRAS = {
    # Tokenizers and teachers are compared with transformers and open_clip; webdataset writes tars that are read.
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "faiss-cpu>=1.9",
        "scipy",
        "ruff==0.17.6",
        "pyarrow",
        "transformers>=5",
        "open_clip_torch>=3.3",
        "webdataset>=1",
    ],
    # Captions and texts in Parquet files.
    "parquet": ["pyarrow"],
    # Teachers of open_clip.
    "openclip": ["open_clip_torch>=3.3"],
    # k-means for `emkum fit-clusters`.
    "clusters": ["faiss-cpu>=1.9"],
    # Sounds in FLAC, OGG or MP3 files, and WAV of floating-point numbers.
    "sounds": ["soundfile"],
    "fsdp": ["fairscale"],
    "hub": ["huggingface_hub"],
    # Runs of `emkum reproduce` as jobs of SLURM.
    "slurm": ["submitit>=1.5"],
    # `emkum figures map --method umap`.
    "umap": ["umap-learn"],
}

# For the tests alone, and without its dependencies, whose pins contradict those above: BEiT-3's own source, which the
# one here is compared with. `examples/setup.sh` reads this line.
WITHOUT_DEPENDENCIES = ["torchscale==0.3.0"]

setup(
    name="emkum",
    version="0.1.0",
    description="Small vision-language models out of pretrained unimodal ones, on fairseq",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["emkum", "emkum.*"]),
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["emkum = emkum.cli:main"]},
)
