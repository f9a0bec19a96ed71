"""A frozen part that is spread over the ranks computes what it computes whole: losses and gradients, texts token by
token though the ranks have other amounts of work, the same runs; each rank holds and reads its rows only."""

import json
from functools import partial

import pytest
import torch
from conftest import LLMS, TINY, roughen, small_model
from safetensors.torch import load_file
from samples import PRECISE, TINY_RUN, batches_of, caption_file, question_file
from test_distributed import GRADCACHE, SAME, STAGE1, assert_equal, step, train_on_ranks
from torch.nn.parallel import DistributedDataParallel

import eval as evaluation
import train
from blip2 import Blip2
from config import TrainConfig, check
from data import collate_lm
from engine.distributed import UNITS, barrier, rank, world_size
from engine.errors import UserError
from engine.log import memory_estimate
from engine.sharding import bytes_per_rank, is_sharded, own_rows
from llm import T5
from model import Blip2Model
from sources.mixture import open_images
from tasks.captions import captioning
from tasks.presets import write_result
from tasks.vqa import vqa
from weights.open import load_llm, load_vit

KINDS = ("opt", "t5", "llama", "llama-untied")
CAPTIONS = ["a small red circle above a large blue square", "three shapes", "a picture of a green cross", "a star"]


def stage2_model(kind: str, sharded: bool) -> Blip2:
    """A small model over the tiny OPT or T5, or another's folder, the same whether sharded or not."""
    model = small_model()
    model.sharded = ("llm",) * sharded
    model.attach_llm(kind)
    roughen(model.llm_proj)
    return model.eval()


# --- loading ---------------------------------------------------------------------------------------------------------


def load_on_ranks(rank, spec, load):
    part, whole = load(spec, sharded=True)[0], load(spec)[0]
    assert [name for name, _ in part.named_parameters()] == [name for name, _ in whole.named_parameters()]
    for (name, ours), theirs in zip(part.named_parameters(), whole.parameters(), strict=True):
        rows = -(-len(theirs) // world_size())
        if is_sharded(ours):
            assert torch.equal(ours.to_local(), theirs[rank * rows : (rank + 1) * rows]), name
        else:
            assert name in ("cls_token", "pos_embed") and torch.equal(ours, theirs)
        assert not ours.requires_grad
    held = sum((p.to_local() if is_sharded(p) else p).nbytes for p in part.parameters())
    most = bytes_per_rank(part.parameters())
    assert held == most if rank == 0 else held <= most < 0.6 * bytes_per_rank(whole.parameters())


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("kind", [*KINDS, "vit"])
def test_each_rank_holds_its_rows_of_the_files(ranks, processes, kind, llm_specs):
    """Also where their number does not divide, and where q, k and v are three tensors in the file."""
    ranks(processes, load_on_ranks, llm_specs.get(kind, "assets/tiny/vit"), load_vit if kind == "vit" else load_llm)


def test_rows_are_read_from_the_parts_that_have_them(monkeypatch):
    """Of q, k and v in a file, joined here, a rank reads no row of another rank."""
    parts, whole = list(torch.arange(30).view(15, 2).split(5)), torch.arange(30).view(15, 2)
    for number in range(4):
        monkeypatch.setattr("engine.sharding.world_size", lambda: 4)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda n=number: n)
        assert torch.equal(own_rows(whole, parts), whole[4 * number : 4 * number + 4])


def random_on_ranks(rank, kind):
    torch.manual_seed(0)
    llm = load_llm(kind, torch.bfloat16, sharded=True)[0]
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(0))
    for name, parameter in llm.named_parameters():
        assert is_sharded(parameter) and parameter.dtype == torch.bfloat16, name
        values = parameter.full_tensor().float()
        assert values.isfinite().all() and (values.std() > 0 if values.ndim > 1 else values.unique().numel() == 1)


def test_random_weights_are_drawn_in_slices_too(ranks, monkeypatch):
    """--llm opt-125m, and what is drawn afterwards is the same on all ranks."""
    ranks(2, random_on_ranks, "opt-125m")


def test_the_bytes_of_the_largest_model_at_eight_ranks():
    """Flan-T5-XXL, 11.1 billion parameters in bf16, on the meta device."""
    with torch.device("meta"):
        llm = T5(T5.presets["flan-t5-xxl"]).to(torch.bfloat16)
    whole, each = bytes_per_rank(llm.parameters()), bytes_per_rank(llm.parameters(), 8)
    assert whole == 2 * sum(p.numel() for p in llm.parameters()) and whole > 22e9
    assert whole / 8 <= each < whole / 8 * 1.0001


# --- a training step -------------------------------------------------------------------------------------------------


def stage2(kind: str, rows: list[range], sharded: bool = False, recompute: bool = False) -> tuple[dict, dict]:
    """A step of stage 2 over micro-batches of these rows of four captions."""
    torch.manual_seed(0)
    model, pixels = stage2_model(kind, sharded), torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert is_sharded(model.llm.word_embedding.weight) == (sharded and world_size() > 1)
    model.llm.grad_checkpointing = recompute
    seeds, targets = [[0, row] for row in range(4)], [("", caption) for caption in CAPTIONS]
    whole = collate_lm(model.llm_tokenizer, targets, seeds, list(range(4)), images=pixels)
    batches = [whole.map(lambda x, part=part: x[part.start : part.stop]) for part in rows]
    losses_of = partial(Blip2Model.stage2_losses, totals=Blip2.stage2_totals(batches))
    if world_size() == 1:
        return step(model, batches, losses_of)
    ddp = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
    return step(model, batches, lambda _, batch: ddp(losses_of, batch))  # `step` adds up again what DDP has averaged


def stage2_on_ranks(rank, kind, recompute, expected):
    rows = [range(2 * rank, 2 * rank + 2)] if recompute else [range(rank, rank + 1), range(rank + 2, rank + 3)]
    assert_equal(stage2(kind, rows, sharded=True, recompute=recompute), expected, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True], ids=["accumulated", "checkpointed"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_one_process(ranks, kind, recompute, llm_specs):
    """With two micro-batches a rank, and with activation checkpointing."""
    ranks(2, stage2_on_ranks, llm_specs[kind], recompute, stage2(llm_specs[kind], [range(4)]))


# --- without gradients: other work on each rank ----------------------------------------------------------------------

GREEDY, BEAMS = dict(num_beams=1, max_new_tokens=6), dict(num_beams=3, num_captions=2, max_new_tokens=6)
NUCLEUS = dict(num_beams=1, num_captions=2, sample=True, top_p=0.9, max_new_tokens=6)
SHARES = [[3, 1], [2], []]  # rows of each batch of each rank


@torch.no_grad()
def texts_of(model: Blip2, share: list[int], seed: int) -> list:
    """All that a language model writes and scores, on batches of so many images."""
    found, prompts = [], ["there is", "a picture of a small red", "two"]
    for number, rows in enumerate(share):
        generator = torch.Generator().manual_seed(10 * seed + number)
        images = model.encode_image(torch.randint(0, 256, (rows, 3, 8, 8), generator=generator, dtype=torch.uint8))
        for decoding in (GREEDY, BEAMS, NUCLEUS):
            found.append(model.generate_texts(images.query_out, prompts[:rows], 64, generator=generator, **decoding))
        found.append(model.rank(images, [prompts[: 1 + seed]] * rows, ["red", "a blue square", "two"], batch_size=4))
    return found


def generate_on_ranks(rank, kind, expected):
    model = stage2_model(kind, sharded=True)
    assert texts_of(model, SHARES[rank], rank) == expected[rank]
    barrier()  # where those who are done help the others
    if rank == 1:  # alone, as rank 0 is when it draws a run's report
        assert texts_of(model, SHARES[1], 1) == expected[1]
    barrier()


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_one_process_though_the_ranks_have_other_work(ranks, kind, llm_specs):
    """Greedy, beam and nucleus, ranked answers: rows that end at different steps, prompts of different lengths, two
    batches, one and none."""
    model = stage2_model(llm_specs[kind], sharded=False)
    expected = [texts_of(model, share, number) for number, share in enumerate(SHARES)]
    ranks(3, generate_on_ranks, llm_specs[kind], expected)


def evaluate_all(_, folder, data):
    """Tasks on a few images in batches of 2; rank 0 writes."""
    captioner = Blip2.from_pretrained(TINY_RUN, sharded=("vit", "llm"))
    assert is_sharded(captioner.llm.word_embedding.weight) == (world_size() > 1)
    questions = open_images([str(data / "questions.json")], "val", 64, questions=True)
    with batches_of(2):
        results = {"candidates": vqa(captioner, questions, candidates=["red", "blue", "a circle", "yes"])}
        results["captions"] = captioning(captioner, open_images([str(data / "captions.json")], "val", 64), num_beams=2)
    for name, result in results.items():
        if rank() == 0:
            write_result(folder / f"{name}.json", result)


def test_ranks_write_the_files_of_one_process(ranks, tmp_path):
    """Three batches on two ranks, both frozen parts sharded."""
    caption_file(tmp_path, 5)
    question_file(tmp_path, 5)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    evaluate_all(0, tmp_path / "one", tmp_path)
    ranks(2, evaluate_all, tmp_path / "two", tmp_path)
    for name in ("candidates.json", "captions.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


# --- runs ------------------------------------------------------------------------------------------------------------

STAGE2 = ["--stage", "2", "--init", "none", *TINY, *"--image-size 64 --batch 4 --lr 1e-3 --warmup 1".split(), *SAME]
SHARDED = ["--shard-llm", "--shard-vit"]


def stopped_and_resumed(_, flags, out):
    """Two of four steps with both parts sharded, the others with the language model whole."""

    def fail(*_):
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(train, "validate", fail)  # at step 2, after the checkpoint
        train.main([*flags, *SHARDED, "--out", out])
    train.main(["--resume", "--no-shard-llm", "--out", out])


def steps_of(run) -> list[dict]:
    """The rows of the log, without times and memory."""
    rows = [json.loads(line) for line in open(run / "log.jsonl")]
    return [{key: row[key] for key in ("step", "loss", "norm", "CIDEr") if key in row} for row in rows if "step" in row]


def test_a_run_is_that_of_one_process(ranks, tmp_path):
    """Two micro-batches, checkpoints, a validation, the report and the final evaluation; stopped after two steps, and
    resumed with one part whole."""
    flags = [*STAGE2, "--micro-batch", "1", "--save-every", "2", "--eval-every", "2", "--llm", LLMS["t5"]]
    flags += ["--data", caption_file(tmp_path, 12), "--val-photos", "3"]
    train.main([*flags, "--out", str(tmp_path / "one")])
    ranks(2, stopped_and_resumed, flags, str(tmp_path / "two"))
    one, two = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two] == [1, 2, 2, 3, 4, 4]
    for ours, theirs in zip(one, two):
        assert ours == pytest.approx(theirs, rel=2e-4)
    for name in ("model.safetensors", "report.html", "captions.json", "best/model.safetensors"):
        assert (tmp_path / "two" / name).exists()
    held = load_file(tmp_path / "two/model.safetensors")
    assert held.keys() == load_file(tmp_path / "one/model.safetensors").keys()


def test_gradcache_over_a_sharded_vit_trains_like_one_process(ranks, tmp_path):
    """Stage 1: the ViT runs once for both passes, without gradients."""
    flags = [*STAGE1, *SAME, "--steps", "2", "--data", caption_file(tmp_path, 16)]
    train.main([*flags, "--out", str(tmp_path / "one")])
    ranks(2, train_on_ranks, [*flags, *GRADCACHE, "--shard-vit", "--out", str(tmp_path / "two")])
    for ours, theirs in zip(steps_of(tmp_path / "one"), steps_of(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)


def ask_on_ranks(_, flags, out):
    evaluation.main([*flags, "--shard-llm", "--shard-vit", "--out", out])


def test_ask_answers_as_one_process_does(ranks, tmp_path):
    """`eval.py ask` on two ranks, which do the same; and with the flags on one."""
    flags = ["ask", "--question", "what color is the star?", "--beams", "2", *PRECISE]
    ask_on_ranks(0, flags, str(tmp_path / "one.json"))
    ranks(2, ask_on_ranks, flags, str(tmp_path / "two.json"))
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


def test_one_process_has_nothing_to_spread():
    """The flags change nothing there."""
    model = Blip2.from_pretrained(TINY_RUN, sharded=("vit", "llm"))
    assert not UNITS and not any(map(is_sharded, model.parameters()))


def test_the_memory_estimate_counts_what_a_rank_holds(monkeypatch):
    """Of sharded tensors their rows."""
    model = stage2_model(LLMS["opt"], sharded=False)
    whole = memory_estimate(model, 1, ("lm",))["frozen"]
    for parameter in model.llm.parameters():
        parameter.placements = ()
    monkeypatch.setattr("engine.sharding.world_size", lambda: 4)
    parts = list(model.llm.parameters())
    assert whole - memory_estimate(model, 1, ("lm",))["frozen"] == bytes_per_rank(parts, 1) - bytes_per_rank(parts, 4)


def test_a_vit_that_is_trained_or_was_is_refused(retrieval_run):
    """In one sentence: the optimizer has all of a trained one, the run's file holds one that was."""
    with pytest.raises(UserError, match="--shard-vit spreads a frozen ViT, here it is trained: add --freeze-vit"):
        check(TrainConfig(stage="caption", shard_vit=True, min_lr=0.0, lr=1.0, batch=1, freeze_vit=False))
    with pytest.raises(UserError, match="--shard-vit: .* holds a ViT that was trained"):
        Blip2.from_pretrained(retrieval_run, sharded=("vit",))
