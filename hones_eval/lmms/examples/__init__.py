"""Examples made from any lmms-eval task with any lmms-eval model whose wrapper calls `generate`."""

from hones_eval.lmms.example import Example
from hones_eval.lmms.examples.dataset import TaskExamples
from hones_eval.lmms.models import inner_model, load_lmm

__all__ = ["Example", "TaskExamples", "inner_model", "load_lmm"]
