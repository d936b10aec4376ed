"""LitServe.

documented: a LitAPI with setup, decode_request, predict and encode_response, everything else as it is.
optimised:  workers per device, its fast queue, and batches that LitServe gathers, with Marina's model in `predict`.

The hooks have no annotations, as in LitServe's documentation: it would take them for the schema of body and answer.
"""

import litserve as ls

from benchmarks.peers.settings import Settings

settings = Settings.read()


class ImageClassifier(ls.LitAPI):
    def setup(self, device):
        self.classifier = settings.classifier()

    def decode_request(self, request):
        return self.classifier.decode(request["content"].file.read())

    def predict(self, x):
        return self.classifier.classify([x])[0]

    def encode_response(self, output):
        return output


class BatchedClassifier(ImageClassifier):
    def batch(self, inputs):
        return inputs

    def predict(self, x):
        return self.classifier.classify(x)

    def unbatch(self, output):
        return output


if __name__ == "__main__":
    if settings.optimised:
        api = BatchedClassifier(max_batch_size=settings.batch, batch_timeout=0.001)
        server = ls.LitServer(api, accelerator=settings.device, workers_per_device=settings.workers, fast_queue=True)
    else:
        server = ls.LitServer(ImageClassifier())
    server.run(host="127.0.0.1", port=settings.port, generate_client_file=False)
