"""Which metrics of MUSE a set of splits allows."""

from collections.abc import Mapping

from datasets import Dataset

GROUPS = ("forget", "retain", "hold")
PRIVLEAK = ("privleak_forget", "privleak_holdout")


def metric_keys(data: Mapping[str, Dataset], icl: bool) -> list[str]:
    """The keys whose splits `data` has. Raises if a split exists but cannot be used."""
    keys = []
    for group in GROUPS:
        if f"verbmem_{group}" in data:
            _check_split(data, f"verbmem_{group}", ("prompt", "gt"))
            keys.append(f"{group}_verbmem")
        if f"knowmem_{group}_qa" in data:
            _check_split(data, f"knowmem_{group}_qa", ("question", "answer"))
            if icl:
                _check_split(data, f"knowmem_{group}_qa_icl", ("question", "answer"))
            keys.append(f"{group}_knowmem")
    if any(name in data for name in PRIVLEAK):
        for name in PRIVLEAK:
            _check_split(data, name, ("text",))
        keys.append("privleak_auc")
    if not keys:
        raise ValueError(
            f"`data` has none of MUSE's splits, it has {sorted(data)}. Accepted are `verbmem_{{group}}`, "
            f"`knowmem_{{group}}_qa` (with `knowmem_{{group}}_qa_icl`), group one of {GROUPS}, and {PRIVLEAK}."
        )
    return keys


def _check_split(data: Mapping[str, Dataset], name: str, columns: tuple[str, ...]) -> None:
    if name not in data:
        hint = " or pass `icl=False` to ask without examples" if name.endswith("_icl") else ""
        raise ValueError(f"`data` lacks the split `{name}`, it has {sorted(data)}. Add it{hint}.")
    missing = [column for column in columns if column not in data[name].column_names]
    if missing:
        raise ValueError(f"Split `{name}` lacks the columns {missing}, it has {data[name].column_names}.")
    if len(data[name]) == 0:
        raise ValueError(f"Split `{name}` is empty: its metric would be undefined. Fill it or leave it out.")
