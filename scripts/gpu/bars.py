"""The bars of the GPU path, reckoned from what the parts of measure.py gave.

A part that is missing leaves its bar open, and a fault in one bar is that bar's text: none keeps the others from being shown.
"""

import math
import operator
import re
from dataclasses import dataclass
from typing import Callable

# Of the random 7B weights in bf16.
WEIGHT_BYTES = 13.5e9


def number(value: object) -> float | None:
    """What can be reckoned with."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if plain else None


def ratio(a: object, b: object) -> float | None:
    """None where either is missing, no number, or not above zero: nothing that is measured here is."""
    a, b = number(a), number(b)
    return None if a is None or b is None or a <= 0 or b <= 0 else a / b


@dataclass
class Reached:
    """A bar's value, how it came about, and why it does not count where it does not."""

    value: float | None
    note: str = ""
    void: str = ""


class Run:
    """What the parts printed. What is not there is empty or None."""

    def __init__(self, parts: dict) -> None:
        self.parts = parts

    def result(self, part: str) -> object:
        return (self.parts.get(part) or {}).get("result")

    def list_of(self, part: str, key: str) -> list[dict]:
        found = self.result(part)
        rows = found.get(key) if isinstance(found, dict) else None
        return [row for row in rows or [] if isinstance(row, dict)]

    def rates(self, part: str, strategy: str, unit: str, cost: bool = False) -> list[float]:
        """Of each run, in their order; planned by costs or not."""
        rows = self.list_of(part, "strategies")
        of_it = [row for row in rows if row.get("strategy") == strategy and bool(row.get("cost_model")) == cost]
        return [value for row in of_it if (value := number(row.get(unit))) is not None and value > 0]

    def fastest(self, part: str, strategy: str, unit: str = "samples_per_s") -> float | None:
        return max(self.rates(part, strategy, unit), default=None)

    def steps(self, part: str, batch_size: int, context: int = 128) -> list[float]:
        """Milliseconds of each measurement of a decode step."""
        points = self.list_of(part, "points")
        found = [p for p in points if (p.get("batch_size"), p.get("context")) == (batch_size, context)]
        return [ms for p in found if (ms := number(p.get("step_ms"))) is not None and ms > 0]

    def line(self, part: str) -> dict:
        """The last line of those that a script printed."""
        found = self.result(part)
        last = found[-1] if isinstance(found, list) and found else found
        return last if isinstance(last, dict) else {}


def short(value: float) -> str:
    """Four digits, or all of a large number."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def list_text(values: list[float], unit: str) -> str:
    return f"{', '.join(map(short, values))} {unit}" if values else ""


def step(part: str) -> Callable[[Run], Reached]:
    """A step of 16 rows against reading the weights at the rate of the median copy: the least of its measurements, since what
    else a machine does only adds."""

    def reached(run: Run) -> Reached:
        floor = ratio(WEIGHT_BYTES / 1e9, run.line("copy_rate").get("tb_per_s"))
        steps = run.steps(part, 16)
        note = f"least of {list_text(steps, 'ms')}; weights {floor:.3g} ms" if steps and floor else ""
        return Reached(ratio(min(steps, default=None), floor), note)

    return reached


def many_rows(run: Run) -> Reached:
    """Tokens per second of the fastest step of 256 rows."""
    steps = run.steps("profile", 256)
    return Reached(ratio(256e3, min(steps, default=None)), list_text(steps, "ms"))


def against_vanilla(part: str, strategy: str = "continuous", cost: bool = False) -> Callable[[Run], Reached]:
    """Requests per second of the fastest run against those of static batches of 16."""

    def reached(run: Run) -> Reached:
        rates = run.rates(part, strategy, "samples_per_s", cost)
        vanilla = run.fastest("vanilla", "vanilla")
        note = f"{list_text(rates, 'requests/s')} against {short(vanilla)}" if rates and vanilla else ""
        return Reached(ratio(max(rates, default=None), vanilla), note)

    return reached


def against_generate(strategy: str) -> Callable[[Run], Reached]:
    """Tokens per second against transformers' `generate` in static batches, on the same requests."""

    def reached(run: Run) -> Reached:
        ours, theirs = run.fastest("ours_16", strategy, "tokens_per_s"), number(run.line("peer_hf").get("tokens_per_s"))
        note = f"{short(ours)} and {short(theirs)} tokens/s" if ours and theirs else ""
        return Reached(ratio(ours, theirs), note)

    return reached


def whole_256(run: Run) -> Reached:
    """Of answers, prompts and all that lies between included."""
    return Reached(run.fastest("continuous_256", "continuous", "tokens_per_s"))


def in_passes(run: Run) -> Reached:
    """What predictions in the passes add to the time of answering, the faster run of each; void unless all were predicted."""
    without, within = (run.rates(part, "continuous", "seconds") for part in ("in_order", "in_passes"))
    share = ratio(min(within, default=None), min(without, default=None))
    log = str((run.parts.get("in_passes") or {}).get("err") or "")
    counts = [(int(some), int(all_)) for some, all_ in re.findall(r"(\d+) of (\d+) lengths were predicted", log)]
    few = min(counts, key=lambda count: count[0], default=None)
    void = "how many lengths were predicted is not known" if few is None else ""
    if few and few[0] < few[1]:
        void = f"only {few[0]:,} of {few[1]:,} lengths were predicted"
    predicted = f"{few[0]:,} of {few[1]:,} lengths were predicted" if few else ""
    note = f"{predicted}; {list_text(without, 's')} without, {list_text(within, 's')} with" if predicted else ""
    return Reached(None if share is None else share - 1, note, void if share is not None else "")


def before_the_run(run: Run) -> Reached:
    """Time per prediction, without what the first pays once, by the time per request of the memory-bound run."""
    one, all_ = (next(iter(run.list_of(part, "predictors")), {}) for part in ("predict_1", "predict_all"))
    first, each, count = number(one.get("ms_per_prediction")), number(all_.get("ms_per_prediction")), number(all_.get("n"))
    if first is None or each is None or not count:
        return Reached(None)
    ms = each * count - first
    per_request = ratio(1e3, run.fastest("continuous_most", "continuous"))
    note = f"{count:,.0f} in {each * count / 1e3:.3g} s, of which the first took {first / 1e3:.3g} s"
    return Reached(ratio(ms / count, per_request), note)


def training(ours: str, theirs: str, unit: str) -> Callable[[Run], Reached]:
    """Steps of ours by theirs."""

    def reached(run: Run) -> Reached:
        a, b = number(run.line(ours).get(unit)), number(run.line(theirs).get(unit))
        return Reached(ratio(a, b), f"{short(a)} and {short(b)}" if a is not None and b is not None else "")

    return reached


def list_of_bars() -> list[tuple]:
    """Name, what is asked (nothing: it is shown), and what was reached."""
    tokens, peak = "tokens_per_s", "peak_mib"
    plain, checkpointing, peft, peft_checkpointing = (
        "train", "train_checkpointing", "train_peft", "train_peft_checkpointing",
    )
    return [
        ("step at 16 rows, context 128, against reading the weights", ("at most", 1.5), step("profile")),
        ("the same with cuBLAS' products alone", None, step("profile_blas")),
        ("the same without kernels that begin early", None, step("profile_late")),
        ("tokens/s of a step at 256 rows, context 128", ("at least", 15e3), many_rows),
        ("tokens/s of the whole work load at 256 slots, faster run", None, whole_256),
        ("continuous, memory-bound, faster run, against vanilla at 16", ("at least", 6), against_vanilla("continuous_most")),
        ("continuous at 16 against vanilla at 16", None, against_vanilla("continuous_16")),
        ("seqsch, published, against vanilla at 16", None, against_vanilla("sorted_16", "seqsch")),
        ("seqsch, cost, against vanilla at 16", None, against_vanilla("sorted_16", "seqsch", cost=True)),
        ("continuous at 16 against generate in batches of 16, tokens/s", ("at least", 3), against_generate("continuous")),
        ("vanilla at 16 against generate in batches of 16, tokens/s", None, against_generate("vanilla")),
        ("predictions in the passes, share of answering, faster runs", ("at most", 0.02), in_passes),
        ("predictions before the run, share of the memory-bound run", None, before_the_run),
        ("LoRA steps: tokens/s against PEFT", ("at least", 1), training(plain, peft, tokens)),
        ("LoRA steps: peak MiB against PEFT", ("at most", 0.8), training(plain, peft, peak)),
        ("both with checkpointing: tokens/s", None, training(checkpointing, peft_checkpointing, tokens)),
        ("both with checkpointing: peak MiB", None, training(checkpointing, peft_checkpointing, peak)),
        ("ours with checkpointing against PEFT without: tokens/s", None, training(checkpointing, peft, tokens)),
        ("ours with checkpointing against PEFT without: peak MiB", None, training(checkpointing, peft, peak)),
    ]


def bars(parts: dict) -> list[dict]:
    """Each bar with what was asked, what was reached, and whether that suffices, as text."""
    run = Run(parts)
    return [bar(run, *named) for named in list_of_bars()]


def bar(run: Run, name: str, asked: tuple | None, reached: Callable[[Run], Reached]) -> dict:
    text = f"{asked[0]} {asked[1]:,g}" if asked else ""
    try:
        found = reached(run)
        value = number(found.value)
    except Exception as error:
        return {"bar": name, "asked": text, "reached": f"not reckoned: {type(error).__name__}: {error}", "verdict": ""}
    note = f" ({found.note})" if found.note else ""
    if value is None:
        return {"bar": name, "asked": text, "reached": f"not measured{note}", "verdict": ""}
    suffices = {"at most": operator.le, "at least": operator.ge}
    verdict = ""
    if asked:
        verdict = found.void or ("met" if suffices[asked[0]](value, asked[1]) else "missed")
    return {"bar": name, "asked": text, "reached": f"{short(value)}{note}", "verdict": verdict}
