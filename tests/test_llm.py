"""The frozen language models (paper 3.3 and 3.4): OPT, T5 and the Llama family compute what transformers computes,
forward, backward and while decoding; a prompt alone gives what it gives in a batch; on a GPU a decoding step is a
replayed CUDA graph; one more is entered in one place."""

import itertools
import json
import math
import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import FEW_STEPS, LLMS, ROOT, roughen, stage2_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import train
from blip2 import Blip2
from data import collate_lm
from engine.errors import UserError
from generate import generate, nucleus
from llm import OPT, T5, Llama, OPTConfig, T5Config, causal_mask, rope
from losses import lm_loss
from sources.prompts import PromptFormat
from sources.shapes import ShapesWorld
from sources.text import LLMTokenizer, pad
from weights.configs import LLMS as LLM_FAMILIES
from weights.configs import LLMFamily, llama_config, llm_config
from weights.export import export
from weights.load import no_init, unload
from weights.open import load_llm
from weights.tables import Row, Table, both

WORDS = 40
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=0.5, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip
FAMILY = {  # of Llama: the class of transformers' configuration, and what is special
    "llama": ("LlamaConfig", dict(tie_word_embeddings=True)),
    "llama3": ("LlamaConfig", dict(rope_parameters=LLAMA3, head_dim=8)),
    "mistral": ("MistralConfig", dict(sliding_window=40, num_key_value_heads=1)),
    "qwen2": ("Qwen2Config", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen3": ("Qwen3Config", dict(head_dim=6)),
}
END = {"opt": 5, "opt-350m": 5, "t5": 1, **dict.fromkeys(FAMILY, 5)}  # a word, as a newline is for OPT
KINDS = list(END)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """twins(kind, seed) -> a random model of transformers, every weight non-trivial, and ours, read from its folder."""
    transformers = pytest.importorskip("transformers")

    def config_of(kind):
        if kind == "t5":
            return transformers.T5Config(
                vocab_size=WORDS, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False, relative_attention_num_buckets=8,
                relative_attention_max_distance=12, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
            )  # fmt: skip
        if kind in FAMILY:
            name, special = FAMILY[kind]
            sizes = dict(vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
            sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
            return getattr(transformers, name)(**sizes | special, initializer_range=0.3, eos_token_id=5)
        odd = kind == "opt-350m"
        return transformers.OPTConfig(
            vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, ffn_dim=24, num_attention_heads=2,
            do_layer_norm_before=not odd, word_embed_proj_dim=12 if odd else 16, max_position_embeddings=50,
            init_std=0.3,
        )  # fmt: skip

    @cache
    def build(kind, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if kind == "t5":
                theirs = transformers.T5ForConditionalGeneration(config_of(kind))
                theirs.lm_head.weight = torch.nn.Parameter(torch.randn(WORDS, 16))  # not tied in v1.1
                theirs.config.tie_word_embeddings = False
            else:
                theirs = transformers.AutoModelForCausalLM.from_config(config_of(kind))
        roughen(theirs, seed)
        with torch.no_grad():
            theirs.get_output_embeddings().weight[END[kind]] *= 2  # so that texts end at different steps
            if kind == "t5":  # its start token is never written: transformers applies the repetition penalty to it
                theirs.lm_head.weight[0] = 0
        folder = tmp_path_factory.mktemp(kind)
        theirs.eval().save_pretrained(folder)
        ours, report, _ = load_llm(str(folder))
        assert "fresh" not in report
        return theirs, ours.requires_grad_(False).eval()

    return build


def prompts(kind: str, count: int, seed: int = 0, longest: int = 9, shortest: int = 2) -> tuple[Tensor, Tensor]:
    """Ragged prompts of random words, padded on the model's side -> ids, mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    ids = torch.randint(6, WORDS, (count, longest), generator=generator)
    position = torch.arange(longest)
    mask = position < lengths[:, None] if kind == "t5" else position >= longest - lengths[:, None]
    return ids, mask


def words(*shape: int, seed: int = 0) -> Tensor:
    """Random words."""
    return torch.randint(6, WORDS, shape, generator=torch.Generator().manual_seed(seed))


# --- the models ------------------------------------------------------------------------------------------------------


def test_presets_are_the_models_of_the_paper():
    """Paper 3.4 and Table 2, and the Llama family; the sizes are those of the public checkpoints."""
    counts = {}
    with torch.device("meta"), no_init():
        for kind in (OPT, T5, Llama):
            counts |= {name: sum(p.numel() for p in kind(cfg).parameters()) for name, cfg in kind.presets.items()}
    assert counts == {
        "opt-125m": 125_239_296,
        "opt-2.7b": 2_651_596_800,
        "opt-6.7b": 6_658_473_984,
        "flan-t5-xl": 2_849_757_184,
        "flan-t5-xxl": 11_135_332_352,
        "smollm2-135m": 134_515_008,
        "qwen3-0.6b": 596_049_920,
        "qwen2.5-3b": 3_085_938_688,
        "llama-3.2-3b": 3_212_749_824,
        "llama-3.1-8b": 8_030_261_248,
    }


def their_forward(kind: str, theirs, embeds: Tensor, mask: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' logits (B, T, W) of the targets, and its loss."""
    if kind == "t5":
        out = theirs(inputs_embeds=embeds, attention_mask=mask.long(), labels=targets)
        return out.logits, out.loss
    both = torch.cat((embeds, theirs.get_input_embeddings()(targets)), dim=1)
    labels = torch.cat((torch.full(embeds.shape[:2], -100), targets), dim=1)
    mask = F.pad(mask, (0, targets.shape[1]), value=True)
    out = theirs(inputs_embeds=both, attention_mask=mask.long(), labels=labels)
    return out.logits[:, embeds.shape[1] - 1 : -1], out.loss


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradient_of_the_prompt_equal_transformers(kind, seed, twins):
    """The gradient reaches the prompt's embeddings, and no weight."""
    theirs, ours = twins(kind, seed)
    ids, mask = prompts(kind, 5, seed)
    targets, embeds = words(5, 7, seed=seed), ours.embed(ids)
    a, b = (embeds.clone().requires_grad_() for _ in range(2))
    logits, loss = their_forward(kind, theirs, a, mask, targets)
    found = ours(b, mask, targets)
    our_loss = lm_loss(found, targets, torch.tensor(35))
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    our_loss.backward()
    torch.testing.assert_close(b.grad[mask], a.grad[mask], rtol=1e-4, atol=1e-5)
    assert b.grad[mask].abs().max() > 1e-3 and all(p.grad is None for p in ours.parameters())


def test_opt_is_causal_and_masks_padding():
    """Three positions after one padding; the last two rows alone are those of decoding."""
    real = torch.tensor([[False, True, True, True]])
    expected = ["#...", ".#..", ".##.", ".###"]  # padding sees itself, so that its row is not all-masked
    drawn = ["".join(".#"[seen] for seen in row) for row in causal_mask(real, 4)[0, 0].int().tolist()]
    assert drawn == expected and torch.equal(causal_mask(real, 2), causal_mask(real, 4)[:, :, 2:])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_invisible(kind, twins):
    """What stands in the padding of a prompt or of a target changes no logit."""
    _, ours = twins(kind)
    ids, mask = prompts(kind, 4)
    targets, other = words(2, 4, 6)
    other[:, :4] = targets[:, :4]  # two words of padding
    one = ours(ours.embed(ids), mask, targets)
    two = ours(ours.embed(torch.where(mask, ids, 7)), mask, other)
    torch.testing.assert_close(one[:, :4], two[:, :4], rtol=0, atol=0)


def test_t5_buckets_near_distances_one_by_one_and_far_ones_together():
    """The encoder tells the two sides apart, the decoder looks back only."""
    llm = T5(T5Config(vocab_size=9, width=8, depth=1, decoder_depth=1, heads=2, head_width=4, mlp=8))
    buckets = llm.decoder.bucket(torch.arange(0, -200, -1)).tolist()
    assert buckets[:16] == list(range(16)) and buckets[-1] == 31 and buckets == sorted(buckets)
    assert llm.decoder.bucket(torch.tensor([5])).item() == 0
    after, before = llm.encoder.bucket(torch.arange(1, 200)), llm.encoder.bucket(-torch.arange(1, 200))
    assert torch.equal(after, before + 16) and before.max() == 15


def test_opt_350m_has_no_final_norm_and_projects_its_words():
    llm = OPT(OPTConfig(vocab_size=9, width=8, depth=1, heads=2, mlp=8, embed_width=6, pre_norm=False))
    names = dict(llm.named_parameters())
    assert not any(name.startswith("ln_final") for name in names)
    assert names["project_in.weight"].shape == (8, 6) and names["project_out.weight"].shape == (6, 8)
    assert llm.width == 6


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.1-8b"])
def test_rope_turns_as_in_transformers(name):
    """Of the types default and llama3; in the latter frequencies of all three ranges occur, here and in `twins`."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    cfg, positions = Llama.presets[name], torch.arange(8000)[None]
    rope_parameters = dict(rope_type="default", rope_theta=cfg.rope_theta)
    if cfg.rope_factor != 1:
        rope_parameters = LLAMA3 | dict(rope_theta=cfg.rope_theta, factor=cfg.rope_factor, low_freq_factor=1.0)
        rope_parameters["original_max_position_embeddings"] = 8192
        for theta, width, low, length in ((cfg.rope_theta, 128, 1, 8192), (1e4, 8, 0.5, 64)):
            turns = length / theta ** (torch.arange(0, width, 2) / width) / (2 * math.pi)
            assert all(x.any() for x in (turns <= low, (low < turns) & (turns < 4), turns >= 4))
    sizes = dict(head_dim=cfg.head_width, max_position_embeddings=cfg.max_positions, rope_parameters=rope_parameters)
    theirs = llama.LlamaRotaryEmbedding(llama.LlamaConfig(**sizes))(torch.zeros(1), positions)
    cos, sin = rope(positions, cfg)
    sin[..., : cfg.head_width // 2] *= -1  # ours is signed, for `rotate`
    torch.testing.assert_close((cos[:, 0], sin[:, 0]), theirs, rtol=0, atol=2e-3)  # fp32 angles of up to 8,000


def test_init_weights_keeps_t5_activations_at_a_reasonable_size():
    """So that it can be trained from scratch (tools/make_tiny.py)."""
    llm = T5(T5Config(vocab_size=50, width=64, depth=2, decoder_depth=2, heads=2, head_width=32, mlp=128))
    llm.init_weights()
    ids, mask = prompts("t5", 4)
    assert 0.3 < llm(llm.embed(ids), mask, ids).std() < 3


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_blocks_give_the_same_gradient(kind, twins):
    _, ours = twins(kind)
    ids, mask = prompts(kind, 3)
    targets, gradients, runs = words(3, 5), [], []
    block = (ours.decoder if kind == "t5" else ours).blocks[0]
    hook = block.register_forward_pre_hook(lambda *_: runs.append(1))
    for ours.grad_checkpointing in (True, False):
        embeds = ours.embed(ids).requires_grad_()
        lm_loss(ours(embeds, mask, targets), targets, torch.tensor(15)).backward()
        gradients.append(embeds.grad)
    hook.remove()
    torch.testing.assert_close(*gradients)
    assert len(runs) == 3  # twice, then once


def test_t5_is_never_fp16():
    """Its activations overflow there; paper 3.4 has OPT in fp16 and T5 in bf16."""
    with pytest.raises(UserError, match="got precision fp16 for .*t5, in which T5 overflows: pass bf16"):
        stage2_model("t5").set_precision("fp16")
    model = stage2_model("t5").set_precision("bf16")
    assert {p.dtype for p in model.llm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in stage2_model("opt").set_precision("fp16").llm.parameters()} == {torch.float16}
    assert model.llm_proj.weight.dtype == torch.float32  # what is trained stays fp32
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    captions = [("", "a small red circle"), ("", "three shapes")]
    batch = collate_lm(model.llm_tokenizer, captions, [[0], [1]], [0, 1], images=images)
    assert torch.isfinite(model.stage2_losses(batch)["lm"])


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_equal_the_whole_pass(kind, twins):
    _, ours = twins(kind)
    ids, mask = prompts(kind, 4)
    targets = words(4, 6)
    with torch.no_grad():
        whole = ours(ours.embed(ids), mask, targets)
        decoder = ours.decoder_for(ours.embed(ids), mask, 6)
        steps = [decoder.start()] + [decoder.step(targets[:, t]) for t in range(5)]
        torch.testing.assert_close(torch.stack(steps, dim=1), whole, rtol=1e-5, atol=1e-5)
        decoder = ours.decoder_for(ours.embed(ids), mask, 6)  # several tokens at once, to two copies of each row
        decoder.start()
        rows = torch.arange(4).repeat_interleave(2)
        appended = decoder.expand(2).append(targets[rows, :5])
        torch.testing.assert_close(appended, whole[rows, 1:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoder.step(targets[:, 0]), whole[:, 1], rtol=1e-5, atol=1e-5)  # unchanged


OPTIONS = [dict(num_beams=1)]
OPTIONS += [dict(num_beams=5, length_penalty=penalty) for penalty in (-1.0, 0.0, 1.0)]
OPTIONS += [dict(num_beams=1, min_new_tokens=4, repetition_penalty=1.3)]
OPTIONS += [dict(num_beams=5, length_penalty=p, min_new_tokens=3, repetition_penalty=1.4) for p in (-1.0, 0.0, 1.0)]


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")  # it counts new tokens only, here and there
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_transformers(kind, options, twins):
    """The same tokens for 52 ragged prompts. With beams, a text's score is its log-probability / length ** penalty.

    With a repetition penalty the prompts are of one length: after k paddings, transformers exempts the first k new
    tokens.
    """
    theirs, ours = twins(kind)
    ids, mask = prompts(kind, 52, seed=1, shortest=9 if "repetition_penalty" in options else 2)
    embeds, end = ours.embed(ids), END[kind]
    with torch.no_grad():
        out = theirs.generate(
            inputs_embeds=embeds, attention_mask=mask.long(), eos_token_id=end, pad_token_id=end, max_new_tokens=10,
            do_sample=False, output_scores=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
    sequences = (out.sequences[:, 1:] if kind == "t5" else out.sequences).tolist()  # without T5's start token
    wanted = [text[: text.index(end)] if end in text else text for text in sequences]
    found = generate(ours.decoder_for(embeds, mask, 10), end_id=end, max_new_tokens=10, **options)
    assert [text for (text,) in found] == wanted
    if "repetition_penalty" in options:
        assert any(len(set(text)) < len(text) for text in wanted)  # a penalty, and no ban
        return
    if options.get("length_penalty", 0) <= 0:
        assert len({len(text) for text in wanted}) > 1  # the comparison means something
    if options["num_beams"] > 1:
        targets, real = pad([text + [end] if len(text) < 10 else text for text in wanted], 0, multiple=1)
        with torch.no_grad():
            logits = ours(embeds, mask, targets)
        log_probs = -F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * real
        scores = log_probs.sum(dim=1) / real.sum(dim=1) ** options["length_penalty"]
        torch.testing.assert_close(scores, out.sequences_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(num_beams=4, length_penalty=-1.0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(kind, options, twins):
    _, ours = twins(kind)
    ids, mask = prompts(kind, 8, seed=2)
    options |= dict(end_id=END[kind], max_new_tokens=8)
    together = generate(ours.decoder_for(ours.embed(ids), mask, 8), **options)
    for row in range(8):
        alone = ids[row][mask[row]][None]
        decoder = ours.decoder_for(ours.embed(alone), torch.ones_like(alone, dtype=torch.bool), 8)
        assert generate(decoder, **options) == [together[row]]


def test_nucleus_equals_transformers():
    warper = pytest.importorskip("transformers").TopPLogitsWarper
    logits = 3 * torch.randn(64, 30)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        kept = warper(top_p=top_p)(None, logits.clone()).softmax(dim=-1)
        every = logits.softmax(dim=-1)
        inside = [nucleus(every, torch.full((64,), token), top_p) for token in range(30)]
        found = every * torch.stack(inside, dim=1)
        torch.testing.assert_close(found / found.sum(dim=-1, keepdim=True), kept, rtol=1e-5, atol=1e-6)


def test_beams_of_t5_share_the_output_of_its_encoder(twins):
    _, ours = twins("t5")
    ids, mask = prompts("t5", 3)
    decoder, rows = ours.decoder_for(ours.embed(ids), mask, 6), []
    static_step = decoder.static_step
    decoder.static_step = lambda tokens: (rows.append((len(tokens), len(decoder.mask))), static_step(tokens))[1]
    generate(decoder, end_id=END["t5"], max_new_tokens=6, min_new_tokens=6, num_beams=4)
    assert rows == [(3, 3)] + [(12, 3)] * 5


# --- the CUDA graph of a decoding step -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*LLMS, "llama"])
def test_a_graphed_step_reads_the_same_memory_until_rows_multiply_or_leave(kind, llm_specs):
    """While the graph lives, beams may change places only within the memory that it has captured."""
    llm, seen = stage2_model(llm_specs[kind]).llm, []
    decoder = llm.decoder_for(torch.randn(2, 5, 128), torch.ones(2, 5, dtype=torch.bool), 9)
    decoder.start()
    for rows in ([0, 0, 1, 1], [1, 0, 2, 2], [0, 1, 3, 2], [2, 3], [1, 0]):  # of two images; then one has finished
        decoder.select(torch.tensor(rows), 2)
        read = [decoder.cache.k, decoder.cache.v, decoder.cache.position]
        read += [decoder.real] if kind != "t5" else [decoder.mask, *(x for kv in decoder.memory for x in kv)]
        seen.append((decoder.graphed, [x.data_ptr() for x in read]))
        decoder.step(torch.full((len(rows),), 7))
    same = [(before is after, old == new) for (before, old), (after, new) in itertools.pairwise(seen)]
    assert same == [(True, True), (True, True), (False, False), (True, True)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and pytest -m cuda")
@pytest.mark.parametrize("kind", [*LLMS, "llama", "llama-untied"])
def test_a_replayed_step_is_the_step(kind, llm_specs):
    """Captured once for four beams and once for the two that stay; in between, beams change places."""
    generator, found = torch.Generator().manual_seed(0), []
    prompt, tokens = torch.randn(2, 5, 128, generator=generator), torch.randint(5, 20, (9, 4), generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for device in ("cpu", "cuda"):
        llm = stage2_model(llm_specs[kind]).set_precision("fp32", device).llm
        decoder = llm.decoder_for(prompt.to(device), mask.to(device), 12)
        logits = [decoder.start().cpu()]
        for step, new in enumerate(tokens):
            rows = [0, 0, 1, 1] if step == 0 else [1, 0, 2, 2] if step < 5 else [2, 3] if step == 5 else [1, 0]
            decoder.select(torch.tensor(rows, device=device), 2)
            logits.append(decoder.step(new[: len(rows)].to(device)).cpu())
        found.append(logits)
    assert decoder.graphed.graph is not None
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- a real one ------------------------------------------------------------------------------------------------------

QUESTIONS = """What is the capital of France?|How many legs does a spider have?|What color is the sky on a clear day?|
Which animal barks?|What is 2 + 3?|Name a fruit that is yellow.|What do bees make?|Who wrote Romeo and Juliet?|
What is the opposite of hot?|How many days are in a week?|What is frozen water called?|Which planet do we live on?|
What is the largest ocean?|In which country is Rome?|What do you use to cut paper?|Is a whale a fish?|
What language is spoken in Brazil?|What is the first month of the year?|Which season follows winter?|
What do cows drink?""".replace("\n", "").split("|")


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct in fp32, transformers' and ours, and 20 left-padded questions in its own format."""
    folder = os.environ.get("BLIP2_SMOLLM2") or pytest.skip("BLIP2_SMOLLM2 names no folder of SmolLM2-135M-Instruct")
    theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = LLMTokenizer(folder, None)
    prompts = [tokenizer.before_image + ids for ids in tokenizer.encode_prompts(QUESTIONS)]
    return theirs.eval(), load_llm(folder)[0].eval(), tokenizer, *pad(prompts, tokenizer.pad_id, "left", multiple=1)


@torch.no_grad()
def test_smollm2_reads_as_in_transformers(smollm2):
    theirs, ours, tokenizer, ids, mask = smollm2
    assert tokenizer.format_name == "chatml" and tokenizer.decode(ids[0].tolist()).startswith("user\nWhat is the cap")
    found = ours.logits(ours.read(ours.embed(ids), mask))
    wanted = theirs(input_ids=ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(found[mask], wanted[mask], rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_smollm2_answers_questions_as_in_transformers_token_by_token(smollm2):
    theirs, ours, tokenizer, ids, mask = smollm2
    ends = dict(eos_token_id=tokenizer.end_id, pad_token_id=tokenizer.end_id)
    out = theirs.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=30, do_sample=False, **ends)
    wanted = [[*text, tokenizer.end_id] for text in out[:, ids.shape[1] :].tolist()]
    decoder = ours.decoder_for(ours.embed(ids), mask, 30)
    answers = [text for (text,) in generate(decoder, end_id=tokenizer.end_id, max_new_tokens=30)]
    assert answers == [text[: text.index(tokenizer.end_id)] for text in wanted]
    assert "Paris" in tokenizer.decode(answers[0])


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILY)
def test_every_spelling_of_a_llama_folder_is_the_same_model(kind, twins, tmp_path):
    """Shards; rope_parameters, or rope_theta and rope_scaling as before transformers 5; keys without "model."."""
    theirs, ours = twins(kind)
    theirs.save_pretrained(tmp_path / "new", max_shard_size="4KB")
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    config = json.loads((tmp_path / "new/config.json").read_text())
    rope_parameters = config.pop("rope_parameters")
    config["rope_theta"], rope_type = (rope_parameters.pop(key) for key in ("rope_theta", "rope_type"))
    for name in ("type", "rope_type"):
        (tmp_path / name).mkdir()
        scaling = {name: rope_type} | rope_parameters if rope_parameters else None
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
        tensors = {key.removeprefix("model."): value.clone() for key, value in theirs.state_dict().items()}
        tensors |= {} if ours.cfg.tied else {"lm_head.weight": tensors["lm_head.weight"]}
        save_file(tensors, tmp_path / name / "model.safetensors")
    for folder in ("new", "type", "rope_type"):
        again, _, _ = load_llm(str(tmp_path / folder))
        assert again.cfg == ours.cfg and (again.cfg.rope_factor == 8) == (kind == "llama3")
        torch.testing.assert_close(again.state_dict(), ours.state_dict(), rtol=0, atol=0)


def test_a_sliding_window_bounds_the_positions(twins):
    """Within it all positions see all before them, as here."""
    assert twins("mistral")[1].max_positions == 40 and twins("llama")[1].max_positions == 64
    config = dict(max_position_embeddings=64, sliding_window=40)
    for kind, switch, longest in (("mistral", {}, 40), ("qwen2", dict(use_sliding_window=False), 64)):
        assert llama_config(config | switch | {"model_type": kind}, "x").max_positions == longest
    assert llama_config(config | {"model_type": "mistral", "sliding_window": None}, "x").max_positions == 64


def folder_with(tmp_path, **config) -> str:
    """The tiny OPT's folder with other entries in its config.json."""
    shutil.copytree(ROOT / LLMS["opt"], tmp_path / "llm", dirs_exist_ok=True)
    path = tmp_path / "llm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(tmp_path / "llm")


@pytest.mark.parametrize(
    "config, sentence",
    [
        ({"model_type": "gpt2"}, "has model_type 'gpt2', expected a language model of a known type: opt, t5, llama, "),
        ({"activation_function": "gelu"}, "is of an OPT without ReLU or biases, expected one of facebook/opt-"),
        ({"model_type": "t5", "feed_forward_proj": "relu"}, "is of a T5 v1.0, expected google/t5-v1_1-"),
        ({"quantization_config": {"quant_method": "gptq"}}, "has a quantization_config: expected weights in fp32"),
        ({"model_type": "llama", "attention_bias": True}, "or biases beside Qwen2's: expected a llama without"),
        ({"model_type": "qwen3", "hidden_act": "gelu"}, "has an activation other than SiLU, or biases"),
        *(({"model_type": "llama", "rope_scaling": {key: rope}}, f"has RoPE of the type '{rope}', expected default or")
          for key, rope in (("rope_type", "yarn"), ("type", "linear"), ("rope_type", "dynamic"))),
    ],
    ids=str,
)  # fmt: skip
def test_language_models_of_another_kind_are_refused(config, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        load_llm(folder_with(tmp_path, **config))


@pytest.mark.parametrize(
    "config, sentence",
    [
        ({"num_key_value_heads": 3}, "has 4 heads and 3 of keys, expected a divisor: fetch it again"),
        ({"num_key_value_heads": "2"}, "has num_key_value_heads '2', expected a whole number from 1 to"),
        ({"num_attention_heads": 10**30}, "has num_attention_heads 1000000.*, expected a whole number from 1 to"),
        ({"num_attention_heads": 5}, "has 5 heads, into which its width of 128 does not divide"),
        ({"head_dim": 3}, "has heads of width 3, expected an even one, for RoPE"),
        ({"model_type": "mistral", "sliding_window": -1}, "has sliding_window -1, expected a whole number from 1 to"),
        ({"rope_theta": "much"}, "has rope_theta 'much', expected a number from 1 to"),
        ({"rope_theta": math.nan}, "has rope_theta nan, expected a number from 1 to"),
        ({"rope_parameters": [8]}, "the RoPE of .*config.json holds a list, expected an object"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "low_freq_factor 'missing', expected a number from 0.001"),
        ({"rope_scaling": LLAMA3 | {"factor": -8}}, "the RoPE of .*config.json has factor -8, expected a number from"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "has low_freq_factor 4 and high_freq_factor 4.0, expected"),
        ({"tie_word_embeddings": "yes"}, "has tie_word_embeddings 'yes', expected True or False"),
    ],
    ids=str,
)
def test_a_configuration_that_no_llama_can_have_is_a_sentence(config, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence) as error:
        load_llm(folder_with(tmp_path, **{"model_type": "llama"} | config))
    assert "\n" not in str(error.value)


def test_quantized_weights_are_refused_by_their_keys_or_types_too(llm_specs, tmp_path):
    """Folders of GPTQ and AWQ of before quantization_config; bitsandbytes' bytes; llama.cpp's GGUF."""
    folder = Path(shutil.copytree(llm_specs["llama"], tmp_path / "llm"))
    tensors, key = load_file(folder / "model.safetensors"), "layers.0.mlp.up_proj.weight"
    for name, sentence in (
        (key, f"is quantized, {key} is uint8: expected weights in fp32, bf16 or fp16"),
        (key.replace("weight", "qweight"), "is quantized, it has layers.0.mlp.up_proj.qweight: expected weights in"),
    ):
        packed = {other: x for other, x in tensors.items() if other != key} | {name: tensors[key].to(torch.uint8)}
        save_file(packed, folder / "model.safetensors")
        with pytest.raises(UserError, match=sentence):
            load_llm(str(folder))
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).unlink()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="llm holds GGUF, expected config.json and weights in safetensors: fetch that"):
        load_llm(str(folder))
    with pytest.raises(UserError, match="model-Q4_K_M.gguf is a file: expected a folder, or a name .opt-125m"):
        load_llm(str(folder / "model-Q4_K_M.gguf"))


def test_the_gelu_is_that_of_config_json(tmp_path):
    """Flan-T5's own is by tanh; LAVIS's BLIP-2 checkpoints, which transformers hosts, set the one by erf."""
    t5 = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    assert llm_config(folder_with(tmp_path, **t5))[0].act == "gelu_new"
    assert llm_config(folder_with(tmp_path, **t5, dense_act_fn="gelu"))[0].act == "gelu"
    inside = {"model_type": "blip-2", "text_config": t5 | {"dense_act_fn": "gelu"}}
    assert llm_config(folder_with(tmp_path, **inside))[0].act == "gelu"


def test_a_name_that_is_no_folder_lists_the_presets():
    with pytest.raises(UserError, match="expected a folder, or a name .*opt-2.7b.*flan-t5-xxl"):
        load_llm("opt-9b")


# --- a third one -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AverageConfig:
    """Architecture of `Average`."""

    vocab_size: int
    width: int = 16
    depth: int = 1
    heads: int = 1
    mlp: int = 16


class Average(torch.nn.Module):
    """The next token from the average of all embeddings so far, scaled by a persistent buffer."""

    prompt_format = PromptFormat("</s>", "", "\n", " ", "left", False, "Q: {} A:", padding="<unk>")
    presets = {"average-tiny": AverageConfig(438)}
    tokenizer, fits_fp16, max_positions, grad_checkpointing = "opt", True, None, False

    def __init__(self, cfg: AverageConfig):
        super().__init__()
        self.cfg, self.width = cfg, cfg.width
        self.word_embedding, self.out = torch.nn.Embedding(cfg.vocab_size, cfg.width), torch.nn.Linear(cfg.width, 438)
        self.register_buffer("scale", torch.ones(()))

    def init_weights(self):
        torch.nn.init.normal_(self.word_embedding.weight)

    def embed(self, ids):
        return self.word_embedding(ids)

    def forward(self, prompt, prompt_mask, target):
        x = torch.cat((prompt, self.embed(target[:, :-1])), dim=1)
        real = F.pad(prompt_mask, (0, target.shape[1] - 1), value=True)[..., None]
        mean = (x * real).cumsum(dim=1) / real.cumsum(dim=1).clamp(min=1)
        return self.out(self.scale * mean[:, -target.shape[1] :])

    def decoder_for(self, prompt, prompt_mask, max_new_tokens):
        return AverageDecoder(self, prompt, prompt_mask)


class AverageDecoder:
    """The sum so far and its length, of each row."""

    def __init__(self, model, prompt, mask):
        self.model, self.total, self.count = model, (prompt * mask[..., None]).sum(1), mask.sum(1, keepdim=True)

    def start(self):
        return self.model.out(self.model.scale * self.total / self.count)

    def step(self, tokens):
        self.total, self.count = self.total + self.model.embed(tokens), self.count + 1
        return self.start()

    def select(self, rows, beams=1):
        self.total, self.count = self.total[rows], self.count[rows]


AVERAGE_TABLE = Table([Row(("wte.weight",), "word_embedding.weight"), *both("out", "out"), Row(("scale",), "scale")])
AVERAGE = LLMFamily(Average, lambda config, where: AverageConfig(config["vocab_size"]), AVERAGE_TABLE)


@pytest.fixture
def average(monkeypatch, tmp_path) -> Path:
    """A third language model: entered in one place; its folder."""
    monkeypatch.setitem(LLM_FAMILIES, "average", AVERAGE)
    folder = tmp_path / "average"
    folder.mkdir()
    shutil.copy(ROOT / LLMS["opt"] / "tokenizer.json", folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "average", "vocab_size": 438}))
    llm = Average(AverageConfig(438))
    llm.scale.fill_(3)
    save_file(unload(llm, AVERAGE_TABLE), folder / "model.safetensors")
    return folder


def test_a_third_language_model_is_trained_with_saved_and_opened(average, stage1_run, few_test_images, tmp_path):
    """Its training ends with an evaluation."""
    flags = ["--stage", "2", "--init", str(stage1_run), "--llm", str(average), "--out", str(tmp_path / "run")]
    train.main([*flags, *FEW_STEPS])
    model, image = Blip2.from_pretrained(tmp_path / "run"), ShapesWorld("test").image(0)
    assert type(model.llm) is Average and model.llm.scale == 3 and model.template == "Q: {} A:"
    assert model.llm_tokenizer.pad_id == model.llm_tokenizer.token("<unk>")
    before = load_file(stage1_run / "model.safetensors")["qformer.queries"]
    assert not torch.equal(model.qformer.queries, before)
    assert isinstance(model.ask(image, "what is it?"), str)
    model.save_pretrained(tmp_path / "again")
    assert Blip2.from_pretrained(tmp_path / "again").ask(image, "what is it?") == model.ask(image, "what is it?")
    for form in ("hf", "lavis"):
        with pytest.raises(UserError, match=f"BLIP-2 in {form} has no place for the language model Average: keep"):
            export(model, form, tmp_path / "out", "fp32")
    assert not (tmp_path / "out").exists()


def test_a_third_language_model_has_names_and_an_incomplete_key_table_is_refused(average, monkeypatch):
    assert type(load_llm("average-tiny")[0]) is Average
    table = Table([row for row in AVERAGE_TABLE.rows if row.ours != "out.bias"])
    with pytest.raises(UserError, match="no place for 1 of the 4 tensors of Average .out.bias.: keep the run"):
        unload(load_llm(str(average))[0], table)
