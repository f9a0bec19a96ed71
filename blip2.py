"""BLIP-2: a frozen image encoder, the Q-Former, and what is trained around them (paper 3).

Stage 1 (paper 3.2) is `Blip2.stage1_losses`, stage 2 (3.3) is `Blip2.stage2_losses`; fine-tuning (4.2 to 4.4) uses the
same two, with the ViT trained as well (`unfreeze_vit`) and for VQA with the question in the Q-Former. Around them are
the calls a user makes, which take pictures and strings and pad, tokenize and batch by themselves: `encode_image`,
`encode_text`, `itc_scores`, `itm_scores`, `caption`, and with a language model `ask`, `rank`, `score`; and
`Blip2.build`, `attach_llm`, `from_pretrained`, `save_pretrained`.
Letters: B rows of this process, N of all processes, P image tokens, V ViT width, Q queries, T text tokens, D Q-Former
width, E shared embedding, L width of the language model, W vocabulary.
"""

import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import formats
import weights
from data import Batch, LLMTexts, Texts, UserError, ask_in, eval_transform, open_picture, pad, read_json, to_rgb
from generate import generate
from llm import LLMS
from losses import (
    all_gather,
    all_gather_ragged,
    all_sum,
    fetch_rows,
    gather_in_order,
    gathered_rows,
    itc_loss,
    itc_similarity,
    itg_loss,
    itm_loss,
    lm_loss,
    sample_hard_negatives,
    say,
    world,
)
from qformer import CaptionDecoder, ImageKV, Prefix, QFormer, QFormerConfig, predict
from vit import ViT, ViTConfig

OBJECTIVES = ("itc", "itm", "itg")
TINY = Path(__file__).parent / "assets/tiny"  # what ships with the code
ANSWERS = dict(max_new_tokens=10, num_beams=5, length_penalty=-1.0, min_new_tokens=1)  # of paper 4.1
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class EncodedImages(NamedTuple):
    """Photos that have been through the ViT and the Q-Former; every call that takes photos takes this too."""

    tokens: Tensor  # (N, P, V), raw ViT tokens: what the Q-Former's cross-attention reads
    query_out: Tensor  # (N, Q, D)
    feats: Tensor  # (N, Q, E), unit length: to be compared with a text's, the highest counts


class EncodedTexts(NamedTuple):
    """Texts that have been through the Q-Former; every call that takes texts takes this too."""

    ids: Tensor  # (M, T), [CLS] ... [SEP], padded
    mask: Tensor  # (M, T) bool, True = real token
    cls: Tensor  # (M, D)
    feats: Tensor  # (M, E), unit length


class Ranked(NamedTuple):
    """An answer and how likely it is."""

    answer: str
    log_prob: float  # summed over its tokens, the end among them
    mean_log_prob: float  # of a token


class Scores(NamedTuple):
    """How likely each text is, given each photo."""

    log_prob: Tensor  # (N, M), summed over the text's tokens, the end among them
    mean_log_prob: Tensor  # (N, M), of a token


class Negatives(NamedTuple):
    """For each of B pairs a photo and a text that look alike and do not belong to it, by their numbers among the N of
    all processes."""

    images: Tensor  # (B,), of the text
    texts: Tensor  # (B,), of the photo
    found: Tensor  # (2B,) bool, False where there is none


class Compared(NamedTuple):
    """A micro-batch of several that `Blip2.compare` has compared with each other; what its second pass needs."""

    seed: int  # of its dropout
    image_tokens: Tensor  # (B, P, V), its own, of `all_tokens`
    itc_value: Tensor  # its share of ITC
    feats_grad: Tensor  # (B, Q+1, E), the gradient of ITC at its features
    temperature_grad: Tensor  # its share of that at the temperature
    negatives: Negatives
    all_tokens: Tensor  # (A*B, P, V), of all micro-batches of this process
    texts: tuple[Tensor, ...]  # ids and mask (B, T) of its own texts, and of its negatives'

    def itc(self, feats: Tensor, temperature: Tensor) -> Tensor:
        """The share of ITC, with its gradient."""
        proxy = (feats * self.feats_grad).sum() + temperature * self.temperature_grad
        return self.itc_value + proxy - proxy.detach()


class Blip2(nn.Module):
    """The model of both stages.

    The ViT is frozen: eval mode, no gradient, not in the checkpoint; until `unfreeze_vit`. Stage 1 trains the Q-Former
    and its queries, `ln_vision` (in the place of the ViT's dropped final norm), two projections, the ITM head and the
    temperature. Stage 2 puts a language model behind the queries (`attach_llm`), as frozen as the ViT, and trains
    `ln_vision`, the queries' part of the Q-Former and `llm_proj`; the text branch stays as stage 1 has left it. For VQA
    it goes on (`condition_on_question`): the Q-Former then reads the question together with the photo (Figure 7).
    """

    def __init__(
        self,
        vit: ViT,
        qformer: QFormer,
        texts: Texts | None,
        image_size: int = 224,
        embed_dim: int = 256,
        ln_vision_eps: float = 1e-5,
        sources: dict | None = None,
    ):
        super().__init__()
        self.vit, self.qformer, self.texts = vit, qformer, texts
        self.image_size, self.embed_dim, self.sources = image_size, embed_dim, sources or {}
        width = qformer.cfg.width
        self.ln_vision = nn.LayerNorm(vit.cfg.width, eps=ln_vision_eps)
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(width, embed_dim)
        self.itm_head = nn.Linear(width, 2)  # column 1 = match
        self.temperature = nn.Parameter(torch.tensor(0.07))  # learned, divides; train.py keeps it within bounds
        self.llm, self.llm_texts, self.template = None, None, None  # from `attach_llm`
        self.prompt = ""  # what captions go on from, if fine-tuned so
        self.conditioned = False  # does the Q-Former read the question too? From `condition_on_question`
        self.vit_trained = False  # from `unfreeze_vit`
        self.amp_dtype: torch.dtype | None = None  # of the products in the trained part; None is fp32
        self.compiled = False  # from `compile_blocks`
        vit.requires_grad_(False).eval()

    # --- open and save -----------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        vit: str,
        bert: str,
        image_size: int = 224,
        num_queries: int = 32,
        cross_every: int = 2,
        embed_dim: int = 256,
        max_text_tokens: int = 32,
        last_block: bool = False,
        dropout: float | None = None,
        precision: str = "fp32",
        device: str | torch.device = "cpu",
    ) -> tuple["Blip2", list[str]]:
        """An untrained model over two folders (see `weights.load_vit`) -> it, and the accounts of what was loaded."""
        encoder, vit_account, vit_files = weights.load_vit(vit, last_block, vit_dtype(precision, device), device)
        sizes = dict(image_width=encoder.cfg.width, num_queries=num_queries, cross_every=cross_every)
        if dropout is not None:
            sizes["dropout"] = dropout
        qformer, bert_account, _ = weights.load_bert(bert, **sizes)
        texts = Texts(bert, max_text_tokens)
        if texts.vocab_size != qformer.cfg.vocab_size:
            raise UserError(
                f"{bert} has a tokenizer of {texts.vocab_size - 1} words and weights of {qformer.cfg.vocab_size - 1}, "
                "expected the same: use the tokenizer that the weights were trained with"
            )
        check_image_size(image_size, encoder.cfg.patch_size, vit)
        longest = qformer.cfg.max_positions // 8 * 8  # `pad` rounds up to 8
        if not 3 <= max_text_tokens <= longest:
            raise UserError(
                f"got --max-text-tokens {max_text_tokens}, expected 3 to {longest}, the positions that {bert} has"
            )
        sources = {"vit": vit, "vit_files": vit_files, "last_block": last_block, "bert": bert}
        model = cls(encoder, qformer, texts, image_size, embed_dim, sources=sources)
        return model.set_precision(precision, device), [vit_account, bert_account]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        vit: str | None = None,
        bert: str | None = None,
        llm: str | None = None,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        dropout: float | None = None,
        image_size: int | None = None,
        train_vit: bool = False,
    ) -> "Blip2":
        """Open a run folder; a folder of transformers' Blip2ForConditionalGeneration or Blip2ForImageTextRetrieval; or
        a checkpoint of LAVIS (.pth) with the folders it was trained over: `vit`, and `bert` or `llm`.

        vit, llm: where the frozen parts of a run are now, if they have moved. precision: "fp32", "bf16" or "fp16"; the
        frozen parts are read straight into it. dropout: of the Q-Former in further training, if not that of the run.
        image_size: of the pictures, if not that of the checkpoint; the table of positions is resized.
        train_vit: keep the ViT of a run in fp32, to train it (see `unfreeze_vit`).
        """
        path = Path(path)
        if path.suffix in (".pth", ".pt"):
            model = cls._from_lavis(path, vit, bert, llm, precision, device)
        elif (path / "config.json").exists() and read_json(path / "config.json").get("model_type") == "blip-2":
            if vit or bert or llm:
                raise UserError(f"{path} has all its parts: leave --vit, --bert and --llm out")
            model = cls._from_hf(path, precision, device)
        else:
            model = cls._from_run(path, vit, llm, dropout, precision, device, train_vit)
        if image_size is not None:
            check_image_size(image_size, model.vit.cfg.patch_size, str(path))
            model.image_size = image_size
        if train_vit:
            model.unfreeze_vit()
        return model.eval()

    @classmethod
    def _from_run(
        cls,
        folder: Path,
        vit: str | None,
        llm: str | None,
        dropout: float | None,
        precision: str,
        device,
        train_vit: bool,
    ) -> "Blip2":
        """A folder that `save_pretrained` has written."""
        if not (folder / "model.safetensors").exists():
            raise UserError(
                f"{folder} is not a run: expected config.json and model.safetensors in it, as train.py writes"
            )
        config = read_json(folder / "config.json")
        if config.get("model") != "blip2":
            raise UserError(f"{folder} is a {config.get('model_type')}, expected a run, or a whole BLIP-2")
        spec, dtype = vit or relocated(config["vit"], folder), vit_dtype("fp32" if train_vit else precision, device)
        if config.get("vit_trained"):  # it is in the run itself
            with torch.device("meta"), weights.NothingDrawn():
                own = {key: tuple(v) if isinstance(v, list) else v for key, v in config["vit_config"].items()}
                encoder, files = ViT(ViTConfig(**own)), []
            encoder = encoder.to(dtype).to_empty(device=device)
        else:
            encoder, _, files = weights.load_vit(spec, config["last_block"], dtype, device)
        trained_over = config["qformer"]["image_width"]
        if encoder.cfg.width != trained_over:
            raise UserError(
                f"{folder} was trained over a ViT of width {trained_over}, {spec} has width {encoder.cfg.width}: "
                f"pass --vit with the encoder it was trained over ({config['vit']})"
            )
        sizes = config["qformer"] | ({} if dropout is None else {"dropout": dropout})
        sources = {"vit": spec, "vit_files": files, "last_block": config["last_block"], "bert": config["bert"]}
        sources["lacks"] = config.get("lacks", [])
        model = cls(
            encoder,
            weights.build_qformer(QFormerConfig(**sizes), {}, device),
            Texts(folder, config["max_text_tokens"]) if config.get("text_branch", True) else None,
            config["image_size"],
            config["embed_dim"],
            config["ln_vision_eps"],
            sources,
        )
        model.vit_trained = config.get("vit_trained", False)
        model.vit.requires_grad_(train_vit)
        model.set_precision(precision, device)
        if not model.vit_trained:
            model.check_frozen("vit", config, folder)
        if config.get("llm"):  # a run of stage 2
            model.attach_llm(llm or relocated(config["llm"], folder), config["template"], config.get("llm_act"))
            model.check_frozen("llm", config, folder)
            model.prompt = config.get("prompt", "")
        if config.get("conditioned"):
            model.condition_on_question()
        model.load_trained(folder)
        return model

    @classmethod
    def _from_hf(cls, folder: Path, precision: str, device) -> "Blip2":
        """transformers' BLIP-2 classes: one folder with all parts. With a language model it has no text branch; for
        retrieval it has one, but neither ITG's head nor ITC's temperature."""
        spec, config = str(folder), read_json(folder / "config.json")
        encoder, account, files = weights.load_vit(spec, dtype=vit_dtype(precision, device), device=device)
        say(account)
        tensors = weights.open_tensors(files)
        retrieval = "itm_head.weight" in tensors
        table = formats.HF_RETRIEVAL if retrieval else formats.HF_BLIP2
        cfg = weights.hf_qformer_config(config, retrieval)
        model = cls(
            encoder,
            weights.build_qformer(cfg, table.fresh, device),
            Texts(folder) if retrieval else None,
            encoder.cfg.image_size,
            config.get("image_text_hidden_size", 256),
            encoder.cfg.eps,
            {"vit": spec, "vit_files": files, "lacks": ["itg"] if retrieval else []},
        ).set_precision(precision, device)
        if not retrieval:
            say(model.attach_llm(spec))
        say(weights.load(model, tensors, table, spec))
        return model

    @classmethod
    def _from_lavis(
        cls, path: Path, vit: str | None, bert: str | None, llm: str | None, precision: str, device
    ) -> "Blip2":
        """The original's checkpoints of either stage, with or without a ViT that was fine-tuned with them. They have no
        config, so the folders say the architecture."""
        if not path.exists():
            raise UserError(f"{path} does not exist: expected a LAVIS checkpoint or a run folder")
        tensors = weights.open_tensors([path])
        stage2, has_vit, name = weights.lavis_kind(tensors)
        own = name if has_vit else f"{name}:{'eva_vit_g.pth' if name == 'eva-g' else 'clip_vit_L.pth'}"
        if vit is None or (llm if stage2 else bert) is None:
            part = "llm" if stage2 else "bert"
            raise UserError(f"{path} does not say its architecture: pass --vit {own} and --{part} FOLDER")
        if has_vit:
            vit = f"{name}:{path}"
        encoder, account, files = weights.load_vit(vit, dtype=vit_dtype(precision, device), device=device)
        say(account)
        sizes = dict(image_width=encoder.cfg.width) | weights.lavis_sizes(tensors)
        if bert is not None:
            sizes |= weights.bert_config(Path(bert))
        sources = {"vit": vit, "vit_files": files, "last_block": False, "bert": bert or ""}
        texts = None if stage2 else Texts(bert)
        embed_dim = len(tensors["vision_proj.bias"]) if "vision_proj.bias" in tensors else 256
        table = formats.LAVIS_STAGE2 if stage2 else formats.LAVIS_STAGE1
        qformer = weights.build_qformer(QFormerConfig(**sizes), table.fresh, device)
        model = cls(encoder, qformer, texts, encoder.cfg.image_size, embed_dim, sources=sources)
        model.set_precision(precision, device)
        if stage2:
            say(model.attach_llm(llm, act="gelu" if "t5_proj.weight" in tensors else None))
        say(weights.load(model, tensors, table, str(path)))
        return model

    def attach_llm(self, spec: str, template: str | None = None, act: str | None = None) -> str:
        """Put a frozen language model behind the queries (paper 3.3) -> the account of its loading.

        spec: see `weights.load_llm`; it is read straight into this model's precision, on its device.
        template: of questions, with {} for the question; else the model's usual one.
        act: T5's activation, if not that of its config.json: the original has put "gelu", by erf, in its place.
        The projection to its width is new; what stage 2 does not reach is not trained any more.
        """
        cfg, _ = weights.llm_config(spec)  # the tokenizer first: its errors come before gigabytes are read
        kind = LLMS[type(cfg)]
        tokenizer = spec if os.path.isdir(spec) else TINY / kind.__name__.lower()  # random weights have none
        texts = LLMTexts(tokenizer, kind.layout, self.texts.max_tokens if self.texts else 32)
        if texts.vocab_size > cfg.vocab_size:
            raise UserError(
                f"{spec} has a tokenizer of {texts.vocab_size} words and weights of {cfg.vocab_size}, "
                "expected no more words than weights: use the model's own tokenizer"
            )
        llm, account, files = weights.load_llm(spec, self.amp_dtype or torch.float32, self.device, act)
        self.llm, self.llm_texts, self.template = (
            llm.requires_grad_(False).eval(),
            texts,
            template or llm.layout.template,
        )
        self.sources |= {"llm": spec, "llm_files": files, "llm_act": act}
        self.check_room(texts.max_tokens, 0)
        self.llm_proj = nn.Linear(self.qformer.cfg.width, llm.width, device=self.device)
        text_branch = (
            self.qformer.word_embedding,
            self.qformer.position_embedding,
            *(block.ffn_text for block in self.qformer.blocks),
            self.qformer.lm_head,
            *(self.vision_proj, self.text_proj, self.itm_head),
        )
        for part in (*text_branch, self.temperature):
            part.requires_grad_(False)
        return account

    def unfreeze_vit(self) -> None:
        """Train the ViT as well (paper 4.2 to 4.4), in fp32 and with a table of positions for the size of its pictures.
        From then on a checkpoint holds it."""
        self.vit.float().requires_grad_(True)
        if self.vit.cfg.image_size != self.image_size:
            self.vit.resize_positions(self.image_size)
        self.vit_trained = True
        self.sources |= {"vit_files": [], "vit_sha256": None}  # it is not that of the files any more

    def condition_on_question(self) -> None:
        """Let the Q-Former read each question together with the photo (paper 4.3, Figure 7), and train what reads it:
        the embeddings and the text feed-forwards that stage 1 has left."""
        if self.texts is None:
            raise UserError(
                f"{self.sources['vit']} has no text branch to read a question with, as all public checkpoints of stage "
                "2: start from a run that has been through stage 1 here, or pass --no-condition"
            )
        texts = [block.ffn_text for block in self.qformer.blocks[:-1]]  # nobody reads the text behind the last block
        for part in (self.qformer.word_embedding, self.qformer.position_embedding, *texts):
            part.requires_grad_(True)
        self.conditioned = True

    def trained_state(self) -> dict[str, Tensor]:
        """Everything that is not frozen for good, by name: what a checkpoint holds."""
        frozen = ("llm.",) if self.vit_trained else ("vit.", "llm.")
        return {name: t for name, t in self.state_dict().items() if not name.startswith(frozen)}

    def load_trained(self, folder: str | Path) -> None:
        """Everything but the frozen parts, from a folder that `save_pretrained` has written; strict."""
        rows = [formats.Row((name,), name) for name in self.trained_state()]
        frozen = r"llm\..*" if self.vit_trained else r"vit\..*|llm\..*"
        table = formats.Table(rows, fresh={frozen: "the frozen parts"})
        weights.load(self, weights.open_tensors([Path(folder) / "model.safetensors"]), table, str(folder))

    def save_pretrained(self, folder: str | Path, home: str | Path | None = None, **extra) -> None:
        """Write config.json, model.safetensors and tokenizer.json, from which `from_pretrained` opens the model.

        home: the folder from which the paths in config.json shall be valid, if the files are moved there afterwards.
        extra: further entries of config.json.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.trained_state().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        if self.texts is not None:
            self.texts.save(folder)
        self.write_config(folder, home, **extra)
        # safetensors lets only the owner read its files; a colleague may read this one as any other.
        shutil.copymode(folder / "config.json", folder / "model.safetensors")

    def write_config(self, folder: Path, home: str | Path | None = None, **extra) -> None:
        """config.json of `save_pretrained`."""
        home = Path(home or folder)
        config = {
            "model": "blip2",
            "vit": relative(self.sources.get("vit", ""), home),
            "vit_sha256": self.frozen_sha256("vit"),
            "vit_trained": self.vit_trained,  # then the run holds it
            **({"vit_config": asdict(self.vit.cfg)} if self.vit_trained else {}),
            "last_block": self.sources.get("last_block", False),
            "bert": relative(self.sources.get("bert", ""), home),  # where the Q-Former started; not needed any more
            "image_size": self.image_size,
            "embed_dim": self.embed_dim,
            "text_branch": self.texts is not None,  # public checkpoints of stage 2 have none
            "lacks": self.sources.get("lacks", []),  # of the heads; those for retrieval have none for ITG
            "max_text_tokens": (self.texts or self.llm_texts).max_tokens,
            "ln_vision_eps": self.ln_vision.eps,
            "qformer": asdict(self.qformer.cfg),
            **extra,
        }
        if self.llm is not None:
            llm = {"llm": relative(self.sources["llm"], home), "llm_sha256": self.frozen_sha256("llm")}
            config |= {**llm, "llm_act": self.sources["llm_act"], "template": self.template}
            config |= {"prompt": self.prompt, "conditioned": self.conditioned}
        (folder / ".config.partial").write_text(json.dumps(config, indent=2) + "\n")
        os.replace(folder / ".config.partial", folder / "config.json")

    # --- precision and freezing --------------------------------------------------------------------------------------

    def set_precision(self, precision: str, device: str | torch.device = "cpu") -> "Blip2":
        """Move to the device. Below fp32, the frozen weights become half, the trained ones stay fp32 masters.

        The ViT takes fp16 on CUDA, as in paper 3.4, and bf16 on CPU, which has no fast fp16. The language model takes
        the precision of the products: bf16 or, for OPT, fp16 (paper 3.4 has OPT in fp16 and T5 in bf16).
        """
        self.amp_dtype = PRECISIONS[precision]
        if self.llm is not None:
            weights.check_llm_dtype(self.llm, self.amp_dtype, self.sources["llm"])
            self.llm.to(self.amp_dtype or torch.float32)
        if not self.trains_vit:
            self.vit.to(vit_dtype(precision, device))
        if torch.device(device).type == "cuda":
            # cuDNN's attention, PyTorch's first choice on some cards, prepares for long at each new shape, and texts
            # and beams have ever new ones; and some of its kernels round the dropout to sixteenths.
            torch.backends.cuda.enable_cudnn_sdp(False)
        return self.to(device)

    def train(self, mode: bool = True):
        """As usual, but what is frozen stays in eval mode."""
        super().train(mode)
        self.vit.eval()
        if self.llm is not None:
            self.llm.eval()
        return self

    def frozen_sha256(self, part: str) -> str | None:
        """A hash of the files of a frozen part, "vit" or "llm", computed once; None if it came from none."""
        files, key = self.sources.get(f"{part}_files"), f"{part}_sha256"
        if key not in self.sources:
            self.sources[key] = weights.sha256(files) if files else None
        return self.sources[key]

    def check_frozen(self, part: str, config: dict, folder: Path) -> None:
        """Refuse a frozen part, "vit" or "llm", that is not the one over which the run in `folder` was trained."""
        spec, known = self.sources[part], config[f"{part}_sha256"]
        if known not in (None, self.frozen_sha256(part)):
            raise UserError(
                f"{spec} holds other weights than {folder} was trained over: pass --{part} with the right ones, "
                f'or take "{part}_sha256" out of {folder}/config.json if you know that they are as good'
            )
        if not self.sources[f"{part}_files"]:
            name = {"vit": "ViT", "llm": "language model"}[part]
            raise UserError(
                f"{folder} was trained over a {name} of random weights ({spec}), which no file holds: "
                f"pass --{part} with real ones, or train again"
            )

    def compile_blocks(self, **options) -> None:
        """torch.compile the blocks: of each kind, and of each way that training takes through it, one graph that all
        layers share. Not those of a frozen ViT, which get slower. options: those of torch.compile."""
        torch._dynamo.config.cache_size_limit = 64  # a Q-Former block has eight ways through it; 8 is the default
        if hasattr(torch._inductor.config.triton, "coalesce_tiling_analysis"):
            torch._inductor.config.triton.coalesce_tiling_analysis = False  # PyTorch 2.11's fails where shapes vary
        for name, module in self.named_modules():
            if name.rpartition(".")[0].endswith("blocks") and (self.trains_vit or not name.startswith("vit.")):
                module.compile(**options)
        self.compiled = True

    def uncompiled(self):
        """Inside, nothing is compiled: evaluation has ever other shapes, each of which would cost a minute."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.temperature.device

    @property
    def trains_vit(self) -> bool:
        """Is the ViT trained just now?"""
        return self.vit.pos_embed.requires_grad

    def autocast(self):
        """Half-precision products of the trained part, whose weights are fp32."""
        return nullcontext() if self.amp_dtype is None else torch.autocast(self.device.type, self.amp_dtype)

    # --- the parts of the model --------------------------------------------------------------------------------------

    def image_tokens(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> the ViT's tokens (B, P, V); those of a frozen one in its own precision, no gradient."""
        if self.trains_vit:
            with self.autocast():
                return self.vit(images)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.vit(images)

    def image_kv(self, image_tokens: Tensor) -> ImageKV:
        """ln_vision, in fp32, and every cross-attention's keys and values."""
        tokens = self.ln_vision(image_tokens.float())
        return self.qformer.image_kv(tokens if self.amp_dtype is None else tokens.to(self.amp_dtype))

    def image_feats(self, query_out: Tensor) -> Tensor:
        """(B, Q, D) -> unit vectors (B, Q, E)."""
        return F.normalize(self.vision_proj(query_out).float(), dim=-1)

    def text_feats(self, text_cls: Tensor) -> Tensor:
        """[CLS] outputs (B, D) -> unit vectors (B, E)."""
        return F.normalize(self.text_proj(text_cls).float(), dim=-1)

    def itm_logits(self, query_out: Tensor) -> Tensor:
        """(R, Q, D) of the bi-directional pass -> (R, 2): a verdict of each query, averaged (paper 3.2)."""
        return self.itm_head(query_out).float().mean(dim=1)

    # --- stage 1 -----------------------------------------------------------------------------------------------------

    def forward(self, *args, **kwargs) -> dict[str, Tensor]:
        """The losses of the model's stage, under the name that DistributedDataParallel wraps."""
        return self.stage1_losses(*args, **kwargs) if self.llm is None else self.stage2_losses(*args, **kwargs)

    def stage1_losses(
        self,
        batch: Batch,
        objectives: tuple[str, ...] = OBJECTIVES,
        totals: dict[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        hardness: float = 1.0,
        compared: "Compared | None" = None,
    ) -> dict[str, Tensor]:
        """The losses of paper 3.2 on one batch; their sum is what stage 1 minimises.

        totals: from `stage1_totals`, what each loss is divided by; by default this batch over all processes.
        generator: of the hard negatives' draw, on the CPU; the same on all processes.
        hardness: 1 draws ITM's negatives by their similarity (the paper), 0 draws any, between is between.
        compared: from `compare`, where ITC compares the batch with more than itself; it has the negatives too.
        """
        if totals is None:
            totals = stage1_totals([batch])
        with self.autocast():
            if compared is None:
                image_tokens = self.tokens_of(batch)
            else:
                image_tokens = compared.image_tokens
                torch.manual_seed(compared.seed)
            image_kv = self.image_kv(image_tokens)  # once, for all the passes below
            cache = [Prefix() for _ in range(self.qformer.cfg.depth)]
            feats = self.feats(image_kv, batch, cache)  # (B, Q+1, E)

            if compared is None:
                feats_all = all_gather(feats)  # (N, Q+1, E), with gradient
                positives = batch.image_ids[:, None] == all_gather(batch.image_ids)  # (B, N): of one photo
                itc, *sims = self._itc(feats, feats_all, positives, totals["itc"])
            else:
                itc = compared.itc(feats, self.temperature)
            losses = {"itc": itc}
            if "itm" in objectives:
                if compared is None:
                    first, uniform = world()[0] * len(batch), random_numbers(feats_all, generator)
                    negatives = draw_negatives(*sims, positives, uniform[:, first : first + len(batch)], hardness)
                    negative_kv = self._negative_kv(image_tokens, image_kv, negatives.images)
                    ids, mask, ids_all, mask_all = all_gather_ragged(batch.text_ids, batch.text_mask)
                    texts = ids, mask, ids_all[negatives.texts], mask_all[negatives.texts]
                else:
                    negatives, texts = compared.negatives, compared.texts
                    negative_kv = self.image_kv(rows_of(compared.all_tokens, negatives.images))
                losses["itm"] = self._itm(image_kv, negative_kv, *texts, negatives.found, totals["itm"])
            if "itg" in objectives:
                losses["itg"] = self._itg(batch, cache, totals["itg"])
        return losses

    @torch.no_grad()
    def compare(
        self,
        batches: list[Batch],
        totals: dict[str, Tensor],
        generator: torch.Generator | None = None,
        hardness: float = 1.0,
    ) -> "list[Compared]":
        """ITC over several micro-batches at once, whose activations would not fit into memory together.

        In two passes (GradCache, Gao et al., 2021). The first, here, keeps the features only, and finds the gradient of
        ITC at each of them; the second, `stage1_losses`, runs each micro-batch again and hands that gradient on. So
        losses, gradients and hard negatives are those of one big batch. The frozen ViT runs once: its tokens are kept.
        For generator and hardness see there.
        """
        A, B, (rank, size) = len(batches), len(batches[0]), world()
        seeds, all_tokens, feats = torch.randint(2**62, (A,)).tolist(), None, []
        with self.autocast():
            for number, (seed, batch) in enumerate(zip(seeds, batches)):
                image_tokens = self.tokens_of(batch)
                if all_tokens is None:
                    all_tokens = image_tokens.new_empty(A, *image_tokens.shape)
                all_tokens[number] = image_tokens
                torch.manual_seed(seed)  # dropout is to be the same in the second pass
                feats.append(self.feats(self.image_kv(image_tokens), batch, None))

        feats_all = gather_in_order(torch.cat(feats), A).requires_grad_()
        ids_all = gather_in_order(torch.cat([batch.image_ids for batch in batches]), A)
        uniform, leaves = random_numbers(feats_all, generator), (feats_all, self.temperature)
        gradient, temperature_grad, found = torch.zeros_like(feats_all), torch.zeros_like(self.temperature), []
        for number in range(A):
            own = slice((number * size + rank) * B, (number * size + rank + 1) * B)
            positives = ids_all[own, None] == ids_all
            with torch.enable_grad():
                itc, *sims = self._itc(feats_all[own], feats_all, positives, totals["itc"])
                grads = torch.autograd.grad(itc, leaves)
            gradient += grads[0]
            temperature_grad += grads[1]
            negatives = draw_negatives(*sims, positives, uniform[:, own], hardness)
            images, texts = (gathered_rows(rows, B, A) for rows in negatives[:2])
            found.append((own, itc.detach(), Negatives(images, texts, negatives.found)))
        gradient = all_sum(gradient)  # a process owes something to the features of all

        longest = max(batch.text_ids.shape[1] for batch in batches)
        padded = (
            torch.cat([F.pad(x, (0, longest - x.shape[1])) for x in tensors])
            for tensors in zip(*((batch.text_ids, batch.text_mask) for batch in batches))
        )
        ids, mask, ids_all, mask_all = all_gather_ragged(*padded)
        return [
            Compared(
                seed, all_tokens[number], itc, gradient[own], temperature_grad / A, negatives, all_tokens.flatten(0, 1),
                (ids[number * B :][:B], mask[number * B :][:B], ids_all[negatives.texts], mask_all[negatives.texts]),
            )
            for number, (seed, (own, itc, negatives)) in enumerate(zip(seeds, found))
        ]  # fmt: skip

    def tokens_of(self, batch: Batch) -> Tensor:
        """The ViT's tokens (B, P, V) of a batch, computed or from the cache."""
        return batch.image_tokens if batch.images is None else self.image_tokens(batch.images)

    def feats(self, image_kv: ImageKV, batch: Batch, cache: list[Prefix] | None) -> Tensor:
        """What ITC compares (B, Q+1, E): of each photo its queries' features, and that of its text."""
        query_out = self.qformer.encode_queries(image_kv, cache)  # (B, Q, D)
        text_cls = self.qformer.encode_text(batch.text_ids, batch.text_mask)  # (B, D)
        return torch.cat((self.image_feats(query_out), self.text_feats(text_cls)[:, None]), dim=1)

    def _itc(self, feats: Tensor, feats_all: Tensor, positives: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image-text contrast of B rows of `feats` with the N of `feats_all` -> the loss, sim_i2t, sim_t2i (B, N)."""
        sim_i2t, sim_t2i = itc_similarity(
            feats[:, :-1], feats[:, -1], feats_all[:, :-1], feats_all[:, -1], self.temperature
        )
        return itc_loss(sim_i2t, sim_t2i, positives, total), sim_i2t, sim_t2i

    def _negative_kv(self, image_tokens: Tensor, image_kv: ImageKV, images: Tensor) -> ImageKV:
        """Keys and values of the photos `images` (B,), numbers among the N of all processes. Of those that are here
        they exist already; of the others the tokens come."""
        fetched, images = fetch_rows(image_tokens, images)
        if world()[1] > 1:
            image_kv = [
                (torch.cat((k, fk)), torch.cat((v, fv)))
                for (k, v), (fk, fv) in zip(image_kv, self.image_kv(fetched), strict=True)
            ]
        return [(k.index_select(0, images), v.index_select(0, images)) for k, v in image_kv]

    def _itm(self, image_kv: ImageKV, negative_kv: ImageKV, ids, mask, negative_ids, negative_mask, found, total):
        """Image-text matching, bi-directional, over 3B rows:

         rows            image      text       match
         0, 2 .. 2B-2    own        own        yes
         1, 3 .. 2B-1    own        hard neg   no
         2B .. 3B-1      hard neg   own        no

        So the two rows that see the same photo are neighbours, and its keys need no copy. found: (2B,), of the images
        and then of the texts, False where there is no negative.
        """

        def rows(own: Tensor, negative: Tensor, alone: Tensor) -> Tensor:
            return torch.cat((torch.stack((own, negative), dim=1).flatten(0, 1), alone))

        image_kv = [(*own, *negative) for own, negative in zip(image_kv, negative_kv, strict=True)]
        text_ids, text_mask = rows(ids, negative_ids, ids), rows(mask, negative_mask, mask)
        query_out = self.qformer.encode_pairs(text_ids, text_mask, image_kv)
        images_found, texts_found = found.chunk(2)
        yes = torch.ones_like(images_found)
        is_match, valid = rows(yes, ~yes, ~yes), rows(yes, texts_found, images_found)
        return itm_loss(self.itm_logits(query_out), is_match, valid, total)

    def _itg(self, batch: Batch, cache: list[Prefix], total: Tensor) -> Tensor:
        """Image-grounded text generation: [DEC] w1 w2 ... behind the cached queries, each predicting the next."""
        ids = batch.text_ids.clone()
        ids[:, 0] = self.qformer.dec_id  # "We also replace the [CLS] token with a new [DEC] token"
        text_out = self.qformer.decode_text(ids, batch.text_mask, cache)
        logits = predict(self.qformer.lm_logits, text_out, batch.label_rows)  # only where there is a next word
        return itg_loss(logits, batch.text_ids.flatten()[batch.label_rows + 1], total)

    # --- stage 2 -----------------------------------------------------------------------------------------------------

    def stage2_losses(self, batch: Batch, totals: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Language modelling of paper 3.3 on one batch: what the frozen language model says of the photos' captions, or
        in fine-tuning of captions behind a prompt and of answers behind their questions.

        Captions alone: with OPT the whole caption; with T5 its second part, given the first (prefix LM). totals: from
        `stage2_totals`, the words of the whole step; by default those of this batch over all processes.
        """
        if totals is None:
            totals = stage2_totals([batch])
        with self.autocast():
            image_kv = self.image_kv(self.tokens_of(batch))
            if self.conditioned:  # the queries see the question too (Figure 7); only they go on
                query_out = self.qformer.encode_pairs(batch.text_ids, batch.text_mask, image_kv)
            else:
                query_out = self.qformer.encode_queries(image_kv)  # (B, Q, D)
        prompt, prompt_mask = self.llm_prompt(query_out, batch.prompt_ids, batch.prompt_mask)
        logits = self.llm(prompt, prompt_mask, batch.target_ids, batch.label_rows)
        return {"lm": lm_loss(logits, batch.target_ids.flatten()[batch.label_rows], totals["lm"])}

    def llm_prompt(self, query_out: Tensor, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Visual embeddings and words (paper Figure 3): (B, Q, D), ids (B, n) and their mask -> (B, Q + n, L), mask."""
        with self.autocast():
            visual = self.llm_proj(query_out)  # (B, Q, L)
        words = self.llm.embed(prompt_ids)
        mask = F.pad(prompt_mask, (visual.shape[1], 0), value=True)  # no visual embedding is ever padding
        return torch.cat((visual.to(words.dtype), words), dim=1), mask

    def check_room(self, prompt_tokens: int, new_tokens: int) -> None:
        """Refuse what is longer than the language model's position table."""
        Q, limit = self.qformer.cfg.num_queries, self.llm.max_positions
        if limit is not None and Q + prompt_tokens + new_tokens > limit:
            raise UserError(
                f"got {Q} visual embeddings, a prompt of {prompt_tokens} tokens and {new_tokens} new ones, expected at "
                f"most {limit}, the positions of {self.sources['llm']}: shorten the prompt, or max_new_tokens"
            )

    # --- the calls a user makes --------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_image(self, images, batch_size: int = 64) -> EncodedImages:
        """Photos (paths, Pillow pictures, uint8 (H, W, 3) arrays, (N, 3, H, W) tensors; one or a list) -> features."""
        if isinstance(images, EncodedImages):
            return images
        if not is_single(images) and not len(images):
            raise UserError("got no photos, expected at least one")
        parts = []
        for pixels in batches_of(images, batch_size):
            if not isinstance(pixels, Tensor):
                pixels = torch.stack([eval_transform(as_picture(picture), self.image_size) for picture in pixels])
            parts.append(self.encode_tokens(self.image_tokens(pixels.to(self.device))))
        return EncodedImages(*map(torch.cat, zip(*parts, strict=True)))

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> EncodedImages:
        """The frozen ViT's tokens (N, P, V), just computed or from a cache -> features."""
        tokens = tokens.to(self.device)
        with self.autocast():
            query_out = self.qformer.encode_queries(self.image_kv(tokens))
            return EncodedImages(tokens, query_out.float(), self.image_feats(query_out))

    @torch.no_grad()
    def encode_text(self, texts, batch_size: int = 256) -> EncodedTexts:
        """Strings (one or a list) -> features. Texts longer than the model's limit are cut."""
        if isinstance(texts, EncodedTexts):
            return texts
        if self.texts is None:
            raise UserError(
                f"{self.sources['vit']} has no text branch to read a text with, as all public checkpoints of stage 2: "
                "open one of stage 1 or for retrieval"
            )
        ids = self.texts.encode([texts] if isinstance(texts, str) else list(texts))
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # so that a batch needs little padding
        cls = torch.empty(len(ids), self.qformer.cfg.width, device=self.device)
        feats = torch.empty(len(ids), self.embed_dim, device=self.device)
        for rows in batches_of(order, batch_size):
            text_ids, text_mask = pad([ids[i] for i in rows], self.texts.pad_id)
            with self.autocast():
                text_cls = self.qformer.encode_text(text_ids.to(self.device), text_mask.to(self.device))
                cls[rows], feats[rows] = text_cls.float(), self.text_feats(text_cls)
        return EncodedTexts(*pad(ids, self.texts.pad_id), cls, feats)

    @torch.no_grad()
    def itc_scores(self, images, texts) -> Tensor:
        """Contrastive similarity of N photos with M texts -> (N, M): the highest cosine over the queries."""
        image_feats, text_feats = self.encode_image(images).feats, self.encode_text(texts).feats
        return itc_similarity(image_feats, text_feats[:0], image_feats[:0], text_feats, torch.ones(()))[0]

    @torch.no_grad()
    def itm_scores(self, images, texts) -> Tensor:
        """Probability that photo n and text m match, for N photos and M texts -> (N, M)."""
        images, texts = self.encode_image(images), self.encode_text(texts)
        N, M = len(images.feats), len(texts.feats)
        logits = self.match_logits(images, texts, torch.arange(N).repeat_interleave(M), torch.arange(M).repeat(N))
        return logits.softmax(dim=1)[:, 1].view(N, M)

    @torch.no_grad()
    def match_logits(
        self, images: EncodedImages, texts: EncodedTexts, image_rows: Tensor, text_rows: Tensor, batch_size: int = 256
    ) -> Tensor:
        """ITM logits (n, 2) of the n pairs (image_rows[i], text_rows[i]); column 1 = match.

        Any pairs, in any order: each photo's keys and values are computed once for all its pairs, and pairs with texts
        of similar length go together.
        """
        logits = torch.empty(len(image_rows), 2, device=self.device)
        for chunk, query_out in self.joint_passes(images, texts.ids, texts.mask, image_rows, text_rows, batch_size):
            with self.autocast():
                logits[chunk] = self.itm_logits(query_out)
        return logits

    def joint_passes(
        self, images: EncodedImages, ids: Tensor, mask: Tensor, image_rows: Tensor, text_rows: Tensor, batch_size: int
    ):
        """The bi-directional pass over the pairs of `match_logits` -> (which of them, their query_out (n, Q, D))."""
        lengths = mask.sum(dim=1)[text_rows]
        for photos in batches_of(torch.unique(image_rows), 32):
            with self.autocast():
                image_kv = self.image_kv(images.tokens[photos].to(self.device))
            pairs = torch.isin(image_rows, photos).nonzero().squeeze(1)
            pairs = pairs[lengths[pairs].argsort()]
            for chunk in batches_of(pairs, batch_size):
                rows = torch.searchsorted(photos, image_rows[chunk]).to(self.device)
                longest = -(-int(lengths[chunk[-1]]) // 8) * 8  # as `pad` rounds
                text, real = (t[text_rows[chunk], :longest].to(self.device) for t in (ids, mask))
                with self.autocast():
                    kv = ((k[rows], v[rows]) for k, v in image_kv)  # copied for one block at a time
                    query_out = self.qformer.encode_pairs(text, real, kv)
                yield chunk.to(self.device), query_out

    def seen_with(self, images: EncodedImages, rows: list[int], questions: list) -> tuple[EncodedImages, list[int]]:
        """What the queries see of the photo of each question: the same for all, or with the question in view (paper
        Figure 7) -> the features, and each question's row in them."""
        if not self.conditioned:
            return images, rows
        last = [question if isinstance(question, str) else question[-1] for question in questions]
        (ids, mask), n = pad(self.texts.encode(last), self.texts.pad_id), len(rows)
        query_out = torch.empty(n, *images.query_out.shape[1:], device=self.device)
        for chunk, out in self.joint_passes(images, ids, mask, torch.tensor(rows), torch.arange(n), 256):
            query_out[chunk] = out.float()
        return images._replace(query_out=query_out), list(range(n))

    @torch.no_grad()
    def caption(
        self,
        images,
        prompt: str | None = None,
        max_new_tokens: int = 30,
        num_beams: int = 5,
        batch_size: int = 64,
        **decoding,
    ):
        """Captions: a string for each photo; for a single photo that is not in a list, its string.

        With a language model, the caption goes on from the prompt, by default the one it was fine-tuned with. Without a
        language model (after stage 1) the Q-Former alone captions (ITG). decoding: see `generate.generate`; with
        num_captions above 1, a list of strings for each photo.
        """
        encoded, several = self.encode_image(images), decoding.get("num_captions", 1) > 1
        decoding = dict(max_new_tokens=max_new_tokens, num_beams=num_beams, min_new_tokens=1) | decoding
        if self.llm is not None:
            rows = list(range(len(encoded.tokens)))
            prompts = [self.prompt if prompt is None else prompt] * len(rows)
            captions = self.write(encoded, rows, prompts, batch_size, **decoding)
        elif prompt:
            raise UserError(f"got the prompt {prompt!r} for a model without a language model: leave it out")
        elif "itg" in self.sources.get("lacks", ()):
            raise UserError(
                "the head that writes captions (ITG) is not trained here, as in runs of other --losses and in all "
                "public checkpoints for retrieval: open one with a language model"
            )
        elif max_new_tokens > self.qformer.cfg.max_positions:
            raise UserError(
                f"got max_new_tokens {max_new_tokens}, expected at most {self.qformer.cfg.max_positions}, as many "
                "as the BERT of the Q-Former has positions"
            )
        else:
            captions = []
            for tokens in batches_of(encoded.tokens, batch_size):
                with self.autocast():
                    decoder = CaptionDecoder(self.qformer, self.image_kv(tokens.to(self.device)), max_new_tokens)
                    groups = generate(decoder, end_id=self.texts.sep_id, **decoding)
                captions += [[self.texts.decode(ids) for ids in group] for group in groups]
        captions = captions if several else [group[0] for group in captions]
        return captions[0] if is_single(images) else captions

    @torch.no_grad()
    def ask(self, images, questions, template: str | None = None, batch_size: int = 64, **decoding):
        """Answers to questions about photos (paper 4.1); each photo is encoded once.

        For one photo: a question, or a list of them -> its answer, or a list. For a list of photos: a question for
        all, or a list with one (or a list of them) for each -> a list of that shape.
        A question is a string, or a conversation: [(question, answer), ..., question]; see `data.ask_in`.
        template: what it is put into, with {} for the question; by default the run's own. "{}" leaves it unchanged,
        so it can be any prompt. decoding: see `generate.generate`; by default `ANSWERS`.
        """
        self.need_llm()
        encoded = self.encode_image(images)
        asked = Asked(questions, None if is_single(images) else len(encoded.tokens))
        prompts = [ask_in(template or self.template, question) for question in asked.questions]
        encoded, rows = self.seen_with(encoded, asked.rows, asked.questions)
        answers = self.write(encoded, rows, prompts, batch_size, **(ANSWERS | decoding))
        several = decoding.get("num_captions", 1) > 1
        return asked.shaped(answers if several else [group[0] for group in answers])

    @torch.no_grad()
    def rank(self, images, questions, candidates: list[str], template: str | None = None, batch_size: int = 256):
        """The candidates in the order of their probability as the answer, for each question: lists of `Ranked`.

        images, questions, template: see `ask`, whose shape the result has. The order is by the summed log-probability;
        the photo and the question run through the language model once for all candidates.
        """
        if not candidates or isinstance(candidates, str):
            raise UserError(f"got the candidates {candidates!r} to rank, expected a list of at least one answer")
        self.need_llm()
        encoded = self.encode_image(images)
        asked = Asked(questions, None if is_single(images) else len(encoded.tokens))
        prompts = [ask_in(template or self.template, question) for question in asked.questions]
        encoded, rows = self.seen_with(encoded, asked.rows, asked.questions)
        total, mean = torch.empty(2, len(prompts), len(candidates))
        for worded in {bool(prompt) for prompt in prompts}:  # behind no words, a text begins in another way
            part = [i for i, prompt in enumerate(prompts) if bool(prompt) == worded]
            of_part = [rows[i] for i in part], [prompts[i] for i in part]
            total[part], mean[part] = self.log_probs(encoded, *of_part, candidates, batch_size)
        ranked = [
            [Ranked(candidates[i], total[row, i].item(), mean[row, i].item()) for i in order]
            for row, order in enumerate(total.argsort(dim=1, descending=True, stable=True).tolist())
        ]
        return asked.shaped(ranked)

    @torch.no_grad()
    def score(self, images, texts, prompt: str = "", batch_size: int = 256) -> Scores:
        """How likely the language model finds M texts, given each of N photos and the prompt: `Scores` of (N, M).

        A photo (and the prompt behind it) runs through the language model once for all texts.
        """
        if not texts:
            raise UserError("got no text to score, expected at least one")
        self.need_llm()
        encoded = self.encode_image(images)
        rows, texts = list(range(len(encoded.tokens))), [texts] if isinstance(texts, str) else list(texts)
        return Scores(*self.log_probs(encoded, rows, [prompt] * len(rows), texts, batch_size))

    def need_llm(self) -> None:
        """Refuse what a model of stage 1 cannot do."""
        if self.llm is None:
            raise UserError("this model has no language model to ask: open a run of stage 2, or train one (--stage 2)")

    def decoders(self, images: EncodedImages, rows: list[int], prompts: list[str], new_tokens: int, batch_size: int):
        """Prompts behind the photos of their rows, in batches of similar length -> (which prompts, their decoder)."""
        ids = self.llm_texts.encode_prompts(prompts)
        self.check_room(max(map(len, ids)), new_tokens)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for part in batches_of(order, batch_size):
            text, mask = pad([ids[i] for i in part], self.llm_texts.pad_id, self.llm.layout.pads, multiple=1)
            query_out = images.query_out[[rows[i] for i in part]].to(self.device)
            prompt, mask = self.llm_prompt(query_out, text.to(self.device), mask.to(self.device))
            yield part, self.llm.decoder_for(prompt, mask, new_tokens)

    def write(
        self,
        images: EncodedImages,
        rows: list[int],
        prompts: list[str],
        batch_size: int,
        max_new_tokens: int,
        **decoding,
    ) -> list[list[str]]:
        """What the language model writes behind each prompt, which stands behind the photo of its row."""
        texts: list[list[str]] = [[] for _ in prompts]
        for part, decoder in self.decoders(images, rows, prompts, max_new_tokens, batch_size):
            groups = generate(decoder, end_id=self.llm_texts.end_id, max_new_tokens=max_new_tokens, **decoding)
            for i, group in zip(part, groups, strict=True):
                texts[i] = [self.llm_texts.decode(ids) for ids in group]
        return texts

    def log_probs(
        self, images: EncodedImages, rows: list[int], prompts: list[str], texts: list[str], batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each of M texts behind each of R prompts, which are all empty or all not: summed and mean
        over its tokens, (R, M)."""
        ids = self.llm_texts.encode_texts(texts, prompts[:1] * len(texts))
        total = torch.empty(len(prompts), len(texts))
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for part, decoder in self.decoders(images, rows, prompts, max(map(len, ids)), batch_size):
            first, R = decoder.start().float().log_softmax(dim=-1), len(part)
            for columns in batches_of(order, max(1, batch_size // R)):
                target, mask = pad([ids[i] for i in columns], self.llm_texts.pad_id, multiple=1)
                target, mask = target.to(self.device), mask.to(self.device)
                said = first[:, target[:, 0]]  # (R, C)
                if target.shape[1] > 1:  # behind each prompt each text, all but its last token
                    logits = decoder.fork(len(columns)).append(target[:, :-1].repeat(R, 1)).float()  # (R * C, T - 1, W)
                    rest = -F.cross_entropy(logits.transpose(1, 2), target[:, 1:].repeat(R, 1), reduction="none")
                    said = said + (rest.view(R, len(columns), -1) * mask[:, 1:]).sum(dim=-1)
                total[torch.tensor(part)[:, None], torch.tensor(columns)] = said.cpu()
        return total, total / torch.tensor([len(tokens) for tokens in ids])


class Asked:
    """Questions about photos in any of the shapes that `Blip2.ask` takes, in a row; and their answers in that shape."""

    def __init__(self, questions, photos: int | None):
        """photos: how many; None for a single one that is not in a list."""
        each = [questions] if photos is None else questions
        if photos is not None and is_question(questions):
            each = [questions] * photos
        if len(each) != (1 if photos is None else photos):
            raise UserError(
                f"got {len(each)} questions for {photos} photos, expected one for all, or one (or a list) for each"
            )
        self.single, self.each = photos is None, each
        groups = [[entry] if is_question(entry) else list(entry) for entry in each]
        if not any(groups):
            raise UserError("got an empty list of questions, expected at least one question")
        self.rows = [row for row, group in enumerate(groups) for _ in group]  # the photo of each question
        self.questions = sum(groups, [])

    def shaped(self, answers: list):
        """An answer for each of `questions` -> as they were asked."""
        left = iter(answers)
        shaped = [next(left) if is_question(entry) else [next(left) for _ in entry] for entry in self.each]
        return shaped[0] if self.single else shaped


def is_question(entry) -> bool:
    """A string, or a conversation: pairs of question and answer, then a question."""
    if isinstance(entry, str) or len(entry) < 2:
        return isinstance(entry, str)
    *past, last = entry
    return isinstance(last, str) and all(isinstance(turn, tuple) and len(turn) == 2 for turn in past)


def is_single(images) -> bool:
    """One picture that is not in a list."""
    return isinstance(images, (str, Path, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4)


def local_device(wanted: str = "auto") -> torch.device:
    """This process's device: "auto" is its CUDA card, else Apple's MPS, else the CPU."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "--device cuda, but PyTorch sees no CUDA card here: pass --device cpu, or install a CUDA build"
            )
        if int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
            raise UserError(
                f"here are {torch.cuda.device_count()} CUDA cards for {os.environ['LOCAL_WORLD_SIZE']} processes: "
                f"pass torchrun --nproc_per_node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(wanted, torch.cuda.current_device()) if wanted == "cuda" else torch.device(wanted)


def choose_precision(device: torch.device, wanted: str = "auto") -> tuple[str, str]:
    """ "fp32", "bf16" or "fp16" for the products on the device, and the reason."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        best = ("bf16", "the card has it") if has_bf16 else ("fp16", "the card has no bf16; with loss scaling")
    elif device.type == "cpu":
        cpuinfo = Path("/proc/cpuinfo")  # elsewhere than on Linux, fp32
        flags = cpuinfo.read_text() if cpuinfo.exists() else ""
        fast = [name for name, flag in (("AMX", "amx_bf16"), ("AVX512-BF16", "avx512_bf16")) if flag in flags]
        best = ("bf16", f"the processor has {fast[0]}") if fast else ("fp32", "the processor has no AMX or AVX512-BF16")
    else:
        best = ("fp32", f"the safe choice on {device.type}")
    if wanted == "auto":
        return best
    if wanted == "fp16" and device.type != "cuda":
        raise UserError(f"--precision fp16 needs a CUDA card, this is {device.type}: pass --precision {best[0]}")
    return wanted, "asked for"


def random_numbers(feats_all: Tensor, generator: torch.Generator | None) -> Tensor:
    """(2, N): for each of the N rows of a comparison a number for the draw of its negative photo, and one for its text.
    A row uses its own, so the draw does not depend on how many processes the rows are spread over."""
    return torch.rand(2, len(feats_all), generator=generator).to(feats_all.device, non_blocking=True)


def draw_negatives(sim_i2t: Tensor, sim_t2i: Tensor, positives: Tensor, uniform: Tensor, hardness: float) -> Negatives:
    """For the text, and for the photo, of each of B rows one of the N others; see `sample_hard_negatives`."""
    images, image_found = sample_hard_negatives(hardness * sim_t2i, positives, uniform[0])
    texts, text_found = sample_hard_negatives(hardness * sim_i2t, positives, uniform[1])
    return Negatives(images, texts, torch.cat((image_found, text_found)))


def rows_of(x: Tensor, wanted: Tensor) -> Tensor:
    """The rows `wanted` (m,) of what `all_gather` would make of x (n, P, V), without gradient."""
    fetched, index = fetch_rows(x, wanted)
    if len(fetched) == 0:
        return x[index]
    foreign = fetched[(index - len(x)).clamp(min=0)]
    return torch.where((index < len(x))[:, None, None], x[index.clamp(max=len(x) - 1)], foreign)


def stage1_totals(batches: list[Batch], together: int = 1) -> dict[str, Tensor]:
    """How many rows or words each loss of one optimizer step counts, over all its micro-batches and processes.

    ITC: the texts (and as many images). ITM: the pairs, without the negatives that cannot be found because what is
    compared, `together` micro-batches at a time, shows one photo only. ITG: the words to predict.
    """
    device, negatives = batches[0].image_ids.device, 0
    for part in batches_of(batches, together):
        ids = torch.cat([batch.image_ids for batch in part])
        negatives += 2 * (ids[:, None] != all_gather(ids)).any(dim=1).sum()
    # torch.full, unlike torch.tensor, does not make the host wait for the device
    rows, words = (
        torch.full((), count, device=device)
        for count in (sum(map(len, batches)), sum(len(b.label_rows) for b in batches))
    )
    itm, itc, itg = all_sum(torch.stack((negatives + rows, rows, words))).unbind()
    return {"itc": itc, "itm": itm, "itg": itg}


def stage2_totals(batches: list[Batch]) -> dict[str, Tensor]:
    """How many words one optimizer step predicts, over all its micro-batches and processes."""
    words = sum(len(batch.label_rows) for batch in batches)
    return {"lm": all_sum(torch.full((), words, device=batches[0].label_rows.device))}


def vit_dtype(precision: str, device: str | torch.device) -> torch.dtype:
    """Of the frozen ViT's weights: half on the way to half-precision products, on CUDA fp16 as in paper 3.4."""
    half = PRECISIONS[precision]
    if half is None:
        return torch.float32
    return torch.float16 if torch.device(device).type == "cuda" else half


def check_image_size(image_size: int, patch: int, what: str) -> None:
    """Refuse a size that patches do not fill."""
    if image_size % patch or image_size < patch:
        raise UserError(
            f"--image-size {image_size} is no multiple of the patch size {patch} of {what}: "
            f"pass --image-size {max(1, round(image_size / patch)) * patch}"
        )


def batches_of(items, size: int):
    """Consecutive parts of a list or tensor; a single picture or string is a list of one."""
    if is_single(items):
        items = [items]
    for start in range(0, len(items), size):
        yield items[start : start + size]


def as_picture(image) -> Image.Image:
    """A path, Pillow picture or uint8 (H, W, 3) array -> RGB picture."""
    if isinstance(image, (str, Path)):
        return open_picture(image)
    return to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))


def relative(spec: str, folder: Path) -> str:
    """A folder or a name:file as it is written from inside `folder`; a bare name stays."""
    name, colon, file = spec.partition(":")
    if colon:
        return f"{name}:{os.path.relpath(file, folder)}"
    return os.path.relpath(spec, folder) if os.path.isdir(spec) else spec


def relocated(spec: str, folder: Path) -> str:
    """The other way round."""
    name, colon, file = spec.partition(":")
    if colon:
        return f"{name}:{os.path.normpath(folder / file)}"
    path = os.path.normpath(folder / spec)
    return path if os.path.isdir(path) or os.sep in spec else spec
