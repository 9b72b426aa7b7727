"""What lamp3d raises when the input, not the code, is at fault.

Every message says what was wrong, gives the value, and says what to do about it. The command line prints the
message alone and exits with status 2; anything else that is raised is a bug and keeps its traceback.
"""

RESUMED = "with --resume (a study: by starting it again)"
"""How a run that was stopped goes on, in messages that `lamp3d train` and `lamp3d study run` both give."""


class LampError(Exception):
    """Base of all errors that a user can put right."""


class ConfigError(LampError):
    """A configuration, an argument or a network that cannot be used as it is."""


class ScanError(LampError):
    """A scan or label file that cannot be read, or whose content makes no sense."""


class DatasetError(LampError):
    """A dataset folder or its ``dataset.json`` that contradicts itself."""


class PlanError(LampError):
    """A plan that cannot be made, does not fit, or does not match the network or the devices."""


class WorkerError(LampError):
    """A worker process that failed; the message carries its rank and its own traceback."""


class WorkerKilledError(WorkerError):
    """A worker process that was killed by SIGKILL, as systems do whose memory has run out."""


class DiskFullError(LampError):
    """A disk without room for what is to be written."""


class DeviceMemoryError(LampError):
    """A device that ran out of memory, whatever its plan said."""


class TrainingError(LampError):
    """A training run that cannot go on, with a diagnosis."""
