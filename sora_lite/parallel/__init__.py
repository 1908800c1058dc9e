"""Processes (`env`) and how a plain model is laid out over them from outside (`apply`)."""
