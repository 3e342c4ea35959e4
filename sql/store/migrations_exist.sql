-- Whether this database has ever been migrated.
SELECT to_regclass('standpipe.migrations') IS NOT NULL
