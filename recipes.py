"""Recipes: the paper's hyperparameters as one visible table, those of the shapes world, and those for small data."""

from engine.distributed import world_size
from llm import T5Config

STAGES = ("1", "2", "caption", "vqa", "retrieval")
WITH_LLM = ("2", "caption", "vqa")
FINE_TUNING = ("caption", "vqa", "retrieval")
CONTRASTIVE = ("1", "retrieval")

# Paper 3.4 gives stage 1 no minimal rate and no clipping; 1e-5 is LAVIS's, whose stage 1 clips nothing, warms up for
# 5,000 steps and takes beta2 0.999.
PAPER_SIZES = dict(dropout=0.1, image_size=224, queries=32, embed_dim=256)
TINY_SIZES = dict(dropout=0.0, image_size=64, queries=8, embed_dim=64)
ADAMW = dict(beta2=0.98, weight_decay=0.05, clip=1.0)
STAGE1 = dict(steps=250_000, lr=1e-4, min_lr=1e-5, warmup=2000, negatives_ramp=0, eval_every=5000, save_every=5000,
              **ADAMW, **PAPER_SIZES)  # fmt: skip
# With few images a run has no time for negatives that are too hard at first, and few passes, so that dropout only slows
# it down (docs/own-images.md has the measurements); what is new needs a high rate, which would make BERT forget its
# language. `fit_to` adds what depends on the number of images.
SMALL = PAPER_SIZES | ADAMW | dict(lr=3e-4, min_lr=1e-5, dropout=0.0)
SMALL_TUNING = ADAMW | dict(lr=3e-4, min_lr=1e-5, freeze_vit=True, vit_lr_decay=1.0, grad_checkpointing=False)
SMALL_DATA, CACHED_IMAGES = 50_000, 20_000  # fewer images than this are "small"; up to this their tokens are cached
BY_NUMBER = ("steps", "batch", "warmup", "negatives_ramp", "eval_every", "save_every", "val_photos", "cache_features")
# Stage 2 of the paper; LAVIS takes batches of 1,024, beta2 0.999 and a minimal rate of 1e-5.
STAGE2 = dict(lr=1e-4, min_lr=5e-5, warmup=2000, eval_every=5000, save_every=5000, **ADAMW, **PAPER_SIZES)
# Fine-tuning on COCO (Table 7), on VQAv2 and Visual Genome (Table 8), on COCO (Table 9). The paper fine-tunes no
# FlanT5-XXL; it takes FlanT5-XL's column here. The minimal rate 0 is LAVIS's.
TUNING = dict(warmup=1000, lr=1e-5, min_lr=0.0, beta2=0.999, weight_decay=0.05, clip=1.0, grad_checkpointing=True,
              eval_every=2000, save_every=2000)  # fmt: skip
CAPTION = dict(batch=256, image_size=364, prompt="a photo of", epochs=5, **TUNING)
VQA = dict(batch=128, image_size=490, template="Question: {} Answer:", epochs=5, **TUNING)
RETRIEVAL = dict(batch=224, image_size=364, negatives_ramp=0, epochs=5, **TUNING)
TINY_TUNING = TUNING | dict(steps=800, batch=32, lr=1e-4, warmup=50, image_size=64, vit_lr_decay=0.8,
                            grad_checkpointing=False, eval_every=400, save_every=800)  # fmt: skip
RECIPES = {
    "stage 1, paper, ViT-L": dict(batch=2320, **STAGE1),
    "stage 1, paper, ViT-g": dict(batch=1680, **STAGE1),
    # For the shapes world over the tiny encoders: a few minutes on two CPU cores. A run this short has no time to lose
    # on negatives that are too hard at first.
    "stage 1, tiny": dict(steps=1890, batch=32, lr=1e-3, min_lr=1e-5, warmup=90, negatives_ramp=600,
                          eval_every=945, save_every=945, **ADAMW, **TINY_SIZES),
    "stage 1, small": SMALL | dict(lr=8e-4, bert_lr=0.2),
    "stage 2, paper, OPT": dict(steps=80_000, batch=1920, **STAGE2),
    "stage 2, paper, T5": dict(steps=80_000, batch=1520, **STAGE2),
    "stage 2, tiny": dict(steps=2500, batch=32, lr=1e-3, min_lr=1e-5, warmup=75, eval_every=500, save_every=2500,
                          **ADAMW, **TINY_SIZES),
    "stage 2, small": SMALL | dict(dropout=0.1, grad_checkpointing=False),
    "caption, paper, FlanT5": dict(**CAPTION, vit_lr_decay=1.0),
    "caption, paper, OPT-2.7B": dict(**CAPTION, vit_lr_decay=1.0),
    "caption, paper, OPT-6.7B": dict(**CAPTION, vit_lr_decay=0.95),
    "vqa, paper, FlanT5": dict(**VQA, vit_lr_decay=0.95),
    "vqa, paper, OPT-2.7B": dict(**VQA, vit_lr_decay=0.95),
    "vqa, paper, OPT-6.7B": dict(**VQA, vit_lr_decay=0.9),
    "retrieval, paper, ViT-L": RETRIEVAL | dict(lr=5e-6, beta2=0.98, vit_lr_decay=1.0),
    "retrieval, paper, ViT-g": dict(**RETRIEVAL, vit_lr_decay=0.95),
    "caption, small": SMALL_TUNING | dict(prompt="a photo of"),
    "vqa, small": SMALL_TUNING,
    "retrieval, small": SMALL_TUNING | dict(lr=2e-4, negatives_ramp=0),
    # The tiny language model has never seen "a photo of".
    "caption, tiny": TINY_TUNING | dict(steps=1600, lr=3e-4, prompt=""),
    "vqa, tiny": TINY_TUNING,
    "retrieval, tiny": TINY_TUNING | dict(lr=3e-4, negatives_ramp=0),
}  # fmt: skip


def recipe_values(stage: str, name: str) -> str:
    """What the recipes of a stage say of a flag, for --help."""
    prefix = ("" if stage in FINE_TUNING else "stage ") + stage + ", "
    values: dict[str, str] = {}  # shown value -> the recipes that have it
    for recipe, row in RECIPES.items():
        if recipe.startswith(prefix):
            size = recipe.removeprefix(prefix).split(",")[0]
            by_number = "by the number of images" if size == "small" and name in BY_NUMBER else None
            value = row.get(name, by_number)
            if value is not None and size not in values.get(f"{value}", ""):
                values[f"{value}"] = " and ".join(filter(None, (values.get(f"{value}"), size)))
    return "; ".join(f"{who} {value}" if len(values) > 1 else value for value, who in values.items())


def paper_column(stage: str, llm) -> str:
    """The column of the paper's tables that is nearest to the language model."""
    if stage == "2":
        return ", T5" if isinstance(llm, T5Config) else ", OPT"
    return ", FlanT5" if isinstance(llm, T5Config) else ", OPT-6.7B" if llm.width >= 4096 else ", OPT-2.7B"


# --- small data -------------------------------------------------------------------------------------------------------


def fit_to(images: int, cfg, given: set[str]) -> tuple[dict, list[str]]:
    """What the recipes for small data take from the number of images, and why.

    Measured on Flickr8k (docs/own-images.md): with 450 images retrieval stops improving after some 28 passes; 850 steps
    take 20 minutes of two CPU cores.
    """
    held_out = cfg.val_photos if "val_photos" in given else 0 if cfg.val_data else min(200, images // 10)
    train, ranks = max(1, images - held_out), world_size()
    batch = cfg.batch if "batch" in given else min(32, 1 << (train.bit_length() - 1))
    batch = -(-batch // ranks) * ranks
    steps = max(1, round(max(min(28 * train / batch, 850), 4 * train / batch)))
    frozen = cfg.stage not in FINE_TUNING or "freeze_vit" not in given or cfg.freeze_vit
    every = -(-steps // 4)
    row = dict(steps=steps, batch=batch, warmup=steps // 16, eval_every=every, save_every=every, val_photos=held_out)
    row |= dict(negatives_ramp=steps * 4 // 5) if cfg.stage == "1" else {}
    row["cache_features"] = frozen and images <= CACHED_IMAGES
    reasons = [
        f"  {steps} steps of {batch} show each of {train:,} images {steps * batch / train:.0f} times; that, lr and "
    ]
    reasons[0] += "warm-up are what did best in docs/own-images.md"
    if held_out:
        reasons.append(f"  {held_out} images are held out to validate on (--val-photos, or --val-data FILE)")
    if row["cache_features"]:
        reasons.append("  the ViT runs once per image; --no-cache-features shows crops instead, slower, better if long")
    if train < 200:
        reasons.append(f"  {train} images teach next to nothing: expect recall near chance; some 500 show a beginning")
    return row, reasons


def scaled(recipe: dict, cfg, given: set[str], texts: int, reasons: list[str]) -> dict:
    """The number of steps, and if it is not the recipe's, what is counted in steps, scaled; adds the reason."""
    batch = cfg.batch if "batch" in given else recipe["batch"]
    planned = recipe.get("steps") or max(1, round(recipe["epochs"] * texts / batch))
    steps = cfg.steps if "steps" in given else planned
    epochs = cfg.epochs if "epochs" in given else recipe.get("epochs") if "steps" not in given else None
    if epochs:
        steps = max(1, round(epochs * texts / batch))
        shown = "questions" if cfg.stage == "vqa" else "captions"
        reasons.append(f"  {epochs:g} epochs of {texts:,} {shown} are {steps:,} steps")
    row = {"steps": steps, "epochs": epochs}
    if given & {"steps", "epochs"} and steps != planned:
        counted = ("warmup", "negatives_ramp", "eval_every", "save_every")
        fewer = {
            name: -(-recipe[name] * steps // planned) for name in counted if recipe.get(name) and name not in given
        }
        reasons.append(f"  scaled to {steps:,} steps: " + ", ".join(f"{name} {value}" for name, value in fewer.items()))
        row |= fewer
    return row
