-- get_budget: One by name.
SELECT name, definition, version, update_time
FROM budget
WHERE name = %(name)s;

-- all_budgets: Every one, in the order of names.
SELECT name, definition, version, update_time
FROM budget
ORDER BY name;

-- put_budget: Create, or replace and count the change.
INSERT INTO budget (name, definition, version, update_time)
VALUES (%(name)s, %(definition)s, 1, now())
ON CONFLICT (name) DO UPDATE
SET definition = excluded.definition,
    version = budget.version + 1,
    update_time = excluded.update_time
RETURNING name, definition, version, update_time;

-- delete_budget: Remove one.
DELETE FROM budget
WHERE name = %(name)s;
