"""The YAML form of budgets, for the allocator's file and for `leasehold budget apply`."""

from leasehold.core.budget import codec, model
from leasehold.runtime import strict_yaml

TEXT_BYTES_MAX = strict_yaml.TEXT_BYTES_MAX


def parse(text: str) -> tuple[model.BudgetSpec, ...]:
    """The budgets of a file's text.

    Raises `InvalidArgument` that names the field, or the line where it is no YAML or a key is given twice.
    """
    return codec.decode_budget_file(strict_yaml.load(text, field="budgets"))
