"""From files to batches: what comes in is checked, what comes out does not depend on processes, workers or order."""

import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from data import (
    Annotations,
    Mixture,
    StepSampler,
    Texts,
    TrainBatches,
    UserError,
    clean_caption,
    decode_crop,
    eval_transform,
    make_batch,
    open_photos,
    open_picture,
    pad,
    random_crop,
    says_left_or_right,
    to_rgb,
    train_loader,
    train_transform,
)

BERT = "assets/tiny/bert"


def write_photos(folder, count=6, size=(40, 30), captions=None, **first):
    """A small annotated folder; photo i is all of grey level 10 * i."""
    records = []
    for i in range(count):
        Image.new("RGB", size, (10 * i,) * 3).save(folder / f"{i}.png")
        records.append({"image": f"{i}.png", "caption": captions[i] if captions else f"a red circle {'very ' * i}big"})
    records[0] |= first
    (folder / "a.json").write_text(json.dumps(records))
    return folder / "a.json"


# --- text


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("A dog.", "a dog"),
        ('Two "dogs" (big); one*small!', "two dogs big one small"),
        ("Hello:  world~#\n", "hello world"),
        ("don't stop, well-known? and/or", "don't stop, well-known? and/or"),
        (" ".join(["word"] * 60), " ".join(["word"] * 50)),
        ("...", ""),
    ],
)
def test_caption_cleaning_is_the_originals(raw, clean):
    """BlipCaptionProcessor.pre_caption in LAVIS."""
    assert clean_caption(raw) == clean


def test_texts_start_with_cls_end_with_sep_and_are_cut_at_the_limit():
    texts = Texts(BERT, max_tokens=6)
    short, long = texts.encode(["A red circle.", "a red circle left of a blue square"])
    assert short[0] == long[0] == texts.cls_id and short[-1] == long[-1] == texts.sep_id
    assert len(short) == 5 and len(long) == 6
    assert texts.decode(short) == "a red circle"
    assert texts.vocab_size - 1 not in short + long  # [DEC] is ours to place


def test_bundled_padding_and_truncation_are_switched_off(tmp_path):
    """all-MiniLM-L6-v2's tokenizer.json pads to 128 and cuts at 128."""
    texts = Texts(BERT)
    texts.tokenizer.enable_padding(length=50)
    texts.tokenizer.enable_truncation(4)
    texts.save(tmp_path)
    assert len(Texts(tmp_path).encode(["a red circle left of a blue square"])[0]) == 10


def test_vocab_txt_will_do(tmp_path):
    words = json.loads(open(f"{BERT}/tokenizer.json").read())["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(words, key=words.get)))
    captions = ["A red circle, left of a blue square.", "a zebra"]
    assert Texts(tmp_path).encode(captions) == Texts(BERT).encode(captions)


def test_texts_at_the_limit_are_counted(tmp_path):
    path = write_photos(tmp_path, 2, captions=["a red circle", "a red circle left of a blue square"])
    batches = TrainBatches(open_photos([str(path)], "train", 8), Texts(BERT, max_tokens=6), 8, seed=0)
    assert [batches.__getitems__([(0, i)]).truncated for i in (0, 1)] == [0, 1]


def test_padding_by_hand():
    ids, mask = pad([[2, 5, 3], [2, 3]], pad_id=0)
    assert ids.shape == (2, 8) and ids[1].tolist() == [2, 3, 0, 0, 0, 0, 0, 0]  # up to a multiple of 8
    assert mask.sum(dim=1).tolist() == [3, 2]
    batch = make_batch([[2, 5, 3], [2, 3]], 0, [7, 8])
    assert batch.label_rows.tolist() == [0, 1, 8]  # b * T + t of each token that has a next one


# --- pictures


def test_pictures_of_every_kind_become_rgb(tmp_path):
    red = (200, 30, 40)
    Image.new("RGB", (4, 4), red).save(tmp_path / "rgb.png")
    Image.new("RGB", (4, 4), red).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    Image.new("RGB", (4, 4), red).quantize(4).save(tmp_path / "palette.png")
    Image.new("L", (4, 4), 128).save(tmp_path / "grey.png")
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(tmp_path / "16bit.png")
    frames = [Image.new("RGB", (4, 4), color) for color in (red, (0, 0, 255))]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.save(tmp_path / "transparent.png")
    expected = {"16bit.png": (128,) * 3, "grey.png": (128,) * 3, "transparent.png": (255,) * 3}
    for path in tmp_path.iterdir():
        picture = open_picture(path)
        assert picture.mode == "RGB" and picture.size == (4, 4)
        assert np.abs(np.array(picture.getpixel((1, 1))) - expected.get(path.name, red)).max() <= 3, path.name


def test_the_cameras_rotation_is_obeyed(tmp_path):
    picture = Image.new("RGB", (8, 4))
    exif = picture.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (4, 8)


def test_a_photo_with_damaged_exif_is_a_photo(tmp_path):
    """Only its rotation is unknown."""
    odd = b"Exif\0\0" + struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x0112, 7, 1, 6, 0)  # a rotation of an odd type
    for damaged in (b"Exif\0\0no TIFF header", odd):
        Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=damaged)
        assert open_picture(tmp_path / "a.jpg").size == (8, 8)
        (tmp_path / "a.json").write_text('[{"image": "a.jpg", "caption": "nothing"}]')
        assert Annotations(tmp_path / "a.json").train_view(0, 4, np.random.default_rng(0)).shape == (3, 4, 4)


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_training_crops_a_turned_picture_as_if_it_stood_upright(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (800, 200)).save(tmp_path / f"turned.{kind}", exif=exif)
    crops = [
        decode_crop(picture, 200, np.random.default_rng(0))
        for picture in (Image.open(tmp_path / f"turned.{kind}"), Image.new("RGB", (200, 800)))
    ]
    assert crops[0][0].size == crops[1][0].size == (200, 800) and crops[0][1] == crops[1][1]


def test_evaluation_squeezes_the_whole_picture_into_the_square():
    wide = Image.fromarray(np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 50, axis=0).repeat(3, axis=2))
    pixels = eval_transform(wide, 20)
    assert pixels.shape == (3, 20, 20) and pixels.dtype == torch.uint8
    assert pixels[0, 0, 0] < 12 and pixels[0, 0, -1] > 188  # both ends are there


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (400, 20), (20, 20)])
def test_crops_have_half_to_all_of_the_area_and_a_sane_shape(size):
    for seed in range(50):
        left, top, right, bottom = random_crop(*size, np.random.default_rng(seed))
        assert 0 <= left < right <= size[0] + 1e-6 and 0 <= top < bottom <= size[1] + 1e-6
        assert 3 / 4 - 1e-6 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-6
        if size != (400, 20):  # too long for any: the middle
            assert 0.5 - 1e-6 <= (right - left) * (bottom - top) / (size[0] * size[1]) <= 1


def train_view(picture, size, seed, flip):
    rng = np.random.default_rng(seed)
    return train_transform(*decode_crop(picture, size, rng), size, rng, flip)


def test_training_sees_the_crop_and_evaluation_the_whole():
    ramp = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 3, 64, axis=0).repeat(3, axis=2))
    for seed in range(20):
        left, _, right, _ = random_crop(64, 64, np.random.default_rng(seed))
        view = train_view(ramp, 16, seed, flip=False)
        middle = 3 * ((left + right) / 2 - 0.5)  # pixel x is centred on x + 0.5 and has brightness 3 x
        slope = 3 * (right - left) / 16
        expected = middle + slope * (torch.arange(16) - 7.5)
        assert (view[0, 8, 1:-1] - expected[1:-1]).abs().max() <= 1


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [32, 100, 200, 400])
def test_a_large_jpeg_is_decoded_no_larger_than_needed(tmp_path, orientation, size):
    """And training sees the same as of the whole picture, whichever way up the camera has stored it."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (1280, 960), Image.Resampling.BICUBIC
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise.save(tmp_path / "a.jpg", quality=95, exif=exif)
    for seed in range(5):
        whole = Image.open(tmp_path / "a.jpg")
        whole.load()
        lazy = Image.open(tmp_path / "a.jpg")
        views = [train_view(p, size, seed, True).float() for p in (whole, lazy)]
        assert (views[0] - views[1]).abs().mean() < 1.5
        left, top, right, bottom = random_crop(*to_rgb(whole).size, np.random.default_rng(seed))
        enough = min(right - left, bottom - top) / size
        assert whole.width == 1280 and 1280 // lazy.width == max(n for n in (1, 2, 4, 8) if n <= max(1, enough))


def test_half_of_the_pictures_are_mirrored_where_that_is_allowed():
    ramp = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 3, 64, axis=0).repeat(3, axis=2))
    falling = {
        flip: sum(
            int(view[0, 0, 0]) > int(view[0, 0, -1])
            for view in (train_view(ramp, 16, seed, flip) for seed in range(200))
        )
        for flip in (True, False)
    }
    assert falling[False] == 0 and 70 < falling[True] < 130


@pytest.mark.parametrize(
    "captions, expected",
    [
        (["a dog on the left"], True),
        (["a dog", "Right of the tree"], True),
        (["the leftmost boy"], True),
        (["a bright upright copyright"], False),
        (["a dog"], False),
    ],
)
def test_captions_that_a_mirror_would_falsify(captions, expected):
    assert says_left_or_right(captions) == expected


def test_a_photo_with_left_in_any_caption_is_never_mirrored(tmp_path):
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 3, 64, axis=0).repeat(3, axis=2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    for captions, mirrored in ((["a ramp", "dark on the left"], False), (["a ramp"], True)):
        (tmp_path / "a.json").write_text(json.dumps([{"image": "ramp.png", "caption": captions}]))
        batches = TrainBatches(open_photos([str(tmp_path / "a.json")], "train", 16), Texts(BERT), 16, seed=0)
        images = batches.__getitems__([(position, 0) for position in range(40)]).images.int()
        assert bool((images[:, 0, 0, 0] > images[:, 0, 0, -1]).any()) == mirrored


# --- annotation files


def test_formats_of_annotations(tmp_path):
    write_photos(tmp_path)
    photos = Annotations(tmp_path / "a.json")
    assert (
        len(photos) == 6
        and photos.captions(1) == ["a red circle very big"]
        and photos.picture(2).getpixel((0, 0)) == (20,) * 3
    )

    lines = [{"image": "0.png", "caption": ["one", "two"], "image_id": 9}, {"image": "1.png", "caption": "three"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    photos = Annotations(tmp_path / "b.jsonl")
    assert photos.captions(0) == ["one", "two"] and photos.key(0) == "9" and photos.key(1) == "1.png"

    karpathy = {
        "images": [
            {
                "filename": f"{i}.png",
                "filepath": "",
                "split": split,
                "sentences": [{"raw": "A"}, {"raw": "B"}],
                "cocoid": i,
            }
            for i, split in enumerate(["train", "restval", "val", "test", "train"])
        ]
    }
    (tmp_path / "k.json").write_text(json.dumps(karpathy))
    assert [len(Annotations(tmp_path / "k.json", split)) for split in ("train", "val", "test")] == [3, 1, 1]
    assert Annotations(tmp_path / "k.json", "val").captions(0) == ["A", "B"]


def test_a_split_without_photos_and_an_id_that_is_null(tmp_path):
    """The splits that are there are named; null, as pandas writes it, is no id."""
    images = [{"filename": "0.png", "split": "val", "sentences": [{"raw": "a"}]}]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    with pytest.raises(UserError, match="k.json has no photo of the split train, only of val"):
        Annotations(tmp_path / "k.json")
    write_photos(tmp_path, image_id=None)
    assert Annotations(tmp_path / "a.json").key(0) == "0.png"
    with pytest.raises(UserError, match="is a folder: expected a .json"):
        Annotations(tmp_path)


def test_photos_may_live_elsewhere(tmp_path):
    (tmp_path / "photos").mkdir()
    path = write_photos(tmp_path / "photos").rename(tmp_path / "a.json")
    assert Annotations(path, images=[tmp_path / "photos"]).picture(1).size == (40, 30)


def test_image_ids_are_of_the_photo_and_its_set(tmp_path):
    """Records of one photo share an id; the same name in another set is another photo; ids never change."""
    records = [{"image": "x.jpg", "caption": c} for c in "ab"] + [{"image": "y.jpg", "caption": "c", "image_id": 5}]
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_text(json.dumps(records))
    photos = open_photos([str(tmp_path / "one.json"), str(tmp_path / "two.json")], "train", 16)
    ids = [photos.image_id(i) for i in range(6)]
    assert ids[0] == ids[1] and len(set(ids)) == 4
    key, part = hashlib.sha256(b"x.jpg").digest()[:6], 1  # 48 bits of the key, above them the number of the set
    assert ids[0] == int.from_bytes(key, "big") and ids[3] == ids[0] + (part << 48)
    assert torch.tensor(ids).dtype == torch.int64


def test_held_out_photos_are_the_same_always_and_on_one_side_only(tmp_path):
    records = [{"image": f"{i // 2}.jpg", "caption": "a"} for i in range(20)]  # two records a photo
    (tmp_path / "a.json").write_text(json.dumps(records))
    photos = open_photos([str(tmp_path / "a.json")], "train", 16)
    rest, out = photos.held_out(3)
    assert len(rest) == 14 and len(out) == 6
    assert not {rest.image_id(i) for i in range(14)} & {out.image_id(i) for i in range(6)}
    assert (photos.held_out(3)[1].chosen == out.chosen).all()


# --- what comes when


def steps_of(sampler):
    return [tuple(samples) for samples in sampler]


def sampler(photos, batch=4, accumulate=1, steps=20, start=0, rank=0, world=1, seed=0):
    return StepSampler(photos, seed, batch, accumulate, steps, start, rank, world)


@pytest.fixture
def photos(tmp_path):
    captions = ["a " + "very " * (i % 7) + "red circle" for i in range(43)]
    return open_photos([str(write_photos(tmp_path, 43, (8, 8), captions))], "train", 8)


def test_an_epoch_shows_each_photo_once_but_for_the_tail(photos):
    s, orders = sampler(photos), []
    assert s.per_epoch == 10
    for epoch in range(2):
        seen = [index for samples in steps_of(s)[10 * epoch : 10 * epoch + 10] for _, index in samples]
        assert len(seen) == len(set(seen)) == 40
        orders.append(seen)
    assert len(set(orders[0]) ^ set(orders[1])) > 0  # another tail is dropped: it is another permutation
    positions = [position for samples in steps_of(s) for position, _ in samples]
    assert len(set(positions)) == 80
    assert steps_of(s) != steps_of(sampler(photos, seed=1))


def test_the_twins_of_the_shapes_world_meet_in_one_batch():
    """So that ITC and ITM have to tell "red circle above blue square" from "blue circle above red square"."""
    for samples in steps_of(sampler(open_photos(["shapes"], "train", 8), batch=16, steps=5)):
        indices = {index for _, index in samples}  # a twin is the next picture
        assert len(indices) == 16 and all(index ^ 1 in indices for index in indices)


@pytest.mark.parametrize("start", [1, 7, 10, 13])
def test_a_resumed_sampler_goes_on_where_the_other_stopped(photos, start):
    assert steps_of(sampler(photos, start=start)) == steps_of(sampler(photos))[start:]


@pytest.mark.parametrize("world, accumulate", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_processes_and_micro_batches_share_the_steps_of_one(photos, world, accumulate):
    whole = steps_of(sampler(photos, batch=8))
    size = 8 // world // accumulate
    parts = [steps_of(sampler(photos, size, accumulate, rank=rank, world=world)) for rank in range(world)]
    for step, samples in enumerate(whole):
        joined = [
            sample
            for micro in range(accumulate)
            for rank in range(world)
            for sample in parts[rank][step * accumulate + micro]
        ]
        assert tuple(joined) == samples


def test_captions_of_a_step_are_of_similar_length(photos):
    """So that little padding is computed; the steps themselves come in no order of length."""
    s = sampler(photos, steps=10)
    lengths = [[len(photos.captions(index)[0].split()) for _, index in samples] for samples in s]
    assert np.mean([max(step) - min(step) for step in lengths]) < 1
    assert sorted(map(max, lengths)) != list(map(max, lengths))


def test_the_data_do_not_depend_on_workers(photos):
    def batches(workers):
        return list(
            train_loader(TrainBatches(photos, Texts(BERT), 8, seed=0), sampler(photos, steps=3), workers, pin=False)
        )

    for alone, helped in zip(batches(0), batches(2), strict=True):
        assert torch.equal(alone.images, helped.images) and torch.equal(alone.text_ids, helped.text_ids)
        assert torch.equal(alone.image_ids, helped.image_ids)


def test_one_of_several_captions_is_drawn_at_each_step():
    photos = open_photos(["shapes"], "train", 64)
    batches = TrainBatches(photos, Texts(BERT), 64, seed=0)
    ids = {tuple(batches.__getitems__([(position, 3)]).text_ids[0].tolist()) for position in range(40)}
    assert len(ids) == len(photos.captions(3)) > 1


def test_mixed_sets_all_take_part(tmp_path, photos):
    both = Mixture([photos.parts[0], open_photos(["shapes"], "val", 8).parts[0]])
    assert len(both) == 43 + 500
    batch = TrainBatches(both, Texts(BERT), 8, seed=0).__getitems__([(0, 42), (1, 43)])
    assert (batch.image_ids >> 48).tolist() == [0, 1]


def test_unreadable_photos_are_named_skipped_and_replaced(tmp_path):
    path = write_photos(tmp_path)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:-30])  # in the middle of its pixels
    batches = TrainBatches(open_photos([str(path)], "train", 8), Texts(BERT), 8, seed=0)
    batch = batches.__getitems__([(0, 0), (1, 1)])
    assert [name.rsplit("/", 1)[1] for name, _ in batch.broken] == ["1.png", "2.png"]
    assert "does not exist" in batch.broken[0][1] and "broken or cut short" in batch.broken[1][1]
    assert len(batch) == 2 and batch.images[1].float().mean() == 30  # photo 3 stands in, with its own caption and id
    assert batches.texts.decode(batch.text_ids[1].tolist()) == "a red circle very very very big"
    assert batch.image_ids.tolist() == [batches.photos.image_id(0), batches.photos.image_id(3)]


def test_records_are_one_block_of_bytes(tmp_path):
    """Forked workers share it: no list of a million dictionaries that each of them would copy."""
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps({"image": f"{i}.jpg", "caption": "a dog"}) for i in range(1000)))
    photos = Annotations(path)
    assert photos.captions(999) == ["a dog"] and photos.name(7).endswith("7.jpg")
    large = {name for name, value in vars(photos).items() if hasattr(value, "__len__") and len(value) > 1}
    assert large == {"bytes", "offsets"} and {type(photos.bytes), type(photos.offsets)} == {np.ndarray}
    assert photos.bytes.nbytes < 100_000


def test_shapes_are_not_cropped_and_photos_are(tmp_path):
    """A caption of the shapes world tells of every object and its place, so a crop would make it false."""
    world = open_photos(["shapes"], "train", 32)
    view = world.train_view(3, 32, np.random.default_rng(0))
    assert torch.equal(view, eval_transform(world.picture(3), 32))
    photos = open_photos([str(write_photos(tmp_path, 2))], "train", 32)
    Image.effect_noise((40, 30), 50).save(tmp_path / "0.png")
    assert not torch.equal(photos.train_view(0, 32, np.random.default_rng(0)), eval_transform(photos.picture(0), 32))
