"""From labelled images to `artifacts/<name>/<version>/`. `training.pipeline` holds the commands' entry points.

Nothing is re-exported here, so that importing `training.config` stays cheap.
"""
