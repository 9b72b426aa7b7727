"""The anatomy of the phantom: a head and neck as a list of simple solids.

Coordinates are mm in RAS (x to the right, y to the front, z up), with the origin between the ears; intensities are HU.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from lamp3d.data.shapes import Canvas, Field, Point, blend, ellipsoid, smooth_field, tube

ORGANS = (
    "BrainStem",
    "Chiasm",
    "Mandible",
    "OpticNerveLeft",
    "OpticNerveRight",
    "ParotidLeft",
    "ParotidRight",
    "SubmandibularLeft",
    "SubmandibularRight",
)
LABEL = {organ: value for value, organ in enumerate(ORGANS, start=1)}
_SIDES = (("Left", -1), ("Right", 1))  # x grows to the right

_AIR, _FAT, _FLUID, _BRAIN, _MUSCLE, _VESSEL = -1000, -95, 8, 36, 55, 150
_MARROW, _SPONGE, _CORTEX, _TOOTH, _METAL = 250, 450, 1100, 1700, 3000


def _mm(x: float, y: float, z: float) -> npt.NDArray[np.float64]:
    return np.array((x, y, z))


class Patient:
    """Paints one patient, from the skin inwards; organs come last so that nothing covers them."""

    def __init__(self, canvas: Canvas, rng: np.random.Generator) -> None:
        self.canvas, self.points, self.rng = canvas, canvas.points, rng
        self.texture = smooth_field(rng, canvas.image.shape, 14)
        self.fine = gaussian_filter(rng.standard_normal(canvas.image.shape, dtype=np.float32), 0.8)
        self.fine /= self.fine.std()
        self.skin: Field

    def paint(self) -> None:
        head = ellipsoid(self.points, (0, -8, 38), (76, 96, 72))
        self._soft_tissue(head)
        self._cranium(head)
        self._spine()
        self._face()
        self._airway()
        self._brain_stem()
        for side, x in _SIDES:
            self._orbit(side, x)
            self._glands(side, x)
        self._chiasm()
        self._mandible()

    def _near(self, place: tuple[float, float, float], sd_mm: float = 1.0) -> npt.NDArray[np.float64]:
        return np.asarray(place) + self.rng.normal(0, sd_mm, 3)

    def _about(self, value: float, relative: float = 0.08) -> float:
        return float(value * np.clip(self.rng.normal(1, relative), 0.7, 1.3))

    def _soft_tissue(self, head: Field) -> None:
        points = self.points
        parts = [
            head,
            ellipsoid(points, (0, 42, -22), (56, 54, 72)),  # face
            ellipsoid(points, (0, 38, -62), (57, 58, 33)),  # jaw
            ellipsoid(points, (0, -2, -32), (71, 62, 55)),  # cheeks and nape
            tube(points, [(0, -18, -20), (0, -18, -240)], self._about(56, 0.05)),  # neck
        ]
        nose = ellipsoid(points, (0, 96, -12), (13, 15, 19))
        skin = blend([blend(parts, 12), nose], 6)
        canvas = self.canvas
        self.skin = skin
        canvas.paint(skin, 20)
        canvas.paint(skin + 2, _FAT + 8 * self.texture)
        fat_mm = self._about(3.5, 0.3) + 5 * np.clip((-40 - points[2]) / 40, 0, 1)
        canvas.paint(skin + 2 + fat_mm, _MUSCLE + 4 * self.texture)
        # Fat planes between the muscles: thin sheets where a smooth field crosses zero.
        sheets = np.maximum(np.abs(self.texture) * 9 - np.float32(1.2), skin + 6 + fat_mm)
        canvas.paint(np.maximum(sheets, points[2] + 20), _FAT + 25)
        for _, x in _SIDES:
            ear = ellipsoid(points, self._near((x * 78, -14, -4), 1.5), (5, 15, 26))
            canvas.paint(ear, -20)
            for place, radius in (((28, -2), 3.2), ((36, -10), 5.0)):  # carotid artery, jugular vein
                a, b = self._near((x * place[0], place[1], -25)), self._near((x * place[0] * 0.9, place[1] + 6, -150))
                vessel = tube(points, [a, b], self._about(radius))
                canvas.paint(vessel - 3, _FAT)
                canvas.paint(vessel, self._about(_VESSEL, 0.15))

    def _cranium(self, head: Field) -> None:
        points, canvas = self.points, self.canvas
        # The floor: high over the orbits, sloping down the clivus to the foramen magnum.
        floor = 6 - 36 * np.clip((22 - points[1]) / 30, 0, 1) + 2 * self.texture
        skull = np.maximum(head + 6, (floor - points[2]) * np.float32(0.8))
        thick = self._about(6.5, 0.12)
        for depth, hu in ((0.0, _CORTEX), (0.3, _SPONGE + 100), (0.7, _CORTEX), (1.0, _FLUID)):
            canvas.paint(skull + depth * thick, hu)
        folds = 1.6 * self.fine + 2.5
        canvas.paint(skull + thick + folds, _BRAIN + 2.5 * self.fine)
        falx = np.maximum(np.abs(points[0]) - np.float32(1), skull + thick)
        canvas.paint(np.maximum(falx, 25 - points[2]), 58)
        for _, x in _SIDES:
            ventricle = [(x * 8, 32, 40), (x * 11, 5, 48), (x * 15, -28, 44), (x * 26, -36, 34)]
            canvas.paint(tube(points, [self._near(place, 1) for place in ventricle], self._about(5, 0.25)), _FLUID)
            petrous = tube(points, [(x * 54, -14, -8), (x * 17, 6, -10)], 9)
            canvas.paint(petrous, _CORTEX - 100)
            mastoid = ellipsoid(points, self._near((x * 55, -24, -18)), (11, 14, 17))
            canvas.paint(mastoid, _SPONGE + 250)
            canvas.paint(mastoid + 3, np.clip(-300 + 500 * self.fine, -900, 700))
            canvas.paint(tube(points, [(x * 84, -6, -6), (x * 48, -4, -8)], 3), _AIR)

    def _spine(self) -> None:
        points, canvas = self.points, self.canvas
        z = points[2]
        bend = self._about(6, 0.3) * np.sin((z + 40) / 40)  # the lordosis
        straight = np.stack([points[0], points[1] + 22 - bend, z])
        level_mm = self._about(19, 0.05)
        disc = np.abs(((z + 38) / level_mm) % 1 - 0.5) * level_mm - (level_mm / 2 - 2.5)
        top = z + 34
        column = np.maximum(tube(straight, [(0, 0, -38), (0, 0, -260)], 11, (1.25, 1, 1)), top)
        canvas.paint(column, 95)
        bodies = np.maximum(column, disc)
        canvas.paint(bodies, _CORTEX - 300)
        canvas.paint(bodies + 2.5, _MARROW + 40 * self.fine)
        arch = np.maximum(tube(straight, [(0, -21, -30), (0, -21, -260)], 14, (1.2, 1, 1)), disc)
        spinous = np.maximum(tube(straight, [(0, -30, -30), (0, -44, -260)], 5, (0.7, 2.2, 1)), disc)
        for bone in (arch, spinous):
            canvas.paint(np.maximum(bone, top), _CORTEX - 300)
            canvas.paint(np.maximum(bone, top) + 2.5, _MARROW)
        canal = tube(straight, [(0, -19, -22), (0, -19, -260)], 8.5)
        canvas.paint(canal, _FLUID + 5)
        canvas.paint(canal + 3.5, _BRAIN + 2)

    def _face(self) -> None:
        canvas = self.canvas.window((0, 48, -24), (75, 50, 75))
        points, fine, texture, skin = (
            canvas.points,
            self.fine[canvas.where],
            self.texture[canvas.where],
            self.skin[canvas.where],
        )
        maxilla = ellipsoid(points, self._near((0, 53, -26), 1.5), (37, 31, 25))
        canvas.paint(maxilla, _CORTEX - 300)
        canvas.paint(maxilla + 3, 140 + 60 * fine)
        for _, x in _SIDES:
            sinus = ellipsoid(points, self._near((x * 25, 56, -23), 1.5), [self._about(r, 0.12) for r in (12, 15, 15)])
            canvas.paint(sinus - 2, _CORTEX - 300)
            canvas.paint(sinus, _AIR)
            canvas.paint(tube(points, [(x * 48, 62, -14), (x * 64, 40, -12), (x * 66, 8, -8)], 3.5), _CORTEX - 100)
            cavity = tube(points, [(x * 5, 86, -24), (x * 5, 60, -20), (x * 5, 26, -22)], 3, (1, 1, 3.2))
            canvas.paint(cavity, _AIR)
        canvas.paint(tube(points, [(0, 88, -30), (0, 30, -34)], 1.2, (1, 1, 3)), _SPONGE)  # the septum's foot
        sphenoid = ellipsoid(points, self._near((0, 33, -8), 1.5), [self._about(r, 0.15) for r in (13, 11, 9)])
        canvas.paint(sphenoid - 3, _CORTEX - 200)
        canvas.paint(sphenoid, _AIR)
        frontal = ellipsoid(points, self._near((0, 73, 20), 1), [self._about(r, 0.25) for r in (15, 3.5, 8)])
        canvas.paint(np.maximum(frontal, skin + 8), _AIR)
        tongue = ellipsoid(points, self._near((0, 46, -56), 2), (25, 32, 17))
        canvas.paint(tongue, _MUSCLE + 12 * texture)
        arch = [(-26, 44, -47), (-22, 64, -47), (0, 77, -47), (22, 64, -47), (26, 44, -47)]
        teeth = tube(points, arch, 3.6, (1, 1, 1.8))
        gaps = np.abs(((np.arctan2(points[0], points[1] - 38) / np.pi * 22) % 1) - 0.5) * 9 - 3.9
        canvas.paint(np.maximum(teeth, gaps), _TOOTH)

    def _airway(self) -> None:
        canvas = self.canvas.window((0, 45, -140), (35, 60, 125))
        points, fine = canvas.points, self.fine[canvas.where]
        width = self._about(1.0, 0.2)
        canvas.paint(tube(points, [(0, 24, -24), (0, 16, -34)], 8 * width, (1.4, 0.9, 1)), _AIR)
        canvas.paint(tube(points, [(0, 16, -34), (0, 12, -62), (0, 18, -84)], 6.5 * width, (1.6, 0.9, 1)), _AIR)
        larynx = tube(points, [(0, 24, -86), (0, 22, -104)], 15, (1, 1.1, 1))
        canvas.paint(larynx, 180 + 40 * fine)
        canvas.paint(larynx + 3, _MUSCLE)
        canvas.paint(tube(points, [(0, 18, -84), (0, 20, -100), (0, 14, -240)], 7.5 * width, (1, 1.2, 1)), _AIR)
        canvas.paint(tube(points, [(0, 80, -43), (0, 50, -39), (0, 26, -44)], 1.6, (6, 1, 1)), _AIR)  # over the tongue
        hyoid = [(-19, 22, -80), (-11, 38, -80), (11, 38, -80), (19, 22, -80)]
        canvas.paint(tube(points, hyoid, 3), _SPONGE + 150)

    def _brain_stem(self) -> None:
        canvas = self.canvas.window((0, -25, -8), (55, 55, 55))
        points, fine = canvas.points, self.fine[canvas.where]
        lean = self.rng.normal(0, 1.5)
        radius = self._about(10.5, 0.06)
        midbrain, pons = (0, 2 + lean, 20), self._near((0, 3 + lean, 2), 0.7)
        foot = self._near((0, -17 + lean, -30), 0.7)
        stem = blend(
            [
                tube(points, [midbrain, pons], radius, (1.25, 0.95, 1)),
                ellipsoid(points, pons, (1.5 * radius, 1.25 * radius, 1.3 * radius)),
                tube(points, [pons, foot], 0.72 * radius),
            ],
            4,
        )
        # It ends where the spinal cord begins, and above at the thalamus.
        stem = np.maximum(stem, np.maximum(foot[2] - points[2], points[2] - midbrain[2] - 7))
        canvas.paint(ellipsoid(points, (0, -43, -4), (46, 26, 22)), 41 + 2 * fine)  # cerebellum
        canvas.paint(stem - 4, _FLUID)
        canvas.paint(stem, self._about(34, 0.06), LABEL["BrainStem"])

    def _orbit(self, side: str, x: int) -> None:
        canvas = self.canvas.window((x * 25, 60, 4), (40, 50, 35))
        points, skin = canvas.points, self.skin[canvas.where]
        globe = self._near((x * 31, 65, 2), 1.2)
        apex = np.array((x * 13, 32, 8))
        cone = blend([ellipsoid(points, globe - _mm(0, 4, 0), (18, 20, 17)), tube(points, [globe, apex], 6)], 6)
        opening = tube(points, [globe, globe + _mm(0, 40, 0)], 15, (1.1, 1, 1))
        canvas.paint(np.maximum(cone - 3, skin + 7), _CORTEX - 200)
        canvas.paint(np.maximum(opening, skin), 25)  # the lids
        canvas.paint(np.maximum(cone, skin + 3), _FAT)
        for dx, dz in ((9, 0), (-9, 0), (0, 9), (0, -9)):  # the straight eye muscles
            canvas.paint(tube(points, [globe + _mm(dx, -4, dz), apex + _mm(0.4 * dx, 3, 0.4 * dz)], 1.8), _MUSCLE)
        radius = self._about(12, 0.04)
        canvas.paint(ellipsoid(points, globe, (radius,) * 3), 60)
        canvas.paint(ellipsoid(points, globe, (radius - 1.5,) * 3), 12)
        canvas.paint(ellipsoid(points, globe + _mm(0, 8.5, 0), (4.5, 2.2, 4.5)), 95)  # lens
        sag = self._near((x * 23, 45, 3), 0.8)
        nerve = tube(points, [globe - _mm(x * 2, radius - 1, 0), sag, apex, (x * 7, 26, 13)], self._about(3.1, 0.06))
        nerve = np.maximum(nerve, -ellipsoid(points, globe, (radius,) * 3))  # it starts at the globe's back
        canvas.paint(nerve - 1.5, -30)  # its sheath, so that it shows in the bony canal too
        canvas.paint(nerve, self._about(38, 0.08), LABEL[f"OpticNerve{side}"])

    def _chiasm(self) -> None:
        canvas = self.canvas.window((0, 20, 15), (25, 20, 20))
        points = canvas.points
        centre = self._near((0, 21, 15), 0.5)
        cistern = ellipsoid(points, centre + _mm(0, 0, 1), (17, 12, 8))
        canvas.paint_around_organs(cistern, _FLUID - 2)
        radius = self._about(3.5, 0.06)
        arms = [tube(points, [(x * 7, 26, 13), centre, centre + _mm(x * 9, -6, 3)], radius) for _, x in _SIDES]
        canvas.paint(blend(arms, 2), self._about(40, 0.06), LABEL["Chiasm"])

    def _glands(self, side: str, x: int) -> None:
        canvas = self.canvas.window((x * 42, 10, -55), (40, 55, 60))
        points, fine = canvas.points, self.fine[canvas.where]
        size = self._about(1, 0.07)
        parotid = self._near((x * 53, -8, -35), 1.8)
        lobes = blend(
            [
                ellipsoid(points, parotid, (13 * size, 17 * size, 26 * size)),
                ellipsoid(points, parotid + _mm(-x * 7, -2, 2), (10 * size, 10 * size, 16 * size)),  # the deep lobe
            ],
            4,
        )
        canvas.paint(lobes - 1.5, _FAT)
        canvas.paint(lobes, self._about(-12, 0.9) + 9 * fine, LABEL[f"Parotid{side}"])
        size = self._about(1, 0.08)
        gland = ellipsoid(points, self._near((x * 30, 32, -78), 1.8), (11 * size, 17 * size, 13 * size))
        canvas.paint(gland - 2.5, _FAT)
        canvas.paint(gland, self._about(72, 0.1) + 4 * fine, LABEL[f"Submandibular{side}"])

    def _mandible(self) -> None:
        canvas = self.canvas.window((0, 48, -52), (70, 62, 60))
        points = canvas.points
        chin = self._near((0, 83, -74), 1.5)
        thick = self._about(6.2, 0.07)
        parts = []
        for _, x in _SIDES:
            angle = self._near((x * 46, 18, -60), 1.2)
            condyle = self._near((x * 50, 4, -13), 1.0)
            body: list[Point] = [chin, (x * 20, 73, -72), (x * 35, 48, -68), angle]
            parts += [
                tube(points, body, thick, (1, 1, 2.1)),
                tube(points, [angle, (x * 49, 12, -28)], 0.85 * thick, (1, 2.6, 1)),
                tube(points, [(x * 49, 10, -30), condyle], thick, (1, 1, 1)),
                tube(points, [(x * 48, 24, -32), (x * 47, 27, -18)], 3.2, (1, 1.6, 1)),  # coronoid process
            ]
        jaw = blend(parts, 2)
        canvas.paint(jaw, _CORTEX + 100, LABEL["Mandible"])
        marrow = jaw + 3.5
        canvas.image += np.clip(np.float32(0.5) - marrow / 3, 0, 1) * (_SPONGE - canvas.image)
        arch = [(-27, 46, -54), (-22, 62, -55), (0, 75, -56), (22, 62, -55), (27, 46, -54)]
        gaps = np.abs(((np.arctan2(points[0], points[1] - 38) / np.pi * 22) % 1) - 0.5) * 9 - 3.9
        teeth = np.maximum(tube(points, arch, 3.4, (1, 1, 1.8)), gaps)
        canvas.paint_around_organs(teeth, _TOOTH)
        if self.rng.random() < 0.35:
            self._filling((float(self.rng.choice((-1, 1))) * 26, 48, -51))

    def _filling(self, place: tuple[float, float, float]) -> None:
        """A metal filling and the streaks that it casts over its slices."""
        x, y, z = (self.points[axis] - place[axis] for axis in range(3))
        distance = np.sqrt(x**2 + y**2)
        angle = np.arctan2(y, x) + self.rng.uniform(0, 2 * math.pi)
        rays = np.sin(9 * angle) * np.sin(4 * angle + 1) + 0.5 * np.sin(17 * angle)
        body = self.canvas.image > -700
        strength = self._about(260, 0.3) * 12 / (12 + distance) * np.exp(-((z / 5) ** 2))
        self.canvas.image += np.where(body, strength * rays, 0).astype(np.float32)
        self.canvas.paint_around_organs(np.sqrt(distance**2 + z**2) - 3, _METAL)
