"""Checkpoints of the authors' code: their names and ours."""

from torch import Tensor, nn

from clip4vla import fusion, towers
from clip4vla.captioner import Captioner
from clip4vla.config import DataConfig, ModelConfig
from clip4vla.model import Model
from clip4vla.settings import load


def from_official(state: dict[str, Tensor], cfg: ModelConfig) -> Model:
    """CLIP4VLA from the authors' flat state dict: clip.* (OpenAI's names), audio.visual.*, and the head that cfg.fusion names."""
    clip = {key[5:]: value.float() for key, value in state.items() if key.startswith("clip.")}
    config = towers.infer_config(clip, "official checkpoint") | {"quick_gelu": True}
    model = Model(config, cfg, load(DataConfig, None, ["preset=official"]).spectrogram)
    vision = {key[7:]: value for key, value in clip.items() if key.startswith("visual.")}
    text = {key: value for key, value in clip.items() if not key.startswith("visual.") and key != "logit_scale"}
    audio = {key[13:]: value.float() for key, value in state.items() if key.startswith("audio.visual.")}
    model.audio.type_embedding.data.copy_(audio.pop("control_embedding"))  # row 0 VB, row 1 NB
    model.vision.load_state_dict(vision)
    model.text.load_state_dict(text)
    model.audio.trunk.load_state_dict(audio)
    if cfg.fusion != "global_global":
        model.head.load_state_dict(_head(state, model.head))
    if cfg.fusion == "captioner":  # tied: in their checkpoints both names hold one tensor
        model.text.token_embedding.weight.data.copy_(state["cls.predictions.decoder.weight"])
    return model


def _head(state: dict[str, Tensor], head: nn.Module) -> dict[str, Tensor]:
    """The authors' cross.*, similarity_dense.* and cls.predictions.* under our names; they have as many positions as CLIP's
    text tower."""
    names = {"transformer.resblocks.": "blocks.", "token_type_embeddings.weight": "type_embedding"}
    out = {}
    for key, value in state.items():
        if key.startswith("cross."):
            name = key[6:]
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            out[f"encoder.{name}"] = value.float()
    rows = len(head.encoder.positional_embedding)
    out["encoder.positional_embedding"] = out["encoder.positional_embedding"][:rows]
    if isinstance(head, fusion.LocalToLocal):
        out |= {f"score.{name}": state[f"similarity_dense.{name}"].float() for name in ("weight", "bias")}
    if isinstance(head, Captioner):
        theirs, pairs = "cls.predictions.", {"transform.dense": "dense", "transform.LayerNorm": "norm"}
        out |= {
            f"{our}.{n}": state[f"{theirs}{their}.{n}"].float()
            for their, our in pairs.items()
            for n in ("weight", "bias")
        }
        out["bias"] = state[f"{theirs}bias"].float()
    return out
