"""relief-onnx: make trained ONNX models smaller."""
