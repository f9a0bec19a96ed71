"""From files to samples: any text becomes token ids, any image file an upright RGB image, any published annotation file
records; and what is wrong with the files is known before a long run."""

import hashlib
import json
import os
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, shared
from PIL import Image, ImageOps

from engine.errors import UserError
from llm import OPT, T5
from sources import layouts
from sources.annotations import AnnotationFile
from sources.images import decode_crop, eval_transform, images_in, open_image, random_crop, to_rgb, train_transform
from sources.layouts import open_records, stream_records
from sources.mixture import Mixture, open_images
from sources.text import (
    BertTokenizer,
    LLMTokenizer,
    clean_caption,
    fill_template,
    open_tokenizer,
    pad,
    says_left_or_right,
    split_prefix,
)
from tasks.batches import Gallery
from tools import data as data_command

BERT = ROOT / "assets/tiny/bert"
ROTATION = 0x0112  # the EXIF tag of the camera's orientation; 6: rotate by 90 degrees


def write(folder, name: str, content) -> str:
    """A text file, or a JSON file."""
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder / name)


def write_annotations(folder, count: int = 6, size=(40, 30), captions=None, **first) -> str:
    """a.json and its images: image i is all of grey level 10 * i. `first`: changes to the first record."""
    for i in range(count):
        Image.new("RGB", size, (10 * i,) * 3).save(folder / f"{i}.png")
    captions = captions or [f"a red circle {'very ' * i}big" for i in range(count)]
    records = [{"image": f"{i}.png", "caption": captions[i]} for i in range(count)]
    return write(folder, "a.json", [records[0] | first, *records[1:]])


def ramp(width: int, height: int) -> Image.Image:
    """Brightness rises from left to right: 0 to 3 * (width - 1), at most 255."""
    row = np.minimum(3 * np.arange(width), 255).astype(np.uint8)
    return Image.fromarray(np.tile(row[None, :, None], (height, 1, 3)))


# --- text ------------------------------------------------------------------------------------------------------------


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
def test_captions_are_cleaned_as_in_lavis(raw, clean):
    """BlipCaptionProcessor.pre_caption."""
    assert clean_caption(raw) == clean


def test_bert_text_starts_with_cls_ends_with_sep_and_is_truncated_to_the_limit():
    tokenizer = BertTokenizer(BERT, max_tokens=6)
    short, long = tokenizer.encode(["A red circle.", "a red circle left of a blue square"])
    assert short[0] == long[0] == tokenizer.cls_id and short[-1] == long[-1] == tokenizer.sep_id
    assert len(short) == 5 and len(long) == 6
    assert tokenizer.decode(short) == "a red circle"
    assert tokenizer.vocab_size - 1 not in short + long  # [DEC]: the Q-Former puts it in the place of [CLS]


def test_padding_and_truncation_of_a_published_tokenizer_are_disabled(tmp_path):
    """tokenizer.json of all-MiniLM-L6-v2 pads to 128 tokens and truncates at 128."""
    tokenizer = BertTokenizer(BERT)
    tokenizer.tokenizer.enable_padding(length=50)
    tokenizer.tokenizer.enable_truncation(4)
    tokenizer.save(tmp_path)
    text = "a red circle left of a blue square"
    assert len(open_tokenizer(tmp_path).encode(text).ids) == len(BertTokenizer(tmp_path).encode([text])[0]) == 10


def test_vocab_txt_is_a_tokenizer_too(tmp_path):
    vocabulary = json.loads((BERT / "tokenizer.json").read_text())["model"]["vocab"]
    write(tmp_path, "vocab.txt", "\n".join(sorted(vocabulary, key=vocabulary.get)))
    captions = ["A red circle, left of a blue square.", "a zebra"]
    assert BertTokenizer(tmp_path).encode(captions) == BertTokenizer(BERT).encode(captions)


def test_real_opt_and_t5_tokenizers_have_the_special_tokens_of_their_models():
    """OPT's folder has vocab.json and merges.txt: </s> is 2, before the text; the newline after it is 50118."""
    tokenizer = LLMTokenizer(shared("data/tokenizers/opt"), OPT.prompt_format)
    assert tokenizer.end_id == 50118 and tokenizer.pad_id == 1
    assert tokenizer.encode_prompts(["", "a photo of"]) == [[2], [2, 102, 1345, 9]]
    assert tokenizer.encode_targets(["a dog"], ["a photo of"]) == [[10, 2335, 50118]]  # joined by a space
    assert tokenizer.decode([10, 2335, 50118]) == "a dog"
    tokenizer = LLMTokenizer(shared("data/tokenizers/t5"), T5.prompt_format)
    assert tokenizer.encode_prompts([""]) == [[1]] and tokenizer.end_id == 1
    assert tokenizer.decode(tokenizer.encode_targets(["a dog"], [""])[0]) == "a dog"


def test_padding_is_up_to_a_multiple_of_eight():
    ids, mask = pad([[2, 5, 3], [2, 3]], pad_id=0)
    assert ids.tolist() == [[2, 5, 3, 0, 0, 0, 0, 0], [2, 3, 0, 0, 0, 0, 0, 0]]
    assert mask.sum(dim=1).tolist() == [3, 2] and mask[1].tolist() == [True] * 2 + [False] * 6
    ids, mask = pad([[2, 5, 3], [2, 3]], pad_id=0, side="left", multiple=1)
    assert ids.tolist() == [[2, 5, 3], [0, 2, 3]] and mask.tolist() == [[True] * 3, [False, True, True]]


def test_questions_and_conversations_are_put_into_the_template():
    """Question, answer, question, ... in the words of the template; each answer ends with one full stop."""
    template = OPT.prompt_format.template
    assert fill_template(template, "what is it?") == "Question: what is it? Answer:"
    turns = [("what is it?", "a dog"), ("is it large?", "no."), "what color?"]
    said = "Question: what is it? Answer: a dog. Question: is it large? Answer: no. Question: what color? Answer:"
    assert fill_template(template, turns) == said
    assert fill_template(T5.prompt_format.template, "what is it?") == "Question: what is it? Short answer:"
    assert fill_template("{}", "a photo of") == "a photo of"


def test_a_prefix_ends_after_any_word_but_the_last_equally_often():
    rng = np.random.default_rng(0)
    cuts = Counter(len(split_prefix("a b c d", rng)[0].split()) for _ in range(4000))
    assert sorted(cuts) == [0, 1, 2, 3] and all(900 < count < 1100 for count in cuts.values())
    assert {split_prefix("one two", rng) for _ in range(20)} == {("", "one two"), ("one", "two")}
    assert split_prefix("one", rng) == ("", "one")


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
def test_captions_that_mirroring_would_falsify_are_recognized(captions, expected):
    assert says_left_or_right(captions) == expected


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_of_every_kind_become_rgb(tmp_path):
    """CMYK, palette, grey and 16-bit images; the first frame of an animation; transparent parts are white."""
    red = (200, 30, 40)
    Image.new("RGB", (4, 4), red).save(tmp_path / "rgb.png")
    Image.new("RGB", (4, 4), red).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    Image.new("RGB", (4, 4), red).quantize(4).save(tmp_path / "palette.png")
    Image.new("L", (4, 4), 128).save(tmp_path / "grey.png")
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(tmp_path / "16bit.png")
    frames = [Image.new("RGB", (4, 4), color) for color in (red, (0, 0, 255))]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "transparent.png")
    expected = {"16bit.png": (128,) * 3, "grey.png": (128,) * 3, "transparent.png": (255,) * 3}
    for path in tmp_path.iterdir():
        image = open_image(path)
        assert image.mode == "RGB" and image.size == (4, 4)
        assert np.abs(np.array(image.getpixel((1, 1))) - expected.get(path.name, red)).max() <= 3, path.name


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_the_rotation_flag_of_the_camera_is_obeyed(tmp_path, kind):
    """A training crop of a rotated image is that of the upright one."""
    exif = Image.Exif()
    exif[ROTATION] = 6
    Image.new("RGB", (800, 200)).save(tmp_path / f"rotated.{kind}", exif=exif)
    assert open_image(tmp_path / f"rotated.{kind}").size == (200, 800)
    rotated, upright = Image.open(tmp_path / f"rotated.{kind}"), Image.new("RGB", (200, 800))
    crops = [decode_crop(image, 200, np.random.default_rng(0)) for image in (rotated, upright)]
    assert crops[0][0].size == crops[1][0].size == (200, 800) and crops[0][1] == crops[1][1]


@pytest.mark.parametrize("flag", range(10))
def test_every_rotation_flag_is_undone_as_pillow_would(flag):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    image.getexif()[ROTATION] = flag
    turned = to_rgb(image)
    assert turned == ImageOps.exif_transpose(image).convert("RGB") and to_rgb(turned) == turned


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("entry", ["xres_minus1_over_0", "xmp_ascii", "desc_as_float", "resunit_as_ascii"])
def test_an_odd_exif_entry_beside_the_flag_is_no_obstacle(kind, entry):
    """Pillow raises struct.error, TypeError or AttributeError when it writes these again."""
    image = open_image(shared(f"cases/03-exif/{entry}.{kind}"))
    assert image.size == (48, 64)  # of 64 x 48, turned


@pytest.mark.parametrize(
    "mode, values, grey",
    [
        ("F", [0, 0.5, 1], [0, 128, 255]),
        ("F", [0, 2, 255], [0, 2, 255]),
        ("F", [0, 257, 65535], [0, 1, 255]),
        ("I", [0, 128, 255], [0, 128, 255]),
        ("I", [0, 257, 65535], [0, 1, 255]),
        ("I;16", [0, 3, 255], [0, 0, 1]),  # a dark one: 16 bits say their range themselves
    ],
)
def test_numbers_beyond_8_bits_are_scaled_by_what_they_are(tmp_path, mode, values, grey):
    """A TIFF of floats or 32-bit integers is neither black nor white."""
    dtype = {"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode]
    image = Image.fromarray(np.array([values], dtype))
    image.save(tmp_path / "a.tif")
    assert image.mode == mode and np.array(open_image(tmp_path / "a.tif"))[0, :, 0].tolist() == grey


def test_hidden_files_are_no_images_of_a_folder(tmp_path):
    for name in ("b.avif", "a.jfif", "c.JP2", "._a.jpg", "notes.txt"):
        write(tmp_path, name, "")
    assert [path.name for path in images_in(tmp_path)] == ["a.jfif", "b.avif", "c.JP2"]


def test_an_image_with_damaged_exif_is_an_image(tmp_path):
    """Only its rotation is unknown."""
    odd = b"Exif\0\0" + struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, ROTATION, 7, 1, 6, 0)  # of a wrong type
    annotations = write(tmp_path, "a.json", [{"image": "a.jpg", "caption": "nothing"}])
    for damaged in (b"Exif\0\0no TIFF header", odd):
        Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=damaged)
        assert open_image(tmp_path / "a.jpg").size == (8, 8)
        assert AnnotationFile(annotations)[0].augment(4, np.random.default_rng(0)).shape == (3, 4, 4)


def test_evaluation_squeezes_the_whole_image_into_a_square():
    pixels = eval_transform(ramp(80, 20), 20)
    assert pixels.shape == (3, 20, 20) and pixels.dtype == torch.uint8
    assert pixels[0, 0, 0] < 12 and pixels[0, 0, -1] > 225  # both ends are there


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (400, 20), (20, 20)])
def test_a_crop_has_half_to_all_of_the_area_and_is_nearly_square(size):
    for seed in range(50):
        left, top, right, bottom = random_crop(*size, np.random.default_rng(seed))
        assert 0 <= left < right <= size[0] + 1e-6 and 0 <= top < bottom <= size[1] + 1e-6
        assert 3 / 4 - 1e-6 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-6
        if size != (400, 20):  # too long for any: its middle
            assert 0.5 - 1e-6 <= (right - left) * (bottom - top) / (size[0] * size[1]) <= 1


def train_view(image, size: int, seed: int, flip: bool) -> torch.Tensor:
    """The image as a training step sees it."""
    rng = np.random.default_rng(seed)
    return train_transform(*decode_crop(image, size, rng), size, rng, flip)


def test_training_sees_the_crop():
    for seed in range(20):
        left, _, right, _ = random_crop(64, 64, np.random.default_rng(seed))
        view = train_view(ramp(64, 64), 16, seed, flip=False)
        middle = 3 * ((left + right) / 2 - 0.5)  # pixel x is centred on x + 0.5 and has brightness 3 x
        slope = 3 * (right - left) / 16
        expected = middle + slope * (torch.arange(16) - 7.5)
        assert (view[0, 8, 1:-1] - expected[1:-1]).abs().max() <= 1


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size, shrink", [(32, 8), (80, 4), (160, 2), (320, 1)])
def test_a_large_jpeg_is_decoded_no_larger_than_needed(tmp_path, orientation, size, shrink):
    """And training sees the same as of the whole image, in either orientation."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ROTATION] = orientation
    large = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
    large.save(tmp_path / "a.jpg", quality=95, exif=exif)
    for seed in range(2):
        whole, lazy = Image.open(tmp_path / "a.jpg"), Image.open(tmp_path / "a.jpg")
        whole.load()
        views = [train_view(image, size, seed, True).float() for image in (whole, lazy)]
        assert (views[0] - views[1]).abs().mean() < 1.5
        left, top, right, bottom = random_crop(*to_rgb(whole).size, np.random.default_rng(seed))
        side = min(right - left, bottom - top)
        assert whole.width == 640 and lazy.width == 640 // shrink
        assert side / shrink >= size and (shrink == 8 or side / (2 * shrink) < size)


def test_half_of_the_training_images_are_mirrored_where_that_is_allowed():
    def mirrored(flip: bool) -> int:
        views = (train_view(ramp(64, 64), 16, seed, flip) for seed in range(200))
        return sum(int(view[0, 0, 0]) > int(view[0, 0, -1]) for view in views)

    assert mirrored(False) == 0 and 70 < mirrored(True) < 130


@pytest.mark.parametrize(
    "texts, is_mirrored",
    [
        ({"caption": ["a ramp"]}, True),
        ({"caption": ["a ramp", "dark on the left"]}, False),
        ({"question": "what is on the left?", "answer": "black"}, False),
        ({"question": "where is it dark?", "answer": ["left", "nowhere"]}, False),
        ({"question": "what is it?", "answer": "a ramp"}, True),
    ],
)
def test_an_image_is_never_mirrored_if_any_of_its_texts_says_left_or_right(tmp_path, texts, is_mirrored):
    ramp(64, 64).save(tmp_path / "ramp.png")
    source = AnnotationFile(write(tmp_path, "a.json", [{"image": "ramp.png", **texts}]), questions="question" in texts)
    views = torch.stack([source[0].augment(16, np.random.default_rng(seed)) for seed in range(40)]).int()
    assert bool((views[:, 0, 0, 0] > views[:, 0, 0, -1]).any()) == is_mirrored


def test_images_of_files_are_cropped_and_those_of_the_shapes_world_are_not(tmp_path):
    """A caption of the shapes world names every object and its place: a crop would make it false."""
    sample, rng = open_images(["shapes"], "train", 32)[3], np.random.default_rng(0)
    assert torch.equal(sample.augment(32, rng), eval_transform(sample.open(), 32))
    sample = open_images([write_annotations(tmp_path, 2)], "train", 32)[0]
    Image.effect_noise((40, 30), 50).save(tmp_path / "0.png")
    assert not torch.equal(sample.augment(32, rng), eval_transform(sample.open(), 32))


# --- annotation files ------------------------------------------------------------------------------------------------


def test_a_record_is_an_image_with_one_or_several_captions(tmp_path):
    """In a JSON list, or one a line; its key is the image_id, else the file name."""
    source = AnnotationFile(write_annotations(tmp_path))
    assert len(source) == 6 and source[1].captions == ["a red circle very big"] and source.num_texts == 6
    assert source[2].name == str(tmp_path / "2.png") and source[2].open().getpixel((0, 0)) == (20,) * 3
    lines = [{"image": "0.png", "caption": ["one", "two"], "image_id": 9}, {"image": "1.png", "caption": "three"}]
    source = AnnotationFile(write(tmp_path, "b.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n"))
    assert source[0].captions == ["one", "two"] and source.num_texts == 3
    assert source[0].key == "9" and source[1].key == "1.png"


@pytest.mark.parametrize("image_id", [None, float("nan"), "", " ", "nan", {}, []])
def test_an_image_id_that_is_none_is_none(tmp_path, image_id):
    """As pandas and others write it; else all images would be one."""
    assert AnnotationFile(write_annotations(tmp_path, image_id=image_id))[0].key == "0.png"
    for kept in (0, 0.5, "000", "coco_7", 10**30):
        assert AnnotationFile(write_annotations(tmp_path, image_id=kept))[0].key == str(kept)


def test_an_image_id_of_several_files_is_told(tmp_path, capsys):
    records = [{"image": f"{i // 2}.png", "caption": "a dog", "image_id": [7, -1, -1][i // 2]} for i in range(6)]
    path = write(tmp_path, "a.json", records)
    AnnotationFile(path)
    said = f"{path}: 1 image_ids are of several files, which count as one image: -1 of 1.png and 2.png; remove them"
    assert capsys.readouterr().out.startswith(said)
    assert "with the image_id of another file: 2\n  -1 for 1.png and 2.png\n" in checked(path, capsys=capsys)[1]
    AnnotationFile(write(tmp_path, "a.json", records[:4]))
    assert capsys.readouterr().out == ""


def test_images_are_counted_once_but_for_many_rows_the_rows(tmp_path):
    """A row a caption, in many files: the recipe depends on the images."""
    records = [{"image": f"{row // 3}.png", "caption": "a dog"} for row in range(12)]
    images = open_images([write(tmp_path, "a.json", records)], "train", 8)
    assert images.num_images(13) == 4 and images.num_images(12) == 12
    assert images.held_out(1)[0].num_images(13) == 3


def test_an_image_id_of_odd_digits_is_a_name(tmp_path):
    """int() reads no superscripts."""
    ids = ["\u00b2\u00b3", "007", "coco_7"]
    records = [{"image": "0.png", "caption": "a dog", "image_id": image_id} for image_id in ids]
    gallery = Gallery(open_images([write(tmp_path, "a.json", records)], "train", 8))
    assert [gallery.public_id(image) for image in range(3)] == ["\u00b2\u00b3", 7, "coco_7"]


def test_an_image_name_need_not_be_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write_annotations(tmp_path, 1)
    os.rename(tmp_path / "0.png", tmp_path / name)
    images = open_images([write(tmp_path, "a.json", [{"image": name, "caption": "a dog"}])], "train", 8)
    assert images[0].open().size == (40, 30) and images.image_id(0) >= 0 and len(images.fingerprint()) == 64


def test_empty_captions_beside_others_are_left_out_and_counted(tmp_path, capsys):
    """Visual Genome has empty phrases, COCO captions of a line end."""
    notes = [{"image_id": 0, "caption": caption} for caption in ("\n", "A dog", None, "!")]
    path = write(tmp_path, "a.json", {"images": [{"id": 0, "file_name": "0.png"}], "annotations": notes})
    source = AnnotationFile(path)
    assert source[0].captions == ["A dog"] and source.num_texts == 1
    assert capsys.readouterr().out == f"{path}: 3 captions without a word are left out\n"


def test_peoples_answers_are_kept_as_they_are(tmp_path):
    """Accuracy counts all ten, whatever they are; what is learned is a text."""
    records = [{"image": "0.png", "question": "what?", "answer": answer} for answer in (["!", "", "a dog"], ["", " "])]
    source = AnnotationFile(write(tmp_path, "q.json", records), questions=True)
    assert [sample.record["answer"] for sample in source] == [["!", "", "a dog"], ["", " "]]
    assert source[0].texts() == [("what?", "!"), ("what?", "a dog")] and source.unanswered == 1


def test_a_folder_of_images_with_texts_is_read_as_it_is(tmp_path, capsys):
    """As img2dataset unpacks and kohya's tools want it: each line of 0.txt is a caption of 0.png."""
    write_annotations(tmp_path, 4)
    write(tmp_path, "0.txt", "a dog\n\n a cat\u2028on a mat \n")
    write(tmp_path, "2.txt", "\n")
    write(tmp_path, "3.txt", "a bird")
    images = open_images([str(tmp_path)], "train", 8)
    assert [sample.captions for sample in images] == [["a dog", "a cat\u2028on a mat"], ["a bird"]]
    assert images[1].open().getpixel((0, 0)) == (30,) * 3
    said = f"{tmp_path}: 2 of 4 images are left out, which have no .txt with a caption\n"
    assert capsys.readouterr().out == said
    assert f"{tmp_path}: a folder of images with texts, 2 records, 2 images" in checked(tmp_path, capsys=capsys)[1]


@pytest.mark.parametrize(
    "name, content",
    [
        ("metadata.csv", 'file_name,text\n0.png,"a dog, big"\n'),
        ("metadata.jsonl", '{"file_name": "0.png", "text": "a dog, big"}\n'),
    ],
)
def test_a_folder_may_have_hugging_faces_metadata(tmp_path, name, content):
    write_annotations(tmp_path, 2)
    write(tmp_path, name, content)
    source = AnnotationFile(tmp_path)
    assert len(source) == 1 and source[0].captions == ["a dog, big"] and source[0].open().size == (40, 30)


@pytest.mark.parametrize("name", ["a.JSON", "a.ndjson", "a.JSONL"])
def test_json_by_other_names(tmp_path, name):
    record = json.dumps({"image": "0.png", "caption": "a dog"})
    content = f"[{record}]" if name == "a.JSON" else f"{record}\n{record}\n"
    assert AnnotationFile(write(tmp_path, name, content))[0].captions == ["a dog"]


def test_a_record_may_be_a_question_with_its_answers(tmp_path):
    """An answer is drawn as often as people gave it."""
    record = {"image": "0.png", "question": "what is it?", "answer": ["a dog"] * 3 + ["a cat"]}
    sample = AnnotationFile(write(tmp_path, "q.json", [record]), questions=True)[0]
    rng = np.random.default_rng(0)
    drawn = Counter(sample.sample_text(rng) for _ in range(400))
    assert set(drawn) == {("what is it?", "a dog"), ("what is it?", "a cat")}
    assert 270 < drawn["what is it?", "a dog"] < 330


def test_a_karpathy_file_has_several_splits(tmp_path):
    """COCO's "restval" is by custom part of the training split; a split that is not there is refused."""
    images = [
        {"filename": f"{i}.png", "filepath": "", "split": split, "sentences": [{"raw": "A"}, {"raw": "B"}], "cocoid": i}
        for i, split in enumerate(["train", "restval", "val", "test", "train"])
    ]
    file = write(tmp_path, "k.json", {"images": images})
    assert [len(AnnotationFile(file, split)) for split in ("train", "val", "test")] == [3, 1, 1]
    assert AnnotationFile(file, "val")[0].captions == ["A", "B"]
    file = write(tmp_path, "val.json", {"images": images[2:3]})
    with pytest.raises(UserError, match="val.json has no image of the split train, only of val"):
        AnnotationFile(file)


def test_images_are_looked_for_in_several_folders_or_beside_the_file(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one/0.png")
    write_annotations(tmp_path / "two", 2)
    source = AnnotationFile(tmp_path / "two/a.json", images=[tmp_path / "one", tmp_path / "two"])
    assert [source[i].open().size for i in range(2)] == [(8, 8), (40, 30)]
    assert AnnotationFile(tmp_path / "two/a.json")[0].open().size == (40, 30)


def test_an_image_id_is_of_the_image_and_its_set(tmp_path):
    """Records of one image share an id; the same name in another set is another image; ids never change."""
    records = [{"image": "x.jpg", "caption": c} for c in "ab"] + [{"image": "y.jpg", "caption": "c", "image_id": 5}]
    images = open_images([write(tmp_path, name, records) for name in ("one.json", "two.json")], "train", 16)
    ids = [images.image_id(i) for i in range(6)]
    assert ids[0] == ids[1] and len(set(ids)) == 4
    key, part = hashlib.sha256(b"x.jpg").digest()[:6], 1  # 48 bits of the key, above them the number of the set
    assert ids[0] == int.from_bytes(key, "big") and ids[3] == ids[0] + (part << 48)
    assert torch.tensor(ids).dtype == torch.int64


def test_a_mixture_has_the_samples_of_all_its_sets(tmp_path):
    mixed = open_images([write_annotations(tmp_path), "shapes"], "val", 8)
    assert len(mixed) == 6 + 500 and mixed.num_texts() == 506
    assert mixed[5].captions == ["a red circle very very very very very big"] and mixed[6].name == "shapes val 0"
    assert [mixed.image_id(i) >> 48 for i in (5, 6)] == [0, 1]
    chosen = Mixture(mixed.parts, np.array([7, 2]))
    assert [chosen[i].name for i in range(2)] == ["shapes val 1", str(tmp_path / "2.png")]


def test_held_out_images_are_always_the_same_and_on_one_side_only(tmp_path):
    records = [{"image": f"{i // 2}.jpg", "caption": "a"} for i in range(20)]  # two records an image
    images = open_images([write(tmp_path, "a.json", records)], "train", 16)
    for count in range(1, 10):
        rest, out = images.held_out(count)
        assert len(rest) == 20 - 2 * count and len(out) == 2 * count
        assert not {rest.image_id(i) for i in range(len(rest))} & {out.image_id(i) for i in range(len(out))}
        assert (images.held_out(count)[1].chosen == out.chosen).all()


def test_records_are_one_block_of_bytes(tmp_path):
    """Forked workers share it: a list of a million dictionaries would be copied by each of them."""
    records = [{"image": f"{i}.jpg", "caption": "a dog"} for i in range(1000)]
    source = AnnotationFile(write(tmp_path, "many.jsonl", "\n".join(map(json.dumps, records))))
    assert source[999].captions == ["a dog"] and source[7].name.endswith("7.jpg")
    large = {name for name, value in vars(source).items() if hasattr(value, "__len__") and len(value) > 1}
    assert large == {"bytes", "offsets", "lengths", "firsts"}
    assert {type(vars(source)[name]) for name in large} == {np.ndarray}
    assert source.bytes.nbytes < 100_000


def test_json_lines_are_read_one_by_one_and_mean_what_the_whole_file_means(tmp_path, monkeypatch):
    """Records of JSON lines are not all in memory; errors are reported as for a whole file."""
    good = [{"image": "a.jpg", "caption": "one"}, {"image": "b.jpg", "caption": ["two"], "img_id": 5}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, good)))
    assert list(stream_records(path)) == open_records(path)[1]
    monkeypatch.setattr(layouts, "read_content", None)  # reads a file whole
    assert len(list(stream_records(path))) == 2
    bad = {"image": "a.jpg", "question": "q", "answers": [{"confidence": "yes"}]}
    path.write_text("\n".join(map(json.dumps, [*good, bad])))
    with pytest.raises(UserError, match="looks like a list of records, but an entry is not as published"):
        list(stream_records(path))
    path.write_text('{"image": "a.jpg", "caption": "one"}\n\n{"image": oops}\n')
    with pytest.raises(UserError, match="line 3 is not JSON"):
        list(stream_records(path))


# --- published layouts -----------------------------------------------------------------------------------------------

QUESTION = {"image_id": 42, "question": "What is it?", "question_id": 420}
VQA = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
ANSWERS = [
    {"answer": word, "answer_confidence": "yes", "answer_id": i + 1} for i, word in enumerate(["dog"] * 9 + ["cat"])
]
NOTE = {"question_type": "what is", "multiple_choice_answer": "dog", "answers": ANSWERS, "image_id": 42}
NOTE |= {"answer_type": "other", "question_id": 420}
ASKED = {"image": "COCO_val2014_000000000042.jpg", **QUESTION}

# One entry of each published layout: name of the file, its content, its second file, the first record made of it.
FILES = {
    "COCO captions": (
        "captions_val2014.json",
        {
            "info": {}, "licenses": [],
            "images": [{"license": 3, "file_name": "COCO_val2014_000000000042.jpg", "coco_url": "u", "height": 4,
                        "width": 6, "date_captured": "d", "flickr_url": "f", "id": 42}],
            "annotations": [{"image_id": 42, "id": 1, "caption": "A dog.\n"},
                            {"image_id": 42, "id": 2, "caption": "A cat"}],
        },
        None,
        {"image": "COCO_val2014_000000000042.jpg", "image_id": 42, "caption": ["A dog.", "A cat"]},
    ),
    "NoCaps": (
        "nocaps_val_4500_captions.json",
        {
            "licenses": [], "info": {},
            "images": [{"id": 0, "open_images_id": "0013ea2087020901", "license": 0, "height": 1024, "width": 732,
                        "coco_url": "https://s3/val/0013ea2087020901.jpg", "date_captured": "d",
                        "file_name": "0013ea2087020901.jpg", "domain": "near-domain"}],
            "annotations": [{"image_id": 0, "id": 0, "caption": "A baby"}],
        },
        None,
        {"image": "0013ea2087020901.jpg", "image_id": 0, "caption": ["A baby"], "domain": "near-domain"},
    ),
    "Karpathy": (
        "dataset_coco.json",
        {"images": [
            {"filepath": "val2014", "sentids": [1], "filename": "a.jpg", "imgid": 0, "split": "restval", "cocoid": 42,
             "sentences": [{"tokens": ["a", "dog"], "raw": "A dog", "imgid": 0, "sentid": 1}]},
            {"filepath": "val2014", "filename": "b.jpg", "imgid": 1, "split": "test", "cocoid": 43, "sentences": []}],
         "dataset": "coco"},
        None,
        {"image": "val2014/a.jpg", "caption": ["A dog"], "image_id": 42},
    ),
    "LAVIS's Karpathy": (
        "coco_karpathy_train.json",
        [{"caption": "A dog", "image": "val2014/COCO_val2014_000000522418.jpg", "image_id": "coco_522418"}],
        None,
        {"caption": ["A dog"], "image": "val2014/COCO_val2014_000000522418.jpg", "image_id": "coco_522418"},
    ),
    "VQAv2": (
        "v2_OpenEnded_mscoco_val2014_questions.json",
        {**VQA, "questions": [QUESTION]},
        {"info": {}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}, "annotations": [NOTE]},
        {**ASKED, "answer": ["dog"] * 9 + ["cat"], "question_type": "what is", "answer_type": "other"},
    ),
    "VQAv2 test": (
        "v2_OpenEnded_mscoco_test-dev2015_questions.json",
        {**VQA, "data_subtype": "test-dev2015", "questions": [QUESTION]},
        None,
        {**ASKED, "image": "COCO_test2015_000000000042.jpg"},
    ),
    "OK-VQA": (
        "OpenEnded_mscoco_val2014_questions.json",
        {**VQA, "questions": [QUESTION]},
        {"annotations": [{"image_id": 42, "answer_type": "other", "question_type": "one", "question_id": 420,
                          "answers": [{"answer_id": 1, "raw_answer": "dogs", "answer_confidence": "yes",
                                       "answer": "dog"}], "confidence": 3}]},
        {**ASKED, "answer": ["dog"], "question_type": "one", "answer_type": "other"},
    ),
    "GQA": (
        "testdev_balanced_questions.json",
        {"201307251": {"semantic": [], "entailed": [], "equivalent": ["201307251"], "question": "Is it red?",
                       "imageId": "n161313", "isBalanced": True, "groups": {"global": None, "local": "l"},
                       "answer": "no", "semanticStr": "s", "annotations": {}, "fullAnswer": "No.",
                       "types": {"detailed": "d", "semantic": "attr", "structural": "verify"}}},
        None,
        {"image": "n161313.jpg", "image_id": "n161313", "question": "Is it red?", "question_id": "201307251",
         "answer": ["no"], "question_type": "verify", "isBalanced": True},
    ),
    "A-OKVQA": (
        "aokvqa_v1p0_val.json",
        [{"split": "val", "image_id": 42, "question_id": "22jbM6", "question": "What?", "choices": ["a", "b", "c", "d"],
          "correct_choice_idx": 1, "direct_answers": ["b"] * 10, "difficult_direct_answer": False,
          "rationales": ["r"]}],
        None,
        {"image": "000000000042.jpg", "image_id": 42, "question": "What?", "question_id": "22jbM6",
         "answer": ["b"] * 10, "choices": ["a", "b", "c", "d"], "difficult_direct_answer": False},
    ),
    "Visual Genome regions": (
        "region_descriptions.json",
        [{"regions": [{"region_id": 1382, "width": 82, "height": 139, "image_id": 1, "phrase": "the clock is green",
                       "y": 57, "x": 421}], "id": 1}],
        None,
        {"image": "1.jpg", "caption": ["the clock is green"], "image_id": 1},
    ),
    "Visual Genome questions": (
        "question_answers.json",
        [{"id": 1, "qas": [{"a_objects": [], "question": "What color?", "image_id": 1, "qa_id": 986768,
                            "answer": "Green.", "q_objects": []}]}],
        None,
        {"image": "1.jpg", "image_id": 1, "question": "What color?", "question_id": 986768, "answer": ["green"]},
    ),
    "LAVIS's VQA": (
        "vqa_val.json",
        [{"image": "a.jpg", "question": "What?", "question_id": 1, "answer": ["dog"] * 10, "dataset": "vqa"}],
        None,
        {"image": "a.jpg", "question": "What?", "question_id": 1, "answer": ["dog"] * 10, "dataset": "vqa"},
    ),
    "Flickr30k tokens": (
        "results_20130124.token",
        "1000092795.jpg#0\tTwo young guys .\n1000092795.jpg#1\tTwo men .\n",
        None,
        {"image": "1000092795.jpg", "caption": ["Two young guys .", "Two men ."]},
    ),
    "Flickr30k csv": (
        "results.csv",
        "image_name| comment_number| comment\n1000092795.jpg| 0| Two young guys .\n1000092795.jpg| 1| Two .\n",
        None,
        {"image": "1000092795.jpg", "caption": ["Two young guys .", "Two ."]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_becomes_records(name, tmp_path, capsys):
    """By `python -m tools.data convert`; a single file also opens unconverted."""
    file, content, second, record = FILES[name]
    paths = [write(tmp_path, file, content)] + ([write(tmp_path, "second.json", second)] if second else [])
    assert open_records(paths[0], annotations=paths[1] if second else None)[1][0] == record
    data_command.main(["convert", *paths, "--out", f"{tmp_path}/out.json"])
    assert json.loads((tmp_path / "out.json").read_text())[0] == record
    assert "1 images, " in capsys.readouterr().out
    asks = "question" in record
    opened = AnnotationFile(tmp_path / "out.json", questions=asks)
    if not second:
        assert AnnotationFile(paths[0], questions=asks)[0].record == opened[0].record
    assert opened[0].name == str(tmp_path / record["image"])


@pytest.mark.parametrize(
    "content",
    [
        'image,caption\na.jpg,"a dog, a cat"\nb.jpg,two\n',
        '\ufeffimage,caption\r\na.jpg,"a dog, a cat"\r\nb.jpg,two\r\n',  # Excel's
        'Image , Caption\na.jpg , "a dog, a cat"\n\nb.jpg , two',
        '"image","caption"\n"a.jpg","a dog, a cat"\n"b.jpg","two"\n',  # pandas, QUOTE_ALL
        '"","image","caption"\n"1","a.jpg","a dog, a cat"\n"2","b.jpg","two"\n',  # R's write.csv
        ',image,caption\n0,a.jpg,"a dog, a cat"\n1,b.jpg,two,\n',  # pandas' index; an empty cell too many
        "image;caption\na.jpg;a dog, a cat\nb.jpg;two\n",
        "image\tcaption\na.jpg\ta dog, a cat\nb.jpg\ttwo\n",
        '"image"\t"caption"\n"a.jpg"\t"a dog, a cat"\n"b.jpg"\t"two"\n',
    ],
)
def test_tables_are_read_as_programs_write_them(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content.encode())
    assert [sample.record for sample in AnnotationFile(tmp_path / "a.csv")] == [
        {"image": "a.jpg", "caption": ["a dog, a cat"]},
        {"image": "b.jpg", "caption": ["two"]},
    ]


def test_quotation_marks_of_a_table_with_tabs_are_text(tmp_path):
    rows = ['a.jpg\t"stop" sign', 'b.jpg\t"a man says', "c.jpg\tbye"]
    source = AnnotationFile(write(tmp_path, "a.tsv", "\n".join(["image\tcaption", *rows])))
    assert [sample.captions for sample in source] == [['"stop" sign'], ['"a man says'], ["bye"]]


def test_columns_of_one_name_are_several_captions(tmp_path):
    source = AnnotationFile(write(tmp_path, "a.csv", "image,caption,caption\na.jpg,one,two\nb.jpg,three,\n"))
    assert [sample.captions for sample in source] == [["one", "two"], ["three"]]


def test_tables_keep_the_line_ends_and_bars_in_their_captions(tmp_path):
    table = write(tmp_path, "a.csv", 'image,caption\na.jpg,"a dog\nthat runs"\nb.jpg,a | 3 cats\n')
    assert [record["caption"] for record in open_records(table)[1]] == [["a dog\nthat runs"], ["a | 3 cats"]]


@pytest.mark.parametrize(
    "content, second, sentence",
    [
        (
            {"annotations": [NOTE]},
            None,
            "has answers without questions: type python -m tools.data convert QUESTIONS",
        ),
        (
            {**VQA, "questions": [QUESTION]},
            {"annotations": [{**NOTE, "question_id": 7}]},
            "1 of 1 questions have no answers in the second file, and 1 of its 1 answers no question",
        ),
        ({"images": [{"id": 1}]}, None, "holds an object with ['images'], images of ['id'], expected a list of"),
        ([], None, "holds nothing, expected a list of"),
        ([1], None, 'is a list: record 0 has int, expected "image" and "caption"'),
        ([{"image": "a.jpg", "caption": "x"}], {"annotations": []}, "do not belong together"),
        (
            {**VQA, "questions": [{"question_id": 1, "question": "?"}]},
            None,
            "but an entry is not as published (KeyError",
        ),
    ],
)
def test_a_file_that_fits_no_layout_gets_a_sentence_and_no_output(content, second, sentence, tmp_path):
    paths = [write(tmp_path, "a.json", content)] + ([write(tmp_path, "b.json", second)] if second else [])
    with pytest.raises(UserError) as error:
        data_command.main(["convert", *paths, "--out", f"{tmp_path}/out.json"])
    assert sentence in str(error.value) and not (tmp_path / "out.json").exists()


# --- python -m tools.data check --------------------------------------------------------------------------------------


def checked(*args, capsys, workers=0) -> tuple[int, str]:
    """Exit status and output."""
    status = 0
    try:
        data_command.main(["check", *map(str, args), "--workers", str(workers)])
    except SystemExit as error:
        status = error.code
    return status, capsys.readouterr().out


def test_check_finds_every_problem_of_annotation_files_and_their_images(tmp_path, capsys):
    for name, color in (("a.png", "red"), ("b.png", "blue"), ("copy.png", "red")):
        Image.new("RGB", (20, 20), color).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "b.png").read_bytes()[:40])
    good = {"image": "b.png", "caption": ["a blue square"]}
    records = [{"image": "a.png", "caption": ["a square"]}, good, good]
    records += [{"image": "copy.png", "caption": ["a red star " * 20]}, {"image": "broken.png", "caption": [" . "]}]
    records += [{"image": "nowhere.png", "caption": ["a dog"]}, {"image": "b.png", "question": "what?"}]
    train, val = write(tmp_path, "train.json", records), write(tmp_path, "val.json", [good])
    status, out = checked(train, val, "--bert", BERT, capsys=capsys)
    assert status == 1 and f"{train}: a list of records, 7 records, 5 images in {tmp_path}" in out
    for line in (
        "unreadable images: 2",
        "broken.png is ",
        "nowhere.png does not exist: check the name",
        "duplicate images: 1",
        "copy.png is the same image as ",
        "with an empty text: 1",
        "duplicate records: 1",
        "without an answer: 1",
        "texts truncated to 32 tokens (--max-text-tokens): 1",
        f"images of {train}, fine unless one is to train and one to test: 1",
        "8 problems",
    ):
        assert line in out, line


def test_check_finds_nothing_wrong_with_good_files(tmp_path, capsys):
    file = write_annotations(tmp_path, 2)
    status, out = checked(file, capsys=capsys, workers=-1)
    assert status == 0 and out.endswith(f"{file}: a list of records, 2 records, 2 images in {tmp_path}\nfine\n")
    assert out.startswith("text lengths are not checked: add --bert FOLDER")
    test_set = write(tmp_path, "test.json", [{"image": "0.png", "question": "what is it?", "question_id": 1}])
    status, out = checked(test_set, capsys=capsys)
    assert status == 0 and "no record has a caption or an answer: fine for a test set" in out
