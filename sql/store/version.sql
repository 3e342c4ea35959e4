-- The version of the tables, and whether the functions are this program's.
SELECT coalesce((SELECT max(version) FROM standpipe.migrations WHERE version > 0), 0),
EXISTS (SELECT FROM standpipe.migrations WHERE version = 0 AND name = $1)
