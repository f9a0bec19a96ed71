"""What several tests need: small models with every weight non-trivial, and batches to feed them."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"  # real photos and weights, where they are; tests that use them skip where not

import shapes  # noqa: E402
from blip2 import Blip2  # noqa: E402
from data import make_batch  # noqa: E402
from qformer import QFormer, QFormerConfig  # noqa: E402
from vit import ViT, ViTConfig  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: a second thread would only wait for the first

TINY = ["--vit", str(ROOT / "assets/tiny/vit"), "--bert", str(ROOT / "assets/tiny/bert")]


def pytest_configure(config):
    """A card is for `pytest -m cuda`; all else is about the processor, and compares processes of which each would need
    a card of its own."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def same_place_and_seed(monkeypatch):
    """Tests run from the project's folder, without network, from a fixed seed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)


@pytest.fixture
def few_test_pictures(monkeypatch):
    """100 of the shapes world's 1,000, of each kind: a training that ends with its evaluation takes seconds."""
    monkeypatch.setitem(shapes.SPLITS, "test", 100)
    for subset, size in shapes.TEST_SUBSETS.items():
        monkeypatch.setitem(shapes.TEST_SUBSETS, subset, size // 10)


def roughen(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter a little random, so that no bias is 0, no norm is 1 and no copy equals its original."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def small_qformer(seed: int = 0, **sizes) -> QFormer:
    """A Q-Former of three blocks, in eval mode."""
    sizes = (
        dict(vocab_size=30, width=16, depth=3, heads=4, mlp=24, max_positions=20, num_queries=3, image_width=10) | sizes
    )
    torch.manual_seed(seed)
    return roughen(QFormer(QFormerConfig(**sizes)), seed).eval()


def small_model(seed: int = 0, texts=None, **sizes) -> Blip2:
    """A whole stage-1 model over a ViT of two blocks, in eval mode (no dropout)."""
    torch.manual_seed(seed)
    vit = roughen(ViT(ViTConfig(10, depth=2, heads=2, mlp=20, patch_size=4, image_size=8, key_bias=False)), seed)
    return roughen(Blip2(vit, small_qformer(seed, **sizes), texts, image_size=8, embed_dim=6), seed).eval()


LLMS = {"opt": "assets/tiny/opt", "t5": "assets/tiny/t5"}


def stage2_model(kind: str, seed: int = 0, **sizes) -> Blip2:
    """A small model in front of the tiny OPT or T5; pictures of 8 x 8 pixels."""
    model = small_model(seed, **sizes)
    model.attach_llm(LLMS[kind])
    roughen(model.llm_proj, seed)
    return model.eval()


def random_batch(count: int, seed: int = 0, image_ids: list[int] | None = None, vocab: int = 29):
    """Pictures of noise with texts of random words and lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    ids = [[2, *torch.randint(5, vocab, (n - 2,), generator=generator).tolist(), 3] for n in lengths]
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return make_batch(ids, 0, image_ids or list(range(count)), images=images)


def shared(path: str) -> Path:
    """A file of real data; the test is skipped where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"no {path} beside the project (it is expected in ../shared)")
    return found


def run_many(processes: int, function, *args) -> None:
    """Run function(rank, *args) on several processes joined by gloo; fails if one fails."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.start_processes(
        _join_and_run, (processes, port, function, args), processes, join=False, start_method="spawn"
    )
    while not context.join(timeout=120):
        pass


def _join_and_run(rank: int, processes: int, port: int, function, args) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import losses

    torch.set_num_threads(1)
    losses.start_processes()
    function(rank, *args)
    losses.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # now and then one of gloo's threads outlives its group, and aborts an interpreter that shuts down
