"""A language model of one's own behind the queries: GPT-2, of which the code knows nothing.

    python -m docs.examples.own_llm train.py --stage 2 --init runs/stage1 --llm W/gpt2 --data photos.json
    python -m docs.examples.own_llm eval.py ask --checkpoint runs/stage2 --image photo.jpg

A class, the names of its weights, its config.json and an entry of `LLMS`; then train.py and eval.py run as always.
`CausalLM` brings padding, cache, beams and `rank`; what a model of another kind has to offer: llm.py.
"""

import sys

import torch.nn.functional as F
from torch import Tensor, nn

import eval as evaluation
import train
from engine.errors import run_command
from llm import CausalLM, OPTBlock, OPTConfig
from weights.configs import LLMS, LLMFamily
from weights.tables import IDENTITY, Row, Table, Transform


class Block(OPTBlock):
    """OPT's, with GELU. (One of your own writes its keys and values into the cache, as that does.)"""

    def forward(self, x: Tensor, mask: Tensor, cache=None) -> Tensor:
        x = x + self.self_attention(self.ln_1(x), mask, cache)
        return x + self.fc2(F.gelu(self.fc1(self.ln_2(x)), approximate="tanh"))


class GPT2(CausalLM):
    """[visual] prompt text <|endoftext|>: the format "plain", whose end token is read from the folder."""

    prompt_format, presets, fits_fp16 = None, {}, True

    def __init__(self, cfg: OPTConfig):
        super().__init__(cfg)
        self.width, self.kv_size = cfg.width, (cfg.heads, cfg.width // cfg.heads)
        self.word_embedding, self.positions = (nn.Embedding(n, cfg.width) for n in (cfg.vocab_size, cfg.max_positions))
        self.ln_final, self.blocks = nn.LayerNorm(cfg.width), nn.ModuleList(Block(cfg, i) for i in range(cfg.depth))

    def run(self, x: Tensor, positions: Tensor, mask: Tensor, cache=None) -> Tensor:
        return self.run_blocks(x + self.positions(positions.clamp(min=0)), mask, cache=cache)  # -1 is padding

    def logits(self, x: Tensor) -> Tensor:
        return self.ln_final(x) @ self.word_embedding.weight.T


NAMES = {"wte": "word_embedding", "wpe": "positions", "ln_f": "ln_final", "h.{}.ln_1": "blocks.{}.ln_1"}
NAMES |= {"h.{}.attn.c_attn": "blocks.{}.qkv", "h.{}.attn.c_proj": "blocks.{}.proj", "h.{}.ln_2": "blocks.{}.ln_2"}
NAMES |= {"h.{}.mlp.c_fc": "blocks.{}.fc1", "h.{}.mlp.c_proj": "blocks.{}.fc2"}
HOW = {old: Transform(Tensor.t) if ".c_" in old else IDENTITY for old in NAMES}  # it stores (in, out)
ROWS = [Row((f"{old}.{kind}",), f"{new}.{kind}", HOW[old]) for old, new in NAMES.items() for kind in ("weight", "bias")]
IGNORED = {r"h\.\d+\.attn\.(masked_)?bias": "masks, which are computed", r"lm_head\.weight": "the word embedding"}
TABLE = Table(ROWS, IGNORED, renames={r"^transformer\.": ""})
SIZES = ("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "n_positions")  # n_inner may be null
LLMS["gpt2"] = LLMFamily(GPT2, lambda config, _: OPTConfig(*(config[k] or 4 * config["n_embd"] for k in SIZES)), TABLE)

if __name__ == "__main__":
    sys.exit(run_command(lambda: {"train.py": train.main, "eval.py": evaluation.main}[sys.argv[1]](sys.argv[2:])))
