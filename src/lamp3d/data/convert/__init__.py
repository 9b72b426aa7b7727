"""Public datasets in the layouts that they are published in, written as Decathlon folders."""

from lamp3d.data.convert.decathlon import Source
from lamp3d.data.convert.decathlon import write as write_decathlon
from lamp3d.data.convert.han import AnatomyNetSource
from lamp3d.data.convert.openkbp import OpenKbpSource

__all__ = ["AnatomyNetSource", "OpenKbpSource", "Source", "write_decathlon"]
