"""Temperature scaling: one number that makes a classifier's probabilities as sure as its answers are right.

Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks" (ICML 2017): softmax(z / T) for the logits z.
It is applied to the probabilities, which give the same, softmax(log(softmax(z)) / T) = softmax(z / T), because softmax
takes no notice of a constant that is added to all logits. So every engine answers as it always did, and none has to
be built again for another temperature.
"""

from __future__ import annotations

from torch import Tensor


def soften(probabilities_BK: Tensor, temperature: float) -> Tensor:
    """Probabilities `[B, classes]`, rows that sum to 1, at another temperature: above 1 less sure, below 1 surer.

    The order of a row's labels stays. At 1.0 the same tensor comes back.
    """
    return probabilities_BK if temperature == 1.0 else (probabilities_BK.log() / temperature).softmax(dim=1)
