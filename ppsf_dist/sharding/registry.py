"""Who knows a kind of sharding. The only place that names the packages of frameworks, and it imports none of them."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any, Literal, NamedTuple, get_args

from ppsf_dist.sharding import marks

Question = Literal["refused", "shards", "layout", "caller", "module", "weights", "strategy"]


class Entry(NamedTuple):
    """One kind of sharding and one question about it. ``answer`` is the ``"module:function"`` that knows."""

    name: str
    test: Callable[..., bool]
    answer: str


_ENTRIES: dict[Question, list[Entry]] = {
    "refused": [Entry("fsdp1", marks.is_flat_parameter, "ppsf_dist.fsdp.shards:refuse_flat_parameters")],
    "shards": [
        Entry("dtensor", marks.is_dtensor, "ppsf_dist.fsdp.shards:dtensor_shards"),
        Entry("experts", marks.is_expert, "ppsf_dist.deepspeed.experts:shards_with_experts"),
    ],
    "layout": [
        Entry("zero", marks.are_partitioned, "ppsf_dist.deepspeed.layout:ZeroLayout"),
        Entry("copies", marks.are_copies, "ppsf_dist.zero.copies:CopiesLayout"),
    ],
    "caller": [Entry("deepspeed", marks.is_engine, "ppsf_dist.deepspeed.config:check_caller")],
    "module": [Entry("fsdp", marks.keeps_gathered_weights, "ppsf_dist.fsdp.modules:reshard")],
    "weights": [Entry("fsdp", marks.is_dtensor, "ppsf_dist.fsdp.modules:reshard_owners")],
    "strategy": [
        Entry("fsdp", "fsdp".__eq__, "ppsf_dist.fsdp.forecast:forecast"),
        Entry("hsdp", "hsdp".__eq__, "ppsf_dist.fsdp.forecast:forecast"),
        Entry("zero1", "zero1".__eq__, "ppsf_dist.zero.forecast:forecast"),
        Entry("zero2", "zero2".__eq__, "ppsf_dist.zero.forecast:forecast"),
        Entry("zero3", "zero3".__eq__, "ppsf_dist.zero.forecast:forecast"),
    ],
}


def register(question: Question, name: str, test: Callable[..., bool], answer: str) -> None:
    """Let the optimizer know a kind of sharding of your own, on every rank before its first step.

    What was registered last is asked first. A test must be cheap and true of nothing else: it looks at attributes. The
    module of the answer is imported when the test is true for the first time.

    ============ ============================== =====================================================================
    question     the test is given              the answer is called with, and returns
    ============ ============================== =====================================================================
    ``refused``  a parameter                    the parameter: nothing; it raises what cannot work
    ``shards``   a parameter                    a list of such parameters, and plain shards of those beside them, whose
                                                domain it may set: a ``Shard`` for each parameter, in order
    ``layout``   all groups, and the parameters the same: a ``Layout`` of them
                 that each was made with
    ``caller``   a frame of the stack           the frame, and all groups: nothing; it raises what cannot work
    ``module``   a module of the model          the model: nothing; it drops what modules keep of the weights, which
                                                have changed
    ``weights``  a parameter                    a list of such parameters, which have changed: nothing; it drops what
                                                modules keep of them, whichever those are
    ``strategy`` the name of a strategy         see ``ppsf_dist.dry_run.Foresee``
    ============ ============================== =====================================================================

    Args:
        question: what the answer answers.
        name: of the kind of sharding; who has registered under the same name before is forgotten.
        test: whether the answer knows what is asked about.
        answer: ``"module:function"``.

    Raises:
        ValueError: there is no such question, or ``answer`` does not have that form.
    """
    if question not in _ENTRIES:
        raise ValueError(f"question={question!r} is never asked: allowed are {', '.join(get_args(Question))}")
    module, colon, function = answer.partition(":")
    if not (module and colon and function):
        raise ValueError(f"answer={answer!r} names no function: write 'package.module:function'")
    others = [entry for entry in _ENTRIES[question] if entry.name != name]
    _ENTRIES[question] = [Entry(name, test, answer), *others]


def who_knows(question: Question, *evidence: object) -> str | None:
    """The answer for some evidence, as it was registered, or None if nobody knows."""
    return next((entry.answer for entry in _ENTRIES[question] if entry.test(*evidence)), None)


def entries(question: Question) -> list[Entry]:
    """Who is asked, in order."""
    return _ENTRIES[question]


def find(question: Question, *evidence: object) -> Callable[..., Any] | None:
    """The function that answers for some evidence, imported now, or None if nobody knows."""
    answer = who_knows(question, *evidence)
    return None if answer is None else load(answer)


def load(answer: str) -> Callable[..., Any]:
    """Import what was registered."""
    function: Callable[..., Any] = resolve_name(answer)
    return function
