"""`python -m relief_onnx_cli`."""

from .main import main

main()
