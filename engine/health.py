"""What is unusual in a run, and what people do about it: each is said once, in one sentence."""

from losses import ITM_PRIOR

LONG = 100  # steps that something has to last
CUT_SHARE = 0.05  # of texts that are truncated, from which on it is said again


class Health:
    """Looks at the rows of log.jsonl as they are written."""

    def __init__(self, cfg, temperatures: tuple[float, float]):
        self.cfg, self.temperatures, self.said = cfg, temperatures, set()
        self.lasting: dict[str, int] = {}  # name of a condition -> how many steps it has held

    def unusual(self, rows: list[dict], hardness: float) -> list[str]:
        """Sentences about the rows since the last call; hardness: of ITM's negatives, 0 to 1."""
        cfg, found, (low, high) = self.cfg, {}, self.temperatures
        for row in rows:
            held = {"clip": row["norm"] > 10 * cfg.clip, "wait": row["waited"] > 0.3}
            held["cold"] = not 1.01 * low < row["temperature"] < 0.99 * high
            held["prior"] = row["step"] > max(cfg.warmup, cfg.steps // 5) and abs(row.get("itm", 0) - ITM_PRIOR) < 0.02
            self.lasting = {name: (self.lasting.get(name, 0) + 1) * holds for name, holds in held.items()}
            found |= {name: row for name, steps in self.lasting.items() if steps >= LONG}
        last, cut = rows[-1], sum(row["truncated"] for row in rows) / len(rows)
        longer = f"{max(cut, 0.0001):.2%} of the texts reach --max-text-tokens {cfg.max_text_tokens} and are cut: "
        sentences = {
            "cut": longer + "pass a larger one if their ends matter" if cut else "",
            "cut much": longer + "pass a larger one, or shorten them" if cut > CUT_SHARE else "",
            "clip": f"the gradient was clipped to less than a tenth in each of the last {LONG} steps (norm "
            f"{last['norm']:.0f}, --clip {cfg.clip:g}): harmless if the losses fall, else lower --lr",
            "cold": f"the temperature has been at its bound, {last['temperature']:.3f}, for {LONG} steps: embeddings "
            "collapse, or match perfectly; people lower --lr, or look for captions that many images share",
            "prior": f"ITM has predicted no more than the prior, one match in three, for {LONG} steps, at hardness "
            f"{hardness:.0%}: usual early; if it stays, more --steps, or a longer --negatives-ramp",
            "wait": f"the steps wait for images {last['waited']:.0%} of their time: pass more --workers, store smaller "
            "images, or pass --cache-features",
        }
        new = [name for name, text in sentences.items() if text and name not in self.said and self.is_due(name, found)]
        self.said |= set(new)
        return [f"  note: {sentences[name]}" for name in new if not (name == "cut" and "cut much" in new)]

    def is_due(self, name: str, found: dict) -> bool:
        """Has it lasted, or need it not last?"""
        return name in found or name.startswith("cut")
