"""Which formulas run: methods are points in one space, and this is the space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Switches:
    """What of a group decides which formulas run: equal switches can be computed together.

    Numbers that only scale a formula (lr, betas, d, ...) are not here: they are read from the device.

    Attributes:
        schedulefree: z and an average in place of a momentum.
        momentum: without that, a momentum at all.
        second_moment: the direction is divided by the root of a second moment; without one it is the gradient.
        sgd_phase: as long as coefficient ``root`` is 0, it is the gradient all the same.
        factored, factored_fp32: that moment is kept as row and column means, in fp32 whatever the weights' dtype.
        statistics: Prodigy's sums over samples are taken. False once ``prodigy_steps`` has frozen a step size.
        prodigy_steps: when that will be; 0 for never.
        slice_p: every so-manyth element of the flattened logical parameter is sampled.
        samples: dtype of the samples p0 and s: fp32, that of the weights, or bf16 of fp32 weights and that of others.
        speed: they are SPEED's.
        weight_decay, weight_decay_by_lr: weights decay, in proportion to the step.
        coupled_decay: they are added to the gradient.
        atan2: the direction is 4/pi atan2(g, sqrt(v)).
        stableadamw: the direction is bounded by its root mean square.
        stochastic_rounding: of 16-bit weights.
        cautious, grams, adopt, orthograd, focus: variants of the update.
        quirks: the oddities of the reference are reproduced.
    """

    schedulefree: bool
    momentum: bool = True
    second_moment: bool = False
    sgd_phase: bool = False
    factored: bool = False
    factored_fp32: bool = True
    statistics: bool = False
    prodigy_steps: int = 0
    slice_p: int = 1
    samples: Literal["fp32", "like weights", "halved"] = "fp32"
    speed: bool = False
    weight_decay: bool = False
    weight_decay_by_lr: bool = True
    coupled_decay: bool = False
    atan2: bool = False
    stableadamw: bool = False
    stochastic_rounding: bool = False
    cautious: bool = False
    grams: bool = False
    adopt: bool = False
    orthograd: bool = False
    focus: bool = False
    quirks: bool = False

    @property
    def masks_update(self) -> bool:
        """The schedule-free forms of cautious and Grams rewrite the step of y as a whole."""
        return self.schedulefree and (self.cautious or self.grams)

    @property
    def counts_mask_early(self) -> bool:
        """Without schedule-free the cautious mask compares g with m: it needs nothing of this step's reductions."""
        return self.cautious and not self.schedulefree

    @property
    def counts_mask_late(self) -> bool:
        """With schedule-free the cautious mask compares the finished update with the step of y: a third reduction."""
        return self.cautious and self.schedulefree

    @property
    def needs_norms(self) -> bool:
        """The update's size or its angle with the weights is needed before anything is written (pass 2)."""
        return self.stableadamw or self.orthograd
