"""Edit hooks and recording hooks: they act, they refuse bad input, and they are always removed."""

import pytest
import torch
from torch import Tensor, nn

from hones_eval.core.hooks import AttachedEdits, Site, editing, recording
from hones_eval.errors import EditError


class Net(nn.Module):
    """Two linear layers; the second can be bypassed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return nn.functional.linear(x, self.second.weight) if self.skip else self.second(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.arange(24.0).view(2, 3, 4) / 10 - 1


def sites(net: Net) -> list[Site]:
    return [Site("first", net.first, 4), Site("second", net.second, 6)]


def hooks(net: Net) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules())


def test_an_edit_acts_on_the_input_while_it_is_attached(net: Net) -> None:
    before = net(X)
    with editing([(sites(net)[1], lambda x: 2 * x)]) as attached:
        inside = net(X)
        assert attached.runs == {"second": 1}
    expected = nn.functional.linear(2 * torch.relu(net.first(X)), net.second.weight, net.second.bias)
    assert torch.equal(inside, expected)
    assert torch.equal(net(X), before)
    assert hooks(net) == 0


def test_an_edit_that_never_ran_is_an_error_that_names_it(net: Net) -> None:
    net.skip = True
    with (
        pytest.raises(EditError, match="1 of 2 edits never ran, the first at second"),
        editing([(site, lambda x: x + 1) for site in sites(net)]),
    ):
        net(X)
    assert hooks(net) == 0


def test_every_check_resets_the_counts(net: Net) -> None:
    attached = AttachedEdits([(sites(net)[0], lambda x: x + 1)])
    net(X)
    attached.check_ran()
    with pytest.raises(EditError, match="never ran, the first at first"):
        attached.check_ran()
    attached.detach()
    attached.detach()
    assert hooks(net) == 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda x: x[..., :1].expand(-1, -1, -1), r"turned \(2, 3, 6\) torch.float32 into \(2, 3, 1\)"),
        (lambda x: x[:1], r"into \(1, 3, 6\)"),
        (lambda x: x.double(), r"into \(2, 3, 6\) torch.float64; an edit must keep shape and dtype"),
    ],
)
def test_an_edit_that_changes_shape_or_type_is_an_error(net: Net, edit: object, message: str) -> None:
    with pytest.raises(EditError, match="the edit at second .*" + message), editing([(sites(net)[1], edit)]):
        net(X)
    assert hooks(net) == 0


def test_a_site_of_another_width_is_an_error(net: Net) -> None:
    wrong = Site("second", net.second, 5)
    for attached in (lambda: editing([(wrong, lambda x: x)]), lambda: recording([wrong])):
        with (
            pytest.raises(EditError, match=r"second received .* \(2, 3, 6\); .* should be 5"),
            attached(),
        ):
            net(X)
    assert hooks(net) == 0


@pytest.mark.parametrize("attach", [lambda s: editing([(s[0], lambda x: x)]), recording])
def test_a_module_called_with_other_arguments_is_an_error(net: Net, attach: object) -> None:
    for call in (lambda: net.first(input=X), lambda: net.first(X, X)):
        with pytest.raises(EditError, match="first was called with"), attach(sites(net)):
            call()
    assert hooks(net) == 0


@pytest.mark.parametrize("attach", [lambda s: editing([(site, lambda x: x) for site in s]), recording])
def test_hooks_are_removed_after_any_exception(net: Net, attach: object) -> None:
    for error in (KeyError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), attach(sites(net)):
            raise error
        assert hooks(net) == 0


def test_an_edit_that_raises_leaves_no_hook(net: Net) -> None:
    def fails(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), editing([(sites(net)[0], fails)]):
        net(X)
    assert hooks(net) == 0


def test_hooks_of_others_are_kept(net: Net) -> None:
    seen: list[Tensor] = []
    net.second.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with editing([(sites(net)[1], lambda x: x + 1)]):
        net(X)
    net(X)
    assert len(seen) == 2


def test_recording_keeps_the_last_input_of_every_site(net: Net) -> None:
    with recording(sites(net)) as recorded:
        net(X + 1)
        net(X)
    assert torch.equal(recorded["first"], X)
    assert torch.equal(recorded["second"], torch.relu(net.first(X)))
    assert not recorded["second"].requires_grad
    assert hooks(net) == 0


def test_recording_some_positions(net: Net) -> None:
    with recording(sites(net), slice(-2, None)) as recorded:
        net(X)
    assert torch.equal(recorded["first"], X[:, -2:])


def test_recording_a_module_that_is_never_called_is_an_error(net: Net) -> None:
    net.skip = True
    with (
        pytest.raises(EditError, match="recorded at second: no forward pass called"),
        recording(sites(net)),
    ):
        net(X)
    assert hooks(net) == 0


def test_recording_sees_the_input_after_an_earlier_edit(net: Net) -> None:
    with editing([(sites(net)[1], lambda x: x + 1)]), recording(sites(net)) as recorded:
        net(X)
    assert torch.equal(recorded["second"], torch.relu(net.first(X)) + 1)
