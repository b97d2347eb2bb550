"""What was measured is kept, also where its folder cannot be written."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from evatune.errors import EvaError
from evatune.spectra import Spectra


def saved_elsewhere(spectra: Spectra, error: EvaError) -> EvaError:
    """Save spectra in another place: the system's folder for temporary files, the present one, or the user's own.

    Args:
        spectra: what was measured.
        error: why it could not be saved where it should be.

    Returns:
        The error to raise: it says where the spectra are now, and how to go on from there.
    """
    for place in (Path(tempfile.gettempdir()), Path.cwd(), Path.home()):
        try:
            made = Path(tempfile.mkdtemp(prefix="evatune-", dir=place))
        except OSError:
            continue
        try:
            folder = spectra.save(made / "spectra")
        except (EvaError, OSError):
            shutil.rmtree(made, ignore_errors=True)
            continue
        return EvaError(
            f"{str(error).removesuffix('.')}. What was measured is not lost, it is in {folder}: move it, or go on from "
            f"there with --spectra {folder}."
        )
    return error
