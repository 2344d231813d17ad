"""From `--model SPEC` to a .gguf file on this machine: `specs` says what it may be, `resolving` where the file is or comes from."""
