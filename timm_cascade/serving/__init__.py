"""Answering requests over HTTP: decoding, batches of requests, metrics and the application."""
