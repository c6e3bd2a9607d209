"""Forward pre-hooks that edit or record the inputs of modules, and are always removed again.

One kind of hook serves every method: a head is a slice of the input of `o_proj`, and a neuron is one feature
of the input of `down_proj`. Recording, replacing, masking, scaling and learning all act on that input.

Compiled models need care. `torch.compile` traces a module's hooks into the compiled code, but by default does
not check later whether hooks were added: code that was compiled for a module without hooks silently ignores
them, and layers share code. So edits that stay attached switch those checks on first (`guard_hooks`) and drop
the code that was compiled without them; the next call compiles anew. Edits and recorders of one `with` block
run the model uncompiled instead (`uncompiled`), which costs no compilation.
"""

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hones_eval.core.experts import NeuronTap, Routed
from hones_eval.errors import EditError

Edit = Callable[[Tensor], Tensor]
"""A function of a module's input. It does not change the input in place, and keeps its shape and dtype.

An edit that cannot break this, given an input of its site's width, may say so by an attribute `is_safe`:
its results are then not checked at every token. One that only multiplies may have its factor [width] as an
attribute `factor`, which saves a call at every token.
"""


LOOKS = 3
"""The number of runs in which a steering's hook looks whether it changes its input."""


class Site(NamedTuple):
    """A module whose input is edited or recorded.

    `name` is used in messages; `width` is the size of the input's last dimension.
    """

    name: str
    module: nn.Module
    width: int


class AttachedEdits:
    """Edits that stay attached to the inputs of modules until `detach`."""

    def __init__(self, edits: Sequence[tuple[Site, Edit]], *, compiled: bool = True) -> None:
        """Attach every edit. `compiled=False` promises that the model runs within `uncompiled` meanwhile."""
        if compiled:
            guard_hooks()
        self._totals = [0] * len(edits)
        self._anything_compiled = False
        looks = LOOKS if compiled else 0
        self._hooks = [
            _EditHook(site, edit, self._totals, number, looks) for number, (site, edit) in enumerate(edits)
        ]
        self._handles = [hook.register() for hook in self._hooks]

    @property
    def runs(self) -> dict[str, int]:
        """How often each edit ran since the last check, by site name. Compiled code counts at most once."""
        return {hook.site.name: hook.runs for hook in self._hooks}

    def check_ran(self) -> None:
        """Raise EditError when an edit has not run since the last check, then reset the counts."""
        idle = [hook for hook in self._hooks if not hook.runs]
        for hook in self._hooks:
            hook.start_again()
        self._refuse(idle)

    def check_ever_ran(self) -> None:
        """Raise EditError when an edit has never run since it was attached."""
        self._refuse([hook for hook in self._hooks if not (hook.runs or hook.ever_ran)])

    def changed_nothing(self) -> bool:
        """Whether no edit changed its input in its first runs. Runs of compiled code are not looked at."""
        return all(hook.looked and not hook.changed for hook in self._hooks) and bool(self._hooks)

    def start_pass(self) -> list[int]:
        """The runs of every edit before a forward pass, to compare with at its end.

        This and `end_pass` run several times per generated token.
        """
        if self._anything_compiled or _anything_compiled():
            self._anything_compiled = True
            for hook in self._hooks:
                hook.ran_compiled = False
        return self._totals.copy()

    def end_pass(self, before: Sequence[int], *, some: bool = False) -> None:
        """Raise EditError when an edit (with `some`, every edit) did not run since `before`."""
        if not any(map(operator.eq, self._totals, before)):
            return
        unchanged = list(map(operator.eq, self._totals, before))
        idle = [
            hook for hook, same in zip(self._hooks, unchanged, strict=True) if same and not hook.ran_compiled
        ]
        if not some or len(idle) == len(self._hooks):
            self._refuse(idle, "did not run in a forward pass")

    def detach(self) -> None:
        """Remove every edit. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _refuse(self, idle: Sequence["_EditHook"], what: str = "never ran") -> None:
        if idle:
            raise EditError(
                f"{len(idle)} of {len(self._hooks)} edits {what}, the first at {idle[0].site.name}: the "
                "forward pass did not call that module, so its results are those of an unedited model"
            )


class _EditHook:
    """A forward pre-hook that edits the input of a site and counts its runs.

    It runs at every generated token, so it does as little as possible: hooks without keyword arguments are
    the cheaper kind, and `input_of`, which builds the error messages, is called only on bad input.
    """

    def __init__(self, site: Site, edit: Edit, totals: list[int], number: int, looks: int = 0) -> None:
        """Count all runs in `totals[number]`, which hooks share so that they are compared at once."""
        self.site, self._width = site, site.width
        self.edit = edit
        self.ever_ran = False
        self._totals, self._number = totals, number
        self._checked_at = 0
        self._compiled_runs = 0
        self.ran_compiled = False
        self.looked = self.changed = False
        self._looks = looks
        self._factor: Tensor | None = getattr(edit, "factor", None)
        self._is_safe = self._factor is not None or getattr(edit, "is_safe", False)

    @property
    def runs(self) -> int:
        """The runs since the last `start_again`. Compiled code counts at most once."""
        return self._totals[self._number] - self._checked_at + self._compiled_runs

    def start_again(self) -> None:
        """Count runs from 0."""
        self.ever_ran = self.ever_ran or self.runs > 0
        self._checked_at, self._compiled_runs = self._totals[self._number], 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Tensor:
        x = args[0] if len(args) == 1 else None
        if not isinstance(x, Tensor) or x.size(-1) != self._width:
            x = input_of(self.site, args)
        if torch.compiler.is_compiling() or self._looks or not self._is_safe:
            return self._checked(x, self.edit(x))
        if self._factor is None:
            edited = self.edit(x)
        else:
            try:
                edited = x * self._factor
            except RuntimeError:  # the factor is on another device than the input of an offloaded layer
                edited = self.edit(x)
                self._factor = getattr(self.edit, "factor", None)  # moved by the edit, once
            if edited.dtype is not x.dtype:
                edited = edited.to(x.dtype)
        self._totals[self._number] += 1
        return edited

    def register(self) -> Any:
        """Register the hook; an edit of routed activations sees no others. Returns what removes it."""
        module, edit = self.site.module, getattr(self.edit, "routed", None)
        if not isinstance(module, NeuronTap) or edit is None:
            return module.register_forward_pre_hook(self.__call__)
        return module.register_routed_hook(lambda part: self._checked(part.values, edit(part)))

    def _checked(self, x: Tensor, edited: Tensor) -> Tensor:
        if edited.shape != x.shape or edited.dtype != x.dtype:
            raise EditError(
                f"the edit at {self.site.name} turned {tuple(x.shape)} {x.dtype} into "
                f"{tuple(edited.shape)} {edited.dtype}; an edit must keep shape and dtype"
            )
        # Compiled code sets the count on every call, but does not read it: a count that is read becomes a
        # guard of the compiled code, and every new value would compile the model again.
        if torch.compiler.is_compiling():
            self._compiled_runs = 1
            self.ran_compiled = True
            return edited
        self._totals[self._number] += 1
        if self._looks:
            self._look(x, edited)
        return edited

    def _look(self, x: Tensor, edited: Tensor) -> None:
        """Note whether the edit changed its input. The first runs are enough, and looking takes time."""
        self.looked = True
        self.changed = not torch.equal(edited, x)
        self._looks = 0 if self.changed else self._looks - 1


@contextmanager
def editing(edits: Sequence[tuple[Site, Edit]]) -> Iterator[AttachedEdits]:
    """Attach edits for the length of a `with` block.

    Raises: EditError at the end of the block when an edit never ran.
    """
    with uncompiled():
        attached = AttachedEdits(edits, compiled=False)
        try:
            yield attached
            attached.check_ran()
        finally:
            attached.detach()


@contextmanager
def recording(sites: Sequence[Site], positions: slice | None = None) -> Iterator[dict[str, Tensor]]:
    """Record the most recent input of every site during a `with` block.

    Args:
        sites: the modules to record.
        positions: token positions to keep; None keeps all of them.

    Yields: tensors [batch, tokens, width] by site name, filled as the sites are called.
    Raises: EditError at the end of the block when a site was never called.
    """
    recorded: dict[str, Tensor] = {}

    def record(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = input_of(site, args)
            recorded[site.name] = x.detach() if positions is None else x.detach()[:, positions]

        return hook

    def register(site: Site) -> Any:
        if not isinstance(site.module, NeuronTap):
            return site.module.register_forward_pre_hook(record(site))
        recorder = _RoutedRecorder(site, positions)
        return site.module.register_routed_hook(
            lambda part: recorded.__setitem__(site.name, recorder.add(part))
        )

    with uncompiled():
        handles = [register(site) for site in sites]
        try:
            yield recorded
            missing = [site.name for site in sites if site.name not in recorded]
            if missing:
                raise EditError(f"nothing was recorded at {missing[0]}: no forward pass called it")
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def recording_calls(site: Site, positions: slice, kept: list[Tensor]) -> Iterator[None]:
    """Append the input [rows, positions, width] of every call of a site's module to `kept`."""
    if isinstance(site.module, NeuronTap):
        recorder = _RoutedRecorder(site, positions)

        def add(part: Routed) -> None:
            x = recorder.add(part)
            if not kept or kept[-1] is not x:
                kept.append(x)

        handle: Any = site.module.register_routed_hook(add)
    else:
        handle = site.module.register_forward_pre_hook(
            lambda module, args: kept.append(args[0][:, positions])
        )
    try:
        yield
    finally:
        handle.remove()


class _RoutedRecorder:
    """Records the neurons of a mixture of experts at some positions only, as [rows, positions, neurons]."""

    def __init__(self, site: Site, positions: slice | None) -> None:
        self._site, self._positions = site, slice(None) if positions is None else positions
        self._call: object = None
        self._kept = torch.empty(0)

    def add(self, part: Routed) -> Tensor:
        """Add the activations of one part of a layer; returns what is recorded of this call so far."""
        rows, length = part.size
        start, stop, _ = self._positions.indices(length)
        if part.call is not self._call:
            self._call = part.call
            self._kept = part.values.new_zeros(rows, max(stop - start, 0), self._site.width)
        width = part.values.shape[-1]
        own = self._kept[..., part.start : part.start + part.expert_count * width].unflatten(
            -1, (part.expert_count, width)
        )
        chosen = torch.nonzero((part.positions >= start) & (part.positions < stop)).flatten()
        where = (part.rows[chosen], part.positions[chosen] - start, part.experts[chosen])
        own[where] = part.values.detach()[chosen]
        return self._kept


def input_of(site: Site, args: tuple[Any, ...]) -> Tensor:
    """Return the input tensor of a call of a site's module.

    Raises: EditError when the module was not called with exactly one positional tensor of the site's width.
    """
    if len(args) != 1 or not isinstance(args[0], Tensor):
        raise EditError(f"{site.name} was called with {len(args)} positional arguments; expected one tensor")
    x = args[0]
    if x.shape[-1] != site.width:
        raise EditError(
            f"{site.name} received an input of shape {tuple(x.shape)}; its last size should be {site.width}"
        )
    return x


_replaced_forwards = 0
_ours: set[nn.Module] = set()


def partial_forwards() -> bool:
    """Whether a `forward` is replaced at the moment, so that passes need not call every module."""
    return _replaced_forwards > 0


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module runs another `forward` than its class's, beyond a block of `replaced_forward`."""
    return "forward" in vars(module) and module not in _ours


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's `forward` by another function for the length of a `with` block."""
    with replaced_forwards([(module, forward)]):
        yield


@contextmanager
def replaced_forwards(replacements: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace the `forward` of several modules, each of them once, for the length of a `with` block."""
    global _replaced_forwards
    # accelerate stores a wrapped forward on the instance
    own = [vars(module).get("forward") for module, _ in replacements]
    with uncompiled():
        for (module, forward), before in zip(replacements, own, strict=True):
            vars(module)["forward"] = forward
            if before is None:
                _ours.add(module)
        _replaced_forwards += 1
        try:
            yield
        finally:
            _replaced_forwards -= 1
            for (module, _), before in zip(replacements, own, strict=True):
                if before is None:
                    _ours.discard(module)
                    del vars(module)["forward"]
                else:
                    vars(module)["forward"] = before


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled models uncompiled within the block, so that hooks attached in it act.

    Costs nothing where nothing has been compiled. Code that is compiled within the block all the same,
    because it is the first of the process, is dropped at the end: it may hold the block's hooks.
    """
    if not _anything_compiled():
        try:
            yield
        finally:
            _drop_compiled_code()
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def guard_hooks() -> None:
    """Make compiled code notice hooks that are added and removed from now on.

    Code that was compiled so far is dropped: it may not have noticed. Every steering gets a fresh start also
    because the compiler gives up on code that it had to compile again for the eighth time.
    """
    import torch._dynamo.config  # transformers has imported it already; alone it would take seconds

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    _drop_compiled_code()


def _drop_compiled_code() -> None:
    if _anything_compiled():
        torch.compiler.reset()


def _anything_compiled() -> bool:
    """Whether `torch.compile` has compiled anything since the start of the process or the last reset."""
    frames = sys.modules.get("torch._dynamo.convert_frame")  # imported by the first compilation at the latest
    return frames is not None and bool(frames.input_codes.seen)
