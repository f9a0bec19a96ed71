"""Features of many images: the frozen ViT's tokens cached for training, or features written into a file."""

import hashlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from blip2 import Blip2, chunked
from data import ImageFiles, image_loader
from engine.distributed import barrier, gather_objects, print0, rank, same_disk
from engine.errors import UserError, expect, shorten
from engine.files import check_room, free_bytes, megabytes, read_json, remove, whole, write_json, writing
from engine.lock import abandoned, locked
from engine.progress import clock, progress
from engine.sharding import is_sharded
from sources.mixture import Mixture
from tasks.batches import IMAGES, TEXTS, encoded_batches, gather_shards, shard


class CachedTokens:
    """A memory-mapped fp16 file of the frozen ViT's tokens, one slot per image, and which images are unreadable.

    slots: the slot of each row of the sources; several questions about an image share it.
    """

    def __init__(self, path: Path, slots: np.ndarray):
        self.slots = slots  # (rows,)
        try:
            self.file = np.load(path, mmap_mode="r")  # (images, P, V)
            kind, shape = self.file.dtype, self.file.shape
            fits = kind == np.float16 and len(shape) == 3 and shape[0] == slots.max() + 1
            expect(fits, f"{kind} {shape}, expected float16 of {slots.max() + 1} images")
            self.broken = {int(slot): str(reason) for slot, reason in read_json(path.with_suffix(".json")).items()}
        except Exception as error:  # numpy raises every kind for what it cannot read
            again = f"remove it and {path.with_suffix('.json').name}: they are then computed again"
            raise UserError(f"{path} is no whole feature cache ({shorten(error)}): {again}") from None

    def tokens(self, rows: np.ndarray) -> Tensor:
        """ViT tokens (n, P, V) of rows of the sources. Raises UserError for an unreadable image."""
        slots = self.slots[rows].tolist()
        for slot in slots:
            expect(slot not in self.broken, self.broken.get(slot))
        return torch.from_numpy(self.file[slots])


def cache_tokens(model: Blip2, images: Mixture, folder: Path, workers: int) -> CachedTokens:
    """The frozen ViT's tokens of all images of the sources, eval transform, fp16: from the file, or computed once.

    The file's name is a hash of the ViT, the transform and the images. Each rank computes its share; the file appears
    under its name when it is whole.
    """
    whole = Mixture(images.parts)
    vit = model.sources["vit"].sha256 or weights_sha256(model.vit)
    slot_of: dict[int, int] = {}  # image_id -> slot
    slots = np.array([slot_of.setdefault(whole.image_id(row), len(slot_of)) for row in range(len(whole))])
    first = np.unique(slots, return_index=True)[1]  # first row of each image
    key = ((vit, repr(model.vit.cfg), str(model.vit.dtype)), model.image_size, whole.fingerprint(), len(first))
    path = folder / f"{hashlib.sha256(repr(key).encode() + slots.tobytes()).hexdigest()[:16]}.npy"
    if not all(gather_objects(path.exists())):  # of machines without a shared disk each has its own
        compute_tokens(model, whole, first, slots, path, workers)
    cached, wanted = CachedTokens(path, slots), token_shape(model)
    got = f"{path} has tokens of shape {cached.file.shape[1:]}, expected {wanted}"
    expect(cached.file.shape[1:] == wanted, f"{got}: remove it, they are then computed again")
    return cached


def token_shape(model: Blip2) -> tuple[int, int]:
    """(P, V) of an image."""
    return model.vit.cfg.tokens(model.image_size), model.vit.cfg.width


def weights_sha256(module: nn.Module) -> str:
    """Hash of all weights, for those that no file holds: random ones, or trained since."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def compute_tokens(
    model: Blip2, images: Mixture, first: np.ndarray, slots: np.ndarray, path: Path, workers: int
) -> None:
    """Write the tokens of the rows `first` into a file beside `path`, in the end rename it to `path`."""
    shape = (len(first), *token_shape(model))
    started, needs = time.time(), 2 * math.prod(shape)
    room = f"{megabytes(needs)} of {megabytes(free_bytes(path))} that are free"
    print0(f"caching the ViT's tokens of {len(first):,} images in {path}: {room}")
    with writing(path, needs):
        path.parent.mkdir(parents=True, exist_ok=True)
    # A folder for each writer, as another run may be computing the same; its lock tells when the writer has died.
    folder = path.with_name(f".{path.stem}.{gather_objects(os.getpid())[0]}.partial")
    if rank() == 0:
        with writing(folder):
            folder.mkdir()
    barrier()
    team = same_disk(folder)  # they fill one file
    if writes := rank() == team[0]:
        for other in filter(abandoned, path.parent.glob(".*.partial")):
            remove(other)
    with locked(folder, team[0]):
        partial = folder / path.name
        try:
            if writes:
                with writing(path, needs):
                    np.lib.format.open_memmap(partial, "w+", np.float16, shape).flush()
                    reserve(partial)
            barrier()
            fill_tokens(model, images, first, slots, partial, workers, team)
            if writes:
                os.replace(partial.with_suffix(".json"), path.with_suffix(".json"))
                os.replace(partial, path)
        finally:
            if writes:
                remove(folder)
    barrier()
    print0(f"cached in {clock(time.time() - started)}")


def reserve(path: Path) -> None:
    """Take the room of a file that has been made but not written: a disk that is full later would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))


def fill_tokens(
    model: Blip2, images: Mixture, first: np.ndarray, slots: np.ndarray, path: Path, workers: int, team: list[int]
) -> None:
    """Write the tokens of the rows `first` into the file of some ranks, and beside it why images are unreadable."""
    tokens, broken = np.lib.format.open_memmap(path, "r+"), {}
    mine = list(chunked(first.tolist(), IMAGES))[team.index(rank()) :: len(team)]
    loader = image_loader(images, model.image_size, mine, workers)
    for done, unreadable, pixels in progress(loader, "caching the ViT's tokens"):
        broken |= {int(slots[row]): reason for row, reason in unreadable.items()}
        if done:
            tokens[slots[done]] = model.image_tokens(pixels.to(model.device)).half().cpu().numpy()
    tokens.flush()
    broken = {slot: reason for part in gather_objects(broken) for slot, reason in part.items()}
    if rank() == team[0]:
        write_json(path.with_suffix(".json"), broken)


def write_features(model: Blip2, paths: list[Path], texts: list[str], out: str, workers: int) -> None:
    """Write the features of image files, and of texts if there are any, into a .safetensors file.

    image_query_outputs (N, Q, D): the queries after the Q-Former; image_features (N, Q, E): these, projected and of
    unit length; text_features (M, E) likewise. itc_scores is the highest product of a text with the queries.
    """
    contrastive = model.tokenizer is not None and model.llm is None  # else the projections are untrained by now
    expect(contrastive or not texts, "--texts have features in a run of stage 1 or retrieval: pass one as --checkpoint")
    Q, D, E = model.qformer.cfg.num_queries, model.qformer.cfg.width, model.embed_dim
    check_room(Path(out).parent, 4 * (len(paths) * Q * (D + E) + len(texts) * E), f"--out {out}")
    batches = list(chunked(list(range(len(paths)))[shard(len(paths))], IMAGES))
    encoded = encoded_batches(model, ImageFiles(paths), batches, workers)
    parts = [(images.query_out.cpu(), images.feats.cpu()) for images in progress(encoded, "images", len(batches))]
    nothing = (torch.empty(0, Q, D), torch.empty(0, Q, E))  # a rank without a share
    found = {
        name: gather_shards(torch.cat(mine).to(model.device), len(paths)).cpu()
        for name, mine in zip(("image_query_outputs", "image_features"), zip(nothing, *parts))
    }
    if not contrastive:
        del found["image_features"]
    if texts:
        batches = progress(list(chunked(texts, TEXTS)), "texts")
        found["text_features"] = torch.cat([model.encode_text(batch).feats.cpu() for batch in batches])
    names = {"images": json.dumps([path.name for path in paths]), "texts": json.dumps(texts)}
    if rank() == 0:
        with whole(out) as partial:
            save_file(found, partial, metadata=names)
    print0(*(f"{name} {tuple(tensor.shape)}" for name, tensor in found.items()), f"written to {out}")
