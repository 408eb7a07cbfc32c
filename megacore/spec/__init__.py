"""The single truth about a model: every parameter, its FLOPs and its bytes. Real modules are tested against it."""

from megacore.spec.model import LayerSpec, ModelSpec
from megacore.spec.params import ParamSpec

__all__ = ["LayerSpec", "ModelSpec", "ParamSpec"]
