class OddWeights:
    def initialize(self, context):
        raise RuntimeError("size mismatch for fc.weight")

    def handle(self, data, context):
        return [b""] * len(data)
