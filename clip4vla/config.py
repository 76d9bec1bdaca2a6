"""Every setting of the project as dataclasses, with its meaning; settings.py reads them. The presets `paper` and `official`."""

from dataclasses import dataclass, field
from typing import Any, Literal


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: one line that says what, where, and what to change.

    What a file has put into it can neither break the line, nor steer the terminal, nor fill it.
    """

    def __init__(self, said: object = "") -> None:
        text = str(said)
        text = text if len(text) <= 2000 else f"{text[:1200]} … {text[-700:]}"
        super().__init__("".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text))


def setting(default: Any, meaning: str, low: float | None = None) -> Any:
    """A dataclass field with its meaning, which `--help` prints, and the least value that makes sense."""
    metadata = {"help": meaning, "low": low}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class SpectrogramConfig:
    """Waveform to log-mel segments, and their 8-bit code. Shapes the pixels, so all of it is in the fingerprint."""

    sample_rate: int = setting(16000, "Hz; audio is resampled to it", low=1000)
    window: Literal["hamming", "hann"] = setting("hamming", "window function (official: hann)")
    win_length: int = setting(512, "samples in a window (32 ms)", low=2)
    hop_length: int = setting(128, "samples between rows (8 ms, so 125 rows a second)", low=1)
    n_fft: int = setting(1024, "FFT points; 512 leaves 12 of the 224 mel filters without a bin (official: 512)", low=2)
    n_mels: int = setting(224, "mel channels, the width of a segment", low=1)
    f_min: float = setting(0.0, "Hz, lower edge of the lowest mel filter")
    f_max: float = setting(8000.0, "Hz, upper edge of the highest mel filter")
    top_db: float = setting(80.0, "dB kept below the loudest point of a clip")
    channels: Literal["mono", "lmr"] = setting("mono", "one channel, or left/mid/right as RGB (official: lmr)")
    segment_rows: int = setting(224, "rows of a segment (1.792 s)", low=1)
    extra_segment: bool = setting(False, "append a blank segment when rows divide by 224 (official: true, a bug)")
    max_segments: int = setting(10, "longer clips keep their contiguous centre", low=1)
    db_min: float = setting(-95.0, "dB stored as 0")
    db_max: float = setting(32.5, "dB stored as 255 (steps of 0.5 dB with the default range)")
    codec: Literal["png", "jpg"] = setting(
        "jpg", "png is lossless after the 8-bit code; jpg 95 takes 3/4 of it and errs by 0.9 dB rms"
    )
    quality: int = setting(95, "JPEG quality of spectrograms", low=1)


@dataclass
class FramesConfig:
    """The film strip: frames of a clip, resized and cropped as CLIP does, stacked vertically in one JPEG."""

    size: int = setting(224, "pixels, both sides", low=32)
    fps: float = setting(1.0, "frames per second; 0: max_frames of every clip", low=0)
    max_frames: int = setting(12, "longer clips are sampled uniformly", low=1)
    quality: int = setting(90, "JPEG quality of the film strip", low=1)


@dataclass
class DataConfig:
    """What data_prep/shard.py does: media and annotations in, tar shards out."""

    dataset: Literal[
        "folder", "stamps", "howto100m", "audioset", "msrvtt", "msrvtt_1ka", "vatex", "audiocaps", "clotho",
        "activitynet", "youcook2", "esc50", "ucf101",
    ] = setting("folder", "which annotation format, see data_prep/annotations.py")  # fmt: skip
    annotations: str = setting("", "annotation file or folder; empty: media_root")
    media_root: str = setting("", "folder with the media; paths in manifests are relative to it and stay inside")
    cut: bool = setting(False, "files named after a whole video hold the annotated interval alone")
    languages: list[str] = setting([], "captions of these languages are kept, e.g. en; empty: all")
    clips_per_video: int = setting(0, "howto100m: clips taken of a video, spread over it; 0: all", low=0)
    out: str = setting("", "folder that receives SOURCE/SPLIT/{*.tar, index.json, quarantine.jsonl}")
    preset: Literal["paper", "official"] = setting("paper", "defaults as in the paper, or as in the authors' code")
    samples_per_shard: int = setting(256, "samples in one tar", low=1)
    workers: int = setting(0, "processes; 0: one for each core", low=0)
    time_limit: float = setting(120.0, "seconds after which a file that hangs is given up", low=0.1)
    max_damage: float = setting(0.01, "share of items that may fail before shard.py gives up", low=0)
    spectrogram: SpectrogramConfig = field(default_factory=SpectrogramConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)


@dataclass
class ModelConfig:
    """Three towers."""

    clip: str = setting(
        "ViT-B-32-quickgelu/openai",
        "open_clip name, NAME/PRETRAINED tag, weights file (.safetensors, .pt), or .json in open_clip's format",
    )
    quick_gelu: Literal["auto", "yes", "no"] = setting(
        "auto", "activation; auto: as the weights were trained, yes for OpenAI's"
    )
    modalities: Literal["v", "a", "av"] = setting("av", "which media towers are used beside text")
    fusion: Literal["global_global", "global_local", "local_local", "captioner", "classifier"] = setting(
        "global_global", "head: one of three for retrieval, the caption generator, or a linear classifier"
    )
    labels: list[str] = setting([], "classes of the classifier; empty: the labels of data.train's clips")
    fusion_layers: int = setting(4, "blocks of the head, started from the text tower's first ones", low=1)
    fusion_dropout: float = setting(0.1, "on what the head's blocks read", low=0)
    words: Literal["all", "eos"] = setting("all", "what of a caption local_local reads (official: both exist)")
    max_frames: int = setting(12, "frames of a clip that a head has positions for", low=1)
    mean: Literal["unit", "raw"] = setting("unit", "mean of vision and audio brought to unit length, or not (official)")
    freeze_layers: dict[str, int] = setting(
        {}, "tower: its first so many blocks, and what lies before them, stay frozen"
    )
    audio_type: str = setting("both", "type token when not pre-training: vb, nb, both, none, or the share of NB, 0..1")
    pretrain_type: Literal["data", "none"] = setting("data", "token in pre-training: the clip's own type, or none")
    audio_init: Literal["vision", "scratch"] = setting("vision", "where the audio tower starts")
    position_init: Literal["matched", "unit"] = setting("matched", "extra position row: as the others, or std 1")
    normalise: Literal["valid", "padded"] = setting("valid", "z-score over valid rows, or after zero padding in dB")
    max_tokens: int = setting(32, "text tokens, [SOS] and [EOS] included", low=2)
    temperature: float = setting(0.01, "of the cosine similarities", low=0.0001)
    learn_temperature: bool = setting(False, "train the temperature too")
    train_towers: str = setting("audio", "trainable towers joined by +, e.g. text+vision; the others are frozen")


@dataclass
class DataSources:
    """Where samples come from: shard folders with their shares of a batch, and how they are read."""

    train: dict[str, float] = setting({}, "shard folder: share; a folder or a list of folders means equal shares")
    val: dict[str, float] = setting({}, "shard folders for evaluation during training")
    test: dict[str, float] = setting({}, "shard folders for launch/evaluate.py")
    window: int = setting(8, "shards whose samples are shuffled together", low=1)
    decode_threads: int = setting(2, "DALI threads of a rank", low=1)
    prefetch: int = setting(2, "batches prepared ahead", low=0)
    max_damage: float = setting(0.01, "share of samples read that may be damaged before the run stops", low=0)
    timeout: float = setting(60.0, "seconds for one answer of a remote storage (s3://, gs://, https://)", low=0.1)
    retries: int = setting(5, "further attempts at what a remote storage did not give", low=0)
    cache: str = setting("", "folder on a local disk of the node that keeps what was read remotely; empty: none")
    cache_gb: float = setting(100.0, "GB that the cache may take, for all ranks of the node", low=0)
    captions: Literal["random", "cycle", "first"] = setting(
        "random", "of a clip, for each visit in training: one at random, all of them in turn, or always the first"
    )
    languages: list[str] = setting([], "captions of these languages are used, e.g. en; empty: all")
    vectors: Literal["auto", "use", "off"] = setting(
        "auto", "frozen text and vision from data_prep/embed.py's vectors: where every folder has them, always, never"
    )


@dataclass
class LossConfig:
    """Weights of the terms of equation (5), and of the stage that trains a CLIP."""

    at: float = setting(1.0, "NCE_at, text and audio (1)")
    av: float = setting(1.0, "NCE_av, vision and audio (2) (official: 2)")
    aa: float = setting(1.0, "NCE_aa, audio and its masked view (3)(4)")
    tv: float = setting(0.0, "text and vision, to train a CLIP")
    tm: float = setting(0.0, "text and media, as model.fusion compares them, to fine-tune retrieval")
    directions: Literal["both", "text_to_media"] = setting("both", "of tm: symmetric, or one way (official)")
    caption: float = setting(0.0, "next words of the captions (7), with model.fusion=captioner")
    label: float = setting(0.0, "labels of the clips, with model.fusion=classifier")
    label_smoothing: float = setting(
        0.0, "of caption and label: share of the target spread over vocabulary or classes", low=0
    )
    padded_words: bool = setting(False, "caption learns the padding behind a caption too (official: true)")
    exclude_same_group: bool = setting(False, "clips of one group are no negatives of each other")


@dataclass
class MaskConfig:
    """The augmented view of a spectrogram."""

    time_share: float = setting(0.15, "share of the rows where a masked run starts", low=0)
    channel_share: float = setting(0.05, "share of the mel channels where a masked run starts", low=0)
    width: int = setting(10, "rows or channels in a run; runs may overlap", low=0)
    uniform_width: bool = setting(False, "draw each width from 0..width (official: true)")
    fill: Literal["mean", "zero_db"] = setting("mean", "0 after normalisation, or 0 dB before it (official)")


@dataclass
class TrainConfig:
    """The training loop."""

    max_steps: int = setting(1000, "optimizer steps; 0: none, evaluate.py takes the weights as they are", low=0)
    batch_size: int = setting(256, "clips in the global batch, over all ranks", low=1)
    accumulate: int = setting(1, "micro-batches that a global batch is run in, to fit in memory", low=1)
    negatives: Literal["global", "micro"] = setting(
        "global",
        "with accumulation: of the whole global batch (costs a second forward pass), or of a micro-batch alone",
    )
    recompute: bool = setting(
        False, "activation checkpointing: a forward pass more, activations of one block in memory"
    )
    compile: Literal["off", "inductor", "aot_eager"] = setting(
        "off", "torch.compile and its backend; batches are padded to few sizes, so that it compiles a few times only"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "auto: bf16 where it is fast (a GPU; a CPU with AMX; AMD with AVX512-BF16), else fp32"
    )
    lr: float = setting(1e-4, "peak learning rate", low=0)
    lr_scale: dict[str, float] = setting({}, "text, vision, audio or head: factor on lr for its weights")
    betas: list[float] = setting([0.9, 0.98], "AdamW")
    eps: float = setting(1e-6, "AdamW", low=0)
    weight_decay: float = setting(0.2, "not on biases, norms, embeddings and temperature", low=0)
    warmup: float = setting(0.1, "share of the steps with a linear warm-up; cosine after it", low=0)
    clip: float = setting(1.0, "gradient norm; 0: off", low=0)
    log_every: int = setting(10, "steps between log lines; the only steps that wait for the device", low=1)
    save_every: int = setting(500, "steps between checkpoints", low=1)
    timeout: float = setting(
        30.0, "minutes on one step, save or evaluation batch: the job hangs, and is ended", low=0.01
    )
    save_minutes: float = setting(0.0, "minutes between checkpoints, beside save_every; 0: off", low=0)
    save_async: bool = setting(False, "write checkpoints in the background, from a copy in memory")
    keep: int = setting(2, "newest checkpoints kept", low=1)
    keep_every: int = setting(0, "checkpoints of steps divisible by this are kept too; 0: none", low=0)
    mirror: str = setting("", "URL (s3://, gs://, ...) where checkpoints are copied to and resumed from; empty: none")


@dataclass
class DecodeConfig:
    """How captions are written."""

    method: Literal["beam", "greedy", "nucleus", "nearest"] = setting(
        "beam",
        "beam search, the likeliest token, sampling; or the caption of the training clip that looks most alike",
    )
    beams: int = setting(5, "captions of a clip that beam search follows", low=1)
    length_penalty: float = setting(0.0, "beam: log-probability / tokens ** this (0: the sum, as the authors do)")
    min_tokens: int = setting(1, "least tokens of a caption", low=0)
    max_tokens: int = setting(0, "most tokens of a caption, [EOS] included; 0: as learnt, model.max_tokens - 1", low=0)
    no_repeat: int = setting(0, "no n-gram of so many tokens comes twice; 0: any may", low=0)
    top_p: float = setting(0.9, "nucleus: the likeliest tokens that have so much of the probability", low=0)
    temperature: float = setting(1.0, "nucleus: of the scores", low=0.001)


@dataclass
class ClassifyConfig:
    """How clips get their labels (eval.task=classification)."""

    method: Literal["probe", "zero_shot", "classifier"] = setting(
        "probe",
        "a linear probe on frozen features; the text tower's vectors of the classes' names; or the head that was trained",
    )
    held_out: Literal["together", "in_turn"] = setting(
        "together",
        "the folders of data.test: one test set, or folds, of which those not held out train with data.train",
    )
    strengths: list[float] = setting(
        [0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4],
        "probe: inverse L2 penalties (scikit-learn's C) to choose from, on a fifth of the training clips, by whole groups",
    )
    shots: list[int] = setting([], "probe: clips of each class that it is fitted on too, for few-shot curves")
    draws: int = setting(5, "probe: times that so few clips are drawn", low=1)
    labels: list[str] = setting(
        [], "zero_shot: the classes, or one .txt file with a class a line; empty: the clips' own"
    )
    templates: list[str] = setting(["{}"], "zero_shot: sentences with {} for the class, whose vectors are averaged")


@dataclass
class EvalConfig:
    """Evaluation on held-out data."""

    task: Literal["zero_shot", "retrieval", "captioning", "classification"] = setting(
        "zero_shot",
        "six directions between single modalities, text and media as model.fusion compares them, written captions, or labels",
    )
    silent: Literal["nearest", "zero", "exclude"] = setting(
        "nearest", "retrieval: clips without sound take that of the most similar training clip, none, or are left out"
    )
    select: str = setting(
        "",
        "metric on data.val, as text_to_video/R@1, caption/CIDEr or label/accuracy, whose best checkpoint is kept and evaluated",
    )
    bootstrap: int = setting(1000, "resamples, of groups of queries, for 95% intervals; 0: none", low=0)
    every: int = setting(0, "steps between evaluations on data.val; 0: never", low=0)
    clips: int = setting(0, "the first so many clips of each folder of data.val; 0: all", low=0)
    batch_size: int = setting(128, "clips in a batch, over all ranks", low=1)
    captions: Literal["first", "all"] = setting("all", "captions of an item used, as queries or as references")
    types: list[str] = setting(
        ["both"], "type tokens, the first is the main one: vb, nb, both, none, data (the clip's own), or 0..1"
    )
    permutations: int = setting(2000, "for the p-value; 0: none", low=0)
    report_queries: int = setting(20, "queries shown on the report page", low=0)


@dataclass
class TrackConfig:
    """What is written about a run."""

    wandb: Literal["auto", "online", "offline", "off"] = setting("auto", "auto: online with a key, else offline")
    project: str = setting("clip4vla", "wandb project")
    samples: bool = setting(False, "every rank lists its samples, a line a step: RUN/samples/rank-NNNNN.jsonl")


@dataclass
class RunConfig:
    """One run of launch/*.py."""

    run_dir: str = setting("runs/default", "everything about the run goes here")
    preset: Literal["paper", "official"] = setting("paper", "defaults as in the paper, or as in the authors' code")
    init_from: list[str] = setting(
        [], "run or checkpoint folders, or scratch; the first that is there gives the weights"
    )
    seed: int = setting(0, "of the sample order, masks and fresh weights", low=0)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataSources = field(default_factory=DataSources)
    loss: LossConfig = field(default_factory=LossConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


@dataclass
class ImportConfig:
    """launch/convert.py: what foreign weights alone do not say."""

    preset: Literal["paper", "official"] = setting("paper", "defaults; official for the authors' checkpoints")
    model: ModelConfig = field(default_factory=ModelConfig)
    spectrogram: SpectrogramConfig = field(default_factory=SpectrogramConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)


# What the released code does where the paper says otherwise or nothing (shares of one table with tests/test_config.py).
OFFICIAL: dict[str, Any] = {
    "spectrogram.window": "hann",
    "spectrogram.n_fft": 512,
    "spectrogram.channels": "lmr",
    "spectrogram.extra_segment": True,
    "model.normalise": "padded",
    "model.audio_type": "0.5",  # one averaged token
    "model.position_init": "unit",
    "model.mean": "raw",
    "loss.av": 2.0,
    "loss.directions": "text_to_media",
    "loss.padded_words": True,
    "mask.uniform_width": True,
    "mask.fill": "zero_db",
}
