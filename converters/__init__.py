"""Fitted pipelines to proven ONNX artifacts."""

from converters.artifact import Artifact, convert
from converters.parity import check_parity
from converters.report import ParityReport

__all__ = ["Artifact", "ParityReport", "check_parity", "convert"]
