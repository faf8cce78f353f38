"""One parameter between its training weights y and its averaged weights x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ppsf_dist.algorithm import averaging
from ppsf_dist.state.writes import Write


@dataclass(frozen=True)
class Swap:
    """A move of the weights of one parameter, ``weights + w (z - weights)``, in the wider of their dtypes.

    Each round trip loses a little, most in 16 bits (``docs/differences.md``, O24). With ``keep`` the training weights
    are kept aside in the state (``y``) and come back as they were.

    Attributes:
        param: the parameter.
        weights: its local weights.
        state: of the parameter, with its z.
        beta1: interpolation of Schedule-Free.
        train: towards y, else towards x.
        keep: whether y is kept aside when x comes.
    """

    param: Tensor
    weights: Tensor
    state: dict[str, Any]
    beta1: float
    train: bool
    keep: bool

    def write(self) -> list[Write]:
        """The weights after the move."""
        if self.train and "y" in self.state:
            return [Write([self.weights], [self.state["y"]])]
        if self.keep and not self.train:
            self.state["y"] = self.weights.detach().clone()
        to_y, to_x = averaging.eval_to_train_weight, averaging.train_to_eval_weight
        weight = (to_y if self.train else to_x)(self.beta1)
        weights, z = self.weights, self.state["z"]
        if weights.dtype != z.dtype:
            # A model that was converted keeps the z that it had.
            weights, z = weights.float(), z.float()
        return [Write([self.weights], [weights.lerp(z, weight)])]

    def end(self) -> None:
        """What was kept aside has come back."""
        if self.train:
            self.state.pop("y", None)
