"""Checks, for every forward pass of a model, that each edit that is attached to it ran in that pass.

A hook that is bypassed leaves no trace in the output: the model simply gives its unedited logits. Counting
the hook's runs over a whole evaluation is not enough, because `generate` runs the prompt and the decode steps
by different code: the prompt may be edited while every decode step, which transformers compiles by itself, is
not. So the runs are compared before and after every single pass.

The comparison itself must not be compiled away. Whatever calls the decoder can be compiled: the model, a
module between the model and the decoder, their `forward`, or the function that `generate` asks the model for.
So all modules on the way from the model to the decoder are watched. Each is watched by hooks, which act when
the module's own call is not compiled, and by a function around its compiled call, which runs outside of the
compiled code. Inside of compiled code both do nothing; there the edits themselves leave a mark (`_EditHook`).
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hones_eval.core.hooks import AttachedEdits, partial_forwards

Undo = Callable[[], None]


def check_every_pass(
    model: nn.Module, decoder: nn.Module, attached: AttachedEdits, *, some: bool = False
) -> Undo:
    """Raise EditError in every forward pass of a model in which an attached edit does not run.

    Args:
        model: the module that users call: the Hugging Face model, or `torch.compile` of it.
        decoder: the module inside the model that runs all layers.
        attached: the edits; each has to run at least once per pass.
        some: it is enough that one of them runs, as in models that leave out layers.

    Returns: a function that stops the checks.
    """
    undo: list[Undo] = []
    for module in _modules_around(model, decoder):
        check = _PassCheck(attached, some)
        undo.append(module.register_forward_pre_hook(check.before).remove)
        undo.append(module.register_forward_hook(check.after).remove)
        undo += _around_compiled_calls(module, check)

    def stop() -> None:
        while undo:
            undo.pop()()

    return stop


def _modules_around(model: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """The decoder and all modules that contain it, the model first."""
    return [part for part in model.modules() if any(inner is decoder for inner in part.modules())]


class _PassCheck:
    """Compares the runs of all edits before and after each call of one module, per thread."""

    def __init__(self, attached: AttachedEdits, some: bool) -> None:
        self.on = True
        self._attached, self._some = attached, some
        self._thread = threading.local()  # DataParallel runs replicas of a module at the same time

    def before(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._thread.runs = self._attached.start_pass()

    def after(self, *_: Any) -> None:
        if torch.compiler.is_compiling() or partial_forwards():
            return
        if (runs := getattr(self._thread, "runs", None)) is not None:
            self._thread.runs = None
            self._attached.end_pass(runs, some=self._some)

    def checked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function that calls `call`, and checks each call while the check is on."""

        def checked_call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not self.on:
                return call(*args, **kwargs)
            self.before()
            output = call(*args, **kwargs)
            self.after()
            return output

        return checked_call


def _around_compiled_calls(module: nn.Module, check: _PassCheck) -> list[Undo]:
    """Check the calls of a module that run compiled: after `module.compile()`, and those of `generate`."""
    undo = []
    compiled = vars(module).get("_compiled_call_impl")
    if compiled is not None:
        undo.append(_replaced(module, "_compiled_call_impl", check.checked(compiled), check))
    if isinstance(module, PreTrainedModel):
        get = module.get_compiled_call

        def get_checked(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            return check.checked(get(*args, **kwargs))

        undo.append(_replaced(module, "get_compiled_call", get_checked, check))

    def switch_off() -> None:
        check.on = False

    return [*undo, switch_off]


def _below(replacement: Any) -> Any:
    """What was in the place of a replacement before it."""
    return replacement.own


def _replaced(module: nn.Module, name: str, value: Any, check: _PassCheck) -> Undo:
    """Replace an attribute of a module by a function of a check; the returned function restores it.

    Checks may be removed in any order. One that is inside of another's function is only switched off, and
    the last to be removed restores what was there before all of them.
    """
    attributes = vars(module)
    value.check, value.own = check, attributes.get(name)
    attributes[name] = value

    def restore() -> None:
        if attributes.get(name) is not value:
            return  # inside of another check's function, or replaced by the user
        own = _below(value)
        while own is not None and getattr(own, "check", None) is not None and not own.check.on:
            own = _below(own)
        if own is None:
            del attributes[name]
        else:
            attributes[name] = own

    return restore
