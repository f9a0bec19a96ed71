"""A `Blip2` out: for transformers' BLIP-2 classes, for LAVIS, or as a run to train from."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from engine.errors import expect
from engine.files import read_json, whole, write_json
from engine.progress import progress
from weights.configs import family_of, hf_config
from weights.load import first_match, open_tensors, unload
from weights.open import holds_vit
from weights.runs import split_spec
from weights.tables import HF_BLIP2, HF_BLIP2_VIT, HF_RETRIEVAL, LAVIS_STAGE1, LAVIS_STAGE2, LAVIS_VITS, Table

SHARD_BYTES = 2_000_000_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(model, form: str, out: Path, dtype: str) -> list[str]:
    """Write a `Blip2` as "hf" (a folder), "lavis" (a .pth) or "run" (a folder) -> notes for the user.

    Raises UserError, with nothing written, for what the format cannot hold. `out` appears whole or not at all.
    """
    expect(not out.exists(), f"{out} exists already: pass another name, or remove it first")
    expect(out.parent.is_dir(), f"{out}: the folder {out.parent} does not exist, create it first")
    expect(
        form == "run" or not model.conditioned,
        f"the Q-Former of this run reads the question too (--stage vqa), which BLIP-2 in {form} cannot: use it here, "
        "or fine-tune with --no-condition",
    )
    for part, source in model.sources.items():
        real = source.files or part == "bert" or (part == "vit" and model.holds_vit)
        expect(real, f"--{part} {source.spec} has random weights, which are not worth exporting")
    family = family_of(model.llm) if model.llm is not None else None
    expect(
        form == "run" or family is None or {"hf": family.hf_prefix, "lavis": family.lavis_proj}[form] is not None,
        f"BLIP-2 in {form} has no place for the language model {type(model.llm).__name__}: keep the run, or export "
        "with --format run",
    )
    with whole(out) as partial:
        return {"hf": export_hf, "lavis": export_lavis, "run": export_run}[form](model, partial, DTYPES[dtype])


def export_run(model, folder: Path, dtype: torch.dtype) -> list[str]:
    """A run to train from; its frozen parts stay where they are."""
    model.save_pretrained(folder, relative_to=folder)
    return [f"--{part} {source.spec}" for part, source in model.sources.items() if part != "bert"]


def left_out(model: nn.Module, table: Table) -> list[str]:
    """What the table has no row for, a sentence per reason."""
    names = [name for name, _ in model.named_parameters() if not name.startswith(("vit.", "llm."))]
    lost = Counter(first_match(table.fresh, name) for name in names)
    return [f"left out, {count} tensors: {why}" for why, count in lost.items() if why]


# --- transformers ----------------------------------------------------------------------------------------------------


def export_hf(model, folder: Path, dtype: torch.dtype) -> list[str]:
    """config.json, safetensors, tokenizer and processor files, as transformers' BLIP-2 classes read them."""
    vit, retrieval, notes = model.vit.cfg, model.llm is None, []
    if vit.eps != model.ln_vision.eps:
        notes.append(
            f"ln_vision has eps {model.ln_vision.eps:g} here and {vit.eps:g} there, where the ViT has only one: "
            "outputs differ in their last digits, as those of the public conversions do"
        )
    notes += left_out(model, HF_RETRIEVAL if retrieval else HF_BLIP2)
    config, tensors = hf_config(model), hf_state(model)
    folder.mkdir()
    if retrieval:
        tokenizer, special = hf_bert_tokenizer(model.tokenizer)
    else:
        tokenizer, special = hf_llm_tokenizer(model.llm_tokenizer)
        image_token = tokenizer.token_to_id("<image>")
        words = max(model.llm.cfg.vocab_size, image_token + 1)
        text = read_json(Path(model.sources["llm"].spec) / "config.json")
        text = text.get("text_config", text)  # of a whole BLIP-2
        ends = {"eos_token_id": model.llm_tokenizer.end_id, "pad_token_id": model.llm_tokenizer.pad_id}
        starts = {key: text[key] for key in ("bos_token_id", "decoder_start_token_id") if text.get(key) is not None}
        act = {"dense_act_fn": model.llm.cfg.act} if hasattr(model.llm.cfg, "act") else {}
        text |= ends | act | {"vocab_size": words, "dtype": str(dtype)[6:]}
        config |= {"image_token_index": image_token, "text_config": text}
        tensors |= hf_llm_state(model.llm, words)
        write_json(folder / "generation_config.json", ends | starts, 2)
    write_shards(folder, tensors, dtype)
    write_json(folder / "config.json", config | {"dtype": str(dtype)[6:]}, 2)
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", special | kind, 2)
    processor = {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": model.image_size, "width": model.image_size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": vit.mean,
        "image_std": vit.std,
    }
    write_json(folder / "preprocessor_config.json", processor, 2)
    queries = {} if retrieval else {"num_query_tokens": model.qformer.cfg.num_queries}
    write_json(folder / "processor_config.json", {"processor_class": "Blip2Processor"} | queries, 2)
    return notes


def hf_state(model) -> dict[str, Tensor]:
    """The state dict of transformers' class, without its language model; positions for the model's image size."""
    table = HF_RETRIEVAL if model.llm is None else HF_BLIP2
    grid = model.image_size // model.vit.cfg.patch_size
    vision = unload(model.vit, HF_BLIP2_VIT) | {"embeddings.position_embedding": model.vit.positions(grid, grid)}
    vision = {f"vision_model.{key}": tensor.detach() for key, tensor in vision.items()}
    return unload(model, table, table.fresh) | vision


def hf_llm_state(llm: nn.Module, words: int) -> dict[str, Tensor]:
    """A language model under transformers' keys, its vocabulary padded with zeros to `words`."""
    family = family_of(llm)
    tensors = unload(llm, family.table)
    for key in ("embed_tokens.weight", "shared.weight", "lm_head.weight"):
        if key in tensors:
            tensors[key] = nn.functional.pad(tensors[key], (0, 0, 0, words - len(tensors[key])))
    return {family.hf_prefix + key: tensor for key, tensor in tensors.items()}


def hf_bert_tokenizer(tokenizer) -> tuple[Tokenizer, dict[str, str]]:
    """BERT's tokenizer for transformers, and the names of its special tokens."""
    copied = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    copied.no_truncation()  # transformers' BLIP-2 processor fails with one
    return copied, {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}


def hf_llm_tokenizer(tokenizer) -> tuple[Tokenizer, dict[str, str]]:
    """The language model's tokenizer for transformers, which adds the tokens around a prompt and has one for an image,
    and the names of its special tokens."""
    copied, form = Tokenizer.from_str(tokenizer.tokenizer.to_str()), tokenizer.format
    copied.add_special_tokens(["<image>"])
    around = [token for token in (form.prompt_start, "$A", form.prompt_end) if token]
    special = [(token, tokenizer.token(token)) for token in around if token != "$A"]
    copied.post_processor = TemplateProcessing(single=" ".join(around), special_tokens=special)
    names = {"pad_token": form.padding, "eos_token": "</s>", "unk_token": "<unk>"}
    return copied, names | ({"bos_token": form.prompt_start} if form.prompt_start else {})


def write_shards(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """model.safetensors, or shards and their index."""
    sizes = {key: tensor.numel() * dtype.itemsize for key, tensor in tensors.items()}
    shards: list[list[str]] = []
    free = 0
    for key, size in sizes.items():
        if not shards or size > free:
            shards.append([])
            free = SHARD_BYTES
        shards[-1].append(key)
        free -= size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
        weight_map = {key: name for name, keys in zip(names, shards) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index, 2)
    for name, keys in progress(zip(names, shards), f"writing {folder}", len(names)):
        save_file({key: tensors[key].to(dtype).contiguous() for key in keys}, folder / name, {"format": "pt"})


# --- LAVIS -----------------------------------------------------------------------------------------------------------


def export_lavis(model, path: Path, dtype: torch.dtype) -> list[str]:
    """{"model": state dict} under LAVIS's keys. A ViT from LAVIS's own file stays out, as there."""
    vit, q, notes = model.vit.cfg, model.qformer.cfg, []
    source = model.sources["vit"]
    expect(
        vit.key_bias == vit.ln_pre,  # EVA has neither, CLIP has both
        f"{source.spec} is neither an EVA-CLIP nor a CLIP encoder, and LAVIS knows no other: export with --format "
        + ("hf" if vit.cls_token and vit.act != "swiglu" else "run"),
    )
    if (q.width, q.depth, q.cross_every) != (768, 12, 2):
        notes.append(
            f"a Q-Former of {q.depth} blocks of width {q.width}, cross-attention in every {q.cross_every}: LAVIS "
            "builds 12 of 768 with cross-attention in every 2, and has to be changed to read it"
        )
    if model.ln_vision.eps != 1e-5:
        notes.append(f"ln_vision has eps {model.ln_vision.eps:g} here and 1e-05 there: the last digits differ")
    if model.llm is not None and getattr(model.llm.cfg, "act", "gelu") != "gelu":
        notes.append("T5's GELU is by tanh here; LAVIS replaces it by the one by erf: answers may differ")
    table = LAVIS_STAGE1
    if model.llm is not None:
        own = family_of(model.llm).lavis_proj  # and no other
        rows = [r for r in LAVIS_STAGE2.rows if not r.ours.startswith("llm_proj") or r.theirs[0].startswith(own)]
        table = replace(LAVIS_STAGE2, rows=rows)
    notes += left_out(model, table)
    tensors = unload(model, table, table.fresh)
    if model.llm is None:
        head = {"weight": "bert.embeddings.word_embeddings.weight", "bias": "cls.predictions.bias"}
        tensors |= {f"Qformer.cls.predictions.decoder.{k}": tensors[f"Qformer.{tied}"] for k, tied in head.items()}
    fine_tuned = model.holds_vit or holds_vit(open_tensors(source.files))
    if split_spec(source.spec)[0] and not fine_tuned:
        notes.append(f"without its ViT, which LAVIS reads from its own file ({source.spec})")
    else:
        tensors |= unload(model.vit, LAVIS_VITS["clip-l" if vit.ln_pre else "eva-g"])
    tensors = {key: tensor.to(dtype).clone() for key, tensor in progress(tensors.items(), f"converting to {path.name}")}
    positions = torch.arange(q.max_positions)[None]
    torch.save({"model": tensors | {"Qformer.bert.embeddings.position_ids": positions}}, path)
    return notes
