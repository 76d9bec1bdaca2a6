"""What was skipped, by place."""


def reasons(skipped):
    return {item.where: f"{item.why}: {item.reason}" for item in skipped}
