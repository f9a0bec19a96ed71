"""How long a public checkpoint of real size takes to open, and how much memory: here and in transformers.

    python tests/real_size.py FOLDER TOKENIZER_FOLDER     for example .../blip2-opt-2.7b and facebook/opt-2.7b

Where FOLDER does not exist it is made, with the keys, shapes and shards of Salesforce/blip2-opt-2.7b and random fp16
values (7.8 GB; the tokenizer's files are copied). Each side opens it in bf16 in a process of its own and captions one
photo by 5 beams. Memory is what no file backs (RssAnon + RssShmem), sampled every 10 ms, beside the largest RSS.
"""

import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def make(folder: Path, tokenizer: Path) -> None:
    """The folder, shard by shard."""
    import transformers

    import weights
    from llm import PRESETS

    cfg = PRESETS["opt-2.7b"]
    text = dict(model_type="opt", vocab_size=50304, hidden_size=cfg.width, num_hidden_layers=cfg.depth, ffn_dim=cfg.mlp,
                num_attention_heads=cfg.heads, word_embed_proj_dim=cfg.width, eos_token_id=50118)  # fmt: skip
    config = transformers.Blip2Config(text_config=text, image_token_index=50265, dtype="float16")
    with torch.device("meta"):
        shapes = {
            key: tensor.shape for key, tensor in transformers.Blip2ForConditionalGeneration(config).state_dict().items()
        }
    shapes.pop("language_model.lm_head.weight")  # tied
    folder.mkdir(parents=True)
    for path in tokenizer.iterdir():
        shutil.copy(path, folder)
    config.architectures = ["Blip2ForConditionalGeneration"]
    config.save_pretrained(folder)
    torch.manual_seed(0)
    weights.write_shards(folder, {key: random(key, shape) for key, shape in shapes.items()}, torch.float16)


def random(key: str, shape: torch.Size) -> torch.Tensor:
    """Small values around 0, around 1 for the scale of a norm."""
    tensor = torch.empty(shape, dtype=torch.float16).normal_(0, 0.02)
    return tensor + 1 if "norm" in key.lower() and key.endswith("weight") else tensor


def private_bytes() -> int:
    """What no file backs."""
    status = Path("/proc/self/status").read_text()
    rows = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return sum(int(rows[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


class Sampled:
    """The peak of `private_bytes` over what is done inside."""

    def __enter__(self):
        self.peak, self.going = 0, True
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self):
        while self.going:
            self.peak = max(self.peak, private_bytes())
            time.sleep(0.01)

    def __exit__(self, *_):
        self.going = False
        self.thread.join()


def measure(side: str, folder: str) -> dict:
    """Open and caption, in this process."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    if side == "transformers":
        import transformers
    else:
        from blip2 import Blip2
    torch.set_num_threads(2)
    before, started = private_bytes(), time.time()
    with Sampled() as loading:
        if side == "transformers":
            model = transformers.Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
        else:
            model = Blip2.from_pretrained(folder, precision="bf16")
    loaded = time.time()
    with Sampled() as captioning, torch.no_grad():
        if side == "transformers":
            size = {"height": 224, "width": 224}
            pixels = transformers.BlipImageProcessor(size=size)(photo, return_tensors="pt")["pixel_values"]
            model.generate(pixel_values=pixels.bfloat16(), num_beams=5, max_new_tokens=20, min_new_tokens=20)
        else:
            model.caption(photo, num_beams=5, max_new_tokens=20, min_new_tokens=20)
    return {
        "load s": loaded - started,
        "caption s": time.time() - loaded,
        "private GB before": before / 1e9,
        "private GB, peak of loading": loading.peak / 1e9,
        "private GB, peak of captioning": captioning.peak / 1e9,
        "largest RSS GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


if __name__ == "__main__":
    if sys.argv[1] in ("here", "transformers"):
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        checkpoint, tokens = map(Path, sys.argv[1:])
        if not checkpoint.exists():
            make(checkpoint, tokens)
        size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) / 1e9
        print(f"{checkpoint}: {size:.2f} GB in {len(list(checkpoint.glob('*.safetensors')))} files")
        for name in ("here", "transformers", "here", "transformers"):
            done = subprocess.run([sys.executable, __file__, name, str(checkpoint)], capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.stderr[-500:]}
            print(
                name, {key: round(value, 2) if key != "failed" else value for key, value in found.items()}, flush=True
            )
