"""How a scene is lit, and how far its wall is: what `render.py` and its kernel in `render_gpu.py` have in common."""

LIGHT = (-0.451, 0.803, -0.391)  # towards the light, length 1
AMBIENT, DIFFUSE, GLOSS = 0.58, 0.46, 0.3
WALL = 6.0  # radius
SOFT = 7.0  # the larger, the sharper the shadow's edge
DARK = 0.5  # share of the light that a full shadow takes
