"""lmms-eval's own models, with a steering inside: found by lmms-eval through an entry point.

Importing this costs no more than lmms-eval's table of model names; torch and the wrappers come when used.
"""

from lmms_eval.models.registry_v2 import ModelManifest

from . import plugin


def manifests() -> list[ModelManifest]:
    """What lmms-eval asks the entry point for: one manifest a model. Also installs the plug-in's patches."""
    plugin.install()
    here = __name__
    return [
        _manifest("llava", simple=f"{here}.llava.SimpleLlava", chat=f"{here}.llava.Llava"),
        _manifest("qwen2_5_vl", simple=f"{here}.qwen2_5_vl.SimpleQwen", chat=f"{here}.qwen2_5_vl.Qwen"),
        _manifest("instructblip", simple=f"{here}.instructblip.InstructBlip"),
        ModelManifest(
            "hones",
            simple_class_path=f"{here}.any_base.SimpleAnyBase",
            chat_class_path=f"{here}.any_base.AnyBase",
            aliases=("vseam",),
        ),
    ]


def _manifest(family: str, *, simple: str, chat: str | None = None) -> ModelManifest:
    return ModelManifest(f"hones_{family}", simple, chat, aliases=(f"vseam_{family}",))
