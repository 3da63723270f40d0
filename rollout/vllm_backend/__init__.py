"""The vLLM engine: in process groups of its own or on running servers."""
