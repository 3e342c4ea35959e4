-- Where tables without a schema go.
SELECT coalesce(current_schema(), 'public')::text
