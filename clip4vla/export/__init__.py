"""Weights in and out: model folders, the official names, ONNX."""
