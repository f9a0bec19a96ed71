"""Tar shards as img2dataset and webdataset write them, read by position.

A sample is the members of one key: KEY.jpg (or .png, .webp, ...), and its captions in KEY.txt, or in a field of
KEY.json, a string or a list of them; the JSON may also be that list. Members come in any order; a key that a tar uses
twice is two samples. Each tar is indexed once, into a folder .index/ beside the tars, or under ~/.cache/blip2 where
that cannot be written: where the members lie, how long the caption is, a hash of the image. The indexes of a set are
joined into one file, of which a row is read when it is needed. So any order of the samples is possible, a run continues
exactly in the middle of an epoch, and the memory of a process does not grow with their number.
"""

import hashlib
import json
import os
import platform
import re
import tarfile
import tempfile
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from glob import escape, glob, has_magic
from io import BytesIO
from pathlib import Path

import numpy as np

from engine.distributed import barrier, local_rank, print0, rank, world_size
from engine.errors import UserError, expect, shorten
from engine.files import parse_json, read_json, read_text, whole, writing
from engine.log import BROKEN_SHARE
from engine.progress import progress
from sources.annotations import Source, StoredImage, Target, image_id
from sources.images import MAX_BYTES, SUFFIXES
from sources.text import is_text

BLOCK = 512  # bytes: members begin at multiples of it
ROW = np.dtype(  # of the index, 26 bytes a sample
    [(name, "<u4") for name in ("image", "image_bytes", "text", "text_bytes")]  # first block and length of the members
    + [("is_json", "?"), ("words", "u1"), ("id", "<u8")]  # of the text; of its first caption; see `image_id`
)
FORMAT = 1  # of the index; one of another is made anew
OPEN_FILES = 64  # of a process

# --- which tars ------------------------------------------------------------------------------------------------------


def is_shards(spec: str) -> bool:
    """Does `--data` name tar shards: a pattern of .tar files, a folder of them, or a text file of their names?"""
    if os.path.isdir(spec):
        return bool(glob(f"{escape(spec)}/*.tar"))
    if spec.endswith(".txt") and os.path.isfile(spec):
        with open(spec, "rb") as file:
            return file.readline(10_000).rstrip().endswith(b".tar")
    return spec.endswith((".tar", ".tar}"))


def expand_braces(pattern: str) -> list[str]:
    """ "{00000..00331}.tar" and "{a,b}.tar", as a shell writes them out."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    inside = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    choices = found[1].split(",")
    if inside:
        choices = [str(n).zfill(len(inside[1])) for n in range(int(inside[1]), int(inside[2]) + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for choice in choices for name in expand_braces(f"{before}{choice}{after}")]


def find_tars(spec: str) -> list[Path]:
    """The tars that `--data` names; at least one. Those that braces or a text file name need not exist."""
    if os.path.isdir(spec):
        names = [f"{escape(spec)}/*.tar"]
    elif spec.endswith(".txt"):
        lines = filter(None, map(str.strip, read_text(spec).splitlines()))
        names = [os.path.join(os.path.dirname(spec), name) for line in lines for name in expand_braces(line)]
    else:
        names = expand_braces(spec)
    patterns = {name for name in names if has_magic(name) and not os.path.exists(name)}
    names = [found for name in names for found in (sorted(glob(name)) if name in patterns else [name])]
    there = any(map(os.path.exists, names))
    expect(there, f"--data {spec}: none of its {len(names)} tars exists: check the pattern, and the folder")
    return list(map(Path, dict.fromkeys(names)))


# --- the index of a tar ----------------------------------------------------------------------------------------------


def members_of(path: Path) -> tuple[list[dict], str]:
    """The samples of a tar, each its members by kind, "image", "txt" and "json" -> (offset, bytes), and its "key"; and
    where the tar breaks off, if it does."""
    samples: dict[tuple[str, int], dict] = {}
    seen: dict[tuple[str, str], int] = {}  # (key, kind) -> how often
    size, problem = path.stat().st_size, ""
    try:
        with tarfile.open(path, "r:") as tar:
            while member := tar.next():
                tar.members.clear()  # it would keep them all
                key, _, suffix = member.name.rpartition(".")
                kind = "image" if f".{suffix.lower()}" in SUFFIXES else suffix.lower()
                hidden = os.path.basename(key).startswith(".")  # macOS writes ._a.jpg
                if not member.isreg() or hidden or kind not in ("image", "txt", "json") or member.size > MAX_BYTES:
                    continue
                expect(member.offset_data + member.size <= size, f"breaks off in {member.name}")
                seen[key, kind] = seen.get((key, kind), 0) + 1
                number = seen[key, kind]
                sample = samples.setdefault((key, number), {"key": key, "number": number})
                sample[kind] = member.offset_data // BLOCK, member.size
            with open(path, "rb") as file:  # tarfile ends in silence at a header that is broken or cut short
                end = read_at(file, tar.offset // BLOCK, BLOCK)
            expect(not tar.offset or end == bytes(BLOCK), f"breaks off after {len(samples):,} samples")
    except (tarfile.TarError, UserError, ValueError) as error:
        problem = str(error) or type(error).__name__
    return [sample for sample in samples.values() if "image" in sample], problem


def captions_in(text: bytes, is_json: bool, field: str) -> tuple[list[str], dict]:
    """The captions that a member has, and the whole of a JSON object. Raises ValueError for JSON that is none."""
    text = text.decode("utf-8", errors="replace")
    if not is_json:
        return list(filter(is_text, [text.strip()])), {}
    content = parse_json(text)
    record = content if isinstance(content, dict) else {}
    found = record.get(field or "caption") if record else content
    found = found if isinstance(found, list) else [found]
    return [caption for caption in found if is_text(caption)], record


def index_tar(path: Path, field: str, name: str) -> tuple[np.ndarray, dict]:
    """Rows of all samples with an image, in the order of the tar; counts of captions, and problems. name: of the tar,
    by which images without a hash of their own are told apart."""
    try:
        samples, broken = members_of(path)
    except OSError as error:  # it does not exist, or cannot be read
        samples, broken = [], error.strerror or str(error)
    rows, captions, problems, digest = [], 0, [broken] * bool(broken), hashlib.sha256()
    with open(path if samples else os.devnull, "rb") as file:
        for sample in samples:
            kind, texts, record = "json" if field or "txt" not in sample else "txt", [], {}
            try:
                if "json" in sample:  # the hash of the image is in it
                    texts, record = captions_in(read_at(file, *sample["json"]), True, field)
            except ValueError as error:
                problems.append(f"{sample['key']}.json cannot be read ({shorten(error)})")
            if kind == "txt":
                texts, _ = captions_in(read_at(file, *sample["txt"]), False, field)
            captions += len(texts)
            digest.update(repr(texts).encode(errors="surrogatepass"))
            words = min(255, len(texts[0].split())) if texts else 0
            own = image_id(record, f"{name}/{sample['key']}#{sample['number']}")
            rows.append((*sample["image"], *(sample[kind] if texts else (0, 0)), kind == "json", words, own))
    found = {"captions": captions, "problems": problems[:5], "more": len(problems[5:]), "broken": bool(broken)}
    found["sha256"] = digest.hexdigest()
    return np.array(rows, ROW), found


def read_at(file, block: int, count: int) -> bytes:
    """A member of an open tar; safe in processes that share the file."""
    return os.pread(file.fileno(), count, int(block) * BLOCK)


# --- the index of a set ----------------------------------------------------------------------------------------------


def index_folder(above: Path) -> Path:
    """Where the indexes of tars in a folder are kept: in it, or in the user's cache."""
    beside = above / ".index"
    try:
        beside.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=beside):
            return beside
    except OSError:  # mounted to be read
        folder = Path.home() / ".cache/blip2" / hashlib.sha256(os.fsencode(above)).hexdigest()[:16]
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder


def tar_state(tar: Path, above: Path, field: str) -> str:
    """Changes when the tar does."""
    stat = tar.stat() if tar.exists() else None
    return f"{os.path.relpath(tar, above)} {stat and stat.st_size} {stat and stat.st_mtime_ns} {field} {FORMAT}"


def hashed(text: str) -> str:
    """A short name for it."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def index_set(tars: list[Path], field: str, need_texts: bool) -> Path:
    """The index of all samples of a set, ROWs one after the other, and beside it a .json of what is known of the tars.
    What is missing of it is made by all ranks; then, where machines share no disk, by those of each machine."""
    above = tars[0].absolute().parent
    folder, states = index_folder(above), [tar_state(tar, above, field) for tar in tars]
    parts = [folder / f"{tar.name}.{hashed(state)}.npz" for tar, state in zip(tars, states)]
    joint = folder / f"{hashed(repr(states))}{'' if need_texts else '.all'}.index"
    for number, count in ((rank(), world_size()), local_rank()):
        todo = [(tar, part) for tar, part in zip(tars, parts) if not (known(joint) or part.exists())]
        barrier()
        for tar, part in progress(todo[number::count], f"indexing {above}"):
            rows, found = index_tar(tar, field, os.path.relpath(tar, above))
            with own(part) as partial, open(partial, "wb") as file:
                np.savez(file, rows=rows, found=json.dumps(found))
        barrier()
        if number == 0 and not known(joint) and all(part.exists() for part in parts):
            join(parts, joint, need_texts)
        barrier()
    return joint


def known(joint: Path) -> bool:
    """Is the index of a set whole?"""
    return joint.exists() and joint.with_suffix(".json").exists()


@contextmanager
def own(path: Path):
    """As `whole`, for a file that several jobs may write at once, all the same."""
    mine = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}")
    with whole(mine) as partial:
        yield partial
    os.replace(mine, path)


def join(parts: list[Path], joint: Path, need_texts: bool) -> None:
    """The indexes of tars, one after the other; with `need_texts` of the samples with a caption."""

    def read(part: Path) -> tuple[np.ndarray, dict]:
        with np.load(part) as content:
            rows, found = content["rows"], json.loads(str(content["found"]))
        kept = rows[rows["words"] > 0] if need_texts else rows
        return kept, found | {"samples": len(kept), "empty": len(rows) - len(kept)}

    known_of_tars = []
    with own(joint) as partial, open(partial, "wb") as file:
        for part in parts:
            rows, found = read(part)
            known_of_tars.append(found)
            file.write(rows.tobytes())
    with own(joint.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(known_of_tars))


# --- the source ------------------------------------------------------------------------------------------------------


@lru_cache(OPEN_FILES)
def opened(path: Path):
    """An open tar; the last few stay open."""
    return open(path, "rb", buffering=0)


class ShardImage(StoredImage):
    """A sample of a tar."""

    def __init__(self, path: Path, row: np.void, field: str):
        self.path, self.row, self.field = path, row, field

    @property
    def name(self) -> str:
        """The tar, and the member in it."""
        header = b""
        with suppress(OSError):  # a lost disk
            header = os.pread(opened(self.path).fileno(), 100, (int(self.row["image"]) - 1) * BLOCK)
        return f"{self.path}/{header.rstrip(bytes(1)).decode(errors='replace')}"

    def member(self, kind: str) -> bytes:
        """ "image" or "text"."""
        try:
            content = read_at(opened(self.path), self.row[kind], int(self.row[f"{kind}_bytes"]))
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}): check its disk") from None
        expect(len(content) == self.row[f"{kind}_bytes"], f"{self.path} is shorter than its index says: copy it again")
        return content

    def read_bytes(self) -> bytes:
        """The image file."""
        return self.member("image")

    @property
    def file(self) -> BytesIO:
        """The image file, as an open file."""
        return BytesIO(self.read_bytes())

    @cached_property
    def captions(self) -> list[str]:
        """All captions; none where there is no text."""
        return captions_in(self.member("text"), bool(self.row["is_json"]), self.field)[0] if self.row["words"] else []

    def texts(self) -> list[Target]:
        """The captions."""
        return [("", caption) for caption in self.captions]


class TarShards(Source):
    """The samples of tar shards, in the order of the tars; see the top of this file."""

    def __init__(self, spec: str, field: str = "", need_texts: bool = True):
        """field: of the JSON, that has the captions; by default they are in the .txt, else in "caption". need_texts:
        leave out images without a caption."""
        self.name, self.field, self.tars = spec, field, find_tars(spec)
        self.path = index_set(self.tars, field, need_texts)
        found = read_json(self.path.with_suffix(".json"))
        self.blocks = np.cumsum([0] + [entry["samples"] for entry in found])
        self.num_texts = sum(entry["captions"] for entry in found)
        self.texts_sha256 = hashlib.sha256("".join(entry["sha256"] for entry in found).encode()).hexdigest()
        whole_index = self.path.stat().st_size == len(self) * ROW.itemsize
        expect(whole_index, f"{self.path} is damaged: remove {self.path.parent}, it is then made again")
        self.tell(found)

    def tell(self, found: list[dict]) -> None:
        """Name what is broken; UserError if it is too much, or nothing is left."""
        problems = [f"{tar}: {problem}" for tar, entry in zip(self.tars, found) for problem in entry["problems"]]
        broken, count = sum(entry["broken"] for entry in found), len(problems) + sum(entry["more"] for entry in found)
        print0(*(f"skipped: {problem}" for problem in problems[:5]))
        if count > 5:
            print0(f"skipped: {count - 5:,} more like these")
        share = f"{broken} of {len(found)} tars of {self.name} are broken or missing, more than {BROKEN_SHARE:.0%}"
        expect(broken <= max(1, BROKEN_SHARE * len(found)), f"{share}: fetch them again, or leave them out")
        if empty := sum(entry["empty"] for entry in found):
            print0(f"{self.name}: {empty:,} images without a caption are left out")
        where = f"in the field {self.field!r} of the .json" if self.field else 'in a .txt, or in "caption" of a .json'
        expect(len(self), f"--data {self.name} has no image with a caption {where}: pass --caption-field, or others")

    def row(self, index: int) -> np.void:
        """A row of the index. (Mapped into memory, it would count as memory: 3.4 GB for 130 million samples.)"""
        content = os.pread(opened(self.path).fileno(), ROW.itemsize, int(index) * ROW.itemsize)
        return np.frombuffer(content, ROW)[0]

    def __len__(self) -> int:
        return int(self.blocks[-1])

    def __getitem__(self, index: int) -> ShardImage:
        tar = int(np.searchsorted(self.blocks, index, side="right")) - 1
        return ShardImage(self.tars[tar], self.row(index), self.field)

    def image_id(self, row: int) -> int:
        """See `annotations.image_id`."""
        return int(self.row(row)["id"])

    def words(self, rows: np.ndarray, rngs) -> list[int]:
        """Words of the first caption: near enough to sort by, and known without reading the sample."""
        file, (_, offset) = opened(self.path).fileno(), ROW.fields["words"]
        return [os.pread(file, 1, row * ROW.itemsize + offset)[0] for row in rows.tolist()]

    def content_sha256(self) -> str:
        """Changes when any caption does."""
        return self.texts_sha256

    def sizes_sha256(self) -> str:
        """Changes when a tar of another size takes the place of one."""
        sizes = [tar.stat().st_size if tar.exists() else 0 for tar in self.tars]
        return hashlib.sha256(repr(sizes).encode()).hexdigest()

    def fingerprint(self) -> str:
        """Changes when any tar does."""
        return self.path.stem
