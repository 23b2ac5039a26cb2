"""TensorBoard's files, in the working directory of a run."""

from collections.abc import Mapping
import io
import json
from pathlib import Path
import socket
import struct
import time

from absl import logging
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.proto.tensor_pb2 import TensorProto
from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboardX.record_writer import masked_crc32c

from declip_jax.reporting.appender import Appender
from declip_jax.reporting.trackers.base import TrackedRun, Tracker

TENSORBOARD = "tensorboard"  # folder of event files in a working directory


class TensorBoard(Tracker):
  """A new event file in a folder.

  Args:
    folder: folder on a file system that can append; it is made if it does not exist.
  """

  def __init__(self, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    self._file = Appender(folder / f"events.out.tfevents.{time.time_ns() // 10**6}.{socket.gethostname()}")
    self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._add_values(step, *(Summary.Value(tag=name, simple_value=value) for name, value in values.items()))

  def picture(self, step: int, name: str, path: Path) -> None:
    try:
      content = path.read_bytes()
      width, height = Image.open(io.BytesIO(content)).size
    except OSError as error:
      logging.warning("%s is not in TensorBoard: %s", path, error)
      return
    # Colour space 3 is RGB; a viewer decodes the file itself.
    encoded = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
    self._add_values(step, Summary.Value(tag=name, image=encoded))

  def text(self, step: int, name: str, text: str) -> None:
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
    self._add_values(step, Summary.Value(tag=f"{name}/text_summary", metadata=metadata, tensor=tensor))

  def roll_back(self, step: int) -> None:
    """Hides the earlier events of the folder after a step."""
    start = SessionLog(status=SessionLog.START)
    self._add(Event(wall_time=time.time(), step=step + 1, session_log=start))

  def close(self, finished: bool = True) -> None:
    """Closes the file; a second call does nothing."""
    del finished
    self._file.close()

  def _add_values(self, step: int, *values: Summary.Value) -> None:
    self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

  def _add(self, event: Event) -> None:
    self._file.append(_record(event))


def open_tensorboard(run: TrackedRun) -> TensorBoard:
  """Opens the event file of a run from its first step on, and writes its config."""
  tracker = TensorBoard(run.workdir / TENSORBOARD)
  tracker.roll_back(run.start)
  lines = json.dumps(run.config, indent=2, sort_keys=True).splitlines()
  tracker.text(run.start, "config", "\n".join(f"    {line}" for line in lines))  # code, in Markdown
  return tracker


def _record(event: Event) -> bytes:
  """Encodes an event as in TensorBoard's files: length and content, each followed by its checksum."""
  data = event.SerializeToString()
  length = struct.pack("<Q", len(data))
  return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
