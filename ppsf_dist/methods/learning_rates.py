"""What is seldom meant by a learning rate, in words: of a method that finds its step size, and of one that averages."""

from __future__ import annotations

_AN_ORDINARY_LEARNING_RATE = 0.01


def of_another_optimizer(lr: float) -> str | None:
    """What to say of a learning rate that multiplies a step size d which is found, if it looks like AdamW's."""
    if not 0 < lr <= _AN_ORDINARY_LEARNING_RATE:
        return None
    return (
        f"lr={lr:g} looks like the learning rate of another optimizer: here it multiplies the step size d that this "
        "one finds, so leave it at 1.0"
    )


def of_a_schedule(before: float, now: float, *, finds_d: bool) -> str | None:
    """What to say of a learning rate that changes between two steps of a method that averages.

    Args:
        before, now: the two.
        finds_d: whether it multiplies a step size d. If not, a rise may be a warm-up that somebody needs.
    """
    if now == before or (now > before and not finds_d):
        return None
    return (
        f"lr {'falls' if now < before else 'rises'} from {before:.4g} to {now:.4g}: a schedule "
        f"{'multiplies the d that is found' if finds_d else 'comes on top'}, and the average of Schedule-Free stands "
        'in its place already; leave the scheduler out or make it constant (lr_scheduler_type="constant" in Trainer)'
    )
