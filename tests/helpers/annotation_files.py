"""Small annotation files of every format that data_prep/annotations.py reads, with the names of their media; what was skipped."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


def reasons(skipped):
    """What was skipped, by place."""
    return {item.where: f"{item.why}: {item.reason}" for item in skipped}


IDS = "-_a-b_c-d_e", "abcdefghijk", "v_b-0123456"


CUT = tuple(f"{name}_30_40.mp4" for name in IDS)  # clips of 10 s
WHOLE = tuple(f"{name}.mp4" for name in IDS)


class AnnotationSet(NamedTuple):
    """Files by name, texts or what becomes JSON, and the names of the media that they are of."""

    files: dict[str, Any]
    media: Sequence[str] = WHOLE
    beside: bool = False  # the files lie in the folder of the media

    def write(
        self, annotations: Path, media: Path, content: Callable[[str], bytes] = lambda name: b""
    ) -> dict[Path, bytes]:
        """Write all of it, media with these contents; the intact annotation files."""
        written = {}
        for name, tree in self.files.items():
            path = (media if self.beside else annotations) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            written[path] = (tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False)).encode()
            path.write_bytes(written[path])
        for name in self.media:
            (media / name).parent.mkdir(parents=True, exist_ok=True)
            (media / name).write_bytes(content(name))
        return written


def _table(head: str, line: Callable[[int, str], str]) -> str:
    return head + "".join(line(i, name) for i, name in enumerate(IDS))


SPLITS = "train", "validate", "test"
TALK = {"start": [0, 10, 20], "end": [10, 19.5, 32], "text": ["a &amp; b c d", "e f g h i", "j k l m n"]}
TOLD = {"duration": 82.73, "timestamps": [[0.83, 19.86], [17.37, 60.81]], "sentences": ["A  man.", " He &lt; she. "]}
STEPS = [{"id": i, "segment": [10 * i, 10 * i + 9], "sentence": f"add oil {i}"} for i in range(2)]
CLIPS = [{"videoID": f"{name}_000030_000040", "enCap": ["A man.", "B."], "chCap": ["一个人。"]} for name in IDS]
MSRVTT = {
    "info": {"contributor": "Microsoft"},
    "videos": [{"video_id": name, "split": split, "start time": 1.0} for name, split in zip(IDS, SPLITS, strict=True)],
    "sentences": [{"caption": "a man &amp; a car", "video_id": name, "sen_id": i} for i, name in enumerate(IDS)],
}  # fmt: skip
CLASSES = 'index,mid,display_name\n0,/m/09x0r,Speech\n1,/t/dd00125,"Inside, small room"\n'
SEGMENTS = "# created\n# YTID, start_seconds, end_seconds, positive_labels\n" + "".join(
    f'{name}, 30.000, 40.000, "/m/09x0r,/t/dd00125"\n' for name in IDS
)
CAPTIONED = _table("audiocap_id,youtube_id,start_time,caption\n", lambda i, name: f'{i},{name},30,"Water, {i}"\n')
CLOTHO = _table(
    "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n", lambda i, name: f"{name}.mp4,a,b,c,d,e\n"
)
ESC50 = _table(
    "filename,fold,target,category,esc10,src_file,take\n", lambda i, name: f"{name}.wav,1,19,dog_bark,True,{name},A\n"
)
OWN = _table(
    "path,caption,start,end,audio_type,label,split,lang\n",
    lambda i, name: f'{name}.mp4,"Water, {name}",1,5,vb,x,val,fr\n',
)
LINES = [
    {"path": f"{name}.mp4", "caption": "Water", "start": 0, "end": 5.5, "label": "x", "lang": "fr"} for name in IDS
]
STAMP = "A chick.\nfr.utf8=Un poussin.\nel.utf8=Ένα κοτόπουλο.\n"
KINETICS = _table("label,youtube_id,time_start,time_end,split\n", lambda i, name: f'"eat, {i}",{name},30,40,train\n')
HOWTO100M = _table("video_id,category_1,category_2,rank,task_id\n", lambda i, name: f"{name},Food,Recipes,3,77\n")
HOWTO_TABLE = ",start,end,text\n0,0,5.5,a b c\n1,6,12,d e f\n"
NARRATED = tuple(f"{name}.wav" for name in IDS)  # long enough for a clip of HowTo100M
SOUNDS = tuple(f"sounds/{name}.wav" for name in IDS)
WAVCAPS = {"AudioSet_SL": "as", "BBC_Sound_Effects": "bbc", "FreeSound": "fsd", "SoundBible": "sb"}


def _microsoft(*numbers: int) -> dict[str, Any]:
    """A file of MSR-VTT as Microsoft ships it, of some of the videos."""
    return MSRVTT | {"videos": [MSRVTT["videos"][number] for number in numbers]}


FORMATS: dict[str, AnnotationSet] = {
    "howto100m": AnnotationSet({"HowTo100M_v1.csv": HOWTO100M, "caption.json": dict.fromkeys(IDS, TALK)}, NARRATED),
    "howto100m tables": AnnotationSet(
        {"HowTo100M_v1.csv": HOWTO100M} | {f"howto100m_captions/{name}.csv": HOWTO_TABLE for name in IDS}, NARRATED
    ),
    "audioset": AnnotationSet({"class_labels_indices.csv": CLASSES, "balanced_train_segments.csv": SEGMENTS}, CUT),
    "msrvtt": AnnotationSet({"MSRVTT_data.json": MSRVTT}),
    "msrvtt microsoft": AnnotationSet(
        {"train_val_videodatainfo.json": _microsoft(0, 1), "test_videodatainfo.json": _microsoft(2)}
    ),
    "msrvtt coco": AnnotationSet(
        {
            "annotation/MSR_VTT.json": {
                "images": [{"id": f"video{number}"} for number in (0, 6513, 7010)],
                "annotations": [{"caption": "a man", "image_id": f"video{number}"} for number in (0, 6513, 7010)],
            }
        },
        ("video0.mp4", "video6513.mp4", "video7010.mp4"),
    ),
    "msrvtt_1ka": AnnotationSet(
        {
            "MSRVTT_data.json": MSRVTT,
            "MSRVTT_train.9k.csv": "video_id\n" + "".join(f"{name}\n" for name in IDS[:2]),
            "MSRVTT_JSFUSION_test.csv": f'key,vid_key,video_id,sentence\nret0,msr0,{IDS[2]},"a person, connecting"\n',
        }
    ),
    "vatex": AnnotationSet({"vatex_training_v1.0.json": CLIPS}, CUT),
    "audiocaps": AnnotationSet({"val.csv": CAPTIONED}, CUT),
    "clotho": AnnotationSet(
        {"clotho_captions_development.csv": CLOTHO}, tuple(f"development/{name}" for name in WHOLE)
    ),
    "activitynet": AnnotationSet({"train.json": dict.fromkeys(IDS, TOLD)}),
    "youcook2": AnnotationSet(
        {
            "youcookii_annotations_trainval.json": {
                "database": {name: {"subset": "training", "recipe_type": "113", "annotations": STEPS} for name in IDS}
            }
        },
        tuple(f"{name}_{start}_{start + 9}.mp4" for name in IDS for start in (0, 10)),
    ),
    "esc50": AnnotationSet({"meta/esc50.csv": ESC50}, SOUNDS),
    "esc10": AnnotationSet({"meta/esc50.csv": ESC50}, SOUNDS),
    "urbansound8k": AnnotationSet(
        {
            "metadata/UrbanSound8K.csv": _table(
                "slice_file_name,fsID,start,end,salience,fold,classID,class\n",
                lambda i, name: f"{name}.wav,100032,0.0,0.31,1,5,3,dog_bark\n",
            )
        },
        SOUNDS,
    ),
    "vggsound": AnnotationSet(
        {"vggsound.csv": _table("", lambda i, name: f'{name},30,"bells, {i}",{"test" if i else "train"}\n')}, CUT
    ),
    "fsd50k": AnnotationSet(
        {
            "FSD50K.ground_truth/dev.csv": _table(
                "fname,labels,mids,split\n", lambda i, name: f'{name},"Rain,Dog_bark","/m/06,/m/07",val\n'
            )
        },
        SOUNDS,
    ),
    "musiccaps": AnnotationSet(
        {
            "musiccaps-public.csv": _table(
                "ytid,start_s,end_s,aspect_list,caption,author_id,is_balanced_subset,is_audioset_eval\n",
                lambda i, name: f'{name},30,40,"[\'low\', \'sad\']","A ""sad""\nsong.",4,False,True\n',
            )
        },
        CUT,
    ),
    "auto_acd": AnnotationSet({"train.csv": _table("youtube_id,caption\n", lambda i, name: f'{name},"A, {i}"\n')}),
    "wavcaps": AnnotationSet(
        {
            f"{part}/{short}_final.json": {"num_captions_per_audio": 1, "data": [{"id": name, "caption": f"of {part}"}]}
            for (part, short), name in zip(WAVCAPS.items(), (f"{IDS[0]}.wav", *IDS), strict=True)
        },
        tuple(f"{part}_flac/{name}.flac" for part, name in zip(WAVCAPS, (IDS[0], *IDS), strict=True)),
    ),
    "grid": AnnotationSet({}, ("s1/bbaf2n.mp4", "s1/lrwp9s.mp4"), beside=True),
    "librispeech": AnnotationSet(
        {"LibriSpeech/dev-clean/84/121123/84-121123.trans.txt": "84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT\n"},
        tuple(f"LibriSpeech/dev-clean/84/121123/84-121123-000{i}.flac" for i in range(2)),
        beside=True,
    ),
    "ljspeech": AnnotationSet(
        {"metadata.csv": _table("", lambda i, name: f'{name}|Printing, in "{i}"|Printing, in "none"\n')},
        tuple(f"wavs/{name}.wav" for name in IDS),
    ),
    "speech_commands": AnnotationSet(
        {"validation_list.txt": "no/a1_nohash_0.wav\n", "testing_list.txt": "yes/b2_nohash_0.wav\n"},
        ("no/a1_nohash_0.wav", "yes/b2_nohash_0.wav", "no/c3_nohash_1.wav", "_background_noise_/pink_noise.wav"),
        beside=True,
    ),
    "spokencoco": AnnotationSet(
        {
            "SpokenCOCO_val.json": {
                "data": [
                    {
                        "image": f"val2014/{name}.png",
                        "captions": [
                            {"text": "A DOG", "speaker": "m1", "uttid": f"u-{name}", "wav": f"wavs/{name}.wav"}
                        ],
                    }
                    for name in IDS
                ]
            }
        },
        tuple(path for name in IDS for path in (f"val2014/{name}.png", f"wavs/{name}.wav")),
    ),
    "ucf101": AnnotationSet(
        {
            "classInd.txt": "1 ApplyEyeMakeup\n2 BoxingPunchingBag\n",
            "testlist01.txt": f"ApplyEyeMakeup/{IDS[0]}.avi\n",
            "trainlist01.txt": f"ApplyEyeMakeup/{IDS[1]}.avi 1\nBoxingPunchingBag/{IDS[2]}.avi 2\n",
        }
    ),
    "msvd": AnnotationSet(
        {
            "AllVideoDescriptions.txt": _table("# Copyright\n\n", lambda i, name: f"{name}_30_40 a man &amp; {i}\n"),
            "train_list.txt": f"{IDS[0]}_30_40\n{IDS[1]}_30_40\n",
            "test_list.txt": f"{IDS[2]}_30_40\n",
        },
        CUT,
    ),
    "didemo": AnnotationSet(
        {
            "train_data.json": [
                {"annotation_id": i, "video": f"{name}.mov", "description": f"a dog {i}", "times": [[0, i]]}
                for i, name in enumerate(IDS)
            ]
        }
    ),
    "lsmdc": AnnotationSet(
        {"LSMDC16_annos_val.csv": _table("", lambda i, name: "\t".join([name, *["00.00.51.926"] * 4, "He."]) + "\n")}
    ),
    "valor32k": AnnotationSet(
        {"desc_val.json": [{"video_id": f"{name}_30.000_40.000", "desc": "A crowd spoke."} for name in IDS]}, CUT
    ),
    "kinetics400": AnnotationSet({"train.csv": KINETICS}, CUT),
    "kinetics600": AnnotationSet({"kinetics_600_train.csv": KINETICS}, CUT),
    "folder csv": AnnotationSet({"captions.csv": OWN}),
    "folder jsonl": AnnotationSet({"captions.jsonl": "".join(json.dumps(line) + "\n" for line in LINES)}),
    "folder pairs": AnnotationSet(
        {
            "captions.csv": "picture;sound;caption;labels;group\na.png;a.wav;A dog;Dog;g1\nb.png;b.wav;Rain;Rain,Wind;g2\n"
        },
        ("a.png", "a.wav", "b.png", "b.wav"),
    ),
    "stamps": AnnotationSet(
        {"animals/chick.txt": STAMP, "animals/dog.txt": "A dog.\nfr.utf8=Un chien.\n"},
        tuple(f"animals/{name}.{suffix}" for name in ("chick", "dog") for suffix in ("png", "ogg")),
        beside=True,
    ),
}
