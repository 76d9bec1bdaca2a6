"""Build and search an index of clips from the command line. See docs/search.md.

python -m clip4vla.search build SHARDS|FOLDER|FILE ... --model M --out IDX
python -m clip4vla.search query "a dog barks" --index IDX
python -m clip4vla.search query --sound FILE --index IDX
python -m clip4vla.search info IDX
python -m clip4vla.search remove FOLDER|FILE ... --index IDX
python -m clip4vla.search plan --items 1000000 --dim 512 --parts 4
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from clip4vla.cli import entry_point, path_word
from clip4vla.errors import UserError
from clip4vla.quick_imports import quick_imports
from clip4vla.search import faiss_index
from clip4vla.search.index import Hit, Index, absolute_name, load_model
from clip4vla.search.store import ITEMS

if TYPE_CHECKING:
    from torch import Tensor

    with quick_imports():
        from clip4vla.api import CLIP4VLA


@entry_point
def main() -> None:
    """Run the command that the command line names."""
    args = arguments().parse_args()
    args.run(args)


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m clip4vla.search", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="build|query|info|remove|plan")
    build = commands.add_parser("build", help="make an index, or bring it up to date")
    build.set_defaults(run=run_build)
    build.add_argument(
        "places", nargs="+", type=path_word, metavar="SHARDS|FOLDER|FILE", help="shard folders, or media at any depth"
    )
    build.add_argument("--model", required=True, type=path_word, help="a folder or a hub id")
    build.add_argument("--out", required=True, type=_folder, metavar="IDX")
    build.add_argument(
        "--audio-types", nargs="+", default=[], help="type tokens stored; default: vb, nb and the model's own"
    )
    query = commands.add_parser("query", help="search by a text, a sound or a picture")
    query.set_defaults(run=run_query)
    asked = query.add_mutually_exclusive_group(required=True)
    asked.add_argument("text", nargs="?")
    asked.add_argument("--sound", type=path_word, metavar="FILE")
    asked.add_argument("--picture", type=path_word, metavar="FILE", help="or a video")
    query.add_argument("-k", type=int, default=10, help="hits")
    query.add_argument(
        "--audio-weight", type=float, default=0.5, help="of the sound, 0..1; the rest is of the pictures"
    )
    query.add_argument(
        "--nb-ratio", type=float, help="share of [NB] in the sound, 0..1; default: the model's own token"
    )
    query.add_argument("--model", type=path_word, help="default: where the index was built with it")
    query.add_argument("--json", action="store_true")
    for command in (build, query):
        command.add_argument("--device", help="default: cuda if there is one")
    build.add_argument("--retry-failed", action="store_true", help="read what could not be read, as a disk may be back")
    build.add_argument(
        "--decode-timeout",
        type=float,
        default=120,
        metavar="S",
        help="for a clip of a file; what hangs longer is given up",
    )
    info = commands.add_parser("info", help="what an index holds, as JSON")
    info.set_defaults(run=run_info)
    info.add_argument("index", type=_folder, metavar="IDX")
    drop = commands.add_parser("remove", help="take sources out of an index")
    drop.set_defaults(run=run_remove)
    drop.add_argument("places", nargs="+", type=path_word, metavar="FOLDER|FILE")
    for command in (query, drop):
        command.add_argument("--index", required=True, type=_folder, metavar="IDX")
    plan = commands.add_parser(
        "plan", help="memory by number of items", description=faiss_index.__doc__, formatter_class=raw
    )
    plan.set_defaults(run=run_plan)
    plan.add_argument("--items", type=int, nargs="+", default=[10**6, 10**7, 10**8])
    plan.add_argument("--dim", type=int, default=512, help="D")
    plan.add_argument("--parts", type=int, default=4, help="P: pictures, and each stored type token")
    for command in (build, drop, plan):
        command.add_argument("--memory-gb", type=float, default=4.0, help="of the faiss index, which decides its kind")
    return parser


def _folder(text: str) -> Path:
    return Path(path_word(text))


def run_build(args: argparse.Namespace) -> None:
    """Build an index; print what became of the sources."""
    with quick_imports():
        from clip4vla.search.builder import build

    faiss_index.faiss()
    model = load_model(args.model, args.device)
    again = args.retry_failed
    if not args.decode_timeout > 0:
        raise UserError(f"--decode-timeout: more than 0 s, not {args.decode_timeout:g}")
    counts = build(
        model,
        absolute_name(args.model),
        args.places,
        args.out,
        args.audio_types,
        args.memory_gb * 1e9,
        again,
        args.decode_timeout,
    )
    print(", ".join(f"{count} {name}" for name, count in counts._asdict().items()) + " files or shards")
    print(describe(args.out))


def run_query(args: argparse.Namespace) -> None:
    """Search, and print the hits."""
    index = Index.open(args.index)
    if args.k < 1:
        raise UserError(f"-k: at least 1 hit, not {args.k}")
    index.weights(args.audio_weight, args.nb_ratio)  # a mistake is reported before the model is loaded
    name = args.model or index.model
    model = load_model(name, args.device)
    index.must_fit(model, name)
    hits = index.search(asked(model, args), args.k, args.audio_weight, args.nb_ratio)
    if args.json:
        print(json.dumps([asdict(hit) for hit in hits], ensure_ascii=False, indent=1))
    else:
        print("\n".join(line(i + 1, hit) for i, hit in enumerate(hits)))


def asked(model: "CLIP4VLA", args: argparse.Namespace) -> "Tensor":
    """Return the query's vector (D,)."""
    if args.sound:
        return model.encode_audio(args.sound)[0].cpu()
    if args.picture:
        return model.encode_video(args.picture)[0].cpu()
    return model.encode_text(args.text)[0].cpu()


def line(rank: int, hit: Hit) -> str:
    """Return a hit as a line of text: rank, score, cosines, name, seconds in the medium, first caption."""
    cosines = " ".join(f"{part} {cosine:.3f}" for part, cosine in hit.scores.items())
    when = f"  {hit.start:.1f}-{hit.end:.1f} s" if hit.start is not None and hit.end is not None else ""
    text = f"{rank:3}  {hit.score:.4f}  ({cosines})  {hit.name}{when}  {' | '.join(hit.captions[:1])}".rstrip()
    return "".join(c if c.isprintable() else " " for c in text)  # nothing that a terminal would obey


def run_info(args: argparse.Namespace) -> None:
    """Print what an index holds as JSON, also of one whose first build is not done."""
    index = Index(args.index)
    known = index.known() if index.store.get("faiss") else {"kind": None, "file": None}
    try:
        sizes = {name: (args.index / name).stat().st_size for name in (ITEMS, known["file"]) if name}
    except OSError as error:
        raise UserError(f"{args.index}/{known['file']}: {error.strerror}: run the build again") from None
    facts = {"model": index.model, "identity": index.store.get("identity"), "parts": index.parts, "dim": index.dim}
    print(json.dumps(facts | index.store.counts() | {"kind": known["kind"], "bytes": sizes}, indent=1))


def run_remove(args: argparse.Namespace) -> None:
    """Take sources out of an index."""
    with quick_imports():
        from clip4vla.search.builder import drop

    print(f"{drop(args.places, args.index, args.memory_gb * 1e9)} files or shards dropped")
    print(describe(args.index))


def run_plan(args: argparse.Namespace) -> None:
    """Print the bytes of each kind; * marks the one that a build takes."""
    width, budget = args.parts * args.dim, args.memory_gb * 1e9
    print(faiss_index.__doc__)
    for items in args.items:
        every = faiss_index.kinds(items, width, budget)
        chosen = faiss_index.choose(every, budget)
        row = [f"{'*' if kind == chosen else ''}{kind.name} {kind.bytes / 1e9:.3g} GB" for kind in every]
        print(f"{items} items: {', '.join(row)}; on disk {items * 2 * width / 1e9:.3g} GB more")
        if not chosen:
            print(f"  none fits --memory-gb {args.memory_gb:g}")


def describe(folder: Path) -> str:
    """Return a summary of an index in one line."""
    store = Index.open(folder).store
    counts, known = store.counts(), store.get("faiss")
    size = faiss_index.memory(faiss_index.IndexType(**known["kind"]), counts["items"])
    corrupt = f"; {counts['corrupt']} corrupt, see {folder}/corrupt.jsonl" if counts["corrupt"] else ""
    return f"{folder}: {counts['items']} clips, {known['kind']['name']} index of {size / 1e6:.1f} MB{corrupt}"


if __name__ == "__main__":
    main()
