"""Vocabulary: groups of objects, colours, materials, relations and their opposites."""

from typing import Literal, NamedTuple

GROUPS: dict[str, tuple[str, ...]] = {
    "animal": (
        *("cat", "dog", "horse", "cow", "sheep", "bird", "elephant", "zebra", "giraffe", "bear", "rabbit"),
        *("goat", "duck", "lion", "monkey", "pig", "antelope", "deer", "fox", "panda", "kitten", "puppy"),
    ),
    "vehicle": (
        *("car", "bus", "truck", "train", "motorcycle", "bicycle", "bike", "airplane", "boat", "scooter"),
        *("van", "taxi", "tractor", "skateboard", "helicopter", "carriage", "jeep"),
    ),
    "indoor": (
        *("chair", "table", "desk", "couch", "bed", "lamp", "mirror", "clock", "vase", "bookcase", "pillow"),
        *("cabinet", "refrigerator", "oven", "toilet", "sink", "rug", "painting", "television", "towel"),
        *("dresser", "sofa", "shelf", "microwave", "dishwasher", "ottoman", "bathtub", "curtain"),
    ),
}
# Things that people confuse: neither replaces the other.
ALIKE: tuple[frozenset[str], ...] = (
    frozenset({"bicycle", "bike", "motorcycle", "scooter"}),
    frozenset({"car", "taxi", "van", "jeep", "truck"}),
    frozenset({"couch", "sofa", "bed", "chair", "ottoman"}),
    frozenset({"table", "desk"}),
    frozenset({"cabinet", "dresser", "bookcase", "shelf"}),
    frozenset({"oven", "microwave", "dishwasher"}),
    frozenset({"sink", "bathtub", "toilet"}),
    frozenset({"horse", "zebra", "deer", "antelope", "cow", "goat", "sheep"}),
    frozenset({"cat", "kitten", "lion"}),
    frozenset({"dog", "puppy", "fox"}),
    frozenset({"bear", "panda"}),
    frozenset({"bird", "duck"}),
    frozenset({"mirror", "painting", "television"}),
    frozenset({"rug", "towel", "curtain"}),
)


class Colour(NamedTuple):
    """A named colour in CIE Lab (D65): a range of lightness, then a and b."""

    dark: float
    light: float
    a: float
    b: float


COLOURS: dict[str, Colour] = {
    "black": Colour(6, 24, 0, 0),
    "gray": Colour(42, 64, 0, 0),
    "grey": Colour(42, 64, 0, 0),
    "silver": Colour(65, 80, 0, -2),
    "white": Colour(86, 97, 0, 0),
    "red": Colour(36, 52, 66, 46),
    "pink": Colour(66, 80, 42, 2),
    "orange": Colour(58, 72, 46, 66),
    "brown": Colour(26, 42, 16, 26),
    "tan": Colour(62, 76, 7, 24),
    "beige": Colour(78, 88, 2, 16),
    "gold": Colour(62, 76, 6, 58),
    "yellow": Colour(78, 92, -6, 76),
    "green": Colour(36, 58, -44, 40),
    "teal": Colour(40, 58, -30, -8),
    "blue": Colour(32, 54, 12, -56),
    "purple": Colour(30, 50, 46, -44),
    "maroon": Colour(20, 32, 36, 18),
}
# New colours are chosen among those that everyone names the same.
PLAIN_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "white", "black")

MATERIALS: dict[str, tuple[str, ...]] = {
    "wood": ("wood", "wooden", "bamboo"),
    "metal": ("metal", "metallic", "steel", "stainless steel", "iron", "aluminum", "chrome", "wire"),
    "brick": ("brick", "bricks", "bricked"),
    "stone": ("stone", "concrete", "cement", "rock", "granite", "marble", "cobblestone"),
    "plastic": ("plastic", "vinyl"),
    "fabric": ("fabric", "cloth", "cotton", "denim", "wool", "wicker", "canvas"),
    "leather": ("leather",),
    "glass": ("glass",),
    "paper": ("paper", "cardboard"),
    "ceramic": ("ceramic", "porcelain", "clay", "tile"),
}
ALIKE_MATERIALS: tuple[frozenset[str], ...] = (
    frozenset({"plastic", "ceramic", "glass", "paper", "leather"}),
    frozenset({"brick", "stone"}),
    frozenset({"fabric", "leather", "paper"}),
    frozenset({"metal", "glass"}),
)


class Relation(NamedTuple):
    """The spatial kind of a relation, and the relation that contradicts it, if any."""

    kind: Literal["side", "height", "contact", "held", "near", "depth"]
    contrary: str | None = None


RELATIONS: dict[str, Relation] = {
    "to the left of": Relation("side", "to the right of"),
    "to the right of": Relation("side", "to the left of"),
    "left of": Relation("side", "right of"),
    "right of": Relation("side", "left of"),
    "above": Relation("height", "below"),
    "over": Relation("height", "under"),
    "below": Relation("height", "above"),
    "under": Relation("height", "over"),
    "underneath": Relation("height", "above"),
    "beneath": Relation("height", "above"),
    "in front of": Relation("depth", "behind"),
    "behind": Relation("depth", "in front of"),
    "standing in front of": Relation("depth", "standing behind"),
    "standing behind": Relation("depth", "standing in front of"),
    "next to": Relation("near", "far away from"),
    "near": Relation("near", "far away from"),
    "beside": Relation("near", "far away from"),
    "by": Relation("near", "far away from"),
    "sitting next to": Relation("near", "sitting far away from"),
    "standing next to": Relation("near", "standing far away from"),
    "sitting by": Relation("near", "sitting far away from"),
    "on": Relation("contact", "next to"),
    "on top of": Relation("contact", "next to"),
    "sitting on": Relation("contact", "standing beside"),
    "sitting in": Relation("contact", "standing beside"),
    "standing on": Relation("contact", "standing beside"),
    "lying on": Relation("contact", "lying beside"),
    "leaning on": Relation("contact", "standing away from"),
    "riding": Relation("contact", "standing beside"),
    "riding on": Relation("contact", "standing beside"),
    "perched on": Relation("contact", "flying away from"),
    "parked on": Relation("contact", "parked beside"),
    "holding": Relation("held", "standing away from"),
    "carrying": Relation("held", "standing away from"),
    "eating": Relation("held", "ignoring"),
    "using": Relation("held", "ignoring"),
}
# Surfaces that are everywhere in an image: nothing can be moved off them.
SURFACES = frozenset(
    {
        *("street", "road", "ground", "grass", "field", "floor", "snow", "sidewalk", "sand", "beach", "wall"),
        *("water", "sky", "mud", "pasture", "mountain", "hill", "court", "dirt", "pavement", "river", "lake"),
        *("ocean", "bricks", "path", "hay"),
    }
)
