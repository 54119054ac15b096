"""A YAML file of settings in, plain nested values out: whoever wrote it, reading it runs and fills nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

MAX_BYTES = 1 << 20  # of a file: presets and recipes have a few thousand


def read_settings(path: Path, what: str, overrides: Sequence[str] = ()) -> Any:
    """The values of a YAML file, with `a.b=value` overrides applied.

    what: "preset", for messages. ValueError, naming the file: it is not there, is too large, is no YAML, has a
    key twice, a tag that names a Python object, or aliases that unfold to more than it is.
    """
    if not path.is_file():
        raise ValueError(f"{what} {path} does not exist")
    if (nbytes := path.stat().st_size) > MAX_BYTES:
        raise ValueError(
            f"{what} {path} has {nbytes:,} bytes, over {MAX_BYTES:,}: it is no file of settings"
        )
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged, resolve=False)
    except RecursionError:
        raise ValueError(f"{what} {path} is nested too deeply to be settings") from None
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise ValueError(f"{what} {path} cannot be read: {error}") from None
    except Exception as error:  # PyYAML's own errors share no importable base with OmegaConf's
        if type(error).__module__.partition(".")[0] != "yaml":
            raise
        raise ValueError(f"{what} {path} is not valid YAML: {error}") from None
