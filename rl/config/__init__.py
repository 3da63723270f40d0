"""The configuration: YAML files and overrides merged and validated into frozen models; `X.py` holds
the settings of X, which may be another folder's X.py. Loads no torch."""
