"""Models and tokenizers of transformers without a hub: published sizes, and word-level tokenizers with each family's numbers."""

import timm
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

ROBERTA = {
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
XLM = ROBERTA | {"model_type": "xlm-roberta", "vocab_size": 250002}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
MT5 = {
    "model_type": "mt5", "vocab_size": 250112, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12,
    "feed_forward_proj": "gated-gelu", "pad_token_id": 0, "eos_token_id": 1, "is_encoder_decoder": True,
}  # fmt: skip
NLLB = {
    "model_type": "m2m_100", "vocab_size": 256206, "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12,
    "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "max_position_embeddings": 1024, "scale_embedding": True, "is_encoder_decoder": True,
}  # fmt: skip
CONFIGS = {  # what their config.json files say of the architecture
    "roberta-base": ROBERTA | {"model_type": "roberta", "vocab_size": 50265},
    "xlm-roberta-base": XLM,
    "xlm-roberta-large": XLM | LARGE,
    "google/mt5-base": MT5,
    "google/mt5-xl": MT5 | {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "facebook/nllb-200-distilled-600M": NLLB,
    "facebook/nllb-200-distilled-1.3B": NLLB
    | {"encoder_layers": 24, "decoder_layers": 24, "encoder_ffn_dim": 8192, "decoder_ffn_dim": 8192},
}
SHALLOW = dict.fromkeys(
    ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"), 1
)
SMALL = SHALLOW | {  # every width, depth and vocabulary of these
    "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64,
    "num_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "vocab_size": 600,
}  # fmt: skip
SPECIAL = {  # (template, padding, numbers) of the tokenizers
    "timm/ViT-B-16-SigLIP": ("$A </s>", "</s>", {"</s>": 1}),
    "timm/ViT-B-16-SigLIP2": ("$A <eos>", "<pad>", {"<pad>": 0, "<eos>": 1}),
    "bert-base-uncased": ("[CLS] $A [SEP]", "[PAD]", {"[PAD]": 0, "[CLS]": 101, "[SEP]": 102}),
    "facebook/xlm-v-base": ("<s> $A </s>", "<pad>", {"<s>": 0, "<pad>": 1, "</s>": 2}),
    "xlm-roberta-base": ("<s> $A </s>", "<pad>", {"<s>": 0, "<pad>": 1, "</s>": 2}),
    "roberta-base": ("<s> $A </s>", "<pad>", {"<s>": 0, "<pad>": 1, "</s>": 2}),
    "google/mt5-base": ("$A </s>", "<pad>", {"<pad>": 0, "</s>": 1}),
    "facebook/nllb-200-distilled-600M": ("eng $A </s>", "<pad>", {"<pad>": 1, "</s>": 2, "eng": 500}),
}
WORDS = "a crow sits on the red fire engine and looks at two dogs that play".split()


STAGES = {
    "convnext": "depths",
    "swin": "depths",
    "fastvit": "layers",
}  # what timm calls the number of blocks of each stage


def published(monkeypatch, blocks: int = 1):
    """Give models of transformers as they are published, timm's with `blocks` blocks, or in each stage: {"small": False}."""
    plain, size = timm.create_model, {"small": False}

    def shallow(name, **words):
        stages = next((word for start, word in STAGES.items() if name.startswith(start)), None)
        count = 5 if name in ("fastvit_mci3", "fastvit_mci4") else 4
        return plain(name, **words, **({stages: (blocks,) * count} if stages else {"depth": blocks}))

    monkeypatch.setattr(timm, "create_model", shallow)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name, **_: config(name, size["small"]))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **_: tokenizer(name))
    return size


def config(name: str, small: bool):
    """The configuration of a model of transformers, of one block."""
    from transformers import AutoConfig

    known = dict(CONFIGS[name])
    made = AutoConfig.for_model(known.pop("model_type"), **known)
    for key, value in (SMALL if small else SHALLOW).items():
        if hasattr(made, key):
            setattr(made, key, value)
    return made


def tokenizer(name: str):
    """A tokenizer of WORDS, numbered from 200 on, with the special tokens of the model's."""
    from transformers import PreTrainedTokenizerFast

    template, padding, numbers = SPECIAL[name]
    made = Tokenizer(
        models.WordLevel({word: 200 + i for i, word in enumerate(WORDS)} | numbers | {"[UNK]": 300}, "[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(template, special_tokens=[*numbers.items()])
    ends = {"sep_token": "[SEP]"} if "[SEP]" in numbers else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=padding, unk_token="[UNK]", **ends)
