"""`--model hones_llava`: lmms-eval's `llava_hf` (LLaVA, LLaVA-NeXT, LLaVA-OneVision), steered."""

from lmms_eval.models.chat.llava_hf import LlavaHf
from lmms_eval.models.simple.llava_hf import LlavaHf as SimpleLlavaHf

from .steered import Steered


class Llava(Steered, LlavaHf):  # type: ignore[misc]
    """Steered `llava_hf`, prompted through its chat template."""

    base_wrapper = "llava_hf"
    own_likelihoods = False  # they fail on transformers 5


class SimpleLlava(Steered, SimpleLlavaHf):  # type: ignore[misc]
    """Steered `llava_hf` under `--force_simple`."""

    base_wrapper = "llava_hf"
    own_likelihoods = False  # they fail on transformers 5
