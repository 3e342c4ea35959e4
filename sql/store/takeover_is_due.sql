-- Whether the application's tables were there before us, and we have not begun to work on them.
SELECT EXISTS (SELECT FROM standpipe.tables_before WHERE name IN ('posts', 'likes'))
AND NOT EXISTS (SELECT FROM standpipe.migrations WHERE version = -1)
