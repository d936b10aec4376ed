"""`marina doctor`: what is wrong with this installation, its store, its server or its log, and what to do about it.

finding      what a check says
host         java, Python modules, configuration, ports, disks, memory, GPUs, keys: whether a server could start here
stored       the model store: archives, their index, what is meant to be served
live         the running server, its workers and queues, the gateway in front of it
signatures   lines of a log, ours or TorchServe's own, and the cause that each of them betrays
examine      runs all of them, each group within its own time
"""
