from relief_onnx_cli.main import main

main()
