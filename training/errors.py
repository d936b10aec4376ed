"""What can stop a training command; each error carries its exit code and a remedy.

MarinaError                       handlerlib.errors
├── RecipeError             3     unknown recipe, key or architecture, a value out of range, weights not to be had
│   ├── NumericFailure      3     the loss became NaN or infinite
│   └── RunBusy             3     another process trains the same run
├── DataError               4     the images cannot be used as they are
├── TargetError             5     not a finished run or artifact, or its files are damaged
├── PeerFailed              1     another process of the same training failed, and says why
├── ProcessDied             1     processes of a training died more often than they may
└── Interrupted           130     stopped on request; the same command resumes
"""

from __future__ import annotations

from collections.abc import Sequence

from handlerlib.errors import MarinaError


class RecipeError(MarinaError):
    """The recipe or an override cannot be used; the message names the key."""

    exit_code = 3


class NumericFailure(RecipeError):
    """The loss of one step, or a weight after it, is NaN or infinite."""

    def __init__(
        self,
        *,
        what: str,
        epoch: int,
        step: int,
        learning_rate: float,
        images: Sequence[str],
        kept: str,
        recipe_rate: float,
        clipped: bool,
    ) -> None:
        """`learning_rate` is that of the step; `recipe_rate` and `clipped` are what the recipe says."""
        more = f" and {len(images) - 3} more" if len(images) > 3 else ""
        super().__init__(
            f"{what} in epoch {epoch}, step {step} (learning rate {learning_rate:g},"
            f" batch {', '.join(images[:3])}{more}); {kept}",
            remedy=f"train more gently, e.g. --set train.learning_rate={recipe_rate / 10:g}"
            + ("" if clipped else " or --set train.clip=1"),
        )
        self.epoch = epoch
        self.step = step
        self.learning_rate = learning_rate
        self.images = tuple(images)
        """Names of the batch's images, in order."""


class RunBusy(RecipeError):
    """Two processes would write into one run folder."""


class DataError(MarinaError):
    """The data set is missing, empty, damaged, or not a classification data set; the message names the file or class."""

    exit_code = 4


class TargetError(MarinaError):
    """A folder given to evaluate or export is neither a finished run nor an artifact."""

    exit_code = 5


class PeerFailed(MarinaError):
    """Another process of the same training cannot go on; its own error is the one to show."""


class ProcessDied(MarinaError):
    """A process of a training was killed or broke down, more often than it may."""

    def __init__(self, restarts: int, log: str) -> None:
        times = "was not to be started again" if restarts == 0 else f"was started again {restarts} times"
        super().__init__(
            f"a process of the training died; the group {times}",
            remedy="the same command goes on from the last checkpoint; was the memory enough?",
        )
        self.log_tail = log


class Interrupted(MarinaError):
    """Stopped by Ctrl-C. What is done is on disk."""

    exit_code = 130

    def __init__(self, message: str) -> None:
        super().__init__(message, remedy="run the same command again: it goes on from here")
