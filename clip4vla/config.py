"""Every setting of the project, a field of a dataclass with its meaning. config_io.py reads them, with preset `official`."""

from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, meaning: str, low: float | None = None, path: bool = False) -> Any:
    """Make a dataclass field with its meaning, which `--help` prints, and the least value that makes sense.

    path: it names files or folders, in which config_io.py expands ~ and $VARIABLES.
    """
    metadata = {"help": meaning, "low": low, "path": path}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class SpectrogramConfig:
    """Sets how a waveform becomes log-mel segments and their 8-bit code: all of it is in the shards' fingerprint."""

    sample_rate: int = option(16000, "Hz; audio is resampled to it", low=1000)
    window: Literal["hamming", "hann"] = option("hamming", "window function (official: hann)")
    win_length: int = option(512, "samples in a window (32 ms)", low=2)
    hop_length: int = option(128, "samples between rows (8 ms, so 125 rows a second)", low=1)
    n_fft: int = option(1024, "FFT points; 512 leaves 12 of the 224 mel filters without a bin (official: 512)", low=2)
    n_mels: int = option(224, "mel channels, the width of a segment", low=1)
    f_min: float = option(0.0, "Hz, lower edge of the lowest mel filter")
    f_max: float = option(8000.0, "Hz, upper edge of the highest mel filter")
    top_db: float = option(80.0, "dB kept below the loudest point of a clip")
    channels: Literal["mono", "lmr"] = option("mono", "one channel, or left/mid/right as RGB (official: lmr)")
    segment_rows: int = option(224, "rows of a segment (1.792 s)", low=1)
    extra_segment: bool = option(False, "append a blank segment when rows divide by 224 (official: true, a bug)")
    max_segments: int = option(10, "longer clips keep their contiguous centre", low=1)
    db_min: float = option(-95.0, "dB stored as 0")
    db_max: float = option(32.5, "dB stored as 255 (steps of 0.5 dB with the default range)")
    codec: Literal["png", "jpg"] = option("jpg", "png is lossless after the 8-bit code; jpg 95: 3/4 of it, 0.9 dB rms")
    quality: int = option(95, "JPEG quality of spectrograms", low=1)


@dataclass
class FramesConfig:
    """Sets the film strip: frames of a clip, all of one size, stacked vertically in one JPEG."""

    size: int = option(224, "pixels, both sides", low=32)
    resize_mode: Literal["shortest", "squash"] = option(
        "shortest", "keep proportions and the centre, stills padded; or squash (SigLIP)"
    )
    fps: float = option(1.0, "frames per second; 0: max_frames of every clip", low=0)
    max_frames: int = option(12, "longer clips are sampled uniformly", low=1)
    quality: int = option(90, "JPEG quality of the film strip", low=1)


@dataclass
class DataConfig:
    """Sets what data_prep/shard.py does: it reads media and annotations, and writes tar shards."""

    dataset: Literal[
        "folder", "stamps", "howto100m", "audioset", "msrvtt", "msrvtt_1ka", "vatex", "audiocaps", "clotho",
        "activitynet", "youcook2", "esc50", "esc10", "urbansound8k", "grid", "ucf101", "auto_acd", "didemo", "fsd50k",
        "kinetics400", "kinetics600", "librispeech", "ljspeech", "lsmdc", "msvd", "musiccaps", "speech_commands",
        "spokencoco", "valor32k", "vggsound", "wavcaps", "webdataset", "parquet",
    ] = option("folder", "which annotation format, see data_prep/annotations.py")  # fmt: skip
    annotations: str = option("", "annotation file or folder; empty: media_root", path=True)
    media_root: str = option(
        "",
        "folder with the media; paths in manifests are relative to it and stay inside. webdataset, parquet: a folder, a file, a "
        "pattern such as FOLDER/{00000..00099}.tar, or the URL of one; parquet: hf:USER/NAME, too",
        path=True,
    )
    captions_from: list[str] = option(
        [],
        "webdataset, parquet: keys of the .json, or columns, that hold captions, texts or lists of them; A.B: B in A; txt: the "
        ".txt. Empty: .txt, else the first of caption, captions, text, texts, raw, sentence, sentences",
    )
    label_from: str = option("", "webdataset, parquet: key or column of the label; empty: .cls, else label")
    media_from: list[str] = option(
        [], "parquet: columns of media, bytes or paths; empty: those of type Audio, Image, Video or bytes, else path"
    )
    split: str = option(
        "", "webdataset, parquet: split of all; empty: by the word train, val or test in a file's path, else train"
    )
    audio_type: Literal["vb", "nb", "both"] = option("both", "webdataset, parquet: audio type of all")
    clips_already_cut: bool = option(False, "files named after a whole video hold the annotated interval alone")
    languages: list[str] = option([], "captions of these languages are kept, e.g. en; empty: all")
    clips_per_video: int = option(0, "howto100m: clips taken of a video, spread over it; 0: all", low=0)
    out: str = option("", "folder or URL that receives SOURCE/SPLIT/{*.tar, index.json, quarantine.jsonl}", path=True)
    preset: Literal["paper", "official"] = option("paper", "defaults as in the paper, or as in the authors' code")
    samples_per_shard: int = option(256, "samples in one tar", low=1)
    workers: int = option(0, "processes; 0: one for each core", low=0)
    decode_timeout: float = option(120.0, "seconds after which a file that hangs is given up", low=0.1)
    max_failed_fraction: float = option(0.01, "share of items that may fail before shard.py gives up", low=0)
    spectrogram: SpectrogramConfig = field(default_factory=SpectrogramConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)


@dataclass
class ModelConfig:
    """Sets the three towers and the head."""

    clip: str = option(
        "ViT-B-32-quickgelu/openai",
        "open_clip name, NAME/TAG, FILE of weights or NAME/FILE, hf-hub:ID, local-dir:PATH, open_clip's .json, or vectors:NAME",
        path=True,
    )
    quick_gelu: Literal["auto", "yes", "no"] = option(
        "auto", "activation; auto: as the weights were trained, yes for OpenAI's"
    )
    modalities: Literal["v", "a", "av"] = option("av", "which media towers are used beside text")
    head: Literal["global_global", "global_local", "local_local", "captioner", "classifier"] = option(
        "global_global", "head: one of three for retrieval, the caption generator, or a linear classifier"
    )
    labels: list[str] = option([], "classes of the classifier; empty: the labels of data.train's clips")
    several_labels: bool = option(False, "classifier: each class against the rest, as clips have several")
    head_layers: int = option(4, "blocks of the head, started from the text tower's first ones", low=1)
    head_dropout: float = option(0.1, "dropout on the input of the head's blocks", low=0)
    text_tokens: Literal["all", "eos"] = option(
        "all", "tokens of a caption that local_local reads (official: both exist)"
    )
    max_frames: int = option(12, "frames of a clip that a head has positions for", low=1)
    media_mean: Literal["normalized", "raw"] = option(
        "normalized", "mean of vision and audio, brought to unit length, or left as it is (official)"
    )
    freeze_layers: dict[str, int] = option({}, "tower: its first blocks that stay frozen, with what lies before them")
    audio_type: str = option("both", "type token when not pre-training: vb, nb, both, none, or the share of NB, 0..1")
    pretrain_audio_type: Literal["data", "none"] = option("data", "token in pre-training: the clip's own type, or none")
    audio_tower: str = option("vision", "vision: its copy; or a ViT, named as in model.clip, or one of timm", path=True)
    audio_init: Literal["vision", "scratch"] = option("vision", "start from the weights of audio_tower, or fresh")
    audio_patch: list[int] = option([], "[rows, mels] of the audio tower's patches, e.g. [4, 224]; empty: its own")
    audio_span: Literal["segment", "clip"] = option(
        "segment",
        "what the audio tower reads at once: a segment, and a clip has the mean of its segments; or a whole clip",
    )
    position_init: Literal["matched", "unit"] = option("matched", "extra position row: as the others, or std 1")
    audio_pool: Literal["tower", "mean"] = option(
        "tower", "vector of the audio tower's outputs: as the vision tower's ([CLS]), or their mean over patches"
    )
    spectrogram_norm: Literal["valid", "clip", "padded"] = option(
        "valid",
        "z-score over a segment's valid rows, over a clip's, or over a segment after zero padding in dB (official)",
    )
    max_tokens: int = option(32, "text tokens, [SOS] and [EOS] included", low=2)
    temperature: float = option(0.01, "divisor of the cosine similarities", low=0.0001)
    learn_temperature: bool = option(False, "train the temperature too")
    trainable_towers: str = option("audio", "trainable towers joined by +, e.g. text+vision; the others are frozen")


@dataclass
class DataSources:
    """Sets where samples come from: shard folders with their shares of a batch, and how they are read."""

    train: dict[str, float] = option(
        {}, "shard folder: share; a folder or a list of folders means equal shares", path=True
    )
    val: dict[str, float] = option({}, "shard folders for evaluation during training", path=True)
    test: dict[str, float] = option({}, "shard folders for launch/evaluate.py", path=True)
    shuffle_window: int = option(8, "shards whose samples are shuffled together", low=1)
    decode_threads: int = option(2, "DALI threads of a rank", low=1)
    prefetch: int = option(2, "batches prepared ahead", low=0)
    max_corrupt_fraction: float = option(0.01, "share of samples read that may be corrupt before the run stops", low=0)
    request_timeout: float = option(60.0, "seconds for an answer of a remote storage (s3://, gs://, ..)", low=0.1)
    retries: int = option(5, "further attempts after a failed request to a remote storage", low=0)
    cache: str = option(
        "", "folder on a local disk of the node that keeps what was read remotely; empty: none", path=True
    )
    cache_gb: float = option(100.0, "GB that the cache may take, for all ranks of the node", low=0)
    caption_sampling: Literal["random", "cycle", "first"] = option(
        "random", "of a clip, for each visit in training: one at random, all of them in turn, or always the first"
    )
    languages: list[str] = option([], "captions of these languages are used, e.g. en; empty: all")
    precomputed_embeddings: Literal["auto", "require", "off"] = option(
        "auto", "frozen text and vision from data_prep/embed.py's vectors: where every folder has them, always, never"
    )


@dataclass
class LossConfig:
    """Weighs the terms of equation (5), those of fine-tuning, and that of the stage that trains a CLIP."""

    at: float = option(1.0, "NCE_at, text and audio (1)")
    av: float = option(1.0, "NCE_av, vision and audio (2) (official: 2)")
    aa: float = option(1.0, "NCE_aa, audio and its masked view (3)(4)")
    tv: float = option(0.0, "text and vision, to train a CLIP")
    tm: float = option(0.0, "text and media, as model.head compares them, to fine-tune retrieval")
    symmetric: bool = option(True, "tm in both directions, or from text to media alone (official: false)")
    caption: float = option(0.0, "next words of the captions (7), with model.head=captioner")
    label: float = option(0.0, "labels of the clips, with model.head=classifier")
    label_smoothing: float = option(
        0.0, "of caption and label: share of the target spread over vocabulary or classes", low=0
    )
    train_on_padding: bool = option(False, "caption learns the padding after a caption too (official: true)")
    exclude_same_group: bool = option(False, "clips of one group are no negatives of each other")


@dataclass
class MaskConfig:
    """Sets the augmented view of a spectrogram."""

    time_start_prob: float = option(0.15, "share of the rows where a masked run starts", low=0)
    freq_start_prob: float = option(0.05, "share of the mel channels where a masked run starts", low=0)
    length: int = option(10, "rows or channels in a run; runs may overlap", low=0)
    random_length: bool = option(False, "draw each run's length from 0..mask.length (official: true)")
    fill: Literal["mean", "zero_db"] = option("mean", "0 after normalisation, or 0 dB before it (official)")


@dataclass
class AugmentConfig:
    """Sets how the sound of training clips is changed, in all terms of the loss, drawn by seed, clip and epoch."""

    time_shift: int = option(
        0, "rows that a clip is turned by at most, either way: what leaves at one end enters at the other", low=0
    )
    mel_shift: int = option(0, "mel channels by which it is moved up or down, at most", low=0)
    time_masks: int = option(0, "runs of rows that are hidden (SpecAugment, Park et al. 2019)", low=0)
    time_mask_rows: int = option(32, "rows of such a run, at most", low=0)
    mel_masks: int = option(0, "runs of mel channels that are hidden", low=0)
    mel_mask_channels: int = option(32, "mel channels of such a run, at most", low=0)
    mix: float = option(
        0.0, "classifier: share of clips whose sound and label are mixed with another's (Tokozume et al. 2018)", low=0
    )


@dataclass
class TrainConfig:
    """Sets the training loop."""

    max_steps: int = option(1000, "optimizer steps; 0: none, evaluate.py takes the weights as they are", low=0)
    batch_size: int = option(256, "clips in the global batch, over all ranks", low=1)
    gradient_accumulation_steps: int = option(1, "micro-batches that a global batch is run in, to fit in memory", low=1)
    negatives: Literal["global", "micro"] = option(
        "global",
        "with accumulation: of the whole global batch (costs a second forward pass), or of a micro-batch alone",
    )
    activation_checkpointing: bool = option(
        False, "activation checkpointing: a forward pass more, activations of one block in memory"
    )
    compile: Literal["off", "inductor", "aot_eager"] = option(
        "off", "torch.compile and its backend; batches are padded to few sizes, so that it compiles a few times only"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "auto: bf16 where it is fast (a GPU; a CPU with AMX; AMD with AVX512-BF16), else fp32"
    )
    lr: float = option(1e-4, "peak learning rate", low=0)
    lr_scale: dict[str, float] = option({}, "text, vision, audio or head: factor on lr for its weights")
    betas: list[float] = option([0.9, 0.98], "AdamW's decay rates of the two moments")
    eps: float = option(1e-6, "AdamW's addend in the denominator", low=0)
    weight_decay: float = option(0.2, "not on biases, norms, embeddings and temperature", low=0)
    warmup_ratio: float = option(0.1, "share of the steps with a linear warm-up; cosine after it", low=0)
    grad_clip_norm: float = option(1.0, "gradient norm; 0: off", low=0)
    log_every: int = option(10, "steps between log lines; the only steps that wait for the device", low=1)
    save_every: int = option(500, "steps between checkpoints", low=1)
    hang_timeout_minutes: float = option(
        30.0, "minutes on one step, save or evaluation batch: the job hangs, and is ended", low=0.01
    )
    save_every_minutes: float = option(0.0, "minutes between checkpoints, beside save_every; 0: off", low=0)
    save_async: bool = option(False, "write checkpoints in the background, from a copy in memory")
    keep_last: int = option(2, "newest checkpoints kept", low=1)
    keep_every: int = option(0, "checkpoints of steps divisible by this are kept too; 0: none", low=0)
    mirror: str = option(
        "", "URL (s3://, gs://, ...) where checkpoints are copied to and resumed from; empty: none", path=True
    )


@dataclass
class DecodeConfig:
    """Sets how captions are written."""

    method: Literal["beam", "greedy", "nucleus", "nearest"] = option(
        "beam",
        "beam search, the likeliest token, sampling; or the caption of the training clip that looks most alike",
    )
    num_beams: int = option(5, "captions of a clip that beam search follows", low=1)
    length_penalty: float = option(0.0, "beam: log-probability / tokens ** this (0: the sum, as the authors do)")
    min_new_tokens: int = option(1, "least tokens of a caption", low=0)
    max_new_tokens: int = option(
        0, "most tokens of a caption, [EOS] included; 0: as learnt, model.max_tokens - 1", low=0
    )
    no_repeat_ngram_size: int = option(0, "tokens of an n-gram that must not come twice; 0: any may", low=0)
    top_p: float = option(0.9, "nucleus: probability that the likeliest tokens, from which it draws, add up to", low=0)
    temperature: float = option(1.0, "nucleus: divisor of the scores", low=0.001)


@dataclass
class ClassifyConfig:
    """Sets how clips get their labels (eval.task=classification)."""

    method: Literal["probe", "zero_shot", "classifier"] = option(
        "probe",
        "a linear probe on frozen features; the text tower's vectors of the classes' names; or the head that was trained",
    )
    cross_validate: bool = option(
        False,
        "each folder of data.test is held out in turn, the others train with data.train; else they are one test set",
    )
    C: list[float] = option(
        [0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4],
        "probe: inverse L2 penalties (scikit-learn's C) to choose from, on a fifth of the training clips, by whole groups",
    )
    shots: list[int] = option([], "probe: clips of each class that it is fitted on too, for few-shot curves")
    n_draws: int = option(5, "probe: draws of the clips for each number in classify.shots", low=1)
    labels: list[str] = option(
        [], "zero_shot: the classes, or one .txt file with a class a line; empty: the clips' own"
    )
    templates: list[str] = option(["{}"], "zero_shot: sentences with {} for the class, whose vectors are averaged")


@dataclass
class EvalConfig:
    """Sets the evaluation on held-out data."""

    task: Literal["zero_shot", "retrieval", "captioning", "classification"] = option(
        "zero_shot",
        "six directions between single modalities, text and media as model.head compares them, written captions, or labels",
    )
    missing_audio: Literal["nearest", "zero", "exclude"] = option(
        "nearest", "retrieval: clips without sound take that of the most similar training clip, none, or are left out"
    )
    best_metric: str = option(
        "",
        "metric on data.val, as text_to_video/R@1, caption/CIDEr or label/accuracy, whose best checkpoint is kept and evaluated",
    )
    bootstrap: int = option(1000, "resamples, of groups of queries, for 95% intervals; 0: none", low=0)
    every_steps: int = option(0, "steps between evaluations on data.val; 0: never", low=0)
    max_val_clips: int = option(0, "clips of each folder of data.val, its first ones; 0: all", low=0)
    batch_size: int = option(128, "clips that a rank embeds at once, at most", low=1)
    captions: Literal["first", "all"] = option("all", "captions of an item used, as queries or as references")
    audio_types: list[str] = option(
        ["both"], "type tokens, the first is the main one: vb, nb, both, none, data (the clip's own), or 0..1"
    )
    permutations: int = option(2000, "permutations for the p-value; 0: none", low=0)
    report_queries: int = option(20, "queries shown on the report page", low=0)
    name: str = option(
        "",
        "of an evaluation on data.test, a folder in run_dir/eval; empty: test, or what sets its data and settings apart",
    )


@dataclass
class TrackConfig:
    """Sets what is written about a run."""

    wandb: Literal["auto", "online", "offline", "off"] = option(
        "auto", "auto: online with a key, else offline; WANDB_MODE comes before all but off"
    )
    project: str = option("clip4vla", "wandb project")
    log_sample_ids: bool = option(False, "every rank lists its samples, a line a step: RUN/samples/rank-NNNNN.jsonl")


@dataclass
class RunConfig:
    """Holds all settings of one run of launch/*.py."""

    run_dir: str = option("runs/default", "everything about the run goes here", path=True)
    preset: Literal["paper", "official"] = option("paper", "defaults as in the paper, or as in the authors' code")
    init_from: list[str] = option(
        [], "run or checkpoint folders, or scratch; the first that exists gives the weights", path=True
    )
    seed: int = option(0, "seed of the sample order, masks and fresh weights", low=0)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataSources = field(default_factory=DataSources)
    loss: LossConfig = field(default_factory=LossConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


@dataclass
class ImportConfig:
    """Sets for launch/convert.py what foreign weights alone do not say."""

    preset: Literal["paper", "official"] = option("paper", "defaults; official for the authors' checkpoints")
    model: ModelConfig = field(default_factory=ModelConfig)
    spectrogram: SpectrogramConfig = field(default_factory=SpectrogramConfig)
    frames: FramesConfig = field(default_factory=FramesConfig)


# What the released code does where the paper says otherwise or nothing (shares of one table with tests/test_config.py).
OFFICIAL: dict[str, Any] = {
    "spectrogram.window": "hann",
    "spectrogram.n_fft": 512,
    "spectrogram.channels": "lmr",
    "spectrogram.extra_segment": True,
    "model.spectrogram_norm": "padded",
    "model.audio_type": "0.5",  # one averaged token
    "model.position_init": "unit",
    "model.media_mean": "raw",
    "loss.av": 2.0,
    "loss.symmetric": False,
    "loss.train_on_padding": True,
    "mask.random_length": True,
    "mask.fill": "zero_db",
}
