"""The command line of relief-onnx."""
