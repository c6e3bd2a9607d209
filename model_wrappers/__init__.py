"""Steered versions of lmms-eval's models, found by lmms-eval through an entry point.

Importing this package is cheap; torch and the wrappers are imported when a model is used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> "list[ModelManifest]":
    """The entry point that lmms-eval calls: one manifest per model. Also installs the plug-in's patches."""
    # Importing lmms_eval.models calls this function, so nothing imported above may import lmms_eval.models.
    from lmms_eval.models.registry_v2 import ModelManifest

    from . import plugin, registry

    def manifest(name: str) -> ModelManifest:
        simple, chat = (registry.class_path(name, form) for form in ("simple", "chat"))
        return ModelManifest(f"hones_{name}", simple, chat, aliases=(f"vseam_{name}",))

    plugin.install()
    any_base = f"{__name__}.any_base"
    return [
        *(manifest(name) for name in registry.FAMILIES),
        ModelManifest("hones", f"{any_base}.SimpleAnyBase", f"{any_base}.AnyBase", aliases=("vseam",)),
    ]
