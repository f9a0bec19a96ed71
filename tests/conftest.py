"""What several tests need: small models with non-trivial weights, batches, finished runs, a pool of ranks."""

import json
import os
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared"  # real photos and weights; tests that use them skip where they are absent

import train  # noqa: E402
from blip2 import Blip2  # noqa: E402
from data import Batch, qformer_batch  # noqa: E402
from engine import distributed  # noqa: E402
from llm import Llama, LlamaConfig, RMSNorm  # noqa: E402
from qformer import QFormer, QFormerConfig  # noqa: E402
from sources import shapes  # noqa: E402
from vit import ViT, ViTConfig  # noqa: E402
from weights.configs import LLAMA_FIELDS, write_fields  # noqa: E402
from weights.load import unload  # noqa: E402
from weights.tables import LLAMA_TABLE  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: a second thread would only wait for the first

TINY = ["--vit", str(ROOT / "assets/tiny/vit"), "--bert", str(ROOT / "assets/tiny/bert")]
LLMS = {"opt": "assets/tiny/opt", "t5": "assets/tiny/t5"}


def pytest_configure(config):
    """A GPU is for `pytest -m cuda`; all other tests run on the CPU, and compare ranks that would need a GPU each."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True, scope="session")
def signals_are_heard():
    """Also where the tests run in the background, or under nohup."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def same_place_and_seed(monkeypatch):
    """Tests run from the project's folder, without network, from a fixed seed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)


def shrink_test_split(monkeypatch) -> None:
    """40 of the shapes world's 1,000 test images, of each kind: a training that ends with its evaluation takes a
    second."""
    monkeypatch.setitem(shapes.SPLITS, "test", 40)
    for subset, size in shapes.TEST_SUBSETS.items():
        monkeypatch.setitem(shapes.TEST_SUBSETS, subset, size // 25)


@pytest.fixture
def few_test_images(monkeypatch):
    """See `shrink_test_split`."""
    shrink_test_split(monkeypatch)


def shared(path: str) -> Path:
    """A file of real data; the test is skipped where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"no {path} beside the project (it is expected in ../shared)")
    return found


# --- small models ----------------------------------------------------------------------------------------------------


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


def small_model(seed: int = 0, tokenizer=None, **sizes) -> Blip2:
    """A whole stage-1 model over a ViT of two blocks, in eval mode (no dropout)."""
    torch.manual_seed(seed)
    vit = roughen(ViT(ViTConfig(10, depth=2, heads=2, mlp=20, patch_size=4, image_size=8, key_bias=False)), seed)
    return roughen(Blip2(vit, small_qformer(seed, **sizes), tokenizer, image_size=8, embed_dim=6), seed).eval()


def stage2_model(kind: str, seed: int = 0, **sizes) -> Blip2:
    """A small model with the tiny OPT or T5, or another language model's folder; images of 8 x 8 pixels."""
    model = small_model(seed, **sizes)
    model.attach_llm(LLMS.get(kind, kind))
    roughen(model.llm_proj, seed)
    return model.eval()


def random_batch(count: int, seed: int = 0, image_ids: list[int] | None = None, vocab: int = 29) -> Batch:
    """Images of noise with texts of random words and lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    ids = [[2, *torch.randint(5, vocab, (n - 2,), generator=generator).tolist(), 3] for n in lengths]
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return qformer_batch(ids, 0, image_ids or list(range(count)), images=images)


def part_of(batch: Batch, rows: range) -> Batch:
    """Some rows of a stage-1 batch, padded to their own longest text."""
    ids = [batch.text_ids[row][batch.text_mask[row]].tolist() for row in rows]
    image_ids = batch.image_ids[rows.start : rows.stop].tolist()
    return qformer_batch(ids, 0, image_ids, images=batch.images[rows.start : rows.stop])


@pytest.fixture(scope="session")
def llm_specs(tmp_path_factory) -> dict[str, str]:
    """Folders of small language models: of LLMS, and of two random Llamas with OPT's tokenizer."""
    specs = dict(LLMS)
    for name, tied in (("llama", True), ("llama-untied", False)):
        sizes = dict(vocab_size=438, width=128, depth=2, heads=4, kv_heads=2, head_width=32, mlp=192, tied=tied)
        torch.manual_seed(0)
        llm, folder = Llama(LlamaConfig(**sizes)), tmp_path_factory.mktemp(name)
        llm.init_weights()
        for norm in filter(lambda module: isinstance(module, RMSNorm), llm.modules()):
            roughen(norm)
        save_file(unload(llm, LLAMA_TABLE), folder / "model.safetensors")
        shutil.copy(ROOT / LLMS["opt"] / "tokenizer.json", folder)
        config = {"model_type": "llama", "eos_token_id": 2} | write_fields(LLAMA_FIELDS, llm.cfg)
        (folder / "config.json").write_text(json.dumps(config | {"rope_theta": llm.cfg.rope_theta}))
        specs[name] = str(folder)
    return specs


# --- finished runs: trained once per session, read-only; a test that changes one copies it ----------------------------

FEW_STEPS = ["--steps", "4", "--batch", "4", "--save-every", "2", "--eval-every", "0", "--precision", "fp32"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """trained(name, *flags) -> the folder of a run with these flags."""
    runs: dict[tuple, Path] = {}

    def run(name: str, *flags: str) -> Path:
        if flags not in runs:
            out = tmp_path_factory.mktemp(name) / name
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.chdir(ROOT)
                shrink_test_split(monkeypatch)
                train.main([*flags, *FEW_STEPS, "--out", str(out)])
            runs[flags] = out
        return runs[flags]

    return run


@pytest.fixture(scope="session")
def stage1_run(trained) -> Path:
    """A run of stage 1 over the shapes world, 4 steps."""
    return trained("stage1", *TINY, "--queries", "4")


@pytest.fixture(scope="session")
def stage2_run(trained, stage1_run) -> Path:
    """A run of stage 2 with OPT."""
    return trained("stage2", "--stage", "2", "--init", str(stage1_run))


@pytest.fixture(scope="session")
def vqa_run(trained, stage2_run) -> Path:
    """A run fine-tuned for VQA, with the ViT trained and the question in the Q-Former."""
    return trained("vqa", "--stage", "vqa", "--init", str(stage2_run))


@pytest.fixture(scope="session")
def retrieval_run(trained, stage1_run) -> Path:
    """A run fine-tuned for retrieval, with the ViT trained."""
    return trained("retrieval", "--stage", "retrieval", "--init", str(stage1_run))


def copy_of(run: Path, folder: Path) -> Path:
    """A copy of a finished run, to be changed; as deep in the same file system, so that its paths stay valid."""
    return Path(shutil.copytree(run, Path(str(run) + f"-{folder.name}")))


# --- several ranks ---------------------------------------------------------------------------------------------------


class RankPool:
    """Processes that are started once and joined by gloo anew for each job. (They have no children: --workers 0.)"""

    def __init__(self):
        self.workers: list[tuple] = []

    def __call__(self, processes: int, function, *args) -> None:
        """Run function(rank, *args) on as many ranks; fails if one of them fails."""
        context = torch.multiprocessing.get_context("spawn")
        while len(self.workers) < processes:
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs,), daemon=True)
            worker.start()
            self.workers.append((worker, ours))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        splits = dict(shapes.SPLITS), dict(shapes.TEST_SUBSETS)
        for rank, (_, pipe) in enumerate(self.workers[:processes]):
            pipe.send((rank, processes, port, splits, function, args))
        for rank, (_, pipe) in enumerate(self.workers[:processes]):
            error = pipe.recv() if pipe.poll(120) else "no answer within 120 s"
            if error:
                self.close()  # the others may wait for this one for ever
                pytest.fail(f"rank {rank}: {error}", pytrace=False)

    def close(self) -> None:
        """End all processes."""
        for worker, _ in self.workers:
            worker.kill()
        self.workers = []


def _work(pipe) -> None:
    """What a worker does until it is killed."""
    os.chdir(ROOT)
    while True:
        rank, processes, port, splits, function, args = pipe.recv()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        shapes.SPLITS |= splits[0]
        shapes.TEST_SUBSETS |= splits[1]
        torch.set_num_threads(1)
        torch.manual_seed(0)
        try:
            distributed.start_processes()
            function(rank, *args)
            distributed.barrier()
            distributed.leave_processes()
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())


@pytest.fixture(scope="session")
def ranks():
    """ranks(2, function, *args) runs function(rank, *args) on two gloo processes."""
    pool = RankPool()
    yield pool
    pool.close()
