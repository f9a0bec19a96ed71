"""transformers' BLIP-2 classes with our weights: the oracle of the tests, and the peer of `bench.py --vs`."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from blip2 import Blip2
from data import Batch
from llm import T5, CausalLM, Llama, OPTConfig, T5Config
from qformer import ImageKV, QFormer, QueryCache, qformer_mask
from weights.configs import LLAMA_FIELDS, OPT_FIELDS, ROPE_FIELDS, T5_FIELDS, hf_config, write_fields
from weights.export import hf_llm_state, hf_state
from weights.load import unload
from weights.tables import LLAMA_TABLE

transformers.logging.set_verbosity_error()


def transformers_twin(model: Blip2) -> nn.Module:
    """transformers' class with the same weights, in the same precisions."""
    config, retrieval = hf_config(model), model.llm is None
    if not retrieval:
        text = text_config(model.llm.cfg)
        text |= dict(eos_token_id=model.llm_tokenizer.end_id, pad_token_id=model.llm_tokenizer.pad_id)
        config |= {"image_token_index": text["vocab_size"] - 1, "text_config": text}  # a token that no text has
    with torch.device(model.device):
        twin = getattr(transformers, config.pop("architectures")[0])(transformers.Blip2Config(**config))
    state = hf_state(model)
    if not retrieval:
        if isinstance(model.llm, T5):  # whatever its configuration says, T5's head is tied to its words
            head = twin.language_model.lm_head
            head.weight = nn.Parameter(head.weight.detach().clone())
        state |= llm_state(model.llm)
    lacking = twin.load_state_dict({k: v.detach() for k, v in state.items()}, strict=False).missing_keys
    tied = ("lm_head.weight", "embed_tokens.weight", "position_ids")
    assert not [key for key in lacking if not key.endswith(tied)], lacking
    twin.to(model.device).requires_grad_(False).eval()
    products = model.amp_dtype or torch.float32  # our ViT's dtype may be another; theirs would be cast at every run
    twin.vision_model.encoder.to(products)
    twin.vision_model.embeddings.to(products)
    if not retrieval:
        for parameter in twin.language_model.parameters():  # not its buffers: the frequencies of RoPE stay fp32
            parameter.data = parameter.data.to(model.llm.word_embedding.weight.dtype)
    return twin


def text_config(llm) -> dict:
    """The language model in a Blip2Config, by our configuration."""
    if isinstance(llm, OPTConfig):
        return {"model_type": "opt"} | write_fields(OPT_FIELDS, llm)
    if isinstance(llm, T5Config):
        text = {"model_type": "t5"} | write_fields(T5_FIELDS, llm)
        text |= dict(feed_forward_proj="gated-gelu", dense_act_fn=llm.act, is_gated_act=True)
        return text | dict(scale_decoder_outputs=False, tie_word_embeddings=False, decoder_start_token_id=llm.pad_id)
    rope = dict(rope_type="default" if llm.rope_factor == 1 else "llama3", rope_theta=llm.rope_theta)
    text = {"model_type": "qwen3" if llm.qk_norm else "qwen2" if llm.qkv_bias else "llama"}
    return text | write_fields(LLAMA_FIELDS, llm) | {"rope_parameters": rope | write_fields(ROPE_FIELDS, llm)}


def llm_state(llm: nn.Module) -> dict[str, Tensor]:
    """The language model's weights in a Blip2ForConditionalGeneration; of a Llama none are exported to one."""
    if not isinstance(llm, Llama):
        return hf_llm_state(llm, llm.cfg.vocab_size)
    state = unload(llm, LLAMA_TABLE).items()
    return {f"language_model.{'' if key == 'lm_head.weight' else 'model.'}{key}": value for key, value in state}


def pixels_of(model: Blip2, images: Tensor) -> Tensor:
    """uint8 images as the twin takes them."""
    return model.vit.normalize(images).to(model.amp_dtype or torch.float32)


def visual_prompt(twin: nn.Module, prompt_ids: Tensor, before_image: int) -> Tensor:
    """Image tokens, which mark the places of the visual embeddings in transformers, and the prompt around them."""
    images = prompt_ids.new_full((len(prompt_ids), twin.config.num_query_tokens), twin.config.image_token_index)
    return torch.cat((prompt_ids[:, :before_image], images, prompt_ids[:, before_image:]), dim=1)


# --- stage 1: transformers cannot train it, so its ViT and Q-Former do our passes ------------------------------------


class TheirViT(nn.Module):
    """transformers' encoder in the place of vit.ViT."""

    def __init__(self, vision_model: nn.Module, like: nn.Module):
        super().__init__()
        self.model, self.cfg, self.like = vision_model, like.cfg, [like]

    @property
    def pos_embed(self) -> Tensor:
        """Its dtype, and whether it is trained."""
        return self.model.embeddings.position_embedding

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, P, V)."""
        pixels = self.like[0].normalize(images).to(self.pos_embed.dtype)
        return self.model.encoder(self.model.embeddings(pixels)).last_hidden_state


class TheirQFormer(nn.Module):
    """transformers' Q-Former in the place of qformer.QFormer. It computes an image's keys and values in each pass, so
    image_kv and the cache carry the image tokens; it has no cache, so ITG is a joint pass."""

    def __init__(self, twin: nn.Module, like: QFormer):
        super().__init__()
        self.queries, self.embeddings, self.model = twin.query_tokens, twin.embeddings, twin.qformer
        self.lm_head, self.cfg, self.dec_id = copy.deepcopy(like.lm_head), like.cfg, like.dec_id

    def image_kv(self, tokens: Tensor) -> ImageKV:
        """The tokens themselves."""
        return [(tokens, tokens[:, :0])]

    def encode_queries(self, image_kv: ImageKV, cache: QueryCache | None = None) -> Tensor:
        """As ours."""
        tokens, empty = image_kv[0]
        if cache is not None:
            cache.update(0, tokens, empty)
        queries = self.queries.expand(len(tokens), -1, -1)
        return self.model(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state

    def encode_text(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """As ours."""
        words, mask = self.embeddings(input_ids=text_ids), text_mask.long()
        return self.model(query_embeds=words, query_length=0, attention_mask=mask).last_hidden_state[:, 0]

    def forward(self, kind: str, text_ids: Tensor, text_mask: Tensor, image_kv: ImageKV) -> tuple[Tensor, Tensor]:
        """As ours."""
        Q, queries = self.cfg.num_queries, self.queries.expand(len(text_ids), -1, -1)
        tokens, _, *others = image_kv[0]
        tokens = torch.cat((tokens, tokens, others[0])) if others else tokens  # ITM's pairs
        out = self.model(
            query_embeds=self.embeddings(input_ids=text_ids, query_embeds=queries),
            query_length=Q,
            attention_mask=qformer_mask(kind, text_mask, Q),
            encoder_hidden_states=tokens,
        ).last_hidden_state
        return out[:, :Q], out[:, Q:]

    def decode_text(self, text_ids: Tensor, text_mask: Tensor, cache: QueryCache) -> Tensor:
        """As ours."""
        return self("itg", text_ids, text_mask, [cache.kv[0]])[1]

    def lm_logits(self, text_out: Tensor) -> Tensor:
        """As ours; transformers lacks this head."""
        return self.lm_head(text_out, self.embeddings.word_embeddings.weight)


def their_stage1(model: Blip2) -> Blip2:
    """Our stage 1 over transformers' ViT and Q-Former."""
    twin = transformers_twin(model)
    vit, qformer = TheirViT(twin.vision_model, model.vit), TheirQFormer(twin, model.qformer)
    theirs = Blip2(vit, qformer, None, model.image_size, model.embed_dim)
    for name in ("ln_vision", "vision_proj", "text_proj", "itm_head"):
        setattr(theirs, name, copy.deepcopy(getattr(model, name)))
    theirs.qformer.requires_grad_(True)
    theirs.amp_dtype = model.amp_dtype
    return theirs.to(model.device).train()


# --- stage 2, generation, retrieval, loading -------------------------------------------------------------------------


class TheirStage2(nn.Module):
    """transformers' Blip2ForConditionalGeneration in the place of Blip2, in stage 2."""

    def __init__(self, model: Blip2, batch: Batch):
        super().__init__()
        self.twin, self.autocast, self.totals = transformers_twin(model), model.autocast, model.stage2_totals
        self.temperature = model.temperature
        for part in (self.twin.qformer, self.twin.language_projection, self.twin.vision_model.post_layernorm):
            part.requires_grad_(True)
        self.twin.query_tokens.requires_grad_(True)
        ids = prefix = visual_prompt(self.twin, batch.prompt_ids, model.before_image)
        labels = batch.labels
        if isinstance(model.llm, CausalLM):
            ids = torch.cat((prefix, batch.target_ids), dim=1)
            labels = torch.cat((torch.full_like(prefix, -100), labels), dim=1)
        mask = torch.cat((torch.ones_like(prefix), (labels != -100).long()[:, prefix.shape[1] :]), dim=1)
        pixels = pixels_of(model, batch.images)
        self.inputs = dict(pixel_values=pixels, input_ids=ids, attention_mask=mask[:, : ids.shape[1]], labels=labels)

    def stage2_totals(self, batches: list[Batch]) -> dict[str, Tensor]:
        """As ours."""
        return self.totals(batches)

    def train(self, mode: bool = True):
        """As ours: the frozen parts stay in eval mode."""
        super().train(mode)
        self.twin.vision_model.eval(), self.twin.language_model.eval()
        return self

    def forward(self, *_) -> dict[str, Tensor]:
        """The loss."""
        with self.autocast():
            return {"lm": self.twin(**self.inputs).loss}


def their_generation(model: Blip2, batch: Batch, settings: dict) -> Callable[[], Tensor]:
    """A function that captions the batch -> (B, new tokens)."""
    twin = transformers_twin(model)
    prefix, pixels, new = (
        visual_prompt(twin, batch.prompt_ids, model.before_image),
        pixels_of(model, batch.images),
        settings["max_new_tokens"],
    )
    ends = dict(eos_token_id=model.llm_tokenizer.end_id, pad_token_id=model.llm_tokenizer.pad_id)

    @torch.no_grad()
    def run() -> Tensor:
        inputs = dict(pixel_values=pixels, input_ids=prefix, attention_mask=torch.ones_like(prefix))
        with model.autocast():
            out = twin.generate(**inputs, do_sample=False, **ends, **settings)
        return out[:, -new:] if isinstance(model.llm, CausalLM) else out[:, 1 : new + 1]

    return run


def their_retrieval(model: Blip2, images: Tensor, batch: Batch) -> Callable[[], Tensor]:
    """A function that matches all images with all texts -> (N, M)."""
    twin, pixels, M = transformers_twin(model), pixels_of(model, images), len(batch)
    texts = dict(input_ids=batch.text_ids, attention_mask=batch.text_mask.long(), use_image_text_matching_head=True)

    @torch.no_grad()
    def run() -> Tensor:
        rows = []
        for image in pixels:  # an image with all texts at a time
            with model.autocast():
                out = twin(pixel_values=image.expand(M, -1, -1, -1), **texts)
            rows.append(out.logits_per_image.float().softmax(dim=1)[:, 1])
        return torch.stack(rows)

    return run


def their_load(path: Path, dtype: torch.dtype, device: torch.device) -> Callable:
    """A function that opens a checkpoint folder."""
    kind = getattr(transformers, json.loads((path / "config.json").read_text())["architectures"][0])
    return partial(lambda: kind.from_pretrained(path, dtype=dtype).to(device))
