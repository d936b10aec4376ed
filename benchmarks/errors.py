"""What goes wrong in a comparison."""

from handlerlib.errors import MarinaError


class BenchmarkError(MarinaError):
    """The comparison cannot be made as asked."""

    exit_code = 2


class NotAvailable(MarinaError):
    """One system cannot take part here; the others can. Its message goes into the results."""

    exit_code = 6
