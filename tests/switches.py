"""Every switch of the optimizer, alone and in the combinations that meet in one formula."""

from __future__ import annotations

from typing import Any

Switch = dict[str, Any]

ALONE: dict[str, Switch] = {
    "default": {},
    "betas": {"betas": (0.95, 0.999)},
    "beta1_zero": {"betas": (0.0, 0.99)},
    "beta3": {"beta3": 0.9},
    "weight_decay": {"weight_decay": 0.1},
    "weight_decay_not_by_lr": {"weight_decay": 0.01, "weight_decay_by_lr": False},
    "d_coef": {"d_coef": 0.9},
    "d_limiter": {"d_limiter": False},
    "prodigy_steps": {"prodigy_steps": 5},
    "prodigy_never": {"prodigy_steps": 1},
    "schedulefree_c": {"schedulefree_c": 50},
    "atan2": {"eps": None},
    "one_d": {"split_groups": False},
    "mean_d": {"split_groups_mean": True},
    "unfactored": {"factored": False},
    "low_factors": {"factored_fp32": False},
    "bias_correction": {"use_bias_correction": True},
    "no_stableadamw": {"use_stableadamw": False},
    "momentum": {"use_schedulefree": False},
    "speed": {"use_speed": True},
    "plain_rounding": {"stochastic_rounding": False},
    "cautious": {"use_cautious": True},
    "grams": {"use_grams": True},
    "adopt": {"use_adopt": True},
    "orthograd": {"use_orthograd": True},
    "focus": {"use_focus": True, "factored": False},
}

TOGETHER: dict[str, Switch] = {
    "unfactored_no_stableadamw": {"factored": False, "use_stableadamw": False},
    "unfactored_cautious": {"factored": False, "use_cautious": True},
    "cautious_no_stableadamw": {"use_cautious": True, "use_stableadamw": False},
    "unfactored_orthograd": {"factored": False, "use_orthograd": True},
    "momentum_decay": {"use_schedulefree": False, "weight_decay": 0.1},
    "momentum_decay_not_by_lr": {"use_schedulefree": False, "weight_decay": 0.01, "weight_decay_by_lr": False},
    "momentum_grams": {"use_schedulefree": False, "use_grams": True},
    "momentum_adopt": {"use_schedulefree": False, "use_adopt": True},
    "momentum_focus": {"use_schedulefree": False, "use_focus": True, "factored": False},
    "momentum_orthograd": {"use_schedulefree": False, "use_orthograd": True},
    "momentum_atan2": {"use_schedulefree": False, "eps": None},
    "momentum_speed": {"use_schedulefree": False, "use_speed": True},
    "momentum_bias_correction": {"use_schedulefree": False, "use_bias_correction": True},
    "momentum_adopt_atan2": {"use_schedulefree": False, "use_adopt": True, "eps": None},
    "cautious_decay": {"use_cautious": True, "weight_decay": 0.1},
    "grams_decay_not_by_lr": {"use_grams": True, "weight_decay": 0.01, "weight_decay_by_lr": False},
    "adopt_atan2": {"use_adopt": True, "eps": None},
    "adopt_no_stableadamw": {"use_adopt": True, "use_stableadamw": False},
    "adopt_focus": {"use_adopt": True, "use_focus": True, "factored": False},
    "orthograd_cautious": {"use_orthograd": True, "use_cautious": True},
    "speed_one_d": {"use_speed": True, "split_groups": False},
}

OURS: dict[str, Switch] = {
    "momentum_cautious": {"use_schedulefree": False, "use_cautious": True},
    "momentum_cautious_no_stableadamw": {
        "use_schedulefree": False,
        "use_cautious": True,
        "use_stableadamw": False,
        "factored": False,
    },
    "momentum_adopt_cautious": {"use_schedulefree": False, "use_adopt": True, "use_cautious": True},
    "moving_d": {"beta4": 0.8},
    "moving_d_unlimited": {"beta4": None, "d_limiter": False, "growth_rate": 1.5, "split_groups": False},
    "growth_rate": {"growth_rate": 1.02},
    "momentum_growth_rate": {"growth_rate": 1.1, "use_schedulefree": False, "use_speed": True},
    "no_quirks": {"reference_quirks": False},
    "no_quirks_speed": {"reference_quirks": False, "use_speed": True},
    "no_quirks_adopt": {"reference_quirks": False, "use_adopt": True},
    "no_quirks_momentum_adopt": {"reference_quirks": False, "use_adopt": True, "use_schedulefree": False},
    "no_quirks_focus": {"reference_quirks": False, "use_focus": True, "factored": False},
}
"""Where the reference does something else on purpose (``docs/differences.md``)."""

EVERY: dict[str, Switch] = ALONE | TOGETHER | OURS
