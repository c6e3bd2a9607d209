"""Causal tracing: replayed patches equal a plain loop with hooks; bad pairs are counted and named."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from families import Family
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image, ImageDraw
from torch import Tensor, nn

from hones_eval.__main__ import main
from hones_eval.core.anatomy import Anatomy
from hones_eval.engine import patching, tokens
from hones_eval.errors import HonesError
from hones_eval.lmms.examples import Example
from hones_eval.methods.tracing import WHATS, CausalTrace, Pair, Reading, Refused, Traced
from hones_eval.reports import trace_tables
from hones_eval.reports.trace_figures import layer_curves
from hones_eval.reports.trace_tables import Curve

Inputs = dict[str, Tensor]
Capture = pytest.CaptureFixture[str]
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "instructblip")
QUESTION = "Is the cat black?"


def draw(colour: str, size: tuple[int, int] = (64, 48)) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).ellipse([4, 4, size[0] // 2, size[1] // 2], fill=colour)
    return picture


def inputs_of(family: Family, picture: Image.Image, text: str = QUESTION) -> Inputs:
    return dict(family.inputs(text, [picture]))


def padded(family: Family, inputs: Inputs, count: int) -> Inputs:
    """Padding in front; in InstructBLIP between picture and text, with the positions that it then needs."""
    ids = inputs["input_ids"]
    start = 0
    if family.name == "instructblip":
        start = int((ids[0] != family.model.config.image_token_id).nonzero()[0])
    fill = {"input_ids": family.tokenizer.pad_token_id}
    longer = {}
    for name, value in inputs.items():
        if value.shape == ids.shape and not value.is_floating_point():
            pads = torch.full((1, count), fill.get(name, 0), dtype=value.dtype)
            longer[name] = torch.cat([value[:, :start], pads, value[:, start:]], 1)
    made = {**inputs, **longer}
    if family.name == "instructblip":
        made["position_ids"] = (made["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return made


def example(family: Family, inputs: Inputs, answer: str, ids: Sequence[int] | None = None) -> Example:
    encoded = family.tokenizer.encode(answer, add_special_tokens=False) if ids is None else list(ids)
    return Example(0, "drawn", "test", 0, inputs, {}, answer, [answer], encoded, [], "")


def pair(family: Family, clean: Inputs, edited: Inputs, answers: tuple[str, str] = ("Yes", "No")) -> Pair:
    made = [example(family, one, answer) for one, answer in zip((clean, edited), answers, strict=True)]
    return Pair(0, "drawn 0", made[0], made[1], {"object": ["cat"], "attribute": ["black"]})


def traced(
    family: Family, one: Pair, whats: Sequence[Any] = WHATS, rows: int | None = None
) -> Traced | Refused:
    trace = CausalTrace(Anatomy.of(family.model), family.tokenizer, whats, rows)
    record = trace.measure(one).record
    assert trace.patcher.inexact is None
    return record


class Plain:
    """The paper's loop: a forward with hooks that keep, and one with a hook that puts back for each cell."""

    def __init__(self, family: Family, one: Pair) -> None:
        self.model = family.model
        self.layers = plain.layers(family.model)
        self.one = one
        self.norm = plain.language_model(family.model).norm
        self.kept: dict[tuple[str, int], Tensor] = {}
        handles = []
        for number, module in enumerate([*self.layers, self.norm]):
            handles.append(module.register_forward_pre_hook(self._keep_input(number), with_kwargs=True))
        for number, layer in enumerate(self.layers):
            for name, module in (("attention", layer.self_attn), ("ffn", layer.mlp)):
                handles.append(module.register_forward_hook(self._keep_output(name, number)))
        self.clean = self.read(one.clean.inputs)
        for handle in handles:
            handle.remove()
        self.edited = self.read(one.edited.inputs)

    def _keep_input(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.kept["stream", number] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    def _keep_output(self, name: str, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.kept[name, number] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    @torch.no_grad()
    def read(self, inputs: Mapping[str, Any]) -> list[float]:
        last = self.model(**inputs).logits[0, -1].float()
        clean, edited = self.one.clean.target_ids, self.one.edited.target_ids
        probabilities = torch.softmax(last, -1)
        return [
            sum(float(probabilities[i]) for i in clean),
            sum(float(last[i]) for i in clean) / len(clean),
            sum(float(last[i]) for i in clean) / len(clean)
            - sum(float(last[i]) for i in edited) / len(edited),
        ]

    def patched(self, part: str, number: int, to: Sequence[int], source: Sequence[int]) -> list[float]:
        clean = self.kept[part, number]

        def changed(x: Tensor) -> Tensor:
            x = x.clone()
            for position, other in zip(to, source, strict=True):
                x[0, position] = clean[0, other]
            return x

        def on_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (changed(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

        def on_output(module: nn.Module, args: Any, output: Any) -> Any:
            return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

        if part == "stream":
            module = [*self.layers, self.norm][number]
            handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
        else:
            layer = self.layers[number]
            handle = (layer.self_attn if part == "attention" else layer.mlp).register_forward_hook(on_output)
        try:
            return self.read(self.one.edited.inputs)
        finally:
            handle.remove()


def places(family: Family, inputs: Inputs) -> tuple[list[int], list[int]]:
    """Image and text positions, counted off one by one."""
    ids, mask = inputs["input_ids"][0].tolist(), inputs["attention_mask"][0].tolist()
    image = [i for i, one in enumerate(ids) if one == family.model.config.image_token_id]
    return image, [i for i in range(len(ids)) if i not in image and mask[i]]


def agrees(family: Family, one: Pair, found: Traced, image: bool = True) -> None:
    """Every cell equals the plain loop's, and the map is not flat."""
    slow = Plain(family, one)
    close(found.clean, slow.clean)
    close(found.edited, slow.edited)
    (to_image, to_text), (from_image, from_text) = (
        places(family, which.inputs) for which in (one.edited, one.clean)
    )
    depth = len(slow.layers)
    streams = {"text": (to_text, from_text), "last": (to_text[-1:], from_text[-1:])}
    if image:
        streams["image"] = (to_image, from_image)
    for what, (to, source) in streams.items():
        for number in range(depth + 1):
            close(found.values[what][number], slow.patched("stream", number, to, source))
    for part in ("attention", "ffn"):
        assert found.values[part].shape == (len(to_text), depth, 3)
        for cell in range(0, len(to_text), 3 if len(to_text) % 3 else 2):
            for number in range(depth):
                expected = slow.patched(part, number, [to_text[cell]], [from_text[cell]])
                close(found.values[part][cell, number], expected)
        for number in range(depth):
            expected = slow.patched(part, number, to_text[-1:], from_text[-1:])
            close(found.values[part][-1, number], expected)
    assert (found.values["attention"][..., 2] - found.edited.difference).abs().max() > 1e-3


def close(found: Any, expected: Sequence[float]) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.tensor(expected).double(), rtol=3e-5, atol=3e-5
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_cell_equals_a_plain_loop_with_hooks(build_family: Callable[[str], Family], name: str) -> None:
    family = build_family(name)
    one = pair(family, inputs_of(family, draw("red")), inputs_of(family, draw("blue")))
    found = traced(family, one)
    assert isinstance(found, Traced)
    agrees(family, one, found)
    # Nothing but the picture differs between the two inputs; Qwen3-VL adds it again above layers 0 and 1.
    if name != "qwen3_vl":
        close(found.values["image"][0], found.clean)
    close(found.values["text"][0], found.edited)
    close(found.values["image"][-1], found.edited)
    close(found.values["last"][-1], found.clean)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "instructblip"])
def test_with_different_padding_of_the_two_inputs(build_family: Callable[[str], Family], name: str) -> None:
    family = build_family(name)
    clean, edited = inputs_of(family, draw("red")), inputs_of(family, draw("blue"))
    one = pair(family, padded(family, clean, 5), padded(family, edited, 2))
    found = traced(family, one, rows=7)
    assert isinstance(found, Traced)
    agrees(family, one, found)
    unpadded = traced(family, pair(family, clean, edited))
    assert isinstance(unpadded, Traced)
    assert found.tokens == unpadded.tokens
    for what in WHATS:
        torch.testing.assert_close(found.values[what], unpadded.values[what], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "instructblip"])
def test_with_pictures_of_different_sizes(build_family: Callable[[str], Family], name: str) -> None:
    family = build_family(name)
    one = pair(family, inputs_of(family, draw("red")), inputs_of(family, draw("blue", (112, 150))))
    found = traced(family, one)
    if name != "qwen2_5_vl":  # the others see every picture in one size
        assert isinstance(found, Traced)
        agrees(family, one, found)
        return
    assert isinstance(found, Refused)
    assert "image tokens" in found.reason
    text_only = traced(family, one, ("text", "last", "attention", "ffn"))
    assert isinstance(text_only, Traced)
    agrees(family, one, text_only, image=False)


def test_pictures_of_as_many_tokens_but_another_layout_do_not_correspond(
    build_family: Callable[[str], Family],
) -> None:
    family = build_family("qwen2_5_vl")
    one = pair(family, inputs_of(family, draw("red", (56, 112))), inputs_of(family, draw("blue", (112, 56))))
    assert one.clean.inputs["input_ids"].shape == one.edited.inputs["input_ids"].shape
    found = traced(family, one, ["image"])
    assert isinstance(found, Refused)
    assert "image_grid_thw" in found.reason


def test_bad_pairs_are_named(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    clean, edited = inputs_of(family, draw("red")), inputs_of(family, draw("blue"))
    same = pair(family, clean, edited, ("Yes", "yes "))
    silent = Pair(0, "drawn 0", example(family, clean, "Yes"), example(family, edited, "", []), {})
    alike = Pair(0, "a", example(family, clean, "Yes", [5]), example(family, edited, "No", [5]), {})
    other = pair(family, clean, inputs_of(family, draw("blue"), "Is the dog black?"))
    for one, message in (
        (same, "clean and edited answers agree: 'Yes'"),
        (silent, "the answer '' has no tokens"),
        (alike, "'Yes' and 'No' have the same tokens"),
        (other, "the prompts differ"),
    ):
        found = traced(family, one, ["text"])
        assert isinstance(found, Refused)
        assert message in found.reason
    measured = CausalTrace(Anatomy.of(family.model), family.tokenizer, ["text"]).measure(same)
    assert (float(measured.sums["refused"]), float(measured.sums["traced"])) == (1, 0)


def test_roles_are_those_of_the_words(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    found = traced(
        family, pair(family, inputs_of(family, draw("red")), inputs_of(family, draw("blue"))), ["last"]
    )
    assert isinstance(found, Traced)
    assert "".join(found.tokens).count(QUESTION) == 1
    by_role = {}
    for token, role in zip(found.tokens, found.roles, strict=True):
        by_role[role] = by_role.get(role, "") + token
    assert by_role["object"].strip() == "cat"
    assert by_role["attribute"].strip() == "black"
    assert found.roles[-1] == tokens.LAST
    labels = tokens.token_roles(
        [" Are", " the", " cat", "s", "'", " scat", " tered", "?"], {"object": ["cat"]}
    )
    assert labels == ["Are", "the", "object", "object", "'", "scat", "tered", tokens.LAST]


def test_a_model_that_cannot_be_replayed_is_traced_by_full_forwards(
    build_family: Callable[[str], Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = build_family("llava")
    one = pair(family, inputs_of(family, draw("red")), inputs_of(family, draw("blue")))
    walk = patching.PatchReplay.walk
    monkeypatch.setattr(patching.PatchReplay, "walk", lambda *args, **kwargs: walk(*args, **kwargs) + 1)
    trace = CausalTrace(Anatomy.of(family.model), family.tokenizer, WHATS)
    found = trace.measure(one).record
    assert trace.patcher.inexact is not None
    assert "differ" in trace.patcher.inexact
    agrees(family, one, found)


def test_one_pair_at_a_time(build_family: Callable[[str], Family]) -> None:
    family = build_family("llava")
    two = dict(family.inputs([QUESTION, QUESTION], [[draw("red")], [draw("blue")]]))
    with pytest.raises(HonesError, match="one pair of inputs at a time"):
        patching.Patcher(Anatomy.of(family.model)).record(two, two)


# The command, on drawn pairs


def drawn_pairs(root: Path) -> Path:
    """Six questions of the colour category; one lacks its edited picture, one keeps its answer."""
    records = []
    for number in range(6):
        picture = draw(["red", "green"][number % 2])
        folder = root / "clean"
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"p{number}.png")
        record = {"question_id": f"q{number}", "imageId": f"p{number}", "answer": ["Yes", "No"][number % 2]}
        record |= {
            "question": f"Is the {['cat', 'dog'][number % 2]} black?",
            "involved_objects": ["cat", "dog"],
        }
        if number != 4:
            (root / "edited").mkdir(exist_ok=True)
            draw("blue").save(root / "edited" / f"q{number}.png")
        records.append(record | ({"edited_answer": "Yes"} if number == 2 else {}))
    (root / "color.json").write_text(json.dumps(records))
    return root


def command(checkpoint: Path, out: Path, *more: str) -> list[str]:
    model = ["--model", "llava_hf", "--model_args", f"pretrained={checkpoint}", "--out", str(out)]
    return ["trace", "--clean", "vseam_color", "--edited", "vseam_color_edited", *model, *more]


def test_the_command_averages_what_its_tables_hold(
    llava_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HONES_EVAL_DATA", str(drawn_pairs(tmp_path / "data")))
    out = tmp_path / "out"
    assert main(command(llava_checkpoint, out, "--what", "image,last,ffn", "--examples", "9")) == 0
    names = {"index.html", "trace.json", "layers.csv", "tokens.csv", "roles.csv", "layers.png"}
    names |= {"vseam_color_ffn_roles.png"}
    assert {path.name for path in out.iterdir()} == names | {f"vseam_color_ffn_pair{i}.png" for i in range(4)}
    (found,) = json.loads((out / "trace.json").read_text())["categories"]
    assert found["pairs"] == 4
    assert found["left_out"] == {
        "its clean and edited answers agree: 'Yes'": ["q2"],
        "it has no counterpart in vseam_color_edited": ["q4"],
    }
    said = capsys.readouterr().out
    assert "4 pairs traced" in said
    assert "left out 1 pair, the first is q2: its clean and edited answers agree" in said
    layers, by_token, roles = (table(out / f"{name}.csv") for name in ("layers", "tokens", "roles"))
    for what in ("image", "last"):
        for layer, mean in enumerate(found[what]["logit_change"]):
            some = [row for row in layers if (row["what"], row["layer"]) == (what, str(layer))]
            assert [row["pair"] for row in some] == ["q0", "q1", "q3", "q5"]
            assert mean == pytest.approx(sum(float(row["logit_change"]) for row in some) / 4, abs=1e-5)
    objects = [row for row in by_token if row["role"] == "object" and row["layer"] == "1"]
    assert {row["pair"]: row["token"].strip() for row in objects} == {
        "q0": "cat", "q1": "dog", "q3": "dog", "q5": "dog",
    }  # fmt: skip
    mean = sum(float(row["probability_change"]) for row in objects) / 4
    (averaged,) = [row for row in roles if (row["role"], row["layer"]) == ("object", "1")]
    assert averaged["pairs"] == "4"
    # The table holds six digits of every pair, so that the mean of its values is as exact as the largest.
    largest = max(abs(float(row["probability_change"])) for row in objects)
    assert float(averaged["probability_change"]) == pytest.approx(mean, abs=1e-5 * largest)


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_command_refuses_in_one_line(
    llava_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HONES_EVAL_DATA", str(drawn_pairs(tmp_path / "data")))
    for more, message in (
        (["--what", "heads"], "--what 'heads' is unknown; choose from image, text, last, attention, ffn"),
        (["--roles", "object"], "--roles 'object' is not of the form"),
        (["--edited", "a,b"], "--clean names 1 tasks and --edited 2"),
        (["--clean", "a,a", "--edited", "a,b"], "--clean a,a: a task is named twice"),
        (["--examples=-1"], "--examples -1: give how many pairs get figures"),
        (["--edited", "vseam_color"], "none of 6 pairs of vseam_color and vseam_color can be traced"),
    ):
        assert main(command(llava_checkpoint, tmp_path / "out", *more)) == 1
        (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("hones-eval:")]
        assert message in line
    assert not (tmp_path / "out").exists()


def test_averages_by_hand() -> None:
    """Two pairs, two layers: one has the role object twice, and the other's question is longer."""
    first = _traced(["Is", "object", "object", tokens.LAST], [[1, 2], [3, 5], [5, 9], [7, 8]], gap=4.0)
    second = _traced(["Is", "object", "the", tokens.LAST], [[3, 4], [8, 3], [0, 1], [1, 0]], gap=2.0)
    found = trace_tables.role_map([first, second], "ffn")
    assert found.roles == ["Is", "object", "the", tokens.LAST]
    assert found.pairs == [2, 2, 1, 2]
    assert found.logit_change == [[2, 3], [6, 5], [0, 1], [4, 4]]
    assert found.recovered == [[4 / 6, 6 / 6], [12 / 6, 10 / 6], [0, 0.5], [8 / 6, 8 / 6]]
    reverse = _traced(["Is", "object", "the", tokens.LAST], [[1, 1]] * 4, gap=-9.0)
    mixed = trace_tables.role_map([first, reverse], "ffn")
    assert dict(zip(mixed.roles, mixed.recovered, strict=True)) == dict.fromkeys(mixed.roles)
    assert trace_tables.recovered(reverse, "ffn") is None


def _traced(roles: list[str], logit_changes: list[list[float]], gap: float) -> Traced:
    changes = torch.tensor(logit_changes, dtype=torch.float64)
    edited = Reading(0.25, 1.0, -1.0)
    values = torch.stack([changes * 0 + 0.25, changes + 1.0, changes - 1.0], -1)
    clean = Reading(0.5, 1.0 + gap, gap - 1.0)
    return Traced("k", ("Yes", "No"), roles, roles, clean, edited, (True, True), {"ffn": values})


@pytest.mark.parametrize("rise", [1.0, -1.0])
def test_a_note_of_what_is_not_defined_touches_no_point(rise: float) -> None:
    """The curve that is defined ends where the note stands; below zero the line at zero is there."""
    line = [rise * layer / 6 for layer in range(7)]
    known = Curve(line, line, line, None, None)
    figure = layer_curves({"one": {"image": known}, "other": {"image": known._replace(recovered=None)}})
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[2]
    (note,) = axes.texts
    assert note.get_text() == "not defined for 1 of 2"
    box = note.get_window_extent().padded(2)
    assert axes.get_window_extent().containsx(box.x1)
    points = [axes.transData.transform(point) for drawn in axes.lines[:1] for point in drawn.get_xydata()]
    assert len(points) == 7
    assert not any(box.contains(*point) for point in points)
    assert box.y0 > axes.transData.transform((0, 0))[1]
    assert all(box.y0 > y for _, y in points)
