"""Errors a user can mend. The command line prints them in a line or two and exits with 2."""


class UserError(ValueError):
    """Something the user set or fed is wrong; the message holds both values and the next step."""


class SettingsError(UserError):
    """An unknown setting, a wrong type, or a combination that cannot work."""


class DataError(UserError):
    """A missing, empty, damaged or mismatched input file; the message names the file and the place."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, belongs to other settings, or has an unknown format."""


class TrainingError(UserError):
    """Training would not do, or does not do, what its settings say; the message names the check that failed."""


class ResourceError(UserError):
    """Too little memory or disk; the message holds what is needed and what is there."""


class MissingExtra(UserError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, feature: str, package: str, extra: str):
        super().__init__(f"{feature} needs the package {package}: pip install 'jaxllm[{extra}]'")


def nearest(name: str, names) -> str:
    """`"; did you mean X?"` for the closest of `names`, or their list when they are few and none is close."""
    import difflib

    names = sorted(map(str, names))
    initials = "".join(word[:1] for word in name.split("_")) if "_" in name else ""
    if initials in names:  # learning_rate for lr
        return f"; did you mean {initials}?"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= 24 else ""
