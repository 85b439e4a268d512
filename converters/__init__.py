"""Fitted pipelines to proven ONNX artifacts."""
