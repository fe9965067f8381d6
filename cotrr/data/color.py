"""Colour difference as people see it: CIEDE2000.

The functions speak the array API standard, so one definition serves NumPy and JAX arrays alike
and this module imports neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Chroma at which blue turns purple and saturated colours stop looking as different as they measure.
_KNEE = 25.0**7


def delta_e_2000(lab1: Any, lab2: Any) -> Any:
    """CIEDE2000 differences [...] of CIE L*a*b* colours [..., 3] and [..., 3], kL = kC = kH = 1.

    The leading shapes broadcast. L* is in [0, 100], a* and b* are in the same units; a difference
    of about 1 is just visible, one beyond 30 is another colour. The arrays are of one array-API
    library (NumPy >= 2 or JAX, also under `jit` and `vmap`). At zero chroma, where hue has no
    meaning, the hue term vanishes.

    Source: Sharma, Wu & Dalal (2005), "The CIEDE2000 color-difference formula: implementation
    notes, supplementary test data, and mathematical observations", Color Res. Appl. 30(1), 21-30.

    >>> import numpy as np
    >>> round(float(delta_e_2000(np.array([50.0, 2.5, 0.0]), np.array([73.0, 25.0, -18.0]))), 4)
    27.1492
    """
    xp = lab1.__array_namespace__()
    # Explicit, because JAX may be told to refuse implicit broadcasting between ranks.
    lab1, lab2 = xp.broadcast_arrays(lab1 * 1.0, lab2 * 1.0)
    lightness1, lightness2 = lab1[..., 0], lab2[..., 0]
    chroma1, hue1, chroma2, hue2 = _chroma_and_hue(xp, lab1, lab2)
    grey = chroma1 * chroma2 == 0

    turn = hue2 - hue1
    turn = xp.where(turn > 180, turn - 360, xp.where(turn < -180, turn + 360, turn))
    turn = xp.where(grey, 0.0 * turn, turn)
    d_lightness, d_chroma = lightness2 - lightness1, chroma2 - chroma1
    d_hue = 2 * xp.sqrt(chroma1 * chroma2) * xp.sin(_radians(xp, turn / 2))

    lightness, chroma, total = (lightness1 + lightness2) / 2, (chroma1 + chroma2) / 2, hue1 + hue2
    # The mean of two angles lies on the shorter arc between them.
    wrapped = xp.where(total < 360, total + 360, total - 360)
    hue = xp.where(grey, total, xp.where(xp.abs(hue1 - hue2) > 180, wrapped, total) / 2)

    l_term = d_lightness / _lightness_weight(xp, lightness)
    c_term = d_chroma / (1 + 0.045 * chroma)
    h_term = d_hue / (1 + 0.015 * chroma * _hue_weight(xp, hue))
    square = l_term**2 + c_term**2 + h_term**2 + _rotation(xp, chroma, hue) * c_term * h_term
    # Rounding may push the square of a vanishing difference below zero.
    return xp.sqrt(xp.where(square > 0, square, 0.0 * square))


def _chroma_and_hue(xp: Any, lab1: Any, lab2: Any) -> tuple[Any, Any, Any, Any]:
    """Chroma [...] and hue [...] in degrees of both, with a* stretched near the neutral axis."""
    (a1, b1), (a2, b2) = (lab1[..., 1], lab1[..., 2]), (lab2[..., 1], lab2[..., 2])
    mean = (xp.hypot(a1, b1) + xp.hypot(a2, b2)) / 2
    stretch = 1 + 0.5 * (1 - xp.sqrt(mean**7 / (mean**7 + _KNEE)))
    a1, a2 = a1 * stretch, a2 * stretch
    degree = 180 / xp.pi
    hue1, hue2 = (xp.atan2(b1, a1) * degree) % 360, (xp.atan2(b2, a2) * degree) % 360
    return xp.hypot(a1, b1), hue1, xp.hypot(a2, b2), hue2


def _lightness_weight(xp: Any, lightness: Any) -> Any:
    """S_L: lightness differences count less far from middle grey."""
    square = (lightness - 50) ** 2
    return 1 + 0.015 * square / xp.sqrt(20 + square)


def _hue_weight(xp: Any, hue: Any) -> Any:
    """T: how the eye's hue resolution varies round the colour circle; `hue` in degrees."""
    return (
        1
        - 0.17 * xp.cos(_radians(xp, hue - 30))
        + 0.24 * xp.cos(_radians(xp, 2 * hue))
        + 0.32 * xp.cos(_radians(xp, 3 * hue + 6))
        - 0.20 * xp.cos(_radians(xp, 4 * hue - 63))
    )


def _rotation(xp: Any, chroma: Any, hue: Any) -> Any:
    """R_T: in the blues (hue near 275 degrees) chroma and hue differences are seen together."""
    angle = 60 * xp.exp(-(((hue - 275) / 25) ** 2))
    return -2 * xp.sqrt(chroma**7 / (chroma**7 + _KNEE)) * xp.sin(_radians(xp, angle))


def _radians(xp: Any, degrees: Any) -> Any:
    return degrees * (xp.pi / 180)


# CIE XYZ of D65 to linear sRGB, and where its curve begins (IEC 61966-2-1).
_SRGB = ((3.2406, -1.5372, -0.4986), (-0.9689, 1.8758, 0.0415), (0.0557, -0.2040, 1.0570))
_D65 = (0.95047, 1.0, 1.08883)


def hex_of_lab(lab: Sequence[float]) -> str:
    """`#rrggbb` in sRGB of a CIE L*a*b* colour (D65); what sRGB cannot show is cut off.

    >>> hex_of_lab((100, 0, 0)), hex_of_lab((53.24, 80.09, 67.2))
    ('#ffffff', '#ff0000')
    """
    y = (lab[0] + 16) / 116
    cube = lambda t: t**3 if t > 6 / 29 else 3 * (6 / 29) ** 2 * (t - 4 / 29)
    xyz = [white * cube(t) for white, t in zip(_D65, (y + lab[1] / 500, y, y - lab[2] / 200), strict=True)]
    linear = [min(max(sum(m * v for m, v in zip(row, xyz, strict=True)), 0.0), 1.0) for row in _SRGB]
    curve = lambda u: 12.92 * u if u <= 0.0031308 else 1.055 * u ** (1 / 2.4) - 0.055
    return "#" + "".join(f"{round(255 * curve(u)):02x}" for u in linear)
