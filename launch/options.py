"""The command line of train.py."""

from __future__ import annotations

import argparse
import ast
import difflib
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

from optimizers import ADAMW, COSINE, NAMES, SCHEDULES, WRAPPER, arguments_of, schedule_of
from ppsf_dist import RECOMMENDED
from ppsf_dist.bootstrap import ProcessInfo
from strategies import DTYPES, STRATEGIES, ZERO_STAGES

LAST = "last"
# What a checkpoint only makes sense with. Strategy, number of ranks and --steps may change when a run is resumed.
FIXED_BY_CHECKPOINT = (
    "batch_size", "seq_len", "dim", "layers", "heads", "dtype", "seed", "optimizer", "lr", "schedule", "warmup", "opt",
)  # fmt: skip

EXAMPLES = """\
examples:
  python launch/train.py --steps 200
  torchrun --standalone --nproc-per-node 2 launch/train.py --strategy fsdp
  mpirun -n 2 python launch/train.py --opt use_cautious=True --opt "betas=(0.95, 0.99)"
  python launch/train.py --resume --steps 400
  python launch/train.py --dry-run --world-size 1000 --shards 8 --dim 8192 --layers 87 --heads 64
"""


@dataclass(frozen=True)
class Settings:
    """What a person can choose; the fields are the options of `train.py --help`."""

    strategy: str | None = None
    zero_stage: int = 3
    steps: int = 400
    batch_size: int = 16
    seq_len: int = 128
    dim: int = 128
    layers: int = 4
    heads: int = 4
    dtype: str = "float32"
    seed: int = 0
    optimizer: str = "ProdigyPlusScheduleFree"
    lr: float | None = None
    schedule: str | None = None
    warmup: int = 0
    opt: dict[str, object] = field(default_factory=dict)
    eval_every: int = 50
    save_every: int = 0
    output: Path = Path("runs/train")
    resume: str | None = None
    overwrite: bool = False
    check_every: int = 0
    dry_run: bool = False
    world_size: int | None = None
    shards: int | None = None

    def fixed(self) -> dict[str, object]:
        """Returns, as JSON holds them, the settings that a resumed run must share with the run that it goes on with."""
        values = {name: value for name, value in asdict(self).items() if name in FIXED_BY_CHECKPOINT}
        values["opt"] = {name: repr(value) for name, value in self.opt.items()}
        if schedule_of(self) == COSINE:
            # A cosine to another end is another schedule.
            values["steps"] = self.steps
        return values


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Returns the settings that the command line asks for; a wrong one ends the program with the way out."""
    parser = _parser()
    values = vars(parser.parse_args(arguments))
    try:
        switches = dict(_switch(text, values["optimizer"]) for text in values["opt"])
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --opt: {error}")
    recommended = dict(RECOMMENDED) if values.pop("recommended") else {}
    if recommended and values["optimizer"] != Settings.optimizer:
        parser.error(f"--recommended is a setting of {Settings.optimizer}, not of --optimizer {values['optimizer']}")
    settings = Settings(**values | {"opt": recommended | switches})
    _check_optimizer(parser, settings)
    if settings.dim % settings.heads:
        parser.error(f"--dim {settings.dim} does not divide into --heads {settings.heads} heads of the same width")
    if settings.dry_run != (settings.world_size is not None):
        parser.error("--dry-run and --world-size go together: the launcher says how many ranks a real run has")
    if settings.shards and (not settings.world_size or settings.world_size % settings.shards):
        parser.error(f"--shards {settings.shards} must divide --world-size {settings.world_size} of a --dry-run")
    if settings.resume and settings.overwrite:
        parser.error("--resume keeps the run that --overwrite would remove: give one of them")
    return settings


def _check_optimizer(parser: argparse.ArgumentParser, settings: Settings) -> None:
    """End the program where the optimizer cannot do what the other options ask for."""
    name = settings.optimizer
    if settings.warmup >= settings.steps:
        parser.error(f"--warmup {settings.warmup} leaves nothing of --steps {settings.steps}: give fewer")
    if settings.strategy == "deepspeed" and (name in (ADAMW, WRAPPER) or name.endswith("Closure")):
        parser.error(f"--optimizer {name} does not run under --strategy deepspeed (docs/deepspeed.md): choose fsdp")
    if settings.check_every and name in (ADAMW, WRAPPER):
        parser.error(f"--check-every compares what ppsf_dist's own optimizers keep: leave it out with {name}")
    if settings.dry_run and name in (ADAMW, WRAPPER):
        parser.error(f"--dry-run knows the memory of ppsf_dist's own optimizers: leave --optimizer {name} out")


def resume_command(settings: Settings, ranks: ProcessInfo) -> str:
    """Returns the command that goes on from the last checkpoint of a run.

    Words in capitals stand for what this process cannot know: the address of the first of several hosts, or a launcher
    that does not say what it is.
    """
    script = [sys.argv[0], *_spelled_out(settings), "--resume"]
    return shlex.join([*_launcher(ranks), *script])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Trains a byte-level transformer language model on the source of Python's standard library, with "
        "an optimizer that finds its own step size. Runs under plain Python, torchrun, mpirun and srun.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Settings()

    def add(group: argparse._ArgumentGroup, name: str, text: str, **kind: object) -> None:
        value = getattr(default, name)
        shown = f"{text} (default: {value})"
        group.add_argument(f"--{name.replace('_', '-')}", default=value, help=shown, **kind)  # type: ignore[arg-type]

    where = parser.add_argument_group("where it runs")
    where.add_argument(
        "--strategy",
        choices=sorted(STRATEGIES),
        help="how the model lies on the ranks (default: single for one rank, fsdp for more)",
    )
    add(where, "zero_stage", "what --strategy deepspeed splits over the ranks", type=int, choices=ZERO_STAGES)
    where.add_argument(
        "--dry-run",
        action="store_true",
        help="start nothing; say what each of --world-size ranks would hold and reduce, under --strategy or each one",
    )
    where.add_argument("--world-size", type=_at_least(1), metavar="N", help="ranks that --dry-run supposes")
    where.add_argument(
        "--shards", type=_at_least(1), metavar="N", help="let --dry-run show HSDP too, with parameters cut over N ranks"
    )

    model = parser.add_argument_group("model")
    add(model, "dim", "width of the residual stream", type=_at_least(1), metavar="N")
    add(model, "layers", "transformer blocks", type=_at_least(1), metavar="N")
    add(model, "heads", "attention heads in each block; must divide --dim", type=_at_least(1), metavar="N")
    add(model, "seq_len", "bytes of context", type=_at_least(1), metavar="BYTES")
    add(model, "dtype", "of weights, gradients and arithmetic", choices=sorted(DTYPES))

    training = parser.add_argument_group("training")
    add(training, "steps", "optimizer steps, counted from the start of the run", type=_at_least(1), metavar="N")
    add(
        training,
        "batch_size",
        "windows in a step over all ranks together; must divide by the number of ranks",
        type=_at_least(1),
        metavar="N",
    )
    add(training, "seed", "of initial weights, data order and stochastic rounding", type=int, metavar="N")
    training.add_argument(
        "--optimizer",
        choices=NAMES,
        default=default.optimizer,
        metavar="NAME",
        help=f"one of {', '.join(NAMES)} (torch's, to compare with); the wrapper is put around AdamW without momentum "
        f"(default: {default.optimizer})",
    )
    training.add_argument(
        "--lr", type=_positive, help="learning rate, for those that find none (default: that of the optimizer)"
    )
    training.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="of the learning rate (default: cosine to 0 for Prodigy and AdamW, constant for all that average)",
    )
    add(training, "warmup", "steps over which the learning rate rises at first", type=_at_least(0), metavar="N")
    training.add_argument(
        "--opt",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of the optimizer with a Python literal as its value, such as use_adopt=True; repeat it for "
        f"more. Those of {default.optimizer}: {', '.join(arguments_of(default.optimizer))}",
    )
    training.add_argument(
        "--recommended",
        action="store_true",
        help=f"docs/quality.md: {', '.join(f'{k}={v}' for k, v in RECOMMENDED.items())}; --opt may say otherwise",
    )
    add(
        training,
        "check_every",
        "steps between two comparisons of d and of all replicas between ranks; 0: never",
        type=_at_least(0),
        metavar="N",
    )

    files = parser.add_argument_group("files")
    add(files, "output", "folder for metrics, picture and checkpoint", type=Path, metavar="FOLDER")
    add(files, "eval_every", "steps between two validations", type=_at_least(1), metavar="N")
    add(
        files,
        "save_every",
        "steps between two saves of the checkpoint; 0: only at the end",
        type=_at_least(0),
        metavar="N",
    )
    files.add_argument(
        "--resume",
        nargs="?",
        const=LAST,
        metavar="CHECKPOINT",
        help="go on from the last checkpoint of --output, or from the one named; "
        "without a name, and without a checkpoint yet, start a new run",
    )
    files.add_argument("--overwrite", action="store_true", help="remove the run that --output holds already")
    return parser


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is too small: {lowest} or more is allowed")
        return value

    number.__name__ = "int"
    return number


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is out of range: a number > 0 is allowed")
    return value


_positive.__name__ = "number"


def _switch(text: str, optimizer: str) -> tuple[str, object]:
    name, equals, literal = text.partition("=")
    names = arguments_of(optimizer)
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no value: write it as NAME=VALUE, such as d_coef=0.5")
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        guess = "it has an option of its own, --lr. " if name == "lr" else guess
        raise argparse.ArgumentTypeError(f"{name!r} is no argument of {optimizer}: {guess}It has {', '.join(names)}")
    try:
        return name, ast.literal_eval(literal)
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(
            f"{literal!r}, given for {name!r}, is no Python literal: write numbers as 0.5, switches as True or False, "
            "pairs as (0.9, 0.99)"
        ) from None


def _spelled_out(settings: Settings) -> list[str]:
    words: list[str] = []
    for option in fields(Settings):
        value = getattr(settings, option.name)
        if option.name in ("opt", "resume", "overwrite") or (option.default is not MISSING and value == option.default):
            continue
        words += [f"--{option.name.replace('_', '-')}", str(value)]
    for name, switch in settings.opt.items():
        words += ["--opt", f"{name}={switch!r}"]
    return words


def _launcher(ranks: ProcessInfo) -> list[str]:
    python, total, here = sys.executable, str(ranks.world_size), str(ranks.local_world_size)
    one_host = ranks.world_size == ranks.local_world_size
    hosts = str(ranks.world_size // ranks.local_world_size)
    rendezvous = ["--standalone"] if one_host else ["--nnodes", hosts, "--rdzv-endpoint", "HOST:PORT"]
    starts = {
        "python": [python],
        "torchrun": [python, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", here],
        "mpirun": ["mpirun", "-n", total, python],
        "srun": ["srun", "-n", total, python],
    }
    return starts.get(ranks.launcher, ["LAUNCHER"])
