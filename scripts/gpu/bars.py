"""The bars of the GPU path, reckoned from what the parts of measure.py printed; a part that is missing leaves its bar open."""

WEIGHT_BYTES = 13.5e9


def bars(parts: dict) -> list[dict]:
    """Each bar with what was asked and what was reached, as text."""

    def result(name: str):
        return parts.get(name, {}).get("result")

    def rows(name: str) -> list[dict]:
        found = result(name)
        return found.get("strategies", []) if isinstance(found, dict) else []

    def rate(name: str, unit: str = "samples_per_s"):
        return rows(name)[0][unit] if rows(name) else None

    def step(batch_size: int, context: int = 128, profile: str = "profile"):
        found = result(profile)
        points = found.get("points", []) if isinstance(found, dict) else []
        return next((p["step_ms"] for p in points if (p["batch_size"], p["context"]) == (batch_size, context)), None)

    def ratio(a, b):
        return None if a is None or not b else a / b

    copied = result("copy_rate")
    floor = WEIGHT_BYTES / (copied["tb_per_s"] * 1e12) * 1e3 if isinstance(copied, dict) else None
    vanilla = rate("vanilla_all") or rate("vanilla_16")
    peer = result("peer_hf")
    peer = peer if isinstance(peer, dict) else (peer or [None])[-1] if isinstance(peer, list) else None
    peer = peer["tokens_per_s"] if isinstance(peer, dict) else None
    per_256 = ratio(256e3, step(256))
    out = [
        bar("step at 16 rows, context 128, against reading the weights", "at most 1.5", ratio(step(16), floor)),
        bar("the same with cuBLAS' products alone", "", ratio(step(16, profile="profile_blas"), floor)),
        bar("the same without kernels that begin early", "", ratio(step(16, profile="profile_late"), floor)),
        bar("tokens/s of a step at 256 rows, context 128", "at least 15,000", per_256),
        bar("tokens/s of the whole work load at 256 slots", "", rate("continuous_256", "tokens_per_s")),
        bar("continuous, memory-bound, against vanilla at 16", "at least 6", ratio(rate("continuous_most"), vanilla)),
        bar("continuous at 16, tokens/s against generate at 16", "at least 3", ratio(rate("continuous_16", "tokens_per_s"), peer)),
    ]
    for row in rows("sorted_16"):
        name = f"seqsch, {'cost' if row.get('cost_model') else 'published'}, samples/s against vanilla at 16"
        out.append(bar(name, "", ratio(row["samples_per_s"], rate("vanilla_16"))))
    # Against the same run without them, which schedules by the recorded lengths.
    in_passes = ratio(rate("in_order"), rate("in_passes"))
    more = None if in_passes is None else in_passes - 1
    out.append(bar("1,024 predictions in the passes, share of answering 1,024 requests", "at most 0.02", more))
    out.append(bar("the same predictions before the run", "", prediction_share(parts, rate)))
    return out + training([result(name) for name in ("train", "train_checkpointing", "train_peft")])


def prediction_share(parts: dict, rate):
    """Their time, loading left out, by that of the memory-bound work load."""
    one, all_ = parts.get("predict_1", {}), parts.get("predict_all", {})
    answers = rate("continuous_most")
    if not answers or "failed" in one or "failed" in all_ or not one.get("seconds") or not all_.get("seconds"):
        return None
    return (all_["seconds"] - one["seconds"]) / (1024 / answers)


def training(rows) -> list[dict]:
    """Each of our ways to train against PEFT."""
    runs = {row["engine"]: row for row in rows if isinstance(row, dict) and "engine" in row}
    peft = runs.get("peft", {})
    out = []
    for engine in ("lengthwise", "checkpointing"):
        row = runs.get(engine, {})
        for what, asked in (("tokens_per_s", "at least 1.0"), ("peak_mib", "at most 0.8")):
            both = what in row and what in peft
            out.append(bar(f"LoRA steps, {engine}: {what} against PEFT", asked, row[what] / peft[what] if both else None))
    return out


def bar(name: str, asked: str, reached) -> dict:
    return {"bar": name, "asked": asked, "reached": "not measured" if reached is None else f"{reached:,.4g}"}
