"""The configuration: YAML files and overrides merged and validated into frozen models. Loads no
torch."""
