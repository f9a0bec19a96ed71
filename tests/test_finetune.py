"""Fine-tuning (paper 4.2 to 4.4, Tables 7 to 9): the recipes, the ViT that learns, the question in the Q-Former."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, random_batch, run_many, small_model, stage2_model
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

import blip2
import train
import weights
from blip2 import Blip2, stage1_totals
from data import PromptedTexts, QuestionTexts, StepSampler, Texts, TrainBatches, UserError, make_batch, open_photos
from qformer import QFormer, QFormerConfig
from shapes import ShapesWorld
from train import build_optimizer, lr_at, set_lr, texts_of
from vit import PRESETS, ViT

QUESTIONS = ["what color is the star?", "how many shapes are there?", "is it large?"]
ANSWERS = ["red", "two", "yes"]


def pictures(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def asking_model(kind: str, seed: int = 0) -> Blip2:
    """A small model with the tiny BERT's words, whose Q-Former reads the question."""
    texts = Texts(ROOT / "assets/tiny/bert")
    model = stage2_model(kind, seed, texts=texts, vocab_size=texts.vocab_size, max_positions=40)
    model.condition_on_question()
    return model


# --- the recipes of the paper


def fake_run(folder, vit_width: int = 1408, llm: str | None = None) -> str:
    """The config.json of a run, which is all that a recipe depends on."""
    config = {
        "model": "blip2",
        "vit": "eva-g",
        "bert": "bert",
        "image_size": 224,
        "embed_dim": 256,
        "last_block": False,
    }
    config |= {"max_text_tokens": 32, "qformer": {"image_width": vit_width, "dropout": 0.1, "num_queries": 32}}
    config["qformer"]["cross_every"] = 2
    (folder / "config.json").write_text(json.dumps(config | ({"llm": llm} if llm else {})))
    return str(folder)


# Tables 7, 8 and 9: (stage, language model, ViT's width), batch, resolution, peak, beta2, layer-wise decay.
ROWS = [
    (("caption", "flan-t5-xl", 1408), 256, 364, 1e-5, 0.999, 1.0),
    (("caption", "opt-2.7b", 1408), 256, 364, 1e-5, 0.999, 1.0),
    (("caption", "opt-6.7b", 1408), 256, 364, 1e-5, 0.999, 0.95),
    (("vqa", "flan-t5-xl", 1408), 128, 490, 1e-5, 0.999, 0.95),
    (("vqa", "opt-2.7b", 1408), 128, 490, 1e-5, 0.999, 0.95),
    (("vqa", "opt-6.7b", 1408), 128, 490, 1e-5, 0.999, 0.9),
    (("retrieval", None, 1024), 224, 364, 5e-6, 0.98, 1.0),
    (("retrieval", None, 1408), 224, 364, 1e-5, 0.999, 0.95),
]


@pytest.mark.parametrize("row, batch, size, peak, beta2, decay", ROWS)
def test_recipes_are_the_papers(tmp_path, row, batch, size, peak, beta2, decay):
    """Read from the optimizer and the loader that are built: 5 epochs, warm-up 1,000, AdamW, weight decay 0.05."""
    stage, llm, width = row
    records = [{"image": "a.png", "caption": ["a dog", "a cat"]} for _ in range(3 * batch)]
    if stage == "vqa":
        records = [{"image": "a.png", "question": "what?", "answer": ["a dog", "a cat"]}] * (3 * batch)
    (tmp_path / "a.json").write_text(json.dumps(records))
    ShapesWorld("train").picture(0).save(tmp_path / "a.png")
    run = fake_run(tmp_path, width, llm)
    cfg, why = train.complete(*train.parse_flags(["--stage", stage, "--init", run, "--data", f"{tmp_path}/a.json"]))
    assert why.startswith(f'recipe "{stage}, paper, ') and cfg.epochs == 5 and cfg.steps is None
    assert (cfg.prompt == "a photo of") == (stage == "caption")
    assert (cfg.template == "Question: {} Answer:") == (stage == "vqa")  # for FlanT5 too, unlike zero-shot

    # an epoch shows each caption, or question, once
    photos = open_photos(cfg.data, "train", cfg.image_size, questions=stage == "vqa")
    assert photos.texts() == 3 * batch * (1 if stage == "vqa" else 2)
    sampler = StepSampler(photos, 0, cfg.batch, 1, 1, 0, 0, 1)
    (samples,) = list(sampler)
    texts = Texts(ROOT / "assets/tiny/bert")
    first = TrainBatches(photos, texts, cfg.image_size, 0).__getitems__(samples[:1])
    assert len(samples) == batch and first.images.shape == (1, 3, size, size)

    with torch.device("meta"):
        model = Blip2(
            ViT(PRESETS["eva-g" if width == 1408 else "clip-l"]), QFormer(QFormerConfig(image_width=width)), None
        )
    model.image_size = size
    model.unfreeze_vit()
    optimizer, depth = build_optimizer(model, cfg), model.vit.cfg.depth
    cfg.steps = 11_000
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for step, share in ((0, 0.0), (500, 0.5), (1000, 1.0), (6000, 0.5), (11_000, 0.0)):
        set_lr(optimizer, lr_at(step, cfg))
        for group in optimizer.param_groups:
            assert group["betas"] == (0.9, beta2)
            for parameter in group["params"]:
                name, scale = names[id(parameter)], 1.0
                if name.startswith("vit."):  # block i of d: decay ** (d - i), and once more below the first
                    place = int(name.split(".")[2]) if name.startswith("vit.blocks.") else -1
                    scale = decay ** (depth - place)
                assert group["lr"] == pytest.approx(peak * share * scale, abs=1e-12), (name, step)
                assert group["weight_decay"] == (0.05 if parameter.ndim >= 2 else 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(names.values()) and "vit.patch_embed.weight" in trained


@pytest.mark.parametrize(
    "stage, llm, vit, size, trained",
    [
        ("caption", "opt-2.7b", "eva-g", 364, 1.0936e9),  # Table 3: 1.1B
        ("caption", "flan-t5-xl", "eva-g", 364, 1.0932e9),
        ("caption", "opt-6.7b", "eva-g", 364, 1.0948e9),
        ("vqa", "flan-t5-xl", "eva-g", 490, 1.1698e9),  # Table 4: 1.2B
        ("vqa", "opt-2.7b", "eva-g", 490, 1.1702e9),
        ("vqa", "opt-6.7b", "eva-g", 490, 1.1714e9),
        ("retrieval", None, "clip-l", 364, 474.2e6),  # Table 5: 474M
        ("retrieval", None, "eva-g", 364, 1.1732e9),  # Table 5: 1.2B
    ],
)
def test_fine_tuning_trains_as_many_parameters_as_the_paper_says(stage, llm, vit, size, trained):
    with torch.device("meta"):
        encoder = ViT(PRESETS[vit])
        model = Blip2(encoder, QFormer(QFormerConfig(image_width=encoder.cfg.width)), None, size)
        if llm:
            model.attach_llm(llm)
    model.unfreeze_vit()
    if stage == "vqa":
        model.texts = "there are some"
        model.condition_on_question()
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count == pytest.approx(trained, abs=1e5)


# --- the ViT that learns


def test_a_trained_vit_learns_slower_block_by_block():
    """AdamW's first step moves every weight by its learning rate: so the decay can be read from the weights."""
    model = small_model()
    model.unfreeze_vit()
    cfg = train.TrainConfig(lr=1e-3, beta2=0.999, weight_decay=0.0, vit_lr_decay=0.5)
    optimizer = build_optimizer(model.train(), cfg)
    before = {name: p.clone() for name, p in model.named_parameters()}
    sum(model.stage1_losses(random_batch(6)).values()).backward()
    set_lr(optimizer, cfg.lr)
    optimizer.step()
    for name, scale in (("blocks.1.fc1.weight", 0.5), ("blocks.0.fc1.weight", 0.25), ("pos_embed", 0.125)):
        moved = (model.get_parameter(f"vit.{name}") - before[f"vit.{name}"]).abs().median().item()
        assert moved == pytest.approx(1e-3 * scale, rel=1e-2), name
    moved = (model.qformer.queries - before["qformer.queries"]).abs().median().item()
    assert moved == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_recomputed_blocks_give_the_same_gradients(kind):
    batch = PromptedTexts(stage2_model(kind).llm_texts, "a photo of").batch(
        [("", "a red star"), ("", "two circles")], [], [0, 1], images=pictures(2)
    )
    gradients = []
    for recompute in (False, True):
        model = stage2_model(kind)
        model.unfreeze_vit()
        model.vit.grad_checkpointing = model.llm.grad_checkpointing = recompute
        model.stage2_losses(batch)["lm"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert "vit.patch_embed.weight" in gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["stage 1", "opt", "t5", "vqa"])
def test_compiled_blocks_have_no_graph_break_and_the_same_gradients(kind):
    """--compile, in each stage; here without the slow part, which makes machine code of the graphs. An evaluation in
    between is not compiled."""
    compiled, gradients = [], []
    for compiles in (False, True):
        if kind == "stage 1":
            model, batch = small_model(), random_batch(4)
        elif kind == "vqa":
            model = asking_model("opt")
            texts = QuestionTexts(model.llm_texts, model.template, model.texts)
            batch = texts.batch(list(zip(QUESTIONS, ANSWERS)), [], [0, 1, 2], images=pictures(3))
            model.unfreeze_vit()
            model.vit.grad_checkpointing = True
        else:
            model = stage2_model(kind)
            batch = model.llm_texts.batch(
                [("", "a red star"), ("", "two circles")], [[0], [1]], [0, 1], images=pictures(2)
            )
        if compiles:
            model.compile_blocks(backend=lambda graph, _: compiled.append(graph) or graph.forward, fullgraph=True)
            assert (model.vit.blocks[0]._compiled_call_impl is not None) == model.trains_vit  # a frozen one gets slower
            with model.uncompiled():
                model.encode_image(pictures(2))
            assert not compiled
        losses = model(batch, generator=torch.Generator().manual_seed(0)) if kind == "stage 1" else model(batch)
        sum(losses.values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert compiled
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, msg=lambda m, n=name: f"{n}: {m}")


def test_every_parameter_that_is_trained_has_a_gradient():
    """Else DistributedDataParallel would wait for it: with the question in the Q-Former and without."""
    for conditioned in (False, True):
        model = asking_model("opt") if conditioned else stage2_model("opt")
        model.unfreeze_vit()
        texts = QuestionTexts(model.llm_texts, model.template, model.texts if conditioned else None)
        batch = texts.batch(list(zip(QUESTIONS, ANSWERS)), [], [0, 1, 2], images=pictures(3))
        model.stage2_losses(batch)["lm"].backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []
        assert (model.qformer.word_embedding.weight.grad is not None) == conditioned


def local_negatives(rank, expected):
    """The photos that rank 0 wants are its own, those of rank 1 are rank 0's: so rank 0 fetches none."""
    model, batch = trained_vit_model(), random_batch(4)
    rows = slice(2 * rank, 2 * rank + 2)
    ids = [batch.text_ids[row][batch.text_mask[row]].tolist() for row in range(4)][rows]
    mine = make_batch(ids, 0, batch.image_ids[rows].tolist(), images=batch.images[rows])
    blip2.sample_hard_negatives = lambda sim, *_: (torch.tensor([1, 0]), torch.ones(2, dtype=torch.bool))
    ddp = DistributedDataParallel(model)
    losses = ddp(mine, ("itc", "itm", "itg"), stage1_totals([mine]))
    (sum(losses.values()) * 2).backward()
    for name, grad in expected.items():
        ours = model.get_parameter(name).grad
        torch.testing.assert_close(ours, grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def trained_vit_model() -> Blip2:
    model = small_model()
    model.unfreeze_vit()
    return model


def test_two_processes_have_the_vits_gradient_of_one(monkeypatch):
    """Also where a process needs no photo of the other: the gradients of fetched photos travel back all the same."""
    model = trained_vit_model()
    monkeypatch.setattr(
        blip2, "sample_hard_negatives", lambda sim, *_: (torch.tensor([1, 0, 1, 0]), torch.ones(4, dtype=torch.bool))
    )
    sum(model.stage1_losses(random_batch(4)).values()).backward()
    run_many(2, local_negatives, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


# --- the question in the Q-Former


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_queries_see_the_question(kind):
    """Paper Figure 7. Without it, they see the same whatever is asked; with it, each question has its own view."""
    model = asking_model(kind)
    images = model.encode_image(pictures(2))
    views, rows = model.seen_with(images, [0, 0, 1], [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]])
    assert rows == [0, 1, 2] and not torch.allclose(views.query_out[0], views.query_out[1], atol=1e-3)
    again, _ = model.seen_with(images, [1], [QUESTIONS[0]])  # a batch gives what each gives alone
    torch.testing.assert_close(again.query_out[0], views.query_out[2], rtol=1e-4, atol=1e-5)
    model.conditioned = False
    assert model.seen_with(images, [0, 0], QUESTIONS[:2]) == (images, [0, 0])


@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_training_and_asking_see_the_same(kind, conditioned):
    """The loss of an answer in training is its negative log-probability when it is ranked, token for token."""
    model = asking_model(kind)
    model.conditioned = conditioned
    texts = QuestionTexts(model.llm_texts, model.template, model.texts if conditioned else None)
    for i, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS)):
        batch = texts.batch([(question, answer)], [], [0], images=pictures(3)[i : i + 1])
        with torch.no_grad():
            loss = model.stage2_losses(batch)["lm"].item()
        ((ranked,),) = model.rank(pictures(3)[i : i + 1], [[question]], [answer])
        assert ranked[0].mean_log_prob == pytest.approx(-loss, abs=1e-4)


def test_a_long_question_loses_its_end_and_not_the_templates():
    model = asking_model("opt")
    question = "what color is " + "the star and " * 20
    prompt = model.llm_texts.question_prompt(model.template, question)
    assert prompt.startswith("Question: what color is the star") and prompt.endswith("Answer:")
    assert len(model.llm_texts.encode_prompts([prompt])[0]) <= model.llm_texts.max_tokens
    assert model.llm_texts.question_prompt(model.template, QUESTIONS[0]) == f"Question: {QUESTIONS[0]} Answer:"


def test_captions_stand_behind_the_prompt():
    """Table 7: "a photo of" is read, not learned."""
    for kind in ("opt", "t5"):
        texts = stage2_model(kind).llm_texts
        batch = PromptedTexts(texts, "a photo of").batch([("", "A red star.")], [], [0])
        assert texts.decode(batch.prompt_ids[0].tolist()) == "a photo of"
        assert texts.decode(batch.target_ids[0].tolist()) == "a red star"


# --- runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of stage 1 and one of stage 2, of two steps each, without dropout."""
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    patch.setattr(train, "evaluate", lambda *_, **__: {"task": "telling", "captions right": 0.0, "mistakes": [],
                                                       "pictures": 0, "seconds": 0})  # fmt: skip
    short = "--steps 2 --batch 4 --eval-every 0 --precision fp32 --dropout 0".split()
    train.main([*TINY, *short, "--queries", "4", "--out", f"{folder}/stage1"])
    train.main([*short, "--stage", "2", "--init", f"{folder}/stage1", "--out", f"{folder}/stage2"])
    patch.undo()
    return folder


def annotations(folder, questions: bool):
    world, records = ShapesWorld("train"), []
    for i in range(24):
        world.picture(i).save(folder / f"{i}.png")
        if questions:
            records += [{"image": f"{i}.png", "question": q, "answer": [a]} for _, q, a in world.questions(i)[:2]]
        else:
            records.append({"image": f"{i}.png", "caption": world.captions(i)})
    (folder / "a.json").write_text(json.dumps(records))
    return str(folder / "a.json")


FLAGS = (
    "--steps 3 --batch 4 --eval-every 0 --save-every 2 --warmup 0 --lr 1e-3 --precision fp32 --image-size 48".split()
)


def flags_of(stage: str, runs, folder) -> list[str]:
    """Fine-tuning on files, which leaves out the evaluation at the end."""
    data = annotations(folder, stage == "vqa")
    return [
        "--stage",
        stage,
        "--init",
        f"{runs}/{'stage1' if stage == 'retrieval' else 'stage2'}",
        "--data",
        data,
        *FLAGS,
    ]


def log_rows(out) -> list[dict]:
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("stage", ["caption", "vqa", "retrieval"])
def test_a_run_holds_its_vit_opens_alone_and_resumes_bit_for_bit(tmp_path, runs, stage, monkeypatch, capsys):
    flags = flags_of(stage, runs, tmp_path)
    train.main([*flags, "--out", f"{tmp_path}/whole"])
    said = capsys.readouterr().out
    assert "peak learning rate 1.0e-03; in the ViT " in said and "ViT (frozen)" not in said
    state = load_file(tmp_path / "whole/model.safetensors")
    before = load_file(f"{runs}/{'stage1' if stage == 'retrieval' else 'stage2'}/model.safetensors")
    assert "vit.blocks.0.fc1.weight" in state and not any(key.startswith("vit.") for key in before)
    assert state["vit.pos_embed"].shape[1] == 1 + 6 * 6  # 48 pixels, patches of 8

    rates, real = [], train.set_lr

    def interrupted(optimizer, lr):
        real(optimizer, lr)
        rates.append(lr)
        if len(rates) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "set_lr", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, "--out", f"{tmp_path}/cut"])
    monkeypatch.setattr(train, "set_lr", real)
    train.main(["--resume", "--out", f"{tmp_path}/cut"])
    resumed = load_file(tmp_path / "cut/model.safetensors")
    assert state.keys() == resumed.keys() and all(torch.equal(state[key], resumed[key]) for key in state)

    fewer = {key: tensor for key, tensor in state.items() if ".blocks.1." not in key}
    save_file(fewer, tmp_path / "cut/model.safetensors")
    with pytest.raises(UserError, match="missing: nothing for vit.blocks.1."):
        Blip2.from_pretrained(tmp_path / "cut")

    model = Blip2.from_pretrained(tmp_path / "whole")
    assert model.image_size == 48 and not model.trains_vit and model.vit_trained
    assert torch.equal(model.vit.pos_embed, state["vit.pos_embed"])
    assert model.conditioned == (stage == "vqa") and model.prompt == ("a photo of" if stage == "caption" else "")
    picture = ShapesWorld("train").picture(0)
    if stage == "vqa":
        assert isinstance(model.ask(picture, QUESTIONS[0]), str)
    other = Blip2.from_pretrained(tmp_path / "whole", image_size=64)  # at another size, its positions are resized
    assert other.encode_image(picture).tokens.shape[1] == 1 + 8 * 8


@pytest.mark.parametrize("stage", ["caption", "vqa", "retrieval"])
def test_two_processes_fine_tune_like_one(tmp_path, runs, stage):
    """The same losses, the same weights, those of the ViT too."""
    flags = flags_of(stage, runs, tmp_path)
    train.main([*flags, "--out", f"{tmp_path}/one"])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "train.py"]
    done = subprocess.run(
        [*command, *flags, "--out", f"{tmp_path}/two"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(log_rows(tmp_path / "one"), log_rows(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4) and a["norm"] == pytest.approx(b["norm"], rel=2e-3)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=5e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_validation_asks_the_questions_of_a_file(tmp_path, runs, capsys):
    """And shows two of them; the best of the run is what answers best."""
    flags = flags_of("vqa", runs, tmp_path)
    flags[flags.index("--eval-every") + 1] = "3"
    train.main([*flags, "--val-data", flags[flags.index("--data") + 1], "--out", f"{tmp_path}/run"])
    said = capsys.readouterr().out
    question = json.loads((tmp_path / "a.json").read_text())[0]["question"]
    assert f'0.png: {question} "' in said and '; a person: "' in said
    assert "the best so far" in said and (tmp_path / "run/best/model.safetensors").exists()
    result = json.loads((tmp_path / "run/answers.json").read_text())
    assert result["metric"] == "any" and result["questions"] == 48 and "seconds" not in result


def test_freeze_vit_leaves_it_alone_and_out_of_the_checkpoint(tmp_path, runs):
    train.main([*flags_of("vqa", runs, tmp_path), "--freeze-vit", "--no-condition", "--out", f"{tmp_path}/run"])
    assert not any(key.startswith("vit.") for key in load_file(tmp_path / "run/model.safetensors"))
    model = Blip2.from_pretrained(tmp_path / "run")
    assert not model.vit_trained and not model.conditioned


def test_what_other_formats_cannot_hold_is_refused(tmp_path, runs):
    train.main([*flags_of("vqa", runs, tmp_path), "--out", f"{tmp_path}/run"])
    for form in ("hf", "lavis"):
        with pytest.raises(UserError, match=r"reads the question too \(--stage vqa\), which BLIP-2 in .* cannot"):
            weights.export(Blip2.from_pretrained(tmp_path / "run"), form, tmp_path / "out", "fp32")
    assert not (tmp_path / "out").exists()


def test_a_fine_tuned_run_is_exported_with_its_own_vit(tmp_path, runs):
    """And opened again; `inspect` tells what it is."""
    train.main([*flags_of("retrieval", runs, tmp_path), "--out", f"{tmp_path}/run"])
    model = Blip2.from_pretrained(tmp_path / "run")
    weights.export(model, "hf", tmp_path / "hf", "fp32")
    again, picture = Blip2.from_pretrained(tmp_path / "hf"), ShapesWorld("train").picture(0)
    expected = model.encode_image(picture).feats
    torch.testing.assert_close(again.encode_image(picture).feats, expected, rtol=0, atol=1e-3)  # another eps of a norm
    said = weights.inspect(tmp_path / "run")
    assert "a run of this code, stage retrieval, 48 px" in said and "--vit" not in said and "ViT " in said


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--stage vqa", "stage vqa starts from a run of stage 2: pass --init runs/stage2"),
        ("--stage retrieval --init none", "stage retrieval starts from a run of stage 1: pass --init runs/stage1"),
        ("--stage retrieval --init RUNS/stage2", "is a run with a language model, stage retrieval starts from one of"),
        ("--stage caption --init RUNS/stage1", "is a run without a language model, stage caption starts from one of"),
        ("--stage caption --init RUNS/stage2 --no-condition", "got --condition, a flag of stage vqa, in stage caption"),
        ("--stage vqa --init RUNS/stage2 --cache-features", "keeps what a frozen ViT sees, here it is trained"),
        ("--stage retrieval --init RUNS/stage1 --batch 8 --micro-batch 2 --itc-batch 8", "trained: add --freeze-vit"),
        ("--stage vqa --init RUNS/stage2 --template hello", "got --template hello, expected {} in it"),
        ("--stage vqa --init RUNS/stage2 --image-size 64 --data QUESTIONS --val-data ASKED", "have no answer to be"),
        ("--stage vqa --init RUNS/stage2 --image-size 64 --data ASKED", "have no answer to learn: take"),
        ("--stage vqa --init nowhere", "--init nowhere is not a run: train it with --stage 2 --out nowhere"),
        ("--stage vqa --init RUNS/stage2 --val-data nowhere.json", "--val-data nowhere.json does not exist"),
        ("--stage vqa --init RUNS/stage2 --vit-lr-decay 2", "got --vit-lr-decay 2.0, expected above 0 and at most 1"),
        ("--stage vqa --init RUNS/stage2 --epochs -1", "got --epochs -1.0, expected above 0"),
        ("--stage vqa --init RUNS/stage2 --image-size 60", "--image-size 60 is no multiple of the patch size 8"),
        ("--stage vqa --init RUNS/stage2 --image-size 64 --data CAPTIONS", 'expected "image" and "question"'),
    ],
)  # fmt: skip
def test_wrong_flags_get_a_sentence(tmp_path, runs, flags, sentence):
    asked = tmp_path / "asked.json"
    asked.write_text('[{"image": "0.png", "question": "what?"}]')
    data = annotations(tmp_path, questions="QUESTIONS" in flags)
    flags = flags.replace("RUNS", str(runs)).replace("CAPTIONS", data).replace("QUESTIONS", data)
    flags = flags.replace("ASKED", str(asked))
    flags += "" if "--epochs" in flags else " --steps 1"
    with pytest.raises(UserError) as error:
        train.main([*flags.split(), "--out", f"{tmp_path}/out"])
    assert sentence in str(error.value) and not (tmp_path / "out").exists()


def test_a_stage_makes_its_own_batches():
    model = asking_model("opt")
    assert isinstance(texts_of(model, train.TrainConfig(stage="vqa")), QuestionTexts)
    assert isinstance(texts_of(model, train.TrainConfig(stage="caption")), PromptedTexts)
    assert texts_of(model, train.TrainConfig(stage="2")) is model.llm_texts
    assert texts_of(model, train.TrainConfig(stage="retrieval")) is model.texts
