"""What the README and docs/ say is so: their commands run, their numbers stand in assets/logs, their links lead on."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FEW_STEPS, ROOT, TINY, roughen
from PIL import Image

import bench
import config
import eval as evaluation
import train
from blip2 import Blip2
from docs.examples import own_encoder, own_llm
from engine.errors import UserError
from generate import generate
from sources.prompts import FORMATS
from tools import data, models, results, scale, weights
from weights.configs import LLMS
from weights.open import load_llm

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "course").glob("*.md"))]
README = PAGES[0].read_text()
PICTURE = ROOT / "assets/tiny/picture.png"
GPT2 = LLMS.pop("gpt2")  # which importing the example has entered; no other test knows it
SMALL = ["--steps", "2", "--batch", "4", "--queries", "2", "--eval-every", "0"]


def blocks_of(page: str) -> list[tuple[str, str]]:
    """(language, content) of the code blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


BLOCKS = blocks_of(README)
ALL_BLOCKS = [block for path in PAGES for block in blocks_of(path.read_text())]


def commands(blocks: list[tuple[str, str]], *languages: str) -> list[list[str]]:
    """The command lines of blocks in some languages, without comments."""
    text = "\n".join(block for kind, block in blocks if kind in languages).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def block(kind: str, *words: str) -> str:
    """The first block of a kind on any page that has all the words."""
    return next(b for language, b in ALL_BLOCKS if language == kind and all(word in b for word in words))


# --- commands --------------------------------------------------------------------------------------------------------


def test_the_first_block_sets_up_and_the_next_ask_train_and_test():
    """Two commands set up, one asks, one trains, one tests; CI runs the same test command, installs the same files."""
    *setup, ask, main, tests = commands(BLOCKS, "bash")
    assert len(setup) == 2
    assert ask == ["python", "eval.py", "ask"]
    assert main == ["torchrun", "train.py", "--stage", "1"]
    ci = (ROOT / ".ci/run").read_text()
    assert " ".join(tests) in ci
    assert setup[1][-1] in ci


def test_the_main_command_runs_and_prints_what_the_readme_shows(tmp_path, few_test_images, capsys):
    """With few steps and test images; torchrun is in test_distributed.py."""
    torchrun, script, *flags = commands(BLOCKS, "bash")[3]
    assert (torchrun, script) == ("torchrun", "train.py")
    train.main([*flags, *SMALL, "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    shown = next(text for kind, text in BLOCKS if kind == "" and "re-ranks" in text)
    for line in (
        "Q-Former",
        "image to text",
        "chance",
        "ITC   ",
        "ITM re-ranks 128",
        "trained in",
        "losses, from the minimum",
    ):
        assert line in printed and line in shown, line
    recipe = shown.splitlines()[0].removesuffix(", ...")
    assert config.complete(config.TrainConfig(), set(), 50_000, 50_000)[1].startswith(recipe)


def test_every_command_of_every_page_has_only_flags_that_exist(capsys):
    lines, seen = commands(ALL_BLOCKS, "", "bash"), set()
    for words in lines:
        if "train.py" in words:
            config.parse_flags(words[words.index("train.py") + 1 :], "")
            seen.add("train.py")
        elif words[:2] == ["python", "eval.py"]:
            evaluation.parse(words[2:])
            seen.add(words[2])
        elif "bench.py" in words:
            bench.parse(words[words.index("bench.py") + 1 :])
            seen.add("bench.py")
        elif words[:2] == ["python", "-m"]:
            module = {"tools.data": data, "tools.weights": weights}.get(words[2])
            if module is not None:  # its files do not exist, but the command line is understood
                with pytest.raises(UserError, match=r"does not exist|has no tokenizer|is not a run"):
                    module.main(words[3:])
            seen.add(words[2])
    assert seen >= {"train.py", "ask", "answers", "captions", "retrieval", "vqa", "features", "bench.py"}
    assert seen >= {"tools.data", "tools.weights", "tools.make_tiny"}


def test_own_images_and_the_python_lines(tmp_path, monkeypatch):
    """The example file of docs/own-images.md, a run over it, its evaluation, and the calls from Python."""
    records = block("json", "caption")
    (tmp_path / "photos.json").write_text(records)
    for i, record in enumerate(json.loads(records)):
        Image.new("RGB", (80, 60), (90 * i, 30, 30)).save(tmp_path / record["image"])
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, *SMALL, "--batch", "2", "--data", "photos.json", "--image-size", "64", "--out", "runs/stage1"])
    words = next(words for words in commands(ALL_BLOCKS, "") if "retrieval" in words and "val.json" in words)
    result = evaluation.main([word.replace("val.json", "photos.json") for word in words[2:]])
    assert (result["images"], result["texts"]) == (2, 3)
    assert [record.keys() for record in json.loads(block("json", "question"))] == [{"image", "question", "answer"}]
    Image.new("RGB", (50, 40)).save("photo.jpg")
    exec(block("python", "runs/stage1"), {})


def test_asking_prints_what_the_readme_shows(capsys):
    evaluation.main(["ask"])
    shown = next(text for kind, text in BLOCKS if kind == "" and text.startswith("assets/tiny/blip2 on"))
    assert capsys.readouterr().out.splitlines()[1:] == shown.splitlines()[1:]  # the first line names the machine


def test_the_python_lines_of_the_readme_give_what_it_says():
    names = {}
    exec(block("python", "tiny/blip2"), names)
    model, image = names["model"], names["image"]
    assert model.caption(image) == "a small white cross left of a large green star"
    assert model.ask(image, "what color is the star?") == "green"
    assert model.rank(image, "what color is the star?", ["red", "green"])[0].answer == "green"
    assert model.score(image, ["a green star", "a red star"]).log_prob.shape == (1, 2)


# --- the examples of docs/models.md ----------------------------------------------------------------------------------


def test_the_formats_are_drawn_as_they_are():
    page = (ROOT / "docs/models.md").read_text()
    for name, form in FORMATS.items():
        if form.next_turn:
            line = f"{form.before_image}[visual]what is it?{form.prompt_end}|a dog{form.text_end}".replace("\n", "\\n")
            drawn = next(line for line in page.splitlines() if line.startswith(f"{name}  "))
            assert drawn.removeprefix(name).replace(" ", "") == line.replace(" ", "")


def test_an_encoder_of_ones_own_is_trained_over_and_taken_up_again(tmp_path, capsys):
    """Ten steps: ITG is far below chance, 4.84; the encoder stays as it was, so the trained part is all there is."""
    model = own_encoder.build().train()
    before = {name: tensor.clone() for name, tensor in model.vit.state_dict().items()}
    own_encoder.train(model, 10)
    assert float(capsys.readouterr().out.split()[-1]) < 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.vit.state_dict().items())
    model.save_pretrained(tmp_path)
    again, asked = own_encoder.build(), (PICTURE, ["a green star", "a red circle"])
    assert not torch.equal(again.itc_scores(*asked), model.eval().itc_scores(*asked))
    again.load_trained(tmp_path)
    torch.testing.assert_close(again.eval().itc_scores(*asked), model.itc_scores(*asked))
    again.attach_llm("assets/tiny/opt")  # on to stage 2
    assert isinstance(again.caption(PICTURE), str)
    again.unfreeze_vit()
    assert again.vit_is_trained


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """transformers' GPT-2 with random weights, and its folder; the example's is entered."""
    monkeypatch.setitem(LLMS, "gpt2", GPT2)
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=438, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=2)
    theirs = roughen(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    shutil.copy(ROOT / "assets/tiny/opt/tokenizer.json", tmp_path / "gpt2")
    return theirs, tmp_path / "gpt2"


def test_a_language_model_of_ones_own_says_what_gpt2_says(gpt2):
    """Logits, also where a prompt has padding, and texts."""
    (theirs, folder), ids = gpt2, torch.randint(5, 400, (1, 9))
    ours = load_llm(str(folder))[0].eval().requires_grad_(False)
    prompt, target, mask = ours.embed(ids[:, :4]), ids[:, 4:], torch.ones(1, 4, dtype=torch.bool)
    expected = theirs(ids).logits[:, 3:-1]
    torch.testing.assert_close(ours(prompt, mask, target), expected, rtol=1e-4, atol=1e-5)
    padded = torch.cat((prompt[:, :2], torch.randn(1, 3, 32), prompt[:, 2:]), dim=1)
    hole = torch.tensor([[True, True, False, False, False, True, True]])
    torch.testing.assert_close(ours(padded, hole, target), expected, rtol=1e-4, atol=1e-5)
    texts = generate(ours.decoder_for(padded, hole, 8), end_id=2, max_new_tokens=8, num_beams=3)
    wanted = theirs.generate(ids[:, :4], max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=2)[0, 4:]
    assert texts[0][0] == [token for token in wanted.tolist() if token != 2]


def test_a_language_model_of_ones_own_is_trained_and_asked_by_the_usual_commands(
    gpt2, stage1_run, few_test_images, tmp_path
):
    flags = ["--stage", "2", "--init", str(stage1_run), "--llm", str(gpt2[1]), "--out", str(tmp_path / "run")]
    train.main([*flags, *FEW_STEPS])
    (found,) = evaluation.main(["ask", "--checkpoint", str(tmp_path / "run"), "--question", "what is it?"])
    assert isinstance(found["what is it?"], str)
    model = Blip2.from_pretrained(tmp_path / "run")
    assert isinstance(model.llm, own_llm.GPT2) and model.llm_tokenizer.format_name == "plain"
    assert {row.answer for row in model.rank(PICTURE, "what is it?", ["red", "green"])} == {"red", "green"}


# --- numbers, links, form --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_tables_match_the_logs(path):
    """`python -m tools.results` writes them anew. A line right after a table would be shown as one of its rows."""
    page = path.read_text()
    assert results.with_tables(page) == page
    assert not re.search(r"^\|.*\n[^|\n]", page, re.MULTILINE)


def test_every_table_of_results_is_shown_somewhere():
    shown = re.findall(r"<!-- table: (\w+) -->", "".join(path.read_text() for path in PAGES))
    assert set(shown) == {make.__name__ for make in [*results.TABLES, scale.models, scale.runs, *models.TABLES]}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_to_files_and_headings_lead_somewhere(path):
    page = path.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", page):
        file, _, heading = target.partition("#")
        if not target.startswith("http"):
            assert not file or (path.parent / file).exists(), target
            if heading:
                other = (path.parent / file).read_text() if file else page
                headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
                            for line in other.splitlines() if line.startswith("#")}  # fmt: skip
                assert heading in headings, target
    rooms = "assets|course|docs|engine|sources|tasks|tests|tools|weights"
    for name in re.findall(rf"`((?:{rooms})/[\w./-]*|\w+\.py)`", page):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_prose_is_wrapped_at_100_columns(path):
    """Tables, code and pictures may be longer."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not [line for line in prose.splitlines() if len(line) > 100 and not line.startswith(("|", "!"))]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 215


def test_no_page_has_a_path_of_somebodys_machine():
    for path in [*PAGES, *Path(ROOT / "assets/logs").glob("*"), *Path(ROOT / "course/logs").glob("*")]:
        assert not re.search(r"(/home/|/root/|/tmp/|/Users/)", path.read_text()), path
