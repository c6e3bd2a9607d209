import io
import warnings
from pathlib import Path

import cv2
import edited
import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from hones_eval.editing import photographs
from hones_eval.editing.boxes import Window
from hones_eval.editing.checks import Bounds, judge, psnr_outside, sound, ssim_outside
from hones_eval.editing.fill import fill
from hones_eval.editing.inpaint import working_size
from hones_eval.editing.layout import Shift
from hones_eval.editing.masks import Region, box_mask, cut_mask
from hones_eval.editing.moving import best_stretch, mirror, move, remove
from hones_eval.editing.problems import RecordError
from hones_eval.editing.recolor import recolor, rgb_to_lab, spread, toned
from hones_eval.editing.retexture import retexture
from hones_eval.editing.vocabulary import COLOURS, PLAIN_COLOURS

BALL = Window(18, 33, 72, 87)
BOX = Window(98, 38, 142, 82)


def disc_of(shape: tuple[int, ...]) -> np.ndarray:
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    return (rows - 60) ** 2 + (columns - 45) ** 2 < 25**2


# Reading


def saved(path: Path, picture: Image.Image, **options: object) -> Path:
    picture.save(path, **options)
    return path


def test_images_are_read_upright_and_as_rgb(tmp_path: Path) -> None:
    picture = Image.fromarray(edited.scene())
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = picture.rotate(90, expand=True)
    found = photographs.read(saved(tmp_path / "turned.png", lying, exif=exif))
    assert np.array_equal(found.pixels, edited.scene())
    assert not found.plain
    assert photographs.read(saved(tmp_path / "plain.png", picture)).plain
    grey = photographs.read(saved(tmp_path / "grey.png", picture.convert("L"))).pixels
    assert (grey == np.asarray(picture.convert("L"))[..., None]).all()


def test_alpha_is_laid_on_white_and_deep_grey_is_scaled(tmp_path: Path) -> None:
    clear = Image.fromarray(edited.scene()).convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 0))
    assert (photographs.read(saved(tmp_path / "clear.png", clear)).pixels == 255).all()
    deep = Image.fromarray(np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16))
    pixels = photographs.read(saved(tmp_path / "deep.png", deep)).pixels
    assert (pixels.min(), pixels.max()) == (0, 255)
    cmyk = photographs.read(
        saved(tmp_path / "print.jpg", Image.new("CMYK", (20, 20), (0, 255, 255, 0)))
    ).pixels
    assert (cmyk.reshape(-1, 3).mean(0) - (254, 0, 0) < 3).all()


def test_what_is_no_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved(tmp_path / "whole.jpg", Image.fromarray(edited.scene())).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    for name, said in (("cut.jpg", "truncated"), ("text.jpg", "cannot identify"), ("none.jpg", "not exist")):
        with pytest.raises(RecordError, match=said):
            photographs.read(tmp_path / name)
    monkeypatch.setattr(photographs, "MOST_PIXELS", 1000)
    with pytest.raises(RecordError, match="160 x 120"), warnings.catch_warnings():
        photographs.read(tmp_path / "whole.jpg")


# Masks


def test_the_cut_follows_the_thing_and_the_box_mask_the_box() -> None:
    picture = edited.scene()
    disc = disc_of(picture.shape)
    region = cut_mask(picture, BALL)
    found = np.zeros(disc.shape)
    found[region.window.slices] = region.alpha
    overlap = ((found > 0.5) & disc).sum() / ((found > 0.5) | disc).sum()
    assert overlap > 0.9
    assert not region.rough
    again = cut_mask(picture, BALL)
    assert np.array_equal(again.alpha, region.alpha)
    solid = box_mask(picture, BALL)
    inner = solid.footprint(*disc.shape)[BALL.slices]
    assert inner.all()
    assert solid.footprint(*disc.shape).sum() < 1.3 * inner.size


def test_where_nothing_can_be_cut_the_box_serves() -> None:
    flat = np.full((100, 100, 3), 127, np.uint8)
    region = cut_mask(flat, Window(30, 30, 70, 70))
    assert region.rough
    assert region.footprint(100, 100)[30:70, 30:70].all()


# Editors


def test_filling_continues_a_pattern_better_than_a_smear() -> None:
    rows, columns = np.mgrid[0:120, 0:160]
    stripes = (np.stack([(rows // 6 % 2) * 120 + 60, columns, 200 - columns], axis=-1)).astype(np.uint8)
    hole = np.zeros((120, 160), bool)
    hole[40:80, 50:100] = True
    broken = stripes.copy()
    broken[hole] = (255, 0, 255)
    filled = fill(broken, hole, 0)
    assert np.array_equal(filled[~hole], stripes[~hole])
    assert np.array_equal(filled, fill(broken, hole, 0))
    smear = cv2.inpaint(broken, hole.astype(np.uint8), 3, cv2.INPAINT_TELEA)
    ours, theirs = (np.abs(item[hole].astype(float) - stripes[hole]).mean() for item in (filled, smear))
    assert ours < 0.5 * theirs
    assert ours < 25


def test_a_hole_larger_than_the_search_works_on_is_filled_too() -> None:
    chance = np.random.default_rng(0)
    picture = chance.integers(90, 110, (500, 700, 3)).astype(np.uint8)
    picture[100:400, 200:500] = (250, 0, 0)
    hole = np.zeros((500, 700), bool)
    hole[98:402, 198:502] = True
    filled = fill(picture, hole, 0)
    assert 92 < filled[hole].mean() < 108
    assert filled[hole].std() > 2
    assert np.array_equal(filled[~hole], picture[~hole])


def test_removing_leaves_ground_and_no_red() -> None:
    picture = edited.scene()
    made, hole = remove(picture, cut_mask(picture, BALL), 0)
    assert np.array_equal(made[~hole], picture[~hole])
    here = made[disc_of(picture.shape)].astype(float)
    assert np.abs(here.mean(0) - (120, 140, 110)).max() < 8
    assert hole.sum() < 1.5 * disc_of(picture.shape).sum()


@pytest.mark.parametrize("colour", PLAIN_COLOURS)
def test_a_new_colour_is_at_home_and_keeps_the_shading(colour: str) -> None:
    picture = edited.scene()
    region = cut_mask(picture, BALL)
    made = recolor(picture, region, colour)
    outside = ~region.footprint(*picture.shape[:2])
    assert np.array_equal(made[outside], picture[outside])
    rows, columns = np.mgrid[0:120, 0:160]
    core = (rows - 60) ** 2 + (columns - 45) ** 2 < 18**2
    before, after = rgb_to_lab(picture)[core], rgb_to_lab(made)[core]
    home = COLOURS[colour]
    assert home.dark - 6 <= np.median(after[:, 0]) <= home.light + 6
    chroma = np.hypot(home.a, home.b)
    if chroma > 10:
        angle = np.arctan2(*np.median(after[:, 1:], axis=0)[::-1]) - np.arctan2(home.b, home.a)
        assert abs((angle + np.pi) % (2 * np.pi) - np.pi) < 0.45
    else:
        assert np.hypot(*np.median(after[:, 1:], axis=0)) < 10
    smooth = [cv2.GaussianBlur(rgb_to_lab(item)[..., 0], (0, 0), 3)[core] for item in (picture, made)]
    assert np.corrcoef(*smooth)[0, 1] > 0.9
    assert len(before) == len(after)


def test_only_what_has_the_recorded_colour_is_painted_and_all_of_it() -> None:
    picture = edited.scene()
    picture[33:60, 30:60] = (250, 250, 250)  # something white in front of the red disc
    whole = Region(BALL, np.ones((54, 54), np.float32))
    region = toned(picture, whole, "red")
    assert region.alpha[12, 27] == 0
    assert region.alpha[40, 27] == 1
    half = Region(Window(18, 60, 72, 87), np.ones((27, 54), np.float32))
    grown = spread(edited.scene(), toned(edited.scene(), half, "red"))
    reached = grown.footprint(120, 160)
    assert reached[50, 45]
    assert not reached[20:32].any()


@pytest.mark.parametrize("material", ["wood", "metal", "brick", "stone", "plastic", "fabric"])
def test_a_new_material_shows_and_keeps_to_the_mask(material: str) -> None:
    picture = edited.scene()
    region = cut_mask(picture, BALL)
    made = retexture(picture, region, material, 5)
    inside = region.footprint(*picture.shape[:2])
    assert np.array_equal(made[~inside], picture[~inside])
    assert np.array_equal(made, retexture(picture, region, material, 5))
    verdict = judge(picture, made, inside, Bounds())
    assert verdict.accepted
    assert verdict.change_inside > 12
    lab = rgb_to_lab(made)[disc_of(picture.shape)]
    if material in ("brick", "stone", "fabric", "wood"):
        assert lab[:, 0].std() > 4


def test_a_moved_thing_is_there_and_no_longer_here() -> None:
    picture = edited.scene()
    made, touched = move(picture, cut_mask(picture, BALL), Shift(75, 0), 0)
    assert np.array_equal(made[~touched], picture[~touched])
    disc = disc_of(picture.shape)
    assert np.abs(made[disc].astype(float).mean(0) - (120, 140, 110)).max() < 10
    there = np.roll(disc, 75, axis=1)
    assert np.abs(made[there].astype(float) - picture[disc]).mean() < 6


def test_a_mirror_swaps_and_keeps_to_its_stretch() -> None:
    picture = edited.scene()
    stretch = best_stretch(picture, BALL.joined(BOX))
    made, touched = mirror(picture, stretch)
    assert np.array_equal(made[~touched], picture[~touched])
    centre = stretch.left + stretch.right - 1
    red = made[60, centre - 45].astype(int)
    blue = made[60, centre - 120].astype(int)
    assert red[0] > 120
    assert red[2] < 90
    assert blue[2] > 150
    assert blue[0] < 80


# Checks


def noisy(amount: float) -> np.ndarray:
    chance = np.random.default_rng(3)
    return (edited.scene() + chance.normal(0, amount, (120, 160, 3))).clip(0, 255).astype(np.uint8)


def test_psnr_and_ssim_are_those_of_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hones_eval.editing.checks.BAND", 37)
    clean, other, nowhere = edited.scene(), noisy(12), np.zeros((120, 160), bool)
    one, two = (torch.from_numpy(each).permute(2, 0, 1)[None].double() for each in (clean, other))
    assert psnr_outside(clean, other, nowhere) == pytest.approx(
        float(peak_signal_noise_ratio(two, one, 255.0)), abs=1e-6
    )
    wanted = structural_similarity_index_measure(two, one, data_range=255.0, sigma=1.5, kernel_size=11)
    # torchmetrics leaves out the frame of half a window, where its padding would count.
    inner = np.ones((120, 160), bool)
    inner[10:-10, 10:-10] = False
    _, full = structural_similarity_index_measure(
        two, one, data_range=255.0, sigma=1.5, kernel_size=11, return_full_image=True
    )
    far = cv2.dilate(inner.astype(np.uint8), np.ones((11, 11), np.uint8)) == 0
    assert ssim_outside(clean, other, inner) == pytest.approx(
        float(full[0][:, torch.from_numpy(far)].mean()), abs=1e-6
    )
    assert ssim_outside(clean, other, nowhere) == pytest.approx(float(wanted), abs=0.01)


def test_a_change_counts_only_on_its_own_side_of_the_mask() -> None:
    clean = edited.scene()
    mask = np.zeros((120, 160), bool)
    mask[30:90, 15:75] = True
    inside = np.where(mask[..., None], 255 - clean, clean)
    verdict = judge(clean, inside, mask, Bounds())
    assert (verdict.accepted, verdict.psnr_outside, verdict.ssim_outside) == (True, None, pytest.approx(1.0))
    outside = np.where(mask[..., None], clean, 255 - clean)
    reasons = judge(clean, outside, mask, Bounds()).reasons
    assert len(reasons) == 3
    assert "PSNR" in reasons[0]
    assert "SSIM" in reasons[1]
    assert "mean change is 0.00" in reasons[2]
    assert "the edited image is 150 x 120" in judge(clean, clean[:, :150], mask, Bounds()).reasons[0]


def test_a_broken_file_is_no_sound_image() -> None:
    content = photographs.png(edited.scene())
    assert sound(content, 160, 120) is None
    assert "cannot be decoded" in str(sound(content[:500], 160, 120))
    buffer = io.BytesIO()
    Image.new("L", (160, 120)).save(buffer, format="PNG")
    assert "the edited image is L, 160 x 120" in str(sound(buffer.getvalue(), 160, 120))


def test_sides_are_cut_to_multiples_of_eight() -> None:
    assert working_size(500, 333, 1024) == (496, 328)
    assert working_size(4000, 3000, 1024) == (1024, 768)
    assert working_size(5, 9000, 1024) == (8, 1024)
