"""What `--model SPEC` names: a .gguf file on this machine, fetched first where it has to be.

A path is looked at, a short name is taken out of a package (`packaged`), `hf:ORG/REPO[:...]` comes through huggingface_hub (`hub`).
"""

from meshserve.engines.models.resolving import ModelSource, is_real_model, resolve

__all__ = ["ModelSource", "is_real_model", "resolve"]
