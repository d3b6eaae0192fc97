"""What is run on a machine with a GPU: each part's command, time limit and needs, in the order of what the bars need most."""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
TINY = HERE.parents[1] / "data" / "tiny"


@dataclass
class Part:
    """A command, the seconds that it may take, and the parts without which it is of no use."""

    name: str
    limit: float
    command: list[str]
    needs: list[str] = field(default_factory=list)
    # What it writes. Where that is there, so is what other parts need of it, whatever came of the part.
    makes: list[Path] = field(default_factory=list)
    # Of a second call: no bar hangs on it.
    second: bool = False


def parts(args: argparse.Namespace) -> list[Part]:
    """All of them; those of a second call last."""
    c = Commands(args)
    first = [*checks(c), *speed(c), *in_the_passes(c), *training(c), *before_the_run(c)]
    later = [*second_speed(c), *sanitized(c)]
    for part in later:
        part.second = True
    return [*first, *later]


class Commands:
    """How commands begin, and how much is measured: little in a dry run, on the CPU."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.dry, self.python = args, args.dry, sys.executable
        self.device, self.dtype, self.torch_dtype = ("cpu", "f32", "float32") if args.dry else ("cuda", "bf16", "bfloat16")
        # Requests of the whole work load, and of the comparison with an engine that needs a minute for so few.
        self.many, self.few = (8, 4) if args.dry else (1024, 96)
        self.weights = args.models / "7b"
        self.model = str(TINY if args.dry else self.weights)
        self.common = ["--device", self.device, "--model", self.model, "-q", "--json"]
        self.workload, self.adapter = args.output / "workload.jsonl", args.output / "adapter"
        self.pairs, self.one_pair = args.output / "pairs.jsonl", args.output / "pairs.jsonl.1"
        # A GPU that refuses everything costs one short part.
        self.starts = ["starts"]
        self.model_needs = self.starts if args.dry else ["starts", "make_7b"]

    def bench(self, strategies: str, slots: int, requests: int, *more: str) -> list[str]:
        """The first so many requests of the same work load, whatever else is asked for."""
        small = ["--divide-lengths", "16"] if self.dry else []
        command = [self.args.lengthwise, "bench", *self.common, "--replay", str(self.args.lengths), *small]
        command += ["--prompt-tokens", "32", "128", "--num", str(requests), "--batch-size", str(slots)]
        return [*command, "--strategy", strategies, *more]

    def twice(self, slots: int, *more: str) -> list[str]:
        """The continuous mode on all requests, two times in a process: the first run is the first of all its passes."""
        return self.bench("continuous,continuous", slots, self.many, *more)

    def profile(self, sizes: str, contexts: str, *variables: str) -> list[str]:
        """A cache of its own: the cost planner would find the few points there and plan by them."""
        cache = f"XDG_CACHE_HOME={self.args.output / 'profile-cache'}"
        sizes, contexts = ("1,16,16", "128") if self.dry else (sizes, contexts)
        command = [self.args.lengthwise, "profile", *self.common, "--batch-sizes", sizes, "--contexts", contexts]
        return ["env", cache, *variables, *command]

    def eval(self, pairs: Path) -> list[str]:
        return [self.args.lengthwise, "eval", *self.common, "--adapter", str(self.adapter), "--data", str(pairs)]

    def train(self, engine: str) -> list[str]:
        folder, name, shape, steps = (self.args.models, "7b", "8x512", "20")
        if self.dry:
            folder, name, shape, steps = (TINY.parent, "tiny", "2x64", "2")
        command = [self.python, str(HERE.parent / "bench_train.py"), str(folder), "--lengthwise", self.args.lengthwise]
        command += ["--models-used", name, "--shapes", shape, "--steps", steps, "--device", self.device]
        return [*command, "--dtype", self.dtype, "--engines", engine]


def checks(c: Commands) -> list[Part]:
    """That the GPU does what it should, and what the rest needs."""
    # Without a GPU the tests say so and pass.
    no_gpu = ["env", "LENGTHWISE_NO_GPU=1"] if c.dry else []
    tests = [*no_gpu, c.args.kernel_tests, "gpu", "--test-threads", "1", "--nocapture"]

    def script(name: str, *more: str) -> list[str]:
        return [str(HERE / name), c.args.lengthwise, c.device, *more]

    weights = [c.python, str(HERE / "make_7b.py"), str(c.weights)]
    return [
        Part("machine", 20, ["uname", "-a"] if c.dry else ["nvidia-smi"]),
        # Time enough for a driver that compiles what it has not compiled before.
        Part("starts", 45, script("starts.sh", c.dtype)),
        Part("kernels", 90, tests),
        Part("answers", 60, script("same_answers.sh"), c.starts),
        Part("answers_16_bits", 60, script("same_answers_16_bits.sh", c.dtype), c.starts),
        *([] if c.dry else [Part("make_7b", 120, weights, c.starts, [c.weights])]),
        Part("copy_rate", 60, [c.python, str(HERE / "copy_rate.py"), c.device], c.starts),
    ]


def speed(c: Commands) -> list[Part]:
    """Steps, whole work loads, and another engine on the same requests."""
    # The ways that products of few rows are computed, and what each took, go to profile.err.
    products = "RUST_LOG=warn,lengthwise_model::gpu::products=debug"
    vanilla = c.bench("vanilla", 16, c.many, "--export-workload", str(c.workload))
    peer = [c.python, str(HERE.parent / "bench_decode" / "peer_hf.py"), c.model, str(c.workload), "vanilla"]
    peer += ["--num", str(c.few), "--device", c.device, "--dtype", c.torch_dtype]
    return [
        # 16 rows twice: how far two measurements of the same lie apart.
        Part("profile", 90, c.profile("1,16,16,64,256", "128", products), c.model_needs),
        Part("continuous_most", 90, c.twice(c.many), c.model_needs),
        Part("vanilla", 240, vanilla, c.model_needs, [c.workload]),
        Part("ours_16", 90, c.bench("vanilla,continuous", 16, c.few), c.model_needs),
        Part("peer_hf", 150, peer, [*c.model_needs, "vanilla"]),
    ]


def in_the_passes(c: Commands) -> list[Part]:
    """Predictions in the passes that answer. So few slots that memory never decides who is admitted: the bar is about
    predictions, and without them the same run admits by the recorded lengths."""
    make_pairs = [c.python, str(HERE / "pairs.py"), str(c.pairs), str(16 if c.dry else 1024)]
    train = [c.args.lengthwise, "train", *c.common, "--dtype", c.dtype, "--data", str(c.pairs), "--output", str(c.adapter)]
    train += ["--objective", "head", "--alora", "--max-steps", "1", "--batch-size", "4"]
    in_order = c.twice(c.args.slots, "--order", "fcfs")
    # How many lengths were predicted is a line of the log.
    in_passes = ["env", "RUST_LOG=info", *in_order, "--adapter", str(c.adapter)]
    made = [c.adapter / "adapter_config.json", c.adapter / "adapter_model.safetensors"]
    return [
        Part("pairs", 20, make_pairs, makes=[c.pairs, c.one_pair]),
        Part("adapter", 60, train, [*c.model_needs, "pairs"], made),
        Part("in_order", 90, in_order, c.model_needs),
        Part("in_passes", 90, in_passes, [*c.model_needs, "adapter"]),
    ]


def training(c: Commands) -> list[Part]:
    """LoRA steps of both sides, plain and with checkpointing."""
    return [
        Part("train", 150, c.train("lengthwise"), c.model_needs),
        Part("train_peft", 120, c.train("peft"), c.model_needs),
        Part("train_checkpointing", 150, c.train("checkpointing"), c.model_needs),
        Part("train_peft_checkpointing", 120, c.train("peft_checkpointing"), c.model_needs),
    ]


def before_the_run(c: Commands) -> list[Part]:
    """Predictions by themselves: of one prompt, which pays for whatever is done once, and of all."""
    return [
        Part("predict_1", 40, c.eval(c.one_pair), [*c.model_needs, "adapter"]),
        Part("predict_all", 60, c.eval(c.pairs), [*c.model_needs, "adapter"]),
    ]


def second_speed(c: Commands) -> list[Part]:
    """Other numbers of slots, sorted batches, longer contexts, and ways that can be turned off."""
    # Measured for this run, and not found where another left it.
    cache = c.args.output / "planner-cache"
    sorting = ["--vbs", "--fcr", "--planner", "published,cost", "--noise-mae", "62"]
    planned, early = ["env", f"XDG_CACHE_HOME={cache}"], "LENGTHWISE_NO_EARLY_KERNELS=1"
    return [
        Part("sorted_16", 240, [*planned, *c.bench("seqsch", 16, c.many, *sorting)], c.model_needs, [cache]),
        Part("continuous_16", 120, c.bench("continuous", 16, c.many), c.model_needs),
        Part("continuous_64", 90, c.twice(64), c.model_needs),
        Part("continuous_256", 90, c.twice(256), c.model_needs),
        Part("profile_long", 120, c.profile("1,16,64,256", "128,512"), c.model_needs),
        Part("profile_blas", 60, c.profile("16,16", "128", "LENGTHWISE_GPU_PRODUCTS=blas"), c.model_needs),
        Part("profile_late", 60, c.profile("16,16", "128", early), c.model_needs),
    ]


def sanitized(c: Commands) -> list[Part]:
    """Bad accesses in all tests of the kernels; races, which take longest to look for, where threads share memory most."""
    tool = ["compute-sanitizer", "--target-processes", "all", "--error-exitcode", "3", "--tool"]
    how = ["--test-threads", "1", "--nocapture"]
    racy = ["few_rows", "attention", "packed"]
    return [
        Part("memcheck", 240, [*tool, "memcheck", c.args.kernel_tests, "gpu", *how], c.starts),
        Part("racecheck", 150, [*tool, "racecheck", c.args.kernel_tests, *racy, *how], c.starts),
    ]
