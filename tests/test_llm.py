"""OPT and T5 compute what transformers computes; frozen; each prompt alone gives what it gives in a batch."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, roughen

import weights
from blip2 import Blip2
from generate import beam_search, generate, nucleus
from llm import OPT, PRESETS, OPTConfig, T5Config, build_llm
from losses import lm_loss
from qformer import QFormer, QFormerConfig
from vit import PRESETS as VIT_PRESETS
from vit import ViT

WORDS = 40
END = {"opt": 5, "opt-350m": 5, "t5": 1}  # a word of the small vocabularies, as a newline is for OPT
KINDS = list(END)


def peer(kind, tmp_path, seed=0):
    """A random model of transformers, every weight non-trivial -> it, and ours opened from the folder it saved."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=WORDS, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, relative_attention_num_buckets=8,
            relative_attention_max_distance=12, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        theirs = transformers.T5ForConditionalGeneration(config)
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(WORDS, 16))  # as in v1.1, not tied
        theirs.config.tie_word_embeddings = False
    else:
        odd = dict(do_layer_norm_before=False, word_embed_proj_dim=12) if kind == "opt-350m" else {}
        config = transformers.OPTConfig(
            **dict(vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, ffn_dim=24, num_attention_heads=2) | odd,
            **({} if odd else {"word_embed_proj_dim": 16}), max_position_embeddings=50, init_std=0.3,
        )  # fmt: skip
        theirs = transformers.OPTForCausalLM(config)
    roughen(theirs, seed)
    with torch.no_grad():
        theirs.get_output_embeddings().weight[END[kind]] *= 2  # so that texts end at different steps
    theirs.eval().save_pretrained(tmp_path)
    llm, account, _ = weights.load_llm(str(tmp_path))
    assert "fresh" not in account
    return theirs, llm.requires_grad_(False).eval()


def prompts(kind, count, seed=0, longest=9, shortest=2):
    """Ragged prompts of random words, padded as the model wants -> ids, mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    ids = torch.randint(6, WORDS, (count, longest), generator=generator)
    place = torch.arange(longest)
    mask = place < lengths[:, None] if kind == "t5" else place >= longest - lengths[:, None]
    return ids, mask


def forward(kind, theirs, embeds, mask, targets):
    """transformers' logits (B, T, W) of the targets, the loss over all of them included."""
    if kind == "t5":
        out = theirs(inputs_embeds=embeds, attention_mask=mask.long(), labels=targets)
        return out.logits, out.loss
    n = embeds.shape[1]
    both = torch.cat((embeds, theirs.get_input_embeddings()(targets)), dim=1)
    labels = torch.cat((torch.full(embeds.shape[:2], -100), targets), dim=1)
    mask = F.pad(mask, (0, targets.shape[1]), value=True)
    out = theirs(inputs_embeds=both, attention_mask=mask.long(), labels=labels)
    return out.logits[:, n - 1 : -1], out.loss


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradient_at_the_embeddings_equal_transformers(kind, seed, tmp_path):
    theirs, ours = peer(kind, tmp_path, seed)
    ids, mask = prompts(kind, 5, seed)
    targets = torch.randint(6, WORDS, (5, 7))
    embeds = ours.embed(ids).detach()
    a, b = (embeds.clone().requires_grad_() for _ in range(2))
    logits, loss = forward(kind, theirs, a, mask, targets)
    found = ours(b, mask, targets, torch.arange(35))
    torch.testing.assert_close(found.view(5, 7, -1), logits, rtol=1e-5, atol=1e-5)
    our_loss = lm_loss(found, targets.flatten())
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    our_loss.backward()
    torch.testing.assert_close(b.grad[mask], a.grad[mask], rtol=1e-4, atol=1e-5)
    assert b.grad[mask].abs().max() > 1e-3 and all(p.grad is None for p in ours.parameters())


OPTIONS = [dict(num_beams=1)]
OPTIONS += [dict(num_beams=5, length_penalty=penalty) for penalty in (-1.0, 0.0, 1.0)]
OPTIONS += [dict(num_beams=1, min_new_tokens=4, repetition_penalty=1.3)]
OPTIONS += [dict(num_beams=5, length_penalty=p, min_new_tokens=3, repetition_penalty=1.4) for p in (-1.0, 0.0, 1.0)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_transformers(kind, options, tmp_path):
    """Over 52 ragged prompts: the same tokens, and with beams the same scores.

    With a repetition penalty all are as long: behind k paddings, transformers forgives the first k new tokens.
    """
    theirs, ours = peer(kind, tmp_path)
    ids, mask = prompts(kind, 52, seed=1, shortest=9 if "repetition_penalty" in options else 2)
    embeds, end = ours.embed(ids), END[kind]
    with torch.no_grad():
        out = theirs.generate(
            inputs_embeds=embeds, attention_mask=mask.long(), eos_token_id=end, pad_token_id=end, max_new_tokens=10,
            do_sample=False, output_scores=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
    sequences = out.sequences[:, 1:] if kind == "t5" else out.sequences  # without T5's start token
    wanted = [text[: text.index(end)] if end in text else text for text in sequences.tolist()]
    decoder = ours.decoder_for(embeds, mask, 10)
    # transformers counts T5's start token as seen, OPT's prompt is embeddings only
    start = torch.zeros(52, 1, dtype=torch.long) if kind == "t5" else None
    if options["num_beams"] == 1:
        got = [group[0] for group in generate(decoder, end_id=end, max_new_tokens=10, prompt_ids=start, **options)]
    else:
        rest = dict(num_captions=1, early_stopping=False, max_new_tokens=10, end_id=end, prompt_ids=start)
        rest |= dict(min_new_tokens=0, repetition_penalty=1.0) | options
        with torch.no_grad():
            found = [group[0] for group in beam_search(decoder, **rest)]
        got = [text for text, _ in found]
        torch.testing.assert_close(torch.tensor([s for _, s in found]), out.sequences_scores, rtol=1e-5, atol=1e-5)
    assert got == wanted
    if options.get("length_penalty", 0) <= 0 and "min_new_tokens" not in options:
        assert len({len(text) for text in wanted}) > 1  # the comparison means something


@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_equal_the_full_forward(kind, tmp_path):
    _, ours = peer(kind, tmp_path)
    ids, mask = prompts(kind, 4)
    targets = torch.randint(6, WORDS, (4, 6))
    with torch.no_grad():
        whole = ours(ours.embed(ids), mask, targets, torch.arange(24)).view(4, 6, -1)
        decoder = ours.decoder_for(ours.embed(ids), mask, 6)
        steps = [decoder.start()] + [decoder.step(targets[:, t]) for t in range(5)]
        torch.testing.assert_close(torch.stack(steps, dim=1), whole, rtol=1e-5, atol=1e-5)
        decoder = ours.decoder_for(ours.embed(ids), mask, 6)  # several tokens at once, in a fork with two of each row
        decoder.start()
        rows = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
        behind = decoder.fork(2).append(targets[rows, :5])
        torch.testing.assert_close(behind, whole[rows, 1:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoder.step(targets[:, 0]), whole[:, 1], rtol=1e-5, atol=1e-5)  # not disturbed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [dict(), dict(num_beams=4, length_penalty=-1.0)], ids=str)
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(kind, options, tmp_path):
    _, ours = peer(kind, tmp_path)
    ids, mask = prompts(kind, 8, seed=2)
    together = generate(ours.decoder_for(ours.embed(ids), mask, 8), end_id=END[kind], max_new_tokens=8, **options)
    for row in range(8):
        alone = ids[row][mask[row]][None]
        decoder = ours.decoder_for(ours.embed(alone), torch.ones_like(alone, dtype=torch.bool), 8)
        assert generate(decoder, end_id=END[kind], max_new_tokens=8, **options) == [together[row]]


def test_nucleus_equals_transformers():
    warper = pytest.importorskip("transformers").TopPLogitsWarper
    logits = 3 * torch.randn(64, 30)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        kept = warper(top_p=top_p)(None, logits.clone()).softmax(dim=-1)
        found = nucleus(logits, top_p)
        torch.testing.assert_close(found / found.sum(dim=-1, keepdim=True), kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_padding_is_invisible(kind, tmp_path):
    """What stands in the padding of a prompt or of a target changes nothing."""
    _, ours = peer(kind, tmp_path)
    ids, mask = prompts(kind, 4)
    targets, other = torch.randint(6, WORDS, (2, 4, 6))
    other[:, :4] = targets[:, :4]
    rows = torch.arange(24).view(4, 6)[:, :4].flatten()
    with torch.no_grad():
        one = ours(ours.embed(ids), mask, targets, rows)
        two = ours(ours.embed(torch.where(mask, ids, 7)), mask, other, rows)
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_grad_checkpointing_gives_the_same_gradient(kind, tmp_path):
    _, ours = peer(kind, tmp_path)
    ids, mask = prompts(kind, 3)
    targets, grads = torch.randint(6, WORDS, (3, 5)), []
    for again in (False, True):
        ours.grad_checkpointing = again
        embeds = ours.embed(ids).detach().requires_grad_()
        lm_loss(ours(embeds, mask, targets, torch.arange(15)), targets.flatten()).backward()
        grads.append(embeds.grad)
    torch.testing.assert_close(*grads)


def test_relative_positions_are_where_the_bucket_says():
    """Near distances have a bucket each, far ones share; the encoder tells the sides apart, the decoder looks back."""
    llm = build_llm(T5Config(vocab_size=9, width=8, depth=1, decoder_depth=1, heads=2, head_width=4, mlp=8))
    back = torch.arange(0, -200, -1)
    buckets = llm.decoder.bucket(back).tolist()
    assert buckets[:16] == list(range(16)) and buckets[-1] == 31 and buckets == sorted(buckets)
    assert llm.decoder.bucket(torch.tensor([5])).item() == 0
    ahead, behind = llm.encoder.bucket(torch.arange(1, 200)), llm.encoder.bucket(-torch.arange(1, 200))
    assert torch.equal(ahead, behind + 16) and behind.max() == 15


def test_presets_are_the_papers_models():
    """Paper 3.4 and Table 2; the sizes are those of the public checkpoints."""
    counts = {}
    with torch.device("meta"):
        for name, cfg in PRESETS.items():
            counts[name] = sum(p.numel() for p in build_llm(cfg).parameters())
    assert counts == {
        "opt-125m": 125_239_296,
        "opt-2.7b": 2_651_596_800,
        "opt-6.7b": 6_658_473_984,
        "flan-t5-xl": 2_849_757_184,
        "flan-t5-xxl": 11_135_332_352,
    }


@pytest.mark.parametrize(
    "llm, vit, trained",
    [
        ("opt-2.7b", "eva-g", 107_133_696),
        ("opt-6.7b", "eva-g", 108_314_880),
        ("flan-t5-xl", "eva-g", 106_739_968),
        ("flan-t5-xxl", "eva-g", 108_314_880),
        ("opt-2.7b", "clip-l", 103_593_984),
        ("opt-6.7b", "clip-l", 104_775_168),
        ("flan-t5-xl", "clip-l", 103_200_256),
        ("flan-t5-xxl", "clip-l", 104_775_168),
    ],
)
def test_stage_2_trains_as_many_parameters_as_the_paper_says(llm, vit, trained):
    """Table 2: 107M, 108M, 107M, 108M; with ViT-L 104M and 103M. The text branch is there and not trained."""
    with torch.device("meta"):
        encoder = ViT(VIT_PRESETS[vit])
        model = Blip2(encoder, QFormer(QFormerConfig(image_width=encoder.cfg.width)), None)
        before = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert "RANDOM WEIGHTS" in model.attach_llm(llm)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    kept = sum(p.numel() for p in model.trained_state().values())
    assert kept == before + sum(p.numel() for p in model.llm_proj.parameters())


def test_350m_has_no_final_norm_and_projects_its_words():
    llm = build_llm(OPTConfig(vocab_size=9, width=8, depth=1, heads=2, mlp=8, embed_width=6, pre_norm=False))
    names = dict(llm.named_parameters())
    assert not any(name.startswith("ln_final") for name in names)
    assert names["project_in.weight"].shape == (8, 6) and names["project_out.weight"].shape == (6, 8)
    assert llm.width == 6


# --- folders


def folder_with(tmp_path, **config):
    shutil.copytree(ROOT / "assets/tiny/opt", tmp_path / "llm")
    path = tmp_path / "llm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(tmp_path / "llm")


@pytest.mark.parametrize(
    "config, sentence",
    [
        ({"model_type": "llama"}, "has model_type 'llama', expected a language model of a known type: opt, t5"),
        ({"activation_function": "gelu"}, "is of an OPT without ReLU or biases, expected one of facebook/opt-"),
        ({"model_type": "t5", "feed_forward_proj": "relu"}, "is of a T5 v1.0, expected google/t5-v1_1-"),
    ],
)
def test_language_models_of_another_kind_are_refused(config, sentence, tmp_path):
    with pytest.raises(weights.UserError, match=sentence):
        weights.load_llm(folder_with(tmp_path, **config))


def test_the_gelu_is_what_the_config_says(tmp_path):
    """Flan-T5's own is the one by tanh; the original's BLIP-2 checkpoints set the one by erf."""
    base = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    folder = folder_with(tmp_path, **base)
    assert weights.llm_config(folder)[0].act == "gelu_new"
    path = tmp_path / "llm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dense_act_fn": "gelu"}))
    assert weights.llm_config(folder)[0].act == "gelu"
    whole = {"model_type": "blip-2", "text_config": json.loads(path.read_text())}
    path.write_text(json.dumps(whole))
    assert weights.llm_config(folder)[0].act == "gelu"


def test_names_that_are_no_folder_list_what_there_is():
    with pytest.raises(weights.UserError, match="expected a folder, or a name .*opt-2.7b.*flan-t5-xxl"):
        weights.load_llm("opt-9b")


def test_init_weights_keeps_t5_activations_at_a_reasonable_size():
    """So that it can be trained from scratch (assets/make_tiny.py)."""
    torch.manual_seed(0)
    llm = build_llm(T5Config(vocab_size=50, width=64, depth=2, decoder_depth=2, heads=2, head_width=32, mlp=128))
    llm.init_weights()
    ids, mask = prompts("t5", 4)
    logits = llm(llm.embed(ids), mask, ids, torch.arange(36))
    assert 0.3 < logits.std() < 3 and isinstance(build_llm(OPTConfig(width=8, heads=2, depth=1)), OPT)


def test_beams_of_t5_share_what_its_encoder_has_read(tmp_path):
    _, ours = peer("t5", tmp_path)
    ids, mask = prompts("t5", 3)
    decoder, rows = ours.decoder_for(ours.embed(ids), mask, 6), []
    one_more = decoder.one_more
    decoder.one_more = lambda tokens: (rows.append((len(tokens), len(decoder.mask))), one_more(tokens))[1]
    generate(decoder, end_id=END["t5"], max_new_tokens=6, min_new_tokens=6, num_beams=4)
    assert rows == [(3, 3)] + [(12, 3)] * 5
