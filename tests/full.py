"""Whether tests are to try everything that they draw or choose from, which takes an hour: with LAMP3D_FULL=1."""

import os

FULL = bool(os.environ.get("LAMP3D_FULL"))
