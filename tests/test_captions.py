"""Image captioning (paper 4.2): scored against the references, beside the captions of shuffled images; the prompt of a
run; files for the evaluation servers."""

import json

import pytest
import torch
from conftest import ROOT, shared, stage2_model
from samples import PRECISE, TINY_RUN, caption_file, few, write_images

import eval as evaluation
from engine.errors import UserError
from sources.mixture import open_images
from tasks.batches import Gallery
from tasks.captions import caption_scores, caption_table, captioning


def test_captions_are_scored_with_the_references_and_with_those_of_other_images(tmp_path, monkeypatch):
    """Captions that equal a reference have BLEU 100; those of shuffled images score lower."""
    model = stage2_model("opt")
    references = [[f"a {c} dog runs on the grass", f"one {c} dog runs"] for c in ("red", "blue", "green", "black")]
    for i in range(4):
        few(4)[i].open().save(tmp_path / f"{i}.png")
    records = [{"image": f"{i}.png", "caption": references[i]} for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    images = open_images([str(tmp_path / "a.json")], "val", 8)
    monkeypatch.setattr(model, "caption", lambda encoded, *_, **__: [texts[0] for texts in references])
    result = captioning(model, images)
    assert result["BLEU-4"] == pytest.approx(100, abs=1e-3) and result["distinct captions"] == 4
    shuffled = result["shuffled images"]
    assert shuffled["BLEU-4"] < result["BLEU-4"] and shuffled["CIDEr"] < result["CIDEr"]
    assert len(result["examples"]) == 4 and result["captions"][str(tmp_path / "0.png")] == references[0][0]
    assert "shuffled images" in caption_table(result) and 'reference: "a red dog' in caption_table(result)


def test_captions_of_a_published_run_still_have_their_scores():
    """1,000 captions of Flickr8k's validation images: the numbers of docs/results.md, to their digits."""
    run = json.loads((ROOT / "assets/logs/flickr8k-stage2.json").read_text())
    references = {
        image["image"]: image["caption"] for image in json.loads(shared("data/flickr8k/val.json").read_text())
    }
    captions = {name.partition("/")[2]: text for name, text in run["captions"].items()}
    scores = caption_scores(list(captions.values()), [references[name] for name in captions])
    assert len(captions) == 1000 and run["CIDEr"] == pytest.approx(scores["CIDEr"], abs=0.01)
    for n in range(1, 5):
        assert run[f"BLEU-{n}"] == pytest.approx(scores[f"BLEU-{n}"], abs=0.01)


def test_a_run_uses_its_own_prompt_by_default():
    model = stage2_model("opt")
    model.prompt = "a photo of"
    images = model.encode_image(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert model.caption(images) == model.caption(images, "a photo of") != model.caption(images, "")


# --- files of the evaluation servers ---------------------------------------------------------------------------------


def test_captions_are_scored_by_domain_and_written_for_the_server(tmp_path):
    """NoCaps scores its domains apart; each is a data set of its own."""
    data, out = caption_file(tmp_path), tmp_path / "server.json"
    result = evaluation.main(
        ["captions", "--checkpoint", TINY_RUN, "--data", data, "--predictions", str(out), *PRECISE]
    )
    assert list(result["domains"]) == ["in-domain", "near-domain"] and result["ROUGE-L"] > 30
    records, captions = json.loads((tmp_path / "captions.json").read_text()), list(result["captions"].values())
    for number, scores in enumerate(result["domains"].values()):  # even images, odd images
        own = [record["caption"] for record in records[number::2]]
        assert scores == caption_scores(captions[number::2], own) and {"BLEU-4", "ROUGE-L", "CIDEr"} <= scores.keys()
    server = json.loads(out.read_text())  # as the COCO server and pycocoevalcap read it
    assert server == [{"image_id": 7 * i, "caption": caption} for i, caption in enumerate(captions)]


def test_images_without_references_are_captioned_for_the_server(tmp_path):
    """COCO's and NoCaps' test sets have no captions. Retrieval needs captions, and says so."""
    write_images(tmp_path, 3)
    images = [{"file_name": f"{i}.png", "id": i} for i in range(3)]
    (tmp_path / "test.json").write_text(json.dumps({"images": images, "info": {}}))
    out, data = tmp_path / "server.json", str(tmp_path / "test.json")
    result = evaluation.main(
        ["captions", "--checkpoint", TINY_RUN, "--data", data, "--predictions", str(out), *PRECISE]
    )
    assert "CIDEr" not in result and [row["image_id"] for row in json.loads(out.read_text())] == [0, 1, 2]
    assert "no reference captions" in caption_table(result)
    with pytest.raises(UserError, match='expected "image" and "caption"'):
        open_images([data], "test", 64)


def test_images_of_coco_have_their_number_as_id(tmp_path):
    """The COCO server and pycocoevalcap know no other; LAVIS's files of val and test have no image_id, its train file
    has one of its own."""
    records = [{"image": "val2014/COCO_val2014_000000000042.jpg", "caption": "a"}]
    records.append({"image": "val2014/COCO_val2014_000000522418.jpg", "caption": "a", "image_id": "coco_17"})
    records.append({"image": "COCO_val2014_000000000007.jpg", "caption": "a", "image_id": 9})
    records.append({"image": "other.jpg", "caption": "a"})
    (tmp_path / "a.json").write_text(json.dumps(records))
    gallery = Gallery(open_images([str(tmp_path / "a.json")], "test", 64))
    assert [gallery.public_id(image) for image in range(4)] == [42, 522418, 9, "other.jpg"]
