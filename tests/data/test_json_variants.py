"""Every key of a manifest and of a checkpoint's header left out, or of every other JSON type: a
result, or one line.
"""

import copy
import hashlib
import json
import logging

import pytest
import safetensors.torch
import torch

from miue_fast import data
from miue_fast.cli import commands
from miue_fast.generation import checkpoint, generate
from miue_fast.generation.run import BiLevelRun

OTHERS = [
    None,
    True,
    0,
    -1,
    2**70,
    1.5,
    1e308,
    "",
    "x",
    "a\nb\x1b[2K",
    [],
    [None],
    ["x"],
    [[]],
    {},
    {"x": None},
    {"x": {"y": []}},
]


def places(value, path=()):
    """The path of every value inside, at any depth."""
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def variants(content):
    """(what was done, changed copy): each value left out, and replaced by each of OTHERS."""
    for path in places(content):
        for other in [KeyError, *OTHERS]:
            changed = copy.deepcopy(content)
            inside = changed
            for key in path[:-1]:
                inside = inside[key]
            if other is KeyError:
                del inside[path[-1]]
            elif repr(inside[path[-1]]) == repr(other):
                continue
            else:
                inside[path[-1]] = other
            yield f"{path} {other!r}", changed


def test_the_generator_of_variants():
    found = [changed for _, changed in variants({"a": [1], "b": {"c": "x"}})]
    assert (
        {"b": {"c": "x"}} in found
        and {"a": [], "b": {"c": "x"}} in found
        and {"a": [1], "b": {}} in found
    )
    assert {"a": [None], "b": {"c": "x"}} in found and len(found) == 4 * (1 + len(OTHERS)) - 1


def one_line(error):
    return isinstance(error, ValueError) and str(error).isprintable() and len(str(error)) < 2500


@pytest.fixture
def made(tmp_path):
    clean = data.shapes(8, seed=1, size=8, classes=2)
    folder = tmp_path / "poison"
    data.save_poison(
        folder,
        data.random_noise(clean, 8 / 255, 0),
        clean,
        {"eps": 8 / 255, "model": "resnet18", "list": [1, {"a": 2}]},
    )
    return clean, folder


def seal(body):
    """A manifest with its right checksum, whatever it says."""
    body = {key: value for key, value in body.items() if key != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps({**body, "manifest_sha256": digest}, indent=1) + "\n").encode()


def test_manifests(made, tmp_path, capsys, monkeypatch):
    """Whoever reads one: `load_poison`, `verify`, a run that goes on, and what `evaluate --json`
    says of the poison.
    """
    clean, folder = made
    path = folder / "manifest.json"
    whole = json.loads(path.read_text())
    assert seal(whole) == path.read_bytes()
    taken = refused = 0
    for what, changed in variants(whole):
        path.write_bytes(seal(changed))
        try:
            delta, manifest = data.load_poison(folder, clean)
        except ValueError as error:
            refused += 1
            assert one_line(error), (what, error)
        else:
            taken += 1
            assert (
                delta.shape == clean.images.shape
                and isinstance(manifest["versions"], dict)
                and isinstance(manifest["options"], dict)
            )
            assert data.verify(clean, folder, eps=8 / 255).count == 8
        monkeypatch.setattr(commands.logging.getLogger("miue_fast"), "disabled", True)
        origin = commands._origin(
            folder, clean, data.apply_poison(clean.images, torch.zeros(clean.images.shape), 0)
        )
        assert origin is None or set(origin) == {"options", "versions"}
    assert taken > 20 and refused > 150
    for key in (
        "versions",
        "classes",
        "names_sha256",
        "files",
        "options",
        "eps",
        "fingerprint",
        "shape",
        "store",
        "format",
    ):
        path.write_bytes(seal({name: value for name, value in whole.items() if name != key}))
        with pytest.raises(
            ValueError, match=rf"manifest.json: expected an undamaged .* manifest, got {key}"
        ):
            data.load_poison(folder, clean)


NO_MANIFEST = [
    b'{"format": NaN}',
    b'{"format": Infinity}',
    b'{"a": 1, "a": 2}',
    b"[]",
    b"1",
    b"",
    b"\xff\xfe",
    b"\0" * 99,
    b"[" * 50_000,
    b'{"format": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("text", NO_MANIFEST)
def test_texts_that_are_no_manifest(made, text):
    clean, folder = made
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(ValueError, match="manifest") as error:
        data.load_poison(folder, clean)
    assert one_line(error.value)


def test_a_key_that_comes_twice_is_refused_even_with_a_checksum(made):
    """Two readers may take different ones."""
    clean, folder = made
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"store"', '"eps": 1,\n "store"', 1))
    with pytest.raises(ValueError, match="a key that comes twice"):
        data.load_poison(folder, clean)


OPTIONS = {"epochs": 1, "steps": 1, "batch": 8, "train_batch": 8, "device": "cpu"}


def test_checkpoint_headers(tmp_path, monkeypatch):
    """Each with its right sha256, read by the run that would go on from it."""
    clean, runs = data.shapes(8, seed=1, size=8, classes=2), []

    def kept(run, *_):
        runs.append(run)

    generate(clean, tmp_path / "out", model="mlp2", progress=False, **OPTIONS)
    monkeypatch.setattr(BiLevelRun, "finish", kept)
    generate(clean, tmp_path / "out", model="mlp2", progress=False, **OPTIONS)
    (run,) = runs
    path = tmp_path / "out" / checkpoint.NAME
    tensors, header = checkpoint.load(path)
    taken = refused = 0
    monkeypatch.setattr(logging.getLogger("miue_fast"), "disabled", True)

    def attempt(what, text, tensors=tensors):
        nonlocal taken, refused
        path.write_bytes(
            safetensors.torch.save(
                tensors, {"header": text, "sha256": checkpoint._digest(tensors, text)}
            )
        )
        try:
            run.resume()
            taken += 1
        except ValueError as error:
            refused += 1
            assert one_line(error) and str(path) in str(error), (what, error)
        try:
            assert checkpoint.saved_epoch(path) is not None
        except ValueError as error:
            assert one_line(error), (what, error)

    for number, (what, changed) in enumerate(variants(header)):
        if (
            not what.startswith("('options', ") or number % 10 == 0
        ):  # thirty options, all of one kind
            attempt(what, json.dumps(changed))
    assert taken > 20 and refused > 150
    for text in ("[]", "", "{", "[" * 50_000, "null", '{"format": "miue_fast checkpoint 1"}'):
        attempt(text[:20], text)
    for name in tensors:
        for other in (None, torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(())):
            rest = {key: value for key, value in tensors.items() if key != name}
            attempt(
                f"{name} {other}",
                json.dumps(header),
                rest if other is None else {**rest, name: other},
            )


def test_a_folder_in_place_of_the_checkpoint(tmp_path):
    clean = data.shapes(8, seed=1, size=8, classes=2)
    (tmp_path / checkpoint.NAME).mkdir()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="no folder under the name of the checkpoint") as error:
            generate(clean, tmp_path, model="mlp2", progress=False, overwrite=overwrite, **OPTIONS)
        assert one_line(error.value)
