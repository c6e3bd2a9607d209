"""Hostile logs: changes to files of lmms-eval output, picked by name or at random by seed."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

Change = Callable[[Path], None]


def _edit(pattern: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change the JSON of the files that match a pattern."""

    def apply(folder: Path) -> None:
        for path in sorted(folder.rglob(pattern)):
            content = json.loads(path.read_text())
            changed = change(content)
            path.write_text(json.dumps(content if changed is None else changed))

    return apply


def results(change: Callable[[dict[str, Any]], Any]) -> Change:
    return _edit("*_results.json", change)


def manifest(change: Callable[[dict[str, Any]], Any]) -> Change:
    return _edit("hones_manifest_*.json", change)


def sample(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change every line of the samples."""

    def apply(folder: Path) -> None:
        for path in sorted(folder.rglob("*_samples_*.jsonl")):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            for row in rows:
                change(row)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return apply


def text(pattern: str, change: Callable[[bytes], bytes]) -> Change:
    def apply(folder: Path) -> None:
        for path in sorted(path for path in folder.rglob(pattern) if path.is_file()):
            path.write_bytes(change(path.read_bytes()))

    return apply


def media(value: Any) -> Change:
    return sample(lambda row: row.update(input_media=value))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def examples(**fields: Any) -> Change:
    """A steering whose provenance lists a set of examples with these fields."""
    chosen = {"task": "shapes", "split": "test", "count": 1, "offset": 0, "hash": "x"} | fields
    return manifest(lambda content: content["steering"].update(provenance={"examples": [chosen]}))


def scales(kind: str) -> Change:
    """The steering's folder beside the logs holds scales of this kind."""

    def apply(folder: Path) -> None:
        import numpy as np

        place = folder / "wild"
        place.mkdir()
        shape = {"huge": (1500, 1500), "deep": (100_000, 1)}.get(kind, (4, 4))
        heads = np.full(shape, np.inf if kind == "infinite" else 2.0, dtype=np.float32)
        tensors = {"head_scales": heads, "neuron_scales": np.ones((shape[0], 3), dtype=np.float32)}
        if kind == "float16":
            tensors = {name: value.astype(np.float16) for name, value in tensors.items()}
        if kind == "one":
            tensors = {"head_scales": heads[0], "neuron_scales": heads[0]}
        save_file(tensors, place / "steering.safetensors")
        if kind in ("bf16", "f8"):
            content = (place / "steering.safetensors").read_bytes()
            name = b"BF16" if kind == "bf16" else b"F8_E4M3"
            size = int.from_bytes(content[:8], "little")
            header = content[8 : 8 + size].replace(b'"F32"', b'"' + name + b'"')
            (place / "steering.safetensors").write_bytes(
                len(header).to_bytes(8, "little") + header + content[8 + size :]
            )
        (place / "steering.json").write_text(json.dumps({"digest": "x"}))
        _edit("hones_manifest_*.json", lambda content: content["steering"].update(path="wild", digest="x"))(
            folder
        )
        _edit("*_results.json", lambda content: content["config"].update(
            model_args="pretrained=tiny/other,steering=wild"))(folder)  # fmt: skip

    return apply


def steering_path(path: str) -> Change:
    def apply(folder: Path) -> None:
        manifest(lambda content: content["steering"].update(path=path))(folder)
        results(
            lambda content: content["config"].update(model_args=f"pretrained=tiny/other,steering={path}")
        )(folder)

    return apply


HOSTILE: dict[str, Change] = {
    "count of 1e11": examples(count=10**11),
    "negative count": examples(count=-5),
    "ids of other types": examples(doc_ids=["a", None, {}]),
    "huge ids": examples(doc_ids=[10**400]),
    "deep settings": manifest(lambda c: c["steering"].update(provenance={"settings": {"x": nested(900)}})),
    "settings of another type": manifest(lambda c: c["steering"].update(provenance={"settings": [1]})),
    "provenance of another type": manifest(lambda c: c["steering"].update(provenance=[1, 2])),
    "infinite strength": manifest(lambda c: c["steering"].update(strength=1e308)),
    "strength in words": manifest(lambda c: c["steering"].update(strength="much")),
    "requests of another type": manifest(lambda c: c.update(requests=[1])),
    "requests that are deep": manifest(lambda c: c.update(requests=nested(500))),
    "no such user": steering_path("~nosuchuser/steering"),
    "a name of 300 characters": steering_path("n" * 300),
    "a name with a null byte": steering_path("a\x00b"),
    "a path of a device": steering_path("/dev/stdin"),
    "huge scales": scales("huge"),
    "deep scales": scales("deep"),
    "bf16 scales": scales("bf16"),
    "f8 scales": scales("f8"),
    "float16 scales": scales("float16"),
    "infinite scales": scales("infinite"),
    "one row of scales": scales("one"),
    "media as a number": media(5),
    "media as a mapping": media({"a": 1}),
    "media as numbers": media([1, None, [2]]),
    "media as a long path": media(["/" + "x" * 5000]),
    "media with a null byte": media(["/a\x00b"]),
    "media as a device": media(["/dev/zero"]),
    "media as a folder": media(["/"]),
    "media that is no image": media(["data:image/png;base64,AAAA"]),
    "media that is postscript": media(["data:image/eps;base64,JSFQUy1BZG9iZS0zLjA="]),
    "deep results": results(lambda c: c["configs"]["shapes"].update(generation_kwargs=nested(900))),
    "task with control characters": results(lambda c: c.update(configs={"a\x1b[2J\u202eb": {}})),
    "task with a surrogate": results(lambda c: c.update(configs={"\ud800": {}})),
    "metric with a surrogate": results(lambda c: c["results"]["shapes"].update({"\ud800,none": 1.0})),
    "task of 300 characters": results(lambda c: c.update(configs={"t" * 300: {}})),
    "model arguments that are deep": results(lambda c: c["config"].update(model_args={"a": nested(900)})),
    "huge numbers": results(lambda c: c["results"]["shapes"].update({"exact_match,none": 10**400})),
    "a zone of another planet": results(
        lambda c: c["config"].update(resolved_cli_args={"timezone": "../../../../dev/null"})
    ),
    "higher of another type": results(lambda c: c.update(higher_is_better={"shapes": 3})),
    "offset below 0": results(lambda c: c["config"].update(offset=-(10**30))),
    "answers that are deep": sample(lambda row: row.update(filtered_resps=nested(900))),
    "inputs that are deep": sample(lambda row: row.update(input=nested(900))),
    "inputs with control characters": sample(lambda row: row.update(input="\x1b[31m\ud800\u202e<script>")),
    "fractional ids": sample(lambda row: row.update(doc_id=row["doc_id"] + 0.5)),
    "scores that are deep": sample(lambda row: row.update(exact_match=nested(900))),
    "huge scores": sample(lambda row: row.update(exact_match=10**400)),
    "a byte order mark": text("*.json*", lambda content: b"\xef\xbb\xbf" + content),
    "no text": text("*_samples_*", lambda content: b"\xff\xfe\x00" * 100),
    "empty files": text("*.json*", lambda content: b""),
}  # fmt: skip


def random_change(seed: int) -> Change:
    """Damage one file at random: bytes, or a JSON value somewhere replaced by another."""
    draw = random.Random(seed)
    values = [None, True, -1, 0, 1e308, 10**30, "", "\x00", "\ud800", "x" * 10_000, [], {}, [[]], {"a": {}},
              "../../etc/passwd", "NaN", nested(60)]  # fmt: skip

    def replace_one(content: Any) -> None:
        places: list[tuple[Any, Any]] = []
        stack = [content]
        while stack:
            value = stack.pop()
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in pairs:
                places.append((value, key))
                if isinstance(inner, dict | list):
                    stack.append(inner)
        if places:
            holder, key = places[draw.randrange(len(places))]
            holder[key] = draw.choice(values)

    def flip(content: bytes) -> bytes:
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            if damaged:
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        return bytes(damaged[: draw.randint(0, len(damaged))] if draw.random() < 0.3 else damaged)

    pattern = draw.choice(["*_results.json", "hones_manifest_*.json", "*_samples_*.jsonl"])
    if draw.random() < 0.3:
        return text(pattern, flip)
    return sample(replace_one) if "samples" in pattern else _edit(pattern, replace_one)
