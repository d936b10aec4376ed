"""What can go wrong in operations, each with its exit code. The message says what and where, the remedy what to do.

MarinaError                      (handlerlib.errors)
├── UsageError             2     an option or an argument is wrong
├── ConfigError            3     config.properties, a MARINA_* variable or an option is wrong
├── ArchiveError           5     an archive is refused
│   └── StoreError         5     the model store lacks an archive, or its index does not fit the files
├── ServerError            6     TorchServe cannot start, did not get ready, or ended by itself
│   ├── NoJava                   no usable java was found
│   ├── NoDevice                 a GPU was asked for and none can be used
│   ├── PortBusy                 a port that the server needs is taken
│   ├── NotReady                 a model did not load, or not in time
│   └── ServerDied               java ended without being asked to
├── ClientError            7     a request got no usable answer
│   ├── Unreachable              nothing listens there, or the connection broke
│   ├── TimedOut                 no connection or no answer in time
│   ├── Refused                  the server answered with an error status
│   └── UnexpectedAnswer         the server answered with something else than the contract says
└── Interrupted          130     Ctrl-C
"""

from __future__ import annotations

from handlerlib.errors import MarinaError

__all__ = [
    "ArchiveError",
    "ClientError",
    "ConfigError",
    "Interrupted",
    "MarinaError",
    "NoDevice",
    "NoJava",
    "NotReady",
    "PortBusy",
    "Refused",
    "ServerDied",
    "ServerError",
    "StoreError",
    "TimedOut",
    "UnexpectedAnswer",
    "Unreachable",
    "UsageError",
]


class UsageError(MarinaError):
    """An option or an argument is unknown, missing or has a value that does not fit."""

    exit_code = 2


class ConfigError(MarinaError):
    """A setting is unknown, malformed, unsafe or contradicts another."""

    exit_code = 3


class ArchiveError(MarinaError):
    """An archive is refused: broken, altered, unsafe, or not what its record says."""

    exit_code = 5


class StoreError(ArchiveError):
    """The model store has no such archive, or its index and its files disagree."""


class ServerError(MarinaError):
    """TorchServe cannot start, did not get ready, or ended by itself."""

    exit_code = 6

    def __init__(self, message: str, *, remedy: str = "", log_tail: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.log_tail = log_tail
        """The last lines that java and the workers printed, oldest first; empty when none ran."""


class NoJava(ServerError):
    """No java was found, or the one found is too old."""


class NoDevice(ServerError):
    """A GPU was asked for and none can be used."""


class PortBusy(ServerError):
    """A port that the server needs is taken."""


class NotReady(ServerError):
    """A model did not load, or not in time; the message holds the worker's own cause."""


class ServerDied(ServerError):
    """java ended without being asked to."""

    def __init__(self, message: str, *, remedy: str = "", log_tail: str = "", status: int | None = None) -> None:
        super().__init__(message, remedy=remedy, log_tail=log_tail)
        self.status = status
        """java's exit status; negative: the number of the signal that ended it."""


class ClientError(MarinaError):
    """A request got no usable answer."""

    exit_code = 7


class Unreachable(ClientError):
    """Nothing listens there, or the connection broke before the answer was complete."""


class TimedOut(ClientError):
    """No connection, or no answer, within the client's timeout."""


class Refused(ClientError):
    """The server answered with an error status. The message is `title: detail`."""

    def __init__(self, title: str, *, status: int, detail: str = "", request_id: str = "", remedy: str = "") -> None:
        super().__init__(f"{title}: {detail}" if detail else title, remedy=remedy)
        self.status = status
        """The HTTP status, 400 to 599."""
        self.title = title
        self.detail = detail
        self.request_id = request_id
        """The request's id in the server's log; empty when the server gave none."""


class UnexpectedAnswer(ClientError):
    """The server answered with something else than the contract says: another service, or another version of it."""


class Interrupted(MarinaError):
    """Ctrl-C, or a signal that is taken for it."""

    exit_code = 130
