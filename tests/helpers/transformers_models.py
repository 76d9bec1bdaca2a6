"""Tiny models of transformers with a text and a vision tower, and tokenizers for them."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from clip4vla.quick_imports import import_for_open_clip

transformers = import_for_open_clip("transformers")  # which clip4vla.cli, in tests before, keeps out

WORDS = "a dog barks at the rain in big red town".split()
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
PICTURE = {"image_size": 32, "patch_size": 16} | {k: v for k, v in SMALL.items() if k != "vocab_size"}
TOKENS = {  # (special tokens, by number; those before and after a text): of OpenAI's, SigLIP 2's, XLM-R's and BERT's kind
    "openai": (["<s>", "</s>"], "<s>", "</s>"),
    "gemma": (["<pad>", "</s>", "<unk>"], None, "</s>"),
    "xlm-r": (["<s>", "<pad>", "</s>"], "<s>", "</s>"),
    "bert": (["[PAD]", "[CLS]", "[SEP]"], "[CLS]", "[SEP]"),
}


def equal_to_theirs():
    """(Configuration, kind of tokenizer, image processor) by name, of the models whose vectors are compared."""
    both, square = {"text_config": SMALL, "vision_config": PICTURE, "projection_dim": 24}, {"height": 32, "width": 32}
    siglip = SMALL | {"max_position_embeddings": 9, "projection_size": 32}
    naflex = {k: v for k, v in PICTURE.items() if k != "image_size"} | {"num_patches": 4}
    xlm = SMALL | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    align = {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 32}
    library = transformers
    openai = (
        both
        | {"projection_dim": 64}
        | {"text_config": SMALL | {"bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 20}}
    )
    clip = library.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square)
    half = library.SiglipImageProcessor(size=square, resample=2)
    return {
        "clip": (library.CLIPConfig(**openai), "openai", clip),
        "siglip": (library.SiglipConfig(text_config=siglip, vision_config=PICTURE), "gemma", half),
        "siglip2": (
            library.Siglip2Config(text_config=siglip, vision_config=naflex),
            "gemma",
            library.Siglip2ImageProcessor(patch_size=16, max_num_patches=4),
        ),
        "metaclip_2": (library.MetaClip2Config(**both | {"text_config": xlm}), "xlm-r", clip),
        "altclip": (library.AltCLIPConfig(**both | {"text_config": xlm | {"project_dim": 32}}), "xlm-r", clip),
        "chinese_clip": (library.ChineseCLIPConfig(**both), "bert", clip),
        "align": (
            library.AlignConfig(text_config=SMALL, vision_config=align, projection_dim=32),
            "bert",
            library.EfficientNetImageProcessor(
                size=square, do_center_crop=False, rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False, resample=2
            ),
        ),
    }  # fmt: skip


def made_tokenizer(kind):
    """A tokenizer of WORDS with special tokens of a kind."""
    special, first, last = TOKENS[kind]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    single = " ".join(part for part in (first, "$A", last) if part)
    used = [(token, special.index(token)) for token in (first, last) if token]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
    pad = "</s>" if kind == "openai" else next(token for token in special if "pad" in token.lower())
    ends = {"cls_token": first, "sep_token": last} if kind == "bert" else {"bos_token": first, "eos_token": last}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, model_max_length=20, padding_side="right", **ends
    )


def others():
    """(Configuration, edge of a picture in pixels, D) of further models, by name."""
    library, both = transformers, {"text_config": SMALL, "vision_config": PICTURE, "projection_dim": 24}
    vit, bert = library.ViTConfig(**PICTURE), library.BertConfig(**SMALL)
    return {
        "aimv2": (library.Aimv2Config(**both), 32, 24),
        "blip": (library.BlipConfig(**both), 32, 24),
        "clipseg": (library.CLIPSegConfig(**both), 32, 24),
        "flava": (
            library.FlavaConfig(text_config=SMALL, image_config=PICTURE, hidden_size=32, projection_dim=24),
            32,
            24,
        ),
        "groupvit": (library.GroupViTConfig(text_config=SMALL, projection_dim=24), 224, 24),
        "owlvit": (library.OwlViTConfig(**both), 32, 24),
        "tipsv2": (library.Tipsv2Config(), 448, 768),
        "dual": (library.VisionTextDualEncoderConfig.from_vision_text_configs(vit, bert, projection_dim=24), 32, 24),
    }
