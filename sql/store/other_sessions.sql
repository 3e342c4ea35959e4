-- Who else works in this database under our name.
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'standpipe' AND pid <> pg_backend_pid()
