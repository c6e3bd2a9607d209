"""Hang edits and recorders on the inputs of modules, and always take them off again.

One forward pre-hook serves everything: a head is a slice of the input of `o_proj`, a neuron an entry of
the input of `down_proj`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from hones_eval.errors import EditError

Edit = Callable[[Tensor], Tensor]


class Site(NamedTuple):
    """A module whose input is edited or recorded: its name for messages, and the input's last size."""

    name: str
    module: nn.Module
    width: int


class AttachedEdits:
    """Edits that stay on the inputs of modules until `detach`."""

    def __init__(self, edits: Sequence[tuple[Site, Edit]]) -> None:
        """Attach every edit; `runs` counts how often each has run."""
        self.runs = {site.name: 0 for site, _ in edits}
        self._handles = [
            site.module.register_forward_pre_hook(self._hook(site, edit)) for site, edit in edits
        ]

    def check_ran(self) -> None:
        """Raise EditError when an edit has not run since the last check, and start counting anew."""
        idle = [name for name, count in self.runs.items() if count == 0]
        self.runs = dict.fromkeys(self.runs, 0)
        if idle:
            raise EditError(
                f"{len(idle)} of {len(self.runs)} edits never ran, the first at {idle[0]}: the forward pass "
                "did not go through that module's __call__, so its results are those of an unedited model"
            )

    def detach(self) -> None:
        """Take every edit off. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, site: Site, edit: Edit) -> Callable[..., Any]:
        # Runs at every generated token: a hook without keyword arguments is the cheaper kind, and `input_of`
        # is called only to complain.
        def edit_input(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
            x = args[0] if len(args) == 1 else None
            if not isinstance(x, Tensor) or x.shape[-1] != site.width:
                x = input_of(site, args)
            edited = edit(x)
            if edited.shape != x.shape or edited.dtype != x.dtype:
                raise EditError(
                    f"the edit at {site.name} turned {tuple(x.shape)} {x.dtype} into "
                    f"{tuple(edited.shape)} {edited.dtype}; an edit keeps shape and type"
                )
            self.runs[site.name] += 1
            return edited

        return edit_input


@contextmanager
def editing(edits: Sequence[tuple[Site, Edit]]) -> Iterator[AttachedEdits]:
    """Edits attached for the length of a `with` block, in which each has to run at least once."""
    attached = AttachedEdits(edits)
    try:
        yield attached
        attached.check_ran()
    finally:
        attached.detach()


@contextmanager
def recording(sites: Sequence[Site], positions: slice | None = None) -> Iterator[dict[str, Tensor]]:
    """Record the last input of every site, by name: [batch, tokens, width], or only some positions.

    Raises EditError at the end of the block for a site that nothing passed through.
    """
    kept: dict[str, Tensor] = {}

    def record(site: Site) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = input_of(site, args)
            kept[site.name] = x.detach() if positions is None else x.detach()[:, positions]

        return keep

    handles = [site.module.register_forward_pre_hook(record(site)) for site in sites]
    try:
        yield kept
        missing = [site.name for site in sites if site.name not in kept]
        if missing:
            raise EditError(f"nothing to record: no forward pass went through {missing[0]}")
    finally:
        for handle in handles:
            handle.remove()


def input_of(site: Site, args: tuple[Any, ...]) -> Tensor:
    """The one positional tensor that a linear layer is called with; any other call is an EditError."""
    if len(args) != 1 or not isinstance(args[0], Tensor):
        raise EditError(f"{site.name} was called with {len(args)} positional arguments, not with one tensor")
    x = args[0]
    if x.shape[-1] != site.width:
        raise EditError(f"{site.name} received {tuple(x.shape)}, but its last size should be {site.width}")
    return x


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another function in place of a module's forward, for one block."""
    attributes = vars(module)
    own = attributes.get("forward")  # accelerate puts a wrapped forward on the instance
    attributes["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del attributes["forward"]
        else:
            attributes["forward"] = own
