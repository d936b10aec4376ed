import a_package_that_nobody_has  # noqa: F401


class Incomplete:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        return [b""] * len(data)
