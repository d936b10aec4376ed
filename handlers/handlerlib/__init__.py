"""What every archive carries beside its handler: shared by training, verification and the worker.

Modules are imported by name (`from handlerlib.spec import ModelSpec`); nothing is re-exported here, so that
reading a spec never imports torch.
"""
