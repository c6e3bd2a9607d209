"""`--model hones_qwen2_5_vl`: lmms-eval's `qwen2_5_vl`, steered."""

from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL
from lmms_eval.models.simple.qwen2_5_vl import Qwen2_5_VL as SimpleQwen2_5_VL

from .steered import Steered


class Qwen(Steered, Qwen2_5_VL):  # type: ignore[misc]
    """Steered `qwen2_5_vl`, prompted through its chat template."""

    base_wrapper = "qwen2_5_vl"


class SimpleQwen(Steered, SimpleQwen2_5_VL):  # type: ignore[misc]
    """Steered `qwen2_5_vl` under `--force_simple`."""

    base_wrapper = "qwen2_5_vl"
